"""Searches: what is drawn, what counts, what ends early, and what a second start finds. Jobs here are made up, but for
the last test's."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vitexp import sweep
from vitexp.config import sweep_settings
from vitexp.errors import UserError
from vitexp.sweeps.ledger import Ledger, State, read_ledger
from vitexp.sweeps.search import DATABASE, Search, dimensions, distributions, job_of, with_space

optuna = pytest.importorskip("optuna")

Curve = Callable[[dict[str, str]], list[float]]  # the accuracy after each epoch of a job with these settings
LR = "optim.lr=tag(log,interval(1e-4,1e-1))"


class MadeUp:
    """A job that learns an epoch whenever it is asked how it is."""

    minutes = 0.1

    def __init__(self, folder: Path, curve: list[float], *, dies: str) -> None:
        self.folder, self.curve, self.dies, self.epoch = folder, curve, dies, 0
        self.asked: tuple[State, str] | None = None
        folder.mkdir(exist_ok=True)

    def poll(self) -> tuple[State, str] | None:
        if self.asked is not None:
            return self.asked
        if self.dies:
            return "failed", self.dies
        row = {"step": self.epoch + 1, "epoch": self.epoch + 1.0, "val/top1": self.curve[self.epoch]}
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.epoch += 1
        if self.epoch < len(self.curve):
            return None
        (self.folder / "summary.json").write_text(json.dumps({"val/top1": self.curve[-1]}))
        return "finished", ""

    def stop(self, state: State, reason: str) -> None:
        self.asked = self.asked or (state, reason)


class Here:
    """A launcher of made-up jobs."""

    survives = False

    def __init__(self, ledger: Ledger, curve: Curve, fails: Callable[[dict[str, str]], bool]) -> None:
        self.ledger, self.curve, self.fails = ledger, curve, fails
        self.started: list[dict[str, str]] = []

    def start(self, arguments: list[str], *, slot: int, console: Path, heard, limits) -> MadeUp:
        values = dict(text.split("=", 1) for text in arguments)
        self.started.append(values)
        folder = Path(values["output_dir"].strip("'"))
        return MadeUp(folder, self.curve(values), dies="made to fail" if self.fails(values) else "")


class AskedAfter:
    """A person who stops the sweep when so many jobs have begun."""

    def __init__(self, launcher: Here, begun: int | None) -> None:
        self.launcher, self.begun = launcher, begun

    @property
    def signum(self) -> int | None:
        return signal.SIGTERM if self.begun is not None and len(self.launcher.started) >= self.begun else None


@pytest.fixture
def searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs a search over made-up jobs: (source, ledger, what was started)."""
    monkeypatch.setattr(sweep, "POLL_S", 0.0)
    monkeypatch.setattr(sweep, "LOOK_S", 0.0)

    def run(curve: Curve, *overrides: str, fails=lambda values: False, at_once: int = 1, stop_at=None, **settings):
        ledger = read_ledger(tmp_path) or Ledger(tmp_path, [], [])
        search = Search(**{"trials": 20, **settings})
        source, jobs, _ = sweep.open_source(search, list(overrides), None, ledger)
        launcher = Here(ledger, curve, fails)
        monkeypatch.setattr(sweep, "build", lambda node, jobs: launcher)
        settings = sweep_settings([f"sweep.jobs={at_once}"])
        sweep.run_jobs(source, jobs, ledger, settings, stop=AskedAfter(launcher, stop_at), config_dir=None)
        return source, ledger, launcher.started

    return run


def peak(values: dict[str, str]) -> list[float]:
    """Best at a rate of 3e-3, by far."""
    return [1 - abs(math.log10(float(values["optim.lr"]) / 3e-3)) / 2]


# ---- what is searched ------------------------------------------------------------------------------------------------


def test_hydras_grammar_says_what_is_searched() -> None:
    given = [
        "model=vit_tiny", "optim=adam,sgd", LR, "model.drop_path=interval(0,0.3)", "model.depth=range(1,6)",
        "train.batch_size=tag(log,int,interval(8,64))", "train.clip_norm=range(0.5,2,0.5)", "optim.momentum=0.1,0.2",
    ]  # fmt: skip
    kinds = optuna.distributions
    assert distributions(dimensions(given, None)) == {
        "optim": kinds.CategoricalDistribution(["adam", "sgd"]),
        "optim.lr": kinds.FloatDistribution(1e-4, 1e-1, log=True),
        "model.drop_path": kinds.FloatDistribution(0, 0.3),
        "model.depth": kinds.IntDistribution(1, 5),  # as Hydra's range ends
        "train.batch_size": kinds.IntDistribution(8, 64, log=True),
        "train.clip_norm": kinds.FloatDistribution(0.5, 1.5, step=0.5),
        "optim.momentum": kinds.CategoricalDistribution(["0.1", "0.2"]),
    }
    parts = dimensions(given[:4], None)
    job = job_of(parts, {"optim": "sgd", "optim.lr": 0.00123456789, "model.drop_path": 0.1})
    assert job.overrides == ("model=vit_tiny", "optim=sgd", "optim.lr=0.00123457", "model.drop_path=0.1")
    assert job.swept == {"optim": "sgd", "optim.lr": "0.00123457", "model.drop_path": "0.1"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["optim=adam"], "nothing to search"),
        (["seed=0,1", "optim=adam,sgd"], "a search would take the luckiest"),
        (["optim.lr=tag(log,interval(0,1))"], "above 0 for log"),
        (["optim.lr=interval(1,1)"], "from a lower to a higher"),
        (["optim.lr=tag(lgo,interval(1,2))"], "'lgo' is none of log, int"),
    ],
)
def test_what_cannot_be_searched_is_said(given: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        dimensions(given, None)


def test_spaces_compose_at_their_ends_and_what_is_typed_wins(repository: Path) -> None:
    spaces = sorted(path.stem for path in (repository / "conf/sweep/space").glob("*.yaml"))
    assert {"lr_wd", "augmentation", "mask_decoder", "layer_decay_drop_path"} <= set(spaces)
    for name in spaces:
        space = sweep_settings(["sweep=optuna", f"sweep/space={name}"])["space"]
        assert sweep.check_jobs(with_space(["data=fake"], space), None, search=True).data["name"] == "fake"
    space = {"optim.lr": "interval(0,1)", "optim.weight_decay": "interval(0,1)"}
    assert with_space(["optim.lr=1,2"], space) == ["optim.weight_decay=interval(0,1)", "optim.lr=1,2"]
    for wrong, said in (
        ("sweep/space=lrwd", "Did you mean 'lr_wd'"),
        ("sweep.search.trails=3", "Did you mean 'search.trials'"),
    ):
        with pytest.raises(UserError, match=said):
            sweep_settings(["sweep=optuna", wrong])
    with pytest.raises(UserError, match="drop_path"):  # at one of its ends
        sweep.check_jobs(["model.drop_path=interval(0,1.5)"], None, search=True)


# ---- what counts -----------------------------------------------------------------------------------------------------


def test_what_was_good_is_tried_near(searched) -> None:
    source, ledger, started = searched(peak, LR, trials=40)
    assert (source.is_complete, len(started), len(ledger.jobs)) == (True, 40, 40)
    off = [abs(math.log10(float(values["optim.lr"]) / 3e-3)) for values in started]
    evenly = [abs(step / 100 - math.log10(30)) for step in range(301)]  # of the three decades
    assert sum(off[10:]) / 30 < 0.8 * sum(evenly) / 301, "as far off as random draws"
    assert source._study.best_trial.value == max(peak(values)[0] for values in started) > 0.97


def test_failed_and_nan_jobs_are_replaced_and_never_the_best(searched) -> None:
    def curve(values: dict[str, str]) -> list[float]:
        return [float("nan")] if values["optim"] == "sgd" else peak(values)

    source, ledger, started = searched(
        curve, "optim=adam,sgd,lion", LR, trials=12, sampler="random", failures=50, fails=lambda v: v["optim"] == "lion"
    )
    ended = {trial.params["optim"]: trial.state.name for trial in source._study.trials}
    assert ended == {"adam": "COMPLETE", "sgd": "FAIL", "lion": "FAIL"}
    assert sum(values["optim"] == "adam" for values in started) == 12
    assert source._study.best_trial.params["optim"] == "adam"
    best = sweep.best_of([job for job in source.known], ledger)
    assert best is not None
    assert best[0].swept["optim"] == "adam"


def test_a_space_that_always_fails_ends(searched, capsys) -> None:
    source, _, started = searched(peak, LR, failures=3, fails=lambda values: True)
    assert len(started) == 3
    assert not source.is_complete
    assert "gives up: 3 jobs in a row failed" in capsys.readouterr().err


@pytest.mark.parametrize("pruner", ["median", "halving"])
def test_bad_ones_end_early_and_cost_less(searched, pruner: str) -> None:
    def curve(values: dict[str, str]) -> list[float]:
        return [peak(values)[0] * (1 - 0.5 / (epoch + 1)) for epoch in range(9)]

    source, ledger, _ = searched(curve, LR, trials=30, sampler="random", pruner=pruner)
    states = [entry.state for entry in ledger.jobs.values()]
    assert set(states) == {"finished", "pruned"}
    rows = {name: len((ledger.folder / name / "metrics.jsonl").read_text().splitlines()) for name in ledger.jobs}
    assert all((rows[name] == 9) == (entry.state == "finished") for name, entry in ledger.jobs.items())
    assert sum(rows.values()) < 0.7 * 30 * 9
    assert all("others were better by then" in e.reason for e in ledger.jobs.values() if e.state == "pruned")
    worst_kept = min(t.value for t in source._study.trials if t.state.name == "COMPLETE")
    pruned = [t for t in source._study.trials if t.state.name == "PRUNED"]
    assert len(pruned) == states.count("pruned")
    assert sum(curve({"optim.lr": str(t.params["optim.lr"])})[-1] < worst_kept for t in pruned) > len(pruned) / 2


def test_a_running_job_drawn_again_waits_for_an_end(searched) -> None:
    long = [0.5] * 40
    source, _, started = searched(lambda values: long, "optim=adam,sgd", trials=6, sampler="random", at_once=3)
    assert len(started) == 2
    assert len(source._study.trials) < 12, "asked for another draw at every look"


@pytest.mark.parametrize("other", [["optim=adam,sgd,lion"], ["optim=adam,sgd", "train.epochs=7"]])
def test_a_folder_holds_one_search(searched, other: list[str]) -> None:
    searched(lambda values: [0.5], "optim=adam,sgd", trials=2)
    with pytest.raises(UserError, match="is of another search"):
        searched(lambda values: [0.5], *other, trials=2)


def test_the_same_settings_drawn_again_are_not_run_again(searched) -> None:
    source, ledger, started = searched(lambda values: [0.5], "optim=adam,sgd", trials=8, sampler="random")
    assert (source.counted, len(started), len(ledger.jobs)) == (8, 2, 2)


# ---- again -----------------------------------------------------------------------------------------------------------


def test_a_second_start_goes_on_with_other_draws(searched) -> None:
    _, first, _ = searched(peak, LR, trials=5)
    before = dict(first.jobs)
    source, ledger, started = searched(peak, LR, trials=9)
    assert (source.counted, len(started)) == (9, 4)
    assert list(ledger.jobs)[:5] == list(before), "drew again what it had"
    assert not [values for values in started if Path(values["output_dir"].strip("'")).name in before]
    assert searched(peak, LR, trials=9)[2] == []


def test_a_stopped_trial_is_the_same_one_afterwards(searched) -> None:
    def long(values: dict[str, str]) -> list[float]:
        return [*peak(values) * 20]

    _, ledger, started = searched(long, LR, trials=4, stop_at=1)
    (stopped,) = [name for name, entry in ledger.jobs.items() if entry.state == "stopped"]
    source, ledger, again = searched(long, LR, trials=4, pruner="none")
    assert again[0]["output_dir"] == started[-1]["output_dir"]
    assert ledger.jobs[stopped].state == "finished"
    assert len(source._study.trials) == 4


@pytest.mark.parametrize("state", ["finished", "pruned", "killed", "running", "missing"])
def test_a_launcher_killed_at_any_moment_leaves_a_study_that_agrees(searched, tmp_path: Path, state: str) -> None:
    """Between Optuna's draw and its being told, with the ledger before or behind it."""
    search = Search(trials=3)
    study = search.study(tmp_path, maximize=True)
    parts = dimensions([LR], None)
    trial = study.ask(distributions(parts))
    job = job_of(parts, trial.params)
    ledger = Ledger(tmp_path, [], [])
    if state != "missing":
        sweep.enter(job, ledger).state = state  # type: ignore[assignment]
        (tmp_path / job.name).mkdir()
        (tmp_path / job.name / "metrics.jsonl").write_text('{"step": 1, "epoch": 1.0, "val/top1": 0.4}\n')
    if state == "finished":
        (tmp_path / job.name / "summary.json").write_text('{"val/top1": 0.4}')
    ledger.write()
    source, ledger, started = searched(peak, LR, trials=3)
    first = source._study.trials[0]
    wanted = {
        "finished": "COMPLETE",
        "pruned": "PRUNED",
        "killed": "FAIL",
        "running": "COMPLETE",
        "missing": "COMPLETE",
    }
    assert first.state.name == wanted[state]
    names = [Path(values["output_dir"].strip("'")).name for values in started]
    assert names.count(job.name) == (state in ("running", "missing"))
    assert source.counted == 3
    if state == "pruned":
        assert first.value == 0.4


@pytest.mark.slow
def test_a_search_killed_with_its_jobs_goes_on_with_the_same_command(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    command = [
        sys.executable, "-m", "vitexp", "--multirun", "sweep=optuna", "sweep.search.trials=3", "data=fake",
        "data.num_train=64", "data.num_val=16", "model=vit_debug", "tracking=none", "train.workers=0",
        "train.epochs=30", "schedule=constant", "train.save_every=5", LR,
        f"output_dir={folder}",
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    while not list(folder.glob("*/metrics.jsonl")):
        assert process.poll() is None
        signal.sigtimedwait([], 0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    first = {path.parent.name for path in folder.glob("*/metrics.jsonl")}
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    ledger = read_ledger(folder)
    assert ledger is not None
    assert (folder / DATABASE).exists()
    assert len(ledger.jobs) == 3
    assert first <= set(ledger.jobs)
    assert {entry.state for entry in ledger.jobs.values()} <= {"finished", "pruned"}
    for name in first:
        steps = [json.loads(line)["step"] for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        assert steps == sorted(steps), "went back without cutting its journal"
        assert steps[-1] == 30 or ledger.jobs[name].state == "pruned"
    assert (folder / "report.html").exists()


@pytest.mark.slow
def test_hydras_own_launcher_runs_a_search_and_goes_on_with_it(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"

    def started(trials: int) -> str:
        command = [
            sys.executable, "-m", "vitexp", "--multirun", "hydra/sweeper=vitexp_optuna", "hydra/launcher=basic",
            f"hydra.sweeper.n_trials={trials}", "data=fake", "data.num_train=64", "data.num_val=16", "model=vit_debug",
            "tracking=none", "train.workers=0", "train.epochs=1", LR, f"output_dir={folder}",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    assert "best: " in started(1)
    started(3)
    assert len(list(folder.glob("lr-*/summary.json"))) == 3
    study = optuna.load_study(study_name="sweep", storage=f"sqlite:///{folder / DATABASE}")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 3
