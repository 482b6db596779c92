from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from vitexp.commands.lr_finder import main
from vitexp.config import compose_and_check
from vitexp.errors import UserError
from vitexp.lr_finder import Divergence, Sweep, centred_mean, exponential_rates, overrides_for, suggest, sweep
from vitexp.optim import resolve_lr
from vitexp.run import build_run
from vitexp.runtime import make_accelerator
from vitexp.train import train

SMALL = ["model=vit_debug", "data=fake", "data.num_train=40", "train.batch_size=8", "runtime.precision=fp32"]


def swept(rates: list[float], *overrides: str) -> Sweep:
    config = compose_and_check([*SMALL, "evaluators=none", *overrides])
    accelerator = make_accelerator(precision="fp32", device="cpu", threads=1)
    return sweep(build_run(config), rates, accelerator=accelerator)


def curve(losses: np.ndarray, rates: list[float]) -> Sweep:
    return Sweep(rates, losses.tolist(), "", True, 64, planned=len(rates))


def test_at_one_rate_the_sweep_is_the_runs_own_first_updates_with_accumulation_mixing_and_clipping(workdir: Path):
    same = ["augment=deit", "train.accumulate=2", "train.clip_norm=0.5", "model.drop_path=0.2", "optim.lr=1e-3"]
    fixed = ["schedule=constant", "schedule.warmup_fraction=0", "train.max_steps=7", "train.log_every=1"]
    train(compose_and_check([*SMALL, *same, *fixed, "evaluators=none", "tracking=none", "output_dir=run"]))
    rows = [json.loads(line) for line in (workdir / "run" / "metrics.jsonl").read_text().splitlines()]
    assert swept([1e-3] * 7, *same).losses == [row["train/loss"] for row in rows]


@pytest.mark.slow
def test_two_processes_updates_are_made_of_twice_the_forwards():
    rates = exponential_rates(1e-4, 1e-2, 5)
    together = swept(rates, "runtime.processes=2")
    assert together.global_batch == 16
    assert together.losses == swept(rates, "train.accumulate=2").losses


@pytest.mark.slow
def test_a_student_of_a_finished_run_sweeps(workdir: Path):
    train(compose_and_check([*SMALL, "evaluators=none", "tracking=none", "train.max_steps=1", "output_dir=teacher"]))
    found = swept(exponential_rates(1e-5, 1e-2, 4), "method=distillation", "method.teacher=teacher")
    assert len(found.losses) == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        ["method=mae", "method.decoder_dim=16", "method.decoder_depth=1", "method.decoder_num_heads=2"],
        ["method=token_labeling", "method.labels=ground_truth", "model=vit_debug"],
        ["optim=sgd", "augment=three_augment"],
        ["optim=muon", "optim.layer_decay=0.7"],
    ],
)
def test_every_method_and_optimizer_sweeps_alike_twice(method: list[str]):
    rates = exponential_rates(1e-5, 1e-2, 4)
    first, second = swept(rates, *method), swept(rates, *method)
    assert len(first.losses) == 4
    assert first.losses == second.losses
    assert first.losses != swept(rates, *method, "seed=1").losses


def test_the_steepest_and_the_least_point_of_a_known_curve_are_found():
    rates = exponential_rates(1e-6, 1.0, 200)
    logs = np.log10(rates)
    falling = 2.3 - 1.5 / (1 + np.exp(-6 * (logs + 3)))  # steepest at 1e-3
    noise = 0.01 * np.random.default_rng(0).standard_normal(200)
    found = suggest(curve(falling + np.exp(4 * (logs + 1.5)) + noise, rates))
    assert found is not None
    assert abs(np.log10(found.steepest) + 3) < 0.15
    exact = rates[int((falling + np.exp(4 * (logs + 1.5))).argmin())]
    assert abs(np.log10(found.least / exact)) < 0.2
    assert found.tenth == pytest.approx(found.least / 10)


def test_noise_and_a_rising_loss_suggest_nothing():
    rates = exponential_rates(1e-6, 1.0, 100)
    noise = np.random.default_rng(0).standard_normal(100)
    assert suggest(curve(2.3 + 0.1 * noise, rates)) is None
    assert suggest(curve(np.linspace(1, 3, 100), rates)) is None


def test_means_and_divergence_are_those_of_slow_sums():
    losses = np.random.default_rng(0).uniform(1, 2, 30)
    losses[20:] *= 9
    place = np.arange(30)
    slow = [np.average(losses, weights=np.exp(-0.5 * ((place - i) / 2) ** 2)) for i in place]
    np.testing.assert_allclose(centred_mean(losses, width=2.0), slow)
    watch, keep, least, said = Divergence(memory=4.0), 0.75, np.inf, []
    for i in range(30):
        mean = np.average(losses[: i + 1], weights=keep ** np.arange(i, -1, -1))
        least = min(least, mean)
        said.append(mean > 4 * least)
        assert watch.diverged(losses[i]) == said[-1]
    assert any(said)


@pytest.mark.parametrize("optim", ["adamw", "lamb", "adamw optim.lr=0.1"])
def test_what_is_pasted_gives_the_rate_it_stands_for(optim: str):
    config = compose_and_check([*SMALL, *f"optim={optim}".split()])
    pasted = overrides_for(1.234e-3, config.optim, global_batch=96)
    assert len(pasted) == (1 if "lr=" in optim else 2)
    for override in pasted:
        given = compose_and_check([*SMALL, f"optim={optim.split()[0]}", override]).optim
        rates = {key: given[key] for key in ("lr", "base_lr", "reference_batch")}
        assert resolve_lr(**rates, global_batch=96) == pytest.approx(1.234e-3, rel=5e-3)


def test_a_sweep_into_infinity_ends_and_leaves_a_picture_and_numbers_only(workdir: Path, capsys):
    span = ["lr_min=1e-3", "lr_max=1e30", "steps=20", "output=found"]
    assert main([*SMALL, "optim=sgd", "train.clip_norm=null", *span], None) == 0
    assert sorted(p.relative_to(workdir).as_posix() for p in workdir.rglob("*") if p.is_file()) == [
        "found/lr_finder.json",
        "found/lr_finder.png",
    ]
    numbers = json.loads((workdir / "found" / "lr_finder.json").read_text())
    assert numbers["diverged"]
    assert len(numbers["losses"]) < 20
    assert np.isfinite(numbers["losses"]).all()
    assert numbers["ended"] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["lr_min=1", "lr_max=0.1"], "a smaller lr_min"),
        (["lr_max=fast"], "lr_max=fast: expected a number above 0"),
        (["steps=3"], "steps=3: expected a whole number of at least 10"),
        (["optim.lrr=1"], "Did you mean 'optim.lr'"),
        (["output=taken"], "is a file"),
    ],
)
def test_bad_input_is_named_before_anything_is_built(workdir: Path, given: list[str], said: str):
    (workdir / "taken").write_text("")
    with pytest.raises(UserError, match=said):
        main([*SMALL, *given], None)
