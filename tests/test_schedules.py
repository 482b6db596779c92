"""Learning-rate curves against those of the official codes of the papers, and the arithmetic of updates."""

from __future__ import annotations

import functools
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from vitexp import horizon as horizon_of
from vitexp import schedules
from vitexp.errors import UserError
from vitexp.horizon import plan_horizon, updates_per_epoch
from vitexp.types import Progress

TESTS = Path(__file__).parent
CONF = TESTS.parent / "conf" / "schedule"
MAE = np.load(TESTS / "golden" / "schedules_mae.npz")
JAX = np.load(TESTS / "golden" / "schedules_vit_jax.npz")
BY_EPOCH = np.load(TESTS / "golden" / "schedules_lvvit_deit_t2t.npz")
ALL = {name: getattr(schedules, name) for name in ("cosine", "linear_warmup", "constant", "wsd")}


def at_step(step: int, total: int) -> Progress:
    return Progress(step=step, total_steps=total, epoch=step / 100, total_epochs=total / 100)


def at_epoch(epoch: float, total: float) -> Progress:
    return Progress(step=round(epoch * 1000), total_steps=round(total * 1000), epoch=epoch, total_epochs=total)


def load(name: str, **overrides: object) -> schedules.Schedule:
    return instantiate(OmegaConf.merge(OmegaConf.load(CONF / f"{name}.yaml"), overrides), _convert_="all")


# ---- official curves -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", list(json.loads(str(MAE["meta_json"]))))
def test_cosine_over_the_planned_updates_is_maes_schedule(name: str) -> None:
    meta = json.loads(str(MAE["meta_json"]))[name]
    horizon = plan_horizon(
        meta["iters_per_epoch"], accumulate=meta["accum_iter"], epochs=meta["epochs"], max_steps=None
    )
    held = []  # the lr held while each micro-batch is computed
    for step in range(horizon.num_updates):
        update = horizon.update(step)
        lr = schedules.cosine(
            update.progress, lr=meta["lr"], warmup_epochs=meta["warmup_epochs"], min_lr=meta["min_lr"]
        )
        held += [lr] * update.num_micro_batches
    np.testing.assert_allclose(held, MAE[f"{name}/lr"], rtol=1e-14, atol=1e-18)


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        ("cosine", functools.partial(schedules.cosine, min_lr=0.0)),
        ("cosine_nowarm", functools.partial(schedules.cosine, min_lr=0.0)),
        ("linear", load("linear_warmup")),
        ("linear", load("vit_jax")),
    ],
)
def test_durations_in_steps_give_the_jax_schedule(name: str, schedule: schedules.Schedule) -> None:
    meta = json.loads(str(JAX["meta_json"]))[name]
    total = meta["total_steps"]
    ours = [
        schedule(at_step(step, total), lr=meta["base"], warmup_steps=meta["warmup_steps"])
        for step in range(len(JAX[name]))  # up to two steps past the end
    ]
    # the reference is float32: its cosine near pi is a difference of two numbers close to 1
    np.testing.assert_allclose(ours, JAX[name], rtol=2e-6, atol=1e-7 * meta["base"])


@pytest.mark.parametrize(
    ("name", "preset", "lr"),
    [
        ("lv/lvvit_s", "lvvit", 1.6e-3),
        ("lv/lvvit_l", "lvvit", 1e-3),
        ("lv/finetune384", "lvvit_finetune", 5e-6),
        ("deit/deit_bs1024", "deit", 1e-3),
        ("deit/deit3_small_800ep", "deit", 4e-3),
        ("t2t/t2t_14_8gpu", "t2t_vit", 5e-4),
        ("t2t/t2t_7_4gpu", "t2t_vit", 1e-3),
    ],
)
def test_every_update_of_an_epoch_has_the_official_loops_rate(name: str, preset: str, lr: float) -> None:
    official = BY_EPOCH[name]
    schedule = load(preset)
    horizon = plan_horizon(3, accumulate=1, epochs=len(official), max_steps=None)
    ours = [schedule(horizon.progress(step), lr=lr) for step in range(horizon.num_updates)]
    np.testing.assert_allclose(ours, np.repeat(official, 3), rtol=1e-12)


def test_a_warmup_in_any_unit_moves_by_whole_epochs() -> None:
    horizon = plan_horizon(10, accumulate=1, epochs=20, max_steps=None)

    def curve(**arguments: float) -> list[float]:
        return [schedules.cosine_by_epoch(horizon.progress(step), lr=1.0, **arguments) for step in range(200)]

    assert curve(warmup_epochs=4) == curve(warmup_steps=40) == curve(warmup_fraction=0.2)
    assert curve(warmup_epochs=4)[:41:10] == [0.0, 0.25, 0.5, 0.75, 0.5 + 0.5 * math.cos(math.pi * 0.2)]
    assert curve(warmup_epochs=4, lag_epochs=1)[10:] == curve(warmup_epochs=4)[:-10]
    assert set(curve(warmup_epochs=4, cooldown_epochs=5, min_lr=0.1)[150:]) == {0.1}
    assert set(curve(warmup_epochs=4, cooldown_epochs=30, min_lr=0.1)[40:]) == {0.1}
    with pytest.raises(UserError, match=r"schedule\.cooldown_epochs=-1"):
        curve(cooldown_epochs=-1)
    with pytest.raises(UserError, match=r"schedule\.warmup_epochs=5 and schedule\.warmup_steps=100"):
        curve(warmup_epochs=5, warmup_steps=100)


# ---- figures of the papers, worked out by hand -----------------------------------------------------------------------
@pytest.mark.parametrize(
    ("preset", "lr", "progress", "expected"),
    [
        # MAE pretraining: 2.4e-3, 40 of 800 epochs
        ("mae", 2.4e-3, at_epoch(0, 800), 0.0),
        ("mae", 2.4e-3, at_epoch(20, 800), 1.2e-3),
        ("mae", 2.4e-3, at_epoch(40, 800), 2.4e-3),
        ("mae", 2.4e-3, at_epoch(420, 800), 1.2e-3),
        ("mae", 2.4e-3, at_epoch(610, 800), 2.4e-3 * (1 - math.sqrt(0.5)) / 2),
        ("mae", 2.4e-3, at_epoch(800, 800), 0.0),
        # MAE fine-tuning of ViT-L: 4e-3, 5 of 50 epochs, down to 1e-6
        ("mae_finetune", 4e-3, at_epoch(2.5, 50), 2e-3),
        ("mae_finetune", 4e-3, at_epoch(5, 50), 4e-3),
        ("mae_finetune", 4e-3, at_epoch(27.5, 50), 2.0005e-3),
        ("mae_finetune", 4e-3, at_epoch(50, 50), 1e-6),
        # ViT-B on JFT: 8e-4, 10,000 updates of warm-up, linear to 1e-5; H: 3e-4
        ("vit_jax", 8e-4, at_step(0, 510_000), 0.0),
        ("vit_jax", 8e-4, at_step(5_000, 510_000), 4e-4),
        ("vit_jax", 8e-4, at_step(10_000, 510_000), 8e-4),
        ("vit_jax", 8e-4, at_step(260_000, 510_000), 4.05e-4),
        ("vit_jax", 3e-4, at_step(135_000, 510_000), 2.275e-4),
        ("vit_jax", 8e-4, at_step(510_000, 510_000), 1e-5),
        # ViT fine-tuning on ImageNet: 0.03, 500 of 20,000 updates, cosine to 0
        ("vit_jax_finetune", 0.03, at_step(250, 20_000), 0.015),
        ("vit_jax_finetune", 0.03, at_step(500, 20_000), 0.03),
        ("vit_jax_finetune", 0.03, at_step(10_250, 20_000), 0.015),
        ("vit_jax_finetune", 0.03, at_step(20_000, 20_000), 0.0),
    ],
)
def test_presets_pass_through_the_published_figures(
    preset: str, lr: float, progress: Progress, expected: float
) -> None:
    assert load(preset)(progress, lr=lr) == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_cosine_follows_the_small_transfer_experience() -> None:
    """Batch 32: 20 epochs of warm-up from 1e-6 to 5e-4, then down to 1e-6 after 50."""
    schedule = load("cosine", warmup_epochs=20, warmup_start_lr=1e-6, min_lr=1e-6)
    points = {0: 1e-6, 10: 2.505e-4, 20: 5e-4, 35: 2.505e-4, 50: 1e-6}
    for epoch, expected in points.items():
        assert schedule(at_epoch(epoch, 50), lr=5e-4) == pytest.approx(expected, rel=1e-12)


# ---- durations -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("schedule", ALL.values(), ids=ALL)
def test_one_duration_in_three_units_is_one_curve(schedule: schedules.Schedule) -> None:
    horizon = plan_horizon(20, accumulate=1, epochs=10, max_steps=None)
    for step in range(horizon.num_updates):
        progress = horizon.progress(step)
        by_steps = schedule(progress, lr=1.0, warmup_steps=50)
        assert schedule(progress, lr=1.0, warmup_epochs=2.5) == pytest.approx(by_steps, rel=1e-12)
        assert schedule(progress, lr=1.0, warmup_fraction=0.25) == pytest.approx(by_steps, rel=1e-12)
        assert schedule(progress, lr=1.0, default_warmup_fraction=0.25) == pytest.approx(by_steps, rel=1e-12)


@pytest.mark.parametrize("schedule", ALL.values(), ids=ALL)
def test_a_fraction_counts_pictures_seen_not_updates(schedule: schedules.Schedule) -> None:
    horizon = plan_horizon(9, accumulate=4, epochs=4, max_steps=None)  # every third update sees a quarter of the others
    for progress in map(horizon.progress, range(horizon.num_updates)):
        assert schedule(progress, lr=1.0, warmup_fraction=0.375) == schedule(progress, lr=1.0, warmup_epochs=1.5)


@pytest.mark.parametrize("schedule", ALL.values(), ids=ALL)
def test_a_named_duration_replaces_the_default_one(schedule: schedules.Schedule) -> None:
    start = at_step(0, 100)
    assert schedule(start, lr=1.0, default_warmup_fraction=0.5) == 0.0
    for off in ({"warmup_epochs": 0}, {"warmup_steps": 0}, {"warmup_fraction": 0}):
        assert schedule(start, lr=1.0, default_warmup_fraction=0.5, **off) == 1.0


@pytest.mark.parametrize("schedule", ALL.values(), ids=ALL)
def test_two_durations_are_refused_with_both_keys(schedule: schedules.Schedule) -> None:
    with pytest.raises(UserError, match=r"schedule\.warmup_epochs=5 and schedule\.warmup_steps=100"):
        schedule(at_step(0, 10), lr=1.0, warmup_epochs=5, warmup_steps=100)


@pytest.mark.parametrize("schedule", ALL.values(), ids=ALL)
@pytest.mark.parametrize("unit", [{"warmup_epochs": 1}, {"warmup_steps": 100}, {"warmup_fraction": 1.0}])
@pytest.mark.parametrize("total", [1, 100])
def test_a_warmup_as_long_as_the_run_only_rises(schedule: schedules.Schedule, unit: dict, total: int) -> None:
    curve = [schedule(at_step(step, total), lr=1.0, warmup_start_lr=0.5, **unit) for step in range(total)]
    # wsd cools down in its last fifth, whatever the warm-up is
    rising = curve[: math.ceil(0.8 * total)] if schedule is schedules.wsd else curve
    assert curve[0] == 0.5
    assert all(a < b for a, b in itertools.pairwise(rising))
    assert all(0.0 <= lr <= 1.0 for lr in curve)


@pytest.mark.parametrize("schedule", [schedules.cosine, schedules.linear_warmup])
def test_a_warmup_longer_than_the_run_stops_half_way_up(schedule: schedules.Schedule) -> None:
    assert schedule(at_step(100, 100), lr=1.0, warmup_steps=200) == 0.5
    assert schedule(at_step(100, 100), lr=1.0, warmup_steps=100, min_lr=0.1) == pytest.approx(0.1)  # both end there


@pytest.mark.parametrize("schedule", ALL.values(), ids=ALL)
def test_a_run_of_one_update_without_warmup_has_the_full_rate(schedule: schedules.Schedule) -> None:
    for unit in ({}, {"warmup_steps": 0}, {"warmup_epochs": 0.0}):
        assert schedule(plan_horizon(1, accumulate=4, epochs=1, max_steps=None).progress(0), lr=0.1, **unit) == 0.1


@pytest.mark.parametrize("schedule", ALL.values(), ids=ALL)
def test_curves_are_continuous_within_bounds_and_reach_the_peak(schedule: schedules.Schedule) -> None:
    total = 2000
    floor = {} if schedule is schedules.constant else {"min_lr": 0.1}
    curve = np.array(
        [schedule(at_step(s, total), lr=1.0, warmup_steps=200, warmup_start_lr=0.2, **floor) for s in range(total + 1)]
    )
    assert np.abs(np.diff(curve)).max() < 0.9 / 200  # no jump at the seams: at most the slope of the warm-up
    assert curve.max() == 1.0
    assert curve[0] == 0.2
    assert curve[-1] == pytest.approx(0.1 if floor else 1.0)
    assert curve.min() == pytest.approx(0.1 if floor else 0.2)


def test_wsd_stays_and_then_cools_down() -> None:
    schedule = functools.partial(schedules.wsd, lr=1.0, warmup_steps=10, decay_steps=20, min_lr=0.1)
    curve = [schedule(at_step(step, 100)) for step in range(101)]
    assert curve[5] == 0.5
    assert set(curve[10:81]) == {1.0}
    assert curve[90] == pytest.approx(0.55)
    assert curve[100] == pytest.approx(0.1)
    with pytest.raises(UserError, match=r"schedule\.decay_epochs=1 and schedule\.decay_fraction=0\.1"):
        schedule(at_step(0, 100), decay_steps=None, decay_epochs=1, decay_fraction=0.1)


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"lr": -1.0}, "optim.lr=-1.0"),
        ({"lr": float("nan")}, "optim.lr=nan"),
        ({"lr": 1.0, "min_lr": 2.0}, "schedule.min_lr=2"),
        ({"lr": 1.0, "warmup_start_lr": 2.0}, "schedule.warmup_start_lr=2"),
        ({"lr": 1.0, "min_lr": -1e-6}, "schedule.min_lr=-1e-06"),
        ({"lr": 1.0, "warmup_steps": -1}, "schedule.warmup_steps=-1"),
        ({"lr": 1.0, "warmup_epochs": float("inf")}, "schedule.warmup_epochs=inf"),
        ({"lr": 1.0, "warmup_fraction": 1.5}, "schedule.warmup_fraction=1.5"),
    ],
)
def test_numbers_out_of_range_name_their_key(arguments: dict, key: str) -> None:
    with pytest.raises(UserError) as caught:
        schedules.cosine(at_step(0, 10), **arguments)
    assert str(caught.value).startswith(key)


# ---- configuration ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_schedule_option_builds_and_takes_plain_overrides(path: Path) -> None:
    node = OmegaConf.load(path)
    assert {"warmup_epochs", "warmup_steps", "warmup_fraction", "warmup_start_lr"} <= set(node)
    assert "min_lr" in node or path.stem == "constant"
    horizon = plan_horizon(30, accumulate=2, epochs=4, max_steps=None)
    preview = horizon_of.preview(load(path.stem), horizon, lr=0.1)
    assert len(preview) == horizon.num_updates
    assert all(0.0 <= lr <= 0.1 for _, lr in preview)
    if node.get("default_warmup_fraction") is not None:  # no duration named: each unit is one override
        assert load(path.stem, warmup_steps=100)(at_step(50, 1000), lr=1.0) == 0.5
        assert load(path.stem, warmup_epochs=0)(at_step(0, 1000), lr=1.0) == 1.0


def test_preview_spreads_its_points_over_the_whole_run() -> None:
    horizon = plan_horizon(100, accumulate=1, epochs=10, max_steps=700)
    points = horizon_of.preview(schedules.linear_warmup, horizon, lr=1.0, points=5)
    assert [step for step, _ in points] == [0, 175, 350, 524, 699]
    assert points[-1][1] == pytest.approx(1 - 699 / 1000)
    assert horizon_of.preview(schedules.constant, plan_horizon(1, accumulate=1, epochs=1, max_steps=None), lr=1.0) == [
        (0, 1.0)
    ]


# ---- updates ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("batches", [1, 2, 5, 9, 12])
@pytest.mark.parametrize("accumulate", [1, 2, 4, 7, 20])
def test_updates_take_every_micro_batch_of_every_epoch_once_in_order(batches: int, accumulate: int) -> None:
    horizon = plan_horizon(batches, accumulate=accumulate, epochs=3, max_steps=None)
    taken = []
    for step in range(horizon.num_updates):
        update = horizon.update(step)
        assert 1 <= update.num_micro_batches <= accumulate
        assert update.progress == horizon.progress(step)
        assert update.progress.epoch == update.epoch + update.first_micro_batch / batches
        taken += [(update.epoch, update.first_micro_batch + i) for i in range(update.num_micro_batches)]
    assert taken == [(epoch, batch) for epoch in range(3) for batch in range(batches)]
    assert horizon.num_updates == horizon.total_steps == 3 * updates_per_epoch(batches, accumulate)
    assert horizon.progress(horizon.total_steps).epoch == 3.0


def test_a_short_last_group_counts_its_own_micro_batches() -> None:
    horizon = plan_horizon(6, accumulate=4, epochs=2, max_steps=None)
    groups = [(u.epoch, u.first_micro_batch, u.num_micro_batches) for u in map(horizon.update, range(4))]
    assert groups == [(0, 0, 4), (0, 4, 2), (1, 0, 4), (1, 4, 2)]


def test_max_steps_cuts_the_run_but_not_the_schedule() -> None:
    whole = plan_horizon(10, accumulate=1, epochs=5, max_steps=None)
    cut = plan_horizon(10, accumulate=1, epochs=5, max_steps=7)
    assert (cut.num_updates, cut.total_steps, cut.total_epochs) == (7, 50, 5.0)
    assert all(cut.progress(step) == whole.progress(step) for step in range(7))
    assert plan_horizon(10, accumulate=1, epochs=5, max_steps=999).num_updates == 50
    with pytest.raises(AssertionError, match="update 7 of a run of 7"):
        cut.update(7)


def test_without_epochs_the_schedule_spans_max_steps() -> None:
    horizon = plan_horizon(9, accumulate=4, epochs=None, max_steps=7)  # 3 updates an epoch: two epochs and one update
    assert (horizon.num_updates, horizon.total_steps) == (7, 7)
    assert horizon.total_epochs == 2 + 4 / 9
    assert schedules.linear_warmup(horizon.progress(7), lr=1.0) == 0.0
    assert schedules.linear_warmup(horizon.progress(7), lr=1.0, warmup_steps=0) == 0.0


@pytest.mark.parametrize(
    ("epochs", "batches", "accumulate", "steps"),
    [(0.5, 10, 1, 5), (0.07, 100, 1, 7), (0.01, 10, 1, 1), (1.5, 9, 4, 5), (2.3, 10, 1, 23), (1e-9, 10, 1, 1)],
)
def test_fractional_epochs_round_up_to_whole_updates(epochs: float, batches: int, accumulate: int, steps: int) -> None:
    horizon = plan_horizon(batches, accumulate=accumulate, epochs=epochs, max_steps=None)
    assert (horizon.total_steps, horizon.total_epochs) == (steps, epochs)
    assert schedules.cosine(horizon.progress(steps), lr=1.0) == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"epochs": None, "max_steps": None}, "train.epochs=null and train.max_steps=null"),
        ({"epochs": 0, "max_steps": None}, "train.epochs=0"),
        ({"epochs": float("nan"), "max_steps": None}, "train.epochs=nan"),
        ({"epochs": -1, "max_steps": None}, "train.epochs=-1"),
        ({"epochs": 1, "max_steps": 0}, "train.max_steps=0"),
        ({"epochs": 1, "max_steps": 1.5}, "train.max_steps=1.5"),
        ({"epochs": 1, "max_steps": None, "accumulate": 0}, "train.accumulate=0"),
        ({"epochs": 1, "max_steps": None, "batches": 0}, "training split has no batch"),
    ],
)
def test_impossible_horizons_are_refused_by_name(arguments: dict, words: str) -> None:
    arguments = {"accumulate": 1, "batches": 10, **arguments}
    with pytest.raises(UserError, match=words):
        plan_horizon(arguments.pop("batches"), **arguments)
