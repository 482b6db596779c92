"""What runs leave on disk, counted before and weighed after; and the refusal where it does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from vitexp import room
from vitexp.commands.plan import disk_of, held_by, prepare
from vitexp.config import compose_and_check
from vitexp.costs import DiskBytes, disk_needed, free_disk
from vitexp.errors import UserError
from vitexp.room import Costs, Member, alike, check_room
from vitexp.train import train

SMALL = ["model=vit_debug", "data=fake", "data.num_train=16", "data.num_val=8", "train.batch_size=8", "tracking=none"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.epochs=4", "train.ema_decay=0.9"],
        ["train.epochs=1", "optim=sgd"],
        ["train.epochs=3", "train.keep=0", "train.save_every=1", "evaluators=none"],
    ],
    ids=" ".join,
)
def test_what_is_counted_before_is_what_a_run_leaves(workdir: Path, overrides: list[str]) -> None:
    config = compose_and_check([*SMALL, *overrides, "output_dir=run"])
    planned = prepare(config)
    disk = disk_of(planned, held_by(planned))
    train(config)
    states = [path.stat().st_size for path in workdir.glob("run/checkpoints/step_*/state.pt")]
    weights = [path.stat().st_size for path in workdir.glob("run/*.safetensors")]
    assert len(states) == disk.checkpoints
    # Names and counters are not counted, which are more of a model this small than of any other.
    assert max(states) == pytest.approx(disk.checkpoint, rel=0.2)
    assert sum(weights) == pytest.approx(disk.weights, rel=0.05)


def test_runs_side_by_side_need_a_checkpoint_more_each() -> None:
    runs = [DiskBytes(checkpoint=10, checkpoints=2, weights=5, logged=1)] * 3 + [DiskBytes(40, 0, 7)]
    assert disk_needed(runs, at_a_time=1) == 3 * 26 + 7 + 10
    assert disk_needed(runs, at_a_time=2) == 3 * 26 + 7 + 20


def test_what_differs_in_seed_and_rate_alone_costs_the_same() -> None:
    first, same, other = (
        compose_and_check([*SMALL, *more])
        for more in ([], ["seed=4", "optim.lr=0.1", "output_dir=x", "schedule=constant"], ["train.keep=3"])
    )
    assert alike(first) == alike(same) != alike(other)


def test_a_disk_that_is_too_small_is_said_but_what_is_there_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = compose_and_check(SMALL)
    members = [Member(f"{n}", config, tmp_path / "sweep" / f"{n}") for n in range(3)]
    costs = Costs()
    one = costs.disk(members[0])
    needed = disk_needed([one] * 3, at_a_time=1)
    monkeypatch.setattr(room, "free_disk", lambda place: needed)
    check_room(members, costs=costs)
    monkeypatch.setattr(room, "free_disk", lambda place: needed - 1)
    with pytest.raises(UserError, match=r"sweep: 3 runs leave [\d.]+ MiB .* are free\nfree some, lower train.keep"):
        check_room(members, costs=costs)
    begun, finished = members[0].folder, members[1].folder
    begun.mkdir(parents=True)
    (begun / "state.pt").write_bytes(b"1")
    check_room(members, costs=costs)
    monkeypatch.setattr(room, "free_disk", lambda place: needed - one.left - 1)
    with pytest.raises(UserError):
        check_room(members, costs=costs)
    finished.mkdir()
    (finished / "summary.json").write_text("{}")
    check_room(members, costs=costs)


def test_room_is_looked_for_where_the_folder_will_be(tmp_path: Path) -> None:
    here, there = free_disk(tmp_path), free_disk(tmp_path / "not" / "there")
    assert there == pytest.approx(here, rel=0.1)  # others write meanwhile
