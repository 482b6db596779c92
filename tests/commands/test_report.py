"""Reports made again: a sweep's as it was, a pipeline's as it was, and one of an MLflow experiment as of a sweep."""

from __future__ import annotations

import itertools
import json
import shutil
import statistics
from pathlib import Path

import pytest

from vitexp import pipeline, plots
from vitexp.commands.report import main
from vitexp.errors import UserError
from vitexp.sweeps.experiment import differing
from vitexp.sweeps.ledger import Entry, Ledger
from vitexp.sweeps.report import write_report


@pytest.fixture(autouse=True)
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What would be drawn, by file, in place of the pictures."""
    kept: dict[str, object] = {}

    def draw(shown: object, path: Path, **how: object) -> Path:
        kept[path.name] = shown
        path.write_bytes(b"a picture")
        return path

    for name in ("by_epoch", "effects", "parallel_coordinates"):
        monkeypatch.setattr(plots, name, draw)
    return kept


def accuracy(optim: str, lr: str, seed: int) -> float:
    return {"adam": 0.6, "sgd": 0.5}[optim] + {"1e-4": 0.0, "1e-3": 0.2}[lr] + 0.01 * seed**2


# ---- a sweep ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """Three jobs, judged by the smallest loss."""
    made = Ledger(tmp_path / "sweep-1", [], ["optim.lr"], metric="val/loss", maximize=False)
    for rate, loss in (("1e-4", 0.5), ("1e-3", 0.4), ("1e-2", 0.9)):
        made.jobs[rate] = Entry([f"optim.lr={rate}"], "finished", attempts=1, minutes=1.0)
        folder = made.folder / rate
        folder.mkdir(parents=True)
        rows = [{"step": n, "epoch": n, "val/loss": loss * n} for n in (1, 2)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "summary.json").write_text(json.dumps({"val/loss": loss, "val/top1": loss / 2}))
    made.write()
    return made


def test_a_sweeps_report_is_made_again_as_the_sweep_made_it(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(ledger, metric=ledger.metric, maximize=ledger.maximize)
    before = {path.name: path.read_bytes() for path in ledger.folder.glob("report.*")}
    assert len(before) == 3
    for name in before:
        (ledger.folder / name).unlink()
    monkeypatch.chdir(ledger.folder)
    assert main(["."], None) == 0
    assert {path.name: path.read_bytes() for path in ledger.folder.glob("report.*")} == before
    assert json.loads(before["report.json"])["best"] == "1e-3"


def test_a_sweep_is_judged_anew_by_what_is_asked_for(ledger: Ledger) -> None:
    main([str(ledger.folder), "metric=val/top1", "maximize=true"], None)
    tree = json.loads((ledger.folder / "report.json").read_text())
    assert (tree["metric"], tree["best"]) == ("val/top1", "1e-2")


# ---- a pipeline ------------------------------------------------------------------------------------------------------


def test_a_pipelines_report_is_made_again_also_with_a_finished_run_from_elsewhere(tmp_path: Path, monkeypatch) -> None:
    def pretend(request: str, *, processes: int) -> int:
        import yaml

        resolved = yaml.safe_load(request)["resolved"]
        finish(Path(resolved["output_dir"]), resolved)
        return 0

    def finish(folder: Path, resolved: dict) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(json.dumps(resolved))
        (folder / "model.json").write_text('{"weights": {"sha256": "0123456789abcdef"}}')
        rows = [
            {"step": n, "epoch": n, "train/loss": 1 / n, "perf/images_per_s": 5.0, "val/top1": n / 4} for n in (1, 2)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "summary.json").write_text(json.dumps({"step": 2, "epoch": 2, "global_batch": 8, "val/top1": 0.5}))

    monkeypatch.setattr(pipeline, "run_in_processes", pretend)
    own = tmp_path / "conf" / "pipeline"
    own.mkdir(parents=True)
    (own / "two.yaml").write_text(
        "name: two\nbaseline: first\nstages: {first: {}, second: {parent: first, stage: finetune}}\n"
    )
    finish(
        tmp_path / "elsewhere", {"stage": {"name": "pretrain"}, "choices": {"method": "x"}, "train": {"fraction": 1}}
    )
    folder = tmp_path / "runs" / "two"
    settings = ["pipeline=two", "model=vit_debug", "data=fake", f"first.run={tmp_path}/elsewhere"]
    assert pipeline.main([*settings, f"output_dir={folder}"], str(tmp_path / "conf")) == 0
    before = {path.name: path.read_bytes() for path in folder.glob("report.*")}
    assert json.loads(before["report.json"])["points_over"] == {"first": {"second": 0.0}}
    for name in ("report.html", "report.md"):
        (folder / name).unlink()
    assert main([str(folder)], None) == 0
    assert {path.name: path.read_bytes() for path in folder.glob("report.*")} == before

    with pytest.raises(UserError, match=r"metric=val/loss: .* is the folder of a pipeline"):
        main([str(folder), "metric=val/loss"], None)
    (folder / "second" / "summary.json").unlink()
    with pytest.raises(UserError, match=r"not whole any more, .*second/summary.json is gone"):
        main([str(folder)], None)
    (folder / "report.json").unlink()
    with pytest.raises(UserError, match="has not finished"):
        main([str(folder)], None)


# ---- an experiment ---------------------------------------------------------------------------------------------------

PARAMS = {"data.name": "digits", "choices.experiment": "tiny", "train.epochs": "4"}


@pytest.fixture
def store(filled: Path, tmp_path: Path) -> str:
    """A copy of the test's own."""
    return f"sqlite:///{shutil.copy(filled, tmp_path / 'mlflow.db')}"


@pytest.fixture(scope="module")
def filled(mlflow_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight runs of 2 optimizers at 2 rates with 2 seeds each, of which one failed; and one of another experiment."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    place = tmp_path_factory.mktemp("experiment")
    database = Path(shutil.copy(mlflow_template, place / "mlflow.db"))
    client = MlflowClient(f"sqlite:///{database}")
    client.create_experiment("something else")
    experiment = client.create_experiment("mine")
    for n, (optim, lr, seed) in enumerate(itertools.product(("adam", "sgd"), ("1e-4", "1e-3"), (0, 1))):
        folder = place / "runs" / str(n)
        command = f"/x/vitexp/__main__.py optim={optim} optim.lr={lr} seed={seed} 'output_dir=a b' group=g"
        tags = {"run_dir": str(folder), "command": command}
        run_id = client.create_run(experiment, start_time=n + 1, run_name=f"run {n}", tags=tags).info.run_id
        params = PARAMS | {"choices.optim": optim, "optim.name": optim, "optim.lr": lr, "seed": str(seed)}
        params |= {"output_dir": str(folder), "derived.lr": lr, "data.seed": str(seed)}
        metrics = [Metric("epoch", float(step), 0, 10 * step) for step in (1, 2)]
        metrics += [Metric("val/top1", accuracy(optim, lr, seed) * step / 2, 0, 10 * step) for step in (1, 2)]
        client.log_batch(run_id, params=[Param(*pair) for pair in params.items()], metrics=metrics)
        client.set_terminated(run_id, "FAILED" if n == 7 else "FINISHED", end_time=n + 60_001)
    (place / "runs" / "7").mkdir(parents=True)
    (place / "runs" / "7" / "train.log").write_text(
        "2026 INFO data\n2026 DEBUG the run ended here\nTraceback (most recent call last):\n  File x\n"
        "vitexp.errors.UserError: the loss | is not finite\nmore of it\n2026 INFO closed\n"
    )
    return database


def test_an_experiment_has_the_report_of_a_sweep(store: str, workdir: Path, drawn: dict[str, object]) -> None:
    assert main(["mine", f"tracking.uri={store}"], None) == 0
    folder = workdir / "outputs" / "mine" / "report"
    tree = json.loads((folder / "report.json").read_text())
    assert tree["experiment"] == "mine"
    values = {
        f"optim={optim} optim.lr={float(lr)}": [accuracy(optim, lr, seed) for seed in (0, 1)]
        for optim, lr in itertools.product(("adam", "sgd"), ("1e-4", "1e-3"))
    }
    del values["optim=sgd optim.lr=0.001"][1]  # it failed
    assert {one["setting"]: one["n"] for one in tree["settings"]} == {key: len(of) for key, of in values.items()}
    for one in tree["settings"]:
        assert one["mean"] == pytest.approx(statistics.mean(values[one["setting"]]))
        if one["n"] > 1:
            assert one["std"] == pytest.approx(statistics.stdev(values[one["setting"]]))
        assert one["minutes"] == pytest.approx(1.0)
    assert list(tree["effects"]) == ["optim", "optim.lr"], "neither the seed nor what follows from others"
    adam = tree["effects"]["optim"][0]
    assert adam["all"]["mean"] == pytest.approx(
        statistics.mean([*values["optim=adam optim.lr=0.0001"], *values["optim=adam optim.lr=0.001"]])
    )
    assert tree["command"] == "python -m vitexp optim=adam optim.lr=1e-3 seed=1"
    (failed,) = [one for one in tree["jobs"] if one["metric"] is None]
    assert (failed["job"], failed["state"], failed["reason"]) == (
        "run 7",
        "failed",
        "UserError: the loss | is not finite",
    )
    page = (folder / "report.html").read_text()
    assert "the loss | is not finite" in page
    assert page.count("data:image/png") == 3
    best = next(iter(drawn["curves.png"].values()))  # type: ignore[attr-defined]
    assert best == [
        [(1.0, pytest.approx(0.4)), (2.0, pytest.approx(0.8))],
        [(1.0, pytest.approx(0.405)), (2.0, pytest.approx(0.81))],
    ]


def test_a_param_that_a_resume_changed_has_its_newer_value(store: str, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("mine").experiment_id
    for run in client.search_runs([experiment], "params.`choices.optim` = 'sgd'"):
        client.set_tag(run.info.run_id, "changed.optim.lr", "5e-4")
    main(["mlflow:mine", f"uri={store}", f"output={tmp_path / 'there'}"], None)
    tree = json.loads((tmp_path / "there" / "report.json").read_text())
    assert [one["value"] for one in tree["effects"]["optim.lr"]] == [1e-4, 5e-4, 1e-3]


def test_what_only_follows_from_a_choice_or_copies_another_is_no_axis() -> None:
    runs = [
        {"choices.optim": optim, "optim.momentum": momentum, "optim.lr": lr, "optim.of.lr": lr, "seed": seed}
        for optim, momentum in (("adam", ""), ("adamw", ""), ("sgd", "0.9"))
        for lr in ("1", "2")
        for seed in ("0", "1", "2")
    ]
    assert differing(runs) == ["seed", "choices.optim", "optim.lr"]
    came_along = [{"choices.model": "a", "train.epochs": "1"}, {"choices.model": "b", "train.epochs": "2"}]
    assert differing(came_along) == ["choices.model", "train.epochs"]
    drawn_at_random = [{"optim.lr": str(n), "optim.weight_decay": str(7 * n % 10)} for n in range(10)]
    assert differing(drawn_at_random) == ["optim.lr", "optim.weight_decay"]


# ---- what it refuses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "report: of what?"),
        (["metric=val/top1"], "report: of what?"),
        (["sweep_1"], "expected the folder of a sweep .* Did you mean 'sweep-1'"),
        (["empty"], "expected the folder of a sweep"),
        (["file.txt"], "expected the folder of a sweep"),
        (["mlflow:mein"], r"mlflow:mein: MLflow at .* has no such experiment. Did you mean 'mine'\?"),
        (["mine", "metric=val/top"], r"metric=val/top: no finished run has this metric. Did you mean 'val/top1'\?"),
        (["mine", "maximize=no"], "maximize=no: expected true or false"),
        (["mine", "metrics=x"], r"report: no such key 'metrics'. Did you mean 'metric'\?"),
        (["sweep-1", "output=x"], "output=x: sweep-1 is the folder of a sweep"),
        (
            ["sweep-1", "metric=val/lost"],
            r"metric=val/lost: no finished run has this metric. Did you mean 'val/loss'\?",
        ),
    ],
)
def test_anything_else_is_refused_with_the_nearest_name(
    arguments: list[str], said: str, ledger: Ledger, store: str, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    shutil.copytree(ledger.folder, workdir / "sweep-1")
    (workdir / "empty").mkdir()
    (workdir / "file.txt").write_text("")
    with pytest.raises(UserError, match=said):
        main(arguments, None)
    assert not (workdir / "outputs").exists()


def test_without_a_store_nothing_is_made(workdir: Path) -> None:
    with pytest.raises(UserError, match=r"there is no MLflow store .*outputs/mlflow.db"):
        main(["mine"], None)
    assert list(workdir.iterdir()) == []
