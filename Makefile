# The two commands of a fresh clone are `make demo` and `make test`. Needs Python 3.11 or newer with pip, and make.
#   PYTHON=...  the interpreter to build .venv from        VENV=...  another place for it
PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3)
VENV ?= .venv
python := $(VENV)/bin/python

# One stamp per set of extras: a warm call compares two dates and installs nothing.
package := $(VENV)/.installed-package
tests := $(VENV)/.installed-test
tools := $(VENV)/.installed-dev

.PHONY: help demo test test-all check fmt bench clean

help:
	@echo 'make demo      trains a small Vision Transformer on the pictures that come with it (first time: installs .venv)'
	@echo 'make test      the quick tests'
	@echo 'make test-all  every test; the slow ones start whole runs, kill them and start them again'
	@echo 'make check     format, lint, types and import layers, changing nothing'
	@echo 'make fmt       formats the code and mends what the linter can'
	@echo 'make bench     the speed comparisons of benchmarks/'
	@echo 'make clean     removes .venv and caches; runs in outputs/ stay'

demo: $(package)
	$(python) -m vitexp

test: $(tests)
	$(python) -m pytest -q -m 'not slow' -n 2 # two at a time: every test keeps to one thread

test-all: $(tests)
	$(python) -m pytest -q -n 2

# All four say what they find before the target fails.
check: $(tools)
	@failed=; \
	$(python) -m ruff format --check . || failed="$$failed format"; \
	$(python) -m ruff check . || failed="$$failed lint"; \
	$(python) -m pyrefly check --python-interpreter-path $(python) --output-format min-text || failed="$$failed types"; \
	$(VENV)/bin/lint-imports --no-logo || failed="$$failed layers"; \
	if [ -n "$$failed" ]; then echo "make check found faults in:$$failed"; exit 1; fi

fmt: $(tools)
	$(python) -m ruff check --fix .
	$(python) -m ruff format .

bench: $(package)
	@for script in benchmarks/*.py; do echo "== $$script"; $(python) "$$script" || exit 1; done

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(package): pyproject.toml
	@tools/install.sh '$(PYTHON)' '$(VENV)' . 'torch and the rest' 'a few minutes'
	@touch $@

$(tests): $(package)
	@tools/install.sh '$(PYTHON)' '$(VENV)' '.[test]' 'what the tests need' 'seconds'
	@touch $@

$(tools): $(tests)
	@tools/install.sh '$(PYTHON)' '$(VENV)' '.[dev]' 'linter, type checker and the like' 'seconds'
	@touch $@
