from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    built = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's files alone, in a folder for PYTHONPATH; what it depends on is where the tests run."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(folder)]
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True)
    return folder


def vitexp(installed: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(installed)}
    command = [sys.executable, "-m", "vitexp", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def relative_files(root: Path, pattern: str) -> set[str]:
    found = {path.relative_to(root).as_posix() for path in root.rglob(pattern)}
    assert found, f"no {pattern} in {root}"
    return found


def test_the_wheel_holds_every_module_and_every_config_file(wheel: Path, repository: Path):
    held = set(zipfile.ZipFile(wheel).namelist())
    modules = {f"vitexp/{name}" for name in relative_files(repository / "vitexp", "*.py")}
    configs = {f"vitexp/conf/{name}" for name in relative_files(repository / "conf", "*.yaml")}
    assert modules | configs <= held
    # Named one by one, because an ignore pattern that is not anchored drops just these without a word.
    assert {"vitexp/data/__init__.py", "vitexp/data/sources/__init__.py", "vitexp/conf/config.yaml"} <= held
    assert "vitexp/py.typed" in held


def test_the_wheel_holds_nothing_but_the_package_and_its_papers(wheel: Path):
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"vitexp", "hydra_plugins"}
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if "/test" in name or name.endswith(".pyc")]
    assert any(name.endswith("/licenses/LICENSE") for name in zipfile.ZipFile(wheel).namelist())


def test_every_package_the_code_imports_is_a_declared_dependency(repository: Path):
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[<>=!~\[; ]", line)[0].lower() for line in project["dependencies"]}
    distributions = packages_distributions()
    missing = {}
    for path in (repository / "vitexp").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for top in {module.split(".")[0] for module in modules} - set(sys.stdlib_module_names) - {"vitexp"}:
                if not declared & {name.lower() for name in distributions.get(top, [top])}:
                    missing[top] = path.name
    assert not missing


def test_help_of_an_installed_wheel_lists_the_shipped_options_in_an_empty_folder(installed: Path, workdir: Path):
    where = subprocess.run(
        [sys.executable, "-c", "import vitexp.config_paths as p; print(p.conf_dir())"],
        cwd=workdir,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(where.stdout.strip()) == installed / "vitexp" / "conf"
    told = vitexp(installed, workdir, "--help")
    assert told.returncode == 0, told.stderr
    assert "vit_micro" in told.stdout
    assert list(workdir.iterdir()) == []


def test_a_persons_own_group_option_is_found_beside_the_shipped_ones(installed: Path, workdir: Path):
    (workdir / "mine" / "optim").mkdir(parents=True)
    own = "defaults: [adamw, _self_]\nname: gentle\nweight_decay: 0.0125\n"
    (workdir / "mine" / "optim" / "gentle.yaml").write_text(own)
    options = vitexp(installed, workdir, "--help", "--config-dir", "mine")
    assert "gentle" in options.stdout
    composed = vitexp(installed, workdir, "--config-dir", "mine", "--cfg", "job", "optim=gentle")
    assert composed.returncode == 0, composed.stderr
    assert "weight_decay: 0.0125" in composed.stdout
    assert "betas:" in composed.stdout  # of the shipped adamw, which it extends
    unknown = vitexp(installed, workdir, "plan", "optim=gentle")
    assert unknown.returncode != 0
    assert "gentle" in unknown.stderr
