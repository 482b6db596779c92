"""The plan of a sweep and of a pipeline: how many runs, each kind measured once, the sums, and the refusal."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vitexp import cli, plan_many, room
from vitexp.commands import plan
from vitexp.errors import UserError
from vitexp.plan_many import main, makespan
from vitexp.probe import Speed

SMALL = ["model=vit_debug", "data=fake", "data.num_train=32", "train.batch_size=8", "runtime.precision=fp32"]


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Makes 8 pictures take a second, and an update nothing. Holds what was measured: model, optimizer, threads."""
    import torch

    asked: list[str] = []

    def speed(planned: plan.Planned, *given: object, **how: object) -> Speed:
        config = planned.config
        asked.append(f"{config.choices['model']} {config.choices['optim']} {torch.get_num_threads()}")
        return Speed(batch_size=8, forward_s=1.0, update_s=0.0, rounds=2)

    monkeypatch.setattr(plan, "speed_or_why", speed)
    monkeypatch.setattr(plan_many, "cores", lambda: 4)
    monkeypatch.setattr(plan, "cores", lambda: 4)
    return asked


def rows_of(page: str) -> list[list[str]]:
    """Cells of the table's rows."""
    table = page.split("which\n")[1].split("\n\n")[0]
    return [re.split(r"\s{2,}", line.strip()) for line in table.splitlines()]


def test_a_sweep_is_counted_and_each_kind_of_run_measured_once(
    workdir: Path, measured: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    swept = ["optim=adam,sgd", "train.epochs=1,2", "optim.lr=1e-3,1e-4", "seed=0,1,2", "sweep.jobs=2"]
    assert main([*SMALL, *swept], None) == 0
    page = capsys.readouterr().out
    assert "24 runs, 2 at a time" in page
    assert sorted(measured) == ["vit_debug adam 2", "vit_debug sgd 2"], (
        "epochs change no update, rates and seeds nothing"
    )
    rows = rows_of(page)
    assert [(row[0], row[1], row[3]) for row in rows] == [
        ("6", "4 s", "optim=adam train.epochs=1"),
        ("6", "8 s", "optim=adam train.epochs=2"),
        ("6", "4 s", "optim=sgd train.epochs=1"),
        ("6", "8 s", "optim=sgd train.epochs=2"),
    ]
    # 12 runs of 4 s and 12 of 8 s, in two places
    assert "time        72 s of updates in all" in page
    assert list(workdir.iterdir()) == []


def test_more_jobs_than_cores_take_turns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(plan_many, "cores", lambda: 1)
    main([*SMALL, "train.epochs=1", "seed=0,1", "sweep.jobs=2"], None)
    assert rows_of(capsys.readouterr().out)[0][:2] == ["2", "8 s"]


def test_a_pipeline_is_planned_stage_by_stage_with_a_teacher_yet_to_be_trained(
    workdir: Path, measured: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pipeline=distillation", *SMALL[1:], "teacher.train.epochs=3"], None) == 0
    page = capsys.readouterr().out
    assert [(row[0], row[3]) for row in rows_of(page)] == [("1", "teacher"), ("1", "distilled"), ("1", "plain")]
    assert rows_of(page)[0][1] == "12 s"
    assert len(measured) == 3, "a student with a teacher is another kind than the same one without"
    assert list(workdir.iterdir()) == []


def test_stages_that_train_nothing_take_room_but_no_time(
    workdir: Path, measured: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    main(["pipeline=mae", *SMALL[1:], "model.depth=1", "probe=false"], None)
    rows = {row[3]: row for row in rows_of(capsys.readouterr().out)}
    assert list(rows) == ["pretrain", "knn", "linear_probe", "finetune", "scratch"]
    assert rows["knn"][1] == "-"
    assert rows["knn"][2] != "0.0 MiB"
    assert len(measured) == 4


@pytest.mark.parametrize("many", [["seed=0,1"], ["pipeline=mae"]], ids=["sweep", "pipeline"])
def test_what_does_not_fit_on_the_disk_ends_with_an_exit_code(
    workdir: Path, many: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(room, "free_disk", lambda place: 1000)
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", "--multirun", *SMALL[1:], *many])
    assert ended.value.code == 2
    told = capsys.readouterr()
    assert "at most: checkpoints" in told.out
    assert re.search(r"^vitexp: .* runs leave .* 0.0 MiB are free$", told.err, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["seed=0,1", "plot=lr.png"], "plot=lr.png: is for the plan of one run"),
        (["seed=0,1", "probe=maybe"], "probe=maybe: expected true or false"),
        (["model=vit_debug,vit_tinny"], "model=vit_tinny: no such option"),
        (["optim.lr=interval(0,1)"], "has no steps to try"),
    ],
)
def test_what_cannot_be_planned_is_said_at_once(arguments: list[str], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        main([*SMALL[1:], *arguments], None)


def test_one_run_is_planned_as_ever(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "train.epochs=1", "probe=true", "plot=lr.png"], None) == 0
    assert (workdir / "lr.png").exists()
    assert "peak lr" in capsys.readouterr().out


def test_each_run_begins_as_soon_as_there_is_a_place() -> None:
    assert makespan([5, 1, 1, 1, 4], 2) == 7
    assert makespan([3, 2], 4) == 3
