"""Mixing and erasing of batches: against timm 0.3.2's results, slow obvious versions, and their own distributions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vitexp import mixing
from vitexp.config import compose_and_check
from vitexp.errors import UserError
from vitexp.losses import classification_loss
from vitexp.mixing import InTurn, Mix, RandomErasing, RolledMixup, cutmix, mix_each, mixup, mixup_rolled, one_hot
from vitexp.types import Batch

# timm 0.3.2's Mixup(0.8, 1.0, prob 1, switch 0.5, smoothing 0.1, 10 classes) and the decisions it had drawn.
GOLDEN = np.load(Path(__file__).parent / "golden" / "mixing_timm032.npz")
CASES = sorted({key.split("/")[0] for key in GOLDEN if "/" in key})
EVERYTHING = Mix(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1)


def batch_of(count: int, height: int = 16, width: int = 16, num_classes: int = 10, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, height, width, generator=generator)
    return Batch(images, torch.randint(num_classes, (count,), generator=generator), torch.arange(count))


def golden() -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = torch.from_numpy(GOLDEN["images"]), torch.from_numpy(GOLDEN["labels"])
    return images, one_hot(labels, 10, smoothing=0.1)


def assert_close(found: tuple[torch.Tensor, torch.Tensor], case: str) -> None:
    for tensor, name in zip(found, ("images", "targets"), strict=True):
        torch.testing.assert_close(tensor, torch.from_numpy(GOLDEN[f"{case}/{name}"]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("batch")])
def test_one_decision_a_batch_gives_timms_pictures_and_targets(case: str) -> None:
    (lam,), (box,) = GOLDEN[f"{case}/lam"], GOLDEN[f"{case}/boxes"].tolist()
    assert_close(cutmix(*golden(), box=tuple(box)) if any(box) else mixup(*golden(), lam=float(lam)), case)


@pytest.mark.parametrize("case", CASES)
def test_decisions_for_each_picture_give_timms_pictures_and_targets(case: str) -> None:
    lam, boxes = GOLDEN[f"{case}/lam"], GOLDEN[f"{case}/boxes"]
    if case.startswith("pair"):
        lam, boxes = np.concatenate([lam, lam[::-1]]), np.concatenate([boxes, boxes[::-1]])
    lam, boxes = np.broadcast_to(lam, 4).copy(), np.broadcast_to(boxes, (4, 4)).copy()
    assert_close(mix_each(*golden(), lam=torch.from_numpy(lam).float(), boxes=torch.from_numpy(boxes)), case)


def test_boxes_are_timms_for_the_shares_and_centres_it_drew() -> None:
    centre = (GOLDEN["drawn_centres"] + 0.5) / 16
    assert np.array_equal(mixing.boxes_of(GOLDEN["drawn_lam"], 16, 16, centre=centre), GOLDEN["drawn_boxes"])
    ends = mixing.boxes_of(np.array([1.0, 0.0]), 5, 8, centre=np.array([[0.0, 0.0], [np.nextafter(1, 0), 0.5]]))
    assert ends.tolist() == [[0, 0, 0, 0], [2, 5, 0, 8]], "nothing for a share of 1"


def test_the_losses_of_mixed_and_smoothed_targets_are_timms() -> None:
    logits, labels = torch.from_numpy(GOLDEN["logits"]), torch.from_numpy(GOLDEN["labels"])
    mixed = classification_loss(logits, torch.from_numpy(GOLDEN["batch0/targets"]))
    assert mixed.item() == pytest.approx(GOLDEN["soft_target_ce"].item(), abs=1e-6)
    only_smoothed = Mix(mixup_alpha=0, cutmix_alpha=0, label_smoothing=0.1)
    batch = only_smoothed(Batch(torch.zeros(4, 3, 2, 2), labels, labels), num_classes=10, seed=0)
    expected = GOLDEN["label_smoothing_ce_0.1"].item()
    assert classification_loss(logits, batch.targets).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("count", [1, 4, 5])
def test_mixing_equals_the_slow_loop_for_even_and_odd_batches_and_oblong_pictures(count: int) -> None:
    batch = batch_of(count, 6, 11)
    targets = one_hot(batch.targets, 10, smoothing=0.0)
    rng = np.random.default_rng(3)
    lam = rng.random(count).astype(np.float32)
    boxes = np.stack([rng.integers(0, 3, count), rng.integers(3, 7, count), rng.integers(0, 5, count)], 1)
    boxes = np.concatenate([boxes, rng.integers(5, 12, (count, 1))], 1)
    images, labels = batch.images.numpy(), targets.numpy()

    def slow(lam: np.ndarray, boxes: np.ndarray, partner: Any) -> tuple[np.ndarray, np.ndarray]:
        pictures, shares = images.copy(), labels.copy()
        for i in range(count):
            top, bottom, left, right = boxes[i]
            inside = (bottom - top) * (right - left) / 66
            pictures[i] = lam[i] * images[i] + (1 - lam[i]) * images[partner(i)]
            pictures[i][:, top:bottom, left:right] = images[partner(i)][:, top:bottom, left:right]
            own = lam[i] * (1 - inside)
            shares[i] = own * labels[i] + (1 - own) * labels[partner(i)]
        return pictures, shares

    def check(found: tuple[torch.Tensor, torch.Tensor], expected: tuple[np.ndarray, np.ndarray]) -> None:
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one.numpy(), other, rtol=0, atol=1e-6)

    ones, nowhere, everyone = np.ones(count), np.zeros((count, 4), np.int64), np.full(count, 0.3)
    mirror, before = (lambda i: count - 1 - i), (lambda i: i - 1)
    both = mix_each(batch.images, targets, lam=torch.from_numpy(lam), boxes=torch.from_numpy(boxes))
    check(both, slow(lam, boxes, mirror))
    check(mixup(batch.images, targets, lam=0.3), slow(everyone, nowhere, mirror))
    check(mixup_rolled(batch.images, targets, lam=0.3), slow(everyone, nowhere, before))
    check(cutmix(batch.images, targets, box=(1, 5, 2, 11)), slow(ones, np.tile([1, 5, 2, 11], (count, 1)), mirror))


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("count", [1, 5, 8])
def test_targets_stay_probabilities_and_a_middle_picture_stays_itself(mode: Any, count: int) -> None:
    mix = Mix(mixup_alpha=0.8, cutmix_alpha=1.0, mode=mode, label_smoothing=0.1)
    for seed in range(20):
        batch = batch_of(count)
        before = batch.images.clone()
        mixed = mix(batch, num_classes=10, seed=seed)
        assert mixed.images.shape == before.shape
        torch.testing.assert_close(mixed.targets.sum(1), torch.ones(count))
        assert (mixed.targets > 0).all()
        assert torch.equal(batch.images, before), "the given pictures are not changed"
        assert mixed.index is batch.index
        if count % 2:
            torch.testing.assert_close(mixed.images[count // 2], before[count // 2])
            own = one_hot(batch.targets, 10, smoothing=0.1)[count // 2]
            torch.testing.assert_close(mixed.targets[count // 2], own)


def test_partners_of_a_pair_share_one_decision() -> None:
    mix = Mix(mixup_alpha=0.8, cutmix_alpha=1.0, mode="pair")
    batch = Batch(torch.arange(6.0).view(6, 1, 1, 1).expand(6, 3, 8, 8), torch.arange(6), torch.arange(6))
    mixed = mix(batch, num_classes=6, seed=1)
    torch.testing.assert_close(mixed.images + mixed.images.flip(0), torch.full((6, 3, 8, 8), 5.0))
    assert len({round(float(share), 4) for share in mixed.targets.diagonal()}) == 3, "three pairs, three shares"


def test_decisions_are_as_likely_as_asked_over_ten_thousand_draws() -> None:
    mix = Mix(mixup_alpha=0.8, cutmix_alpha=1.0, prob=0.7, switch_prob=0.3)
    lam, boxes = mix.draw(np.random.default_rng(0), 10_000, 224, 224)
    cut, mixed = (boxes[:, 0] < boxes[:, 1]) & (boxes[:, 2] < boxes[:, 3]), lam < 1
    assert not (cut & mixed).any()
    assert cut.mean() == pytest.approx(0.7 * 0.3, abs=0.015)
    assert mixed.mean() == pytest.approx(0.7 * 0.7, abs=0.015)
    assert lam[mixed].mean() == pytest.approx(0.5, abs=0.02)
    assert lam[mixed].var() == pytest.approx(1 / (4 * (2 * 0.8 + 1)), abs=0.005)  # Beta(0.8, 0.8)
    for alphas, always in (((0.8, 0.0), "mixed"), ((0.0, 1.0), "cut")):
        only = Mix(mixup_alpha=alphas[0], cutmix_alpha=alphas[1])
        lam, boxes = only.draw(np.random.default_rng(0), 1000, 224, 224)
        assert (lam < 1).mean() == float(always == "mixed")
        area = (boxes[:, 1] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 2])
        assert (area > 0).mean() == pytest.approx(float(always == "cut"), abs=0.03)


def test_boxes_have_the_exact_area_distribution() -> None:
    height, width, lam = 40, 60, 0.51  # sides of 28 and 42 before clipping: every centre is as likely
    centre = np.random.default_rng(0).random((20_000, 2))
    boxes = mixing.boxes_of(np.full(20_000, lam), height, width, centre=centre)

    def clipped(side: int, half: int) -> np.ndarray:
        return np.array([min(c + half, side) - max(c - half, 0) for c in range(side)])

    tall, wide = clipped(40, 14), clipped(60, 21)
    assert (boxes[:, 1] - boxes[:, 0]).mean() == pytest.approx(tall.mean(), abs=0.15)
    assert (boxes[:, 3] - boxes[:, 2]).mean() == pytest.approx(wide.mean(), abs=0.2)
    area = (boxes[:, 1] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 2])
    expected = np.outer(tall, wide).ravel()
    for share in (0.05, 0.25, 0.5, 0.75, 0.95):
        assert np.quantile(area, share) == pytest.approx(np.quantile(expected, share), rel=0.03)
    assert boxes.min() == 0
    assert boxes[:, 1].max() == 40
    assert boxes[:, 3].max() == 60


def test_rolled_mixup_keeps_the_larger_share_and_takes_the_picture_before() -> None:
    batch = Batch(torch.arange(5.0).view(5, 1, 1, 1).expand(5, 1, 2, 2), torch.arange(5), torch.arange(5))
    shares = []
    for seed in range(500):
        mixed = RolledMixup(alpha=0.2)(batch, num_classes=5, seed=seed)
        lam = float(mixed.targets[0, 0])
        assert lam >= 0.5
        torch.testing.assert_close(mixed.targets, lam * torch.eye(5) + (1 - lam) * torch.eye(5).roll(1, 0))
        torch.testing.assert_close(mixed.images[2], torch.full((1, 2, 2), 2 * lam + 1 - lam))
        shares.append(lam)
    draws = np.random.default_rng(1).beta(0.2, 0.2, 100_000)
    assert np.mean(shares) == pytest.approx(np.maximum(draws, 1 - draws).mean(), abs=0.02)


def test_erased_boxes_have_the_asked_probability_areas_and_aspects() -> None:
    height, width, count = 200, 300, 20_000
    erased, boxes = RandomErasing(prob=0.25).draw(np.random.default_rng(0), count, height, width)
    assert len(erased) / count == pytest.approx(0.25, abs=0.01)
    assert (np.diff(erased) > 0).all()
    top, bottom, left, right = boxes.T
    assert boxes.min() == 0
    assert bottom.max() == height
    assert right.max() == width
    tall, wide = bottom - top, right - left
    share = tall * wide / (height * width)
    assert share.min() > 0.02 * 0.98
    assert share.max() < 1 / 3 * 1.02
    aspect = tall / wide
    assert aspect.min() > 0.3 * 0.95
    assert aspect.max() < 10 / 3 * 1.05
    # timm's loop, one picture at a time
    rng, loop = np.random.default_rng(1), []
    while len(loop) < 5000:
        area, ratio = rng.uniform(0.02, 1 / 3) * height * width, np.exp(rng.uniform(*np.log([0.3, 1 / 0.3])))
        h, w = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if h < height and w < width:
            loop.append((h, w, rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)))
    for found, expected in zip((tall, wide, top, left), np.array(loop).T, strict=True):
        for level in (0.1, 0.5, 0.9):
            assert np.quantile(found, level) == pytest.approx(np.quantile(expected, level), abs=6)


def test_erasing_puts_noise_inside_the_boxes_and_leaves_the_rest() -> None:
    erase, batch = RandomErasing(prob=0.5), batch_of(64, 32, 40)
    before = batch.images.clone()
    erase(batch, num_classes=0, seed=5)
    changed = batch.images != before
    numbers, boxes = erase.draw(np.random.default_rng(5), 64, 32, 40)
    expected = torch.zeros(64, 3, 32, 40, dtype=torch.bool)
    for number, (top, bottom, left, right) in zip(numbers, boxes, strict=True):
        expected[number, :, top:bottom, left:right] = True
    assert torch.equal(changed, expected)
    noise = batch.images[changed]
    assert noise.mean().abs() < 0.03
    assert noise.std().item() == pytest.approx(1, abs=0.03)
    assert len(noise.unique()) > 0.99 * len(noise), "a number for each pixel and channel"
    assert 0.35 < len(numbers) / 64 < 0.65
    untouched = batch_of(8)
    kept = untouched.images.clone()
    RandomErasing(prob=0.0)(untouched, num_classes=0, seed=5)
    assert torch.equal(untouched.images, kept)


def test_a_seed_decides_everything_and_global_generators_are_left_alone() -> None:
    steps = InTurn([RandomErasing(prob=0.5), EVERYTHING])
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = steps(batch_of(8), num_classes=10, seed=7)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    torch.manual_seed(2)
    again, other = steps(batch_of(8), num_classes=10, seed=7), steps(batch_of(8), num_classes=10, seed=8)
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.targets, again.targets)
    assert not torch.equal(first.images, other.images)


def test_each_step_of_several_has_random_numbers_of_its_own() -> None:
    seeds = []

    def note(batch: Batch, *, num_classes: int, seed: int) -> Batch:
        seeds.append(seed)
        return batch

    InTurn([note, note])(batch_of(2), num_classes=3, seed=1)
    InTurn([note, note])(batch_of(2), num_classes=3, seed=2)
    assert len(set(seeds)) == 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mix(mixup_alpha=-1, cutmix_alpha=1), "mixup_alpha=-1"),
        (lambda: Mix(mixup_alpha=1, cutmix_alpha=1, prob=2), "prob=2"),
        (lambda: Mix(mixup_alpha=1, cutmix_alpha=1, mode="all"), "mode=all"),
        (lambda: RolledMixup(alpha=0), "alpha=0"),
        (lambda: RandomErasing(prob=-0.1), "prob=-0.1"),
        (lambda: RandomErasing(prob=0.5, area=(0.5, 0.2)), r"area=\[0.5, 0.2\]"),
        (lambda: EVERYTHING(batch_of(2), num_classes=0, seed=0), "the data has none"),
        (lambda: InTurn([EVERYTHING, EVERYTHING])(batch_of(2), num_classes=10, seed=0), "mixes labels twice"),
    ],
)
def test_senseless_settings_are_refused_by_name(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


# ---- In a run --------------------------------------------------------------------------------------------------------

RUN = ["model=vit_debug", "data=fake", "data.flip=0.5", "data.num_train=40", "data.num_val=12", "tracking=none"]
RUN += ["runtime.device=cpu", "train.batch_size=5", "train.accumulate=2", "train.epochs=3", "train.log_every=1"]


def final_state(folder: Path) -> dict[str, Any]:
    return torch.load(max((folder / "checkpoints").glob("step_*")) / "state.pt", weights_only=True)


def train_rows(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k.startswith("train/")} for row in found if "train/loss" in row]


def assert_equal(one: Any, other: Any, where: str = "state") -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for number, pair in enumerate(zip(one, other, strict=True)):
            assert_equal(*pair, f"{where}.{number}")
    else:
        assert one == other, where


@pytest.mark.parametrize("augment", ["deit", "big_vision", "three_augment_src"])
def test_a_resumed_run_with_all_of_it_on_is_the_same_bit_for_bit(augment: str, tmp_path: Path) -> None:
    from vitexp.train import train

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    common = [*RUN, f"augment={augment}", "model.drop_path=0.2", "evaluators=none"]
    train(compose_and_check([*common, f"output_dir={whole}", "train.max_steps=6", "data.cache=memory"]))
    streamed = [*common, f"output_dir={parts}", "data.cache=none", "train.workers=2"]
    train(compose_and_check([*streamed, "train.max_steps=3"]))
    train(compose_and_check([*streamed, "train.max_steps=6"]))
    assert len(train_rows(whole)) == 6
    assert train_rows(whole) == train_rows(parts)
    assert_equal(final_state(whole), final_state(parts))


def test_training_batches_are_mixed_each_with_its_own_seed_and_evaluation_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vitexp.train import train

    seeds, mix = [], Mix.__call__
    # At its end a run may draw a mixed batch, which is no training batch.
    monkeypatch.setattr("vitexp.reports.draw_pictures", lambda *given: None, raising=False)

    def note(self: Mix, batch: Batch, *, num_classes: int, seed: int) -> Batch:
        assert batch.images.dtype == torch.float32
        assert num_classes == 10
        seeds.append(seed)
        return mix(self, batch, num_classes=num_classes, seed=seed)

    monkeypatch.setattr(Mix, "__call__", note)
    train(compose_and_check([*RUN, "augment=three_augment", "train.max_steps=4", f"output_dir={tmp_path / 'run'}"]))
    assert len(seeds) == len(set(seeds)) == 8, "four updates of two micro-batches"


@pytest.mark.parametrize("augment", ["none", "deit", "vit_jax", "big_vision", "three_augment", "mae_finetune"])
def test_an_option_trains_two_steps_of_gray_pictures_too(augment: str, workdir: Path) -> None:
    from vitexp.train import train

    gray = ["data.channels=1", "model.in_channels=1", "data.mean=[0.5]", "data.std=[0.5]", "train.batch_size=3"]
    train(compose_and_check(["debug=fast", "model=vit_debug", f"augment={augment}", "output_dir=run", *gray]))
    losses = [row["train/loss"] for row in train_rows(Path("run"))]
    assert len(losses) == 2
    assert np.isfinite(losses).all()


def test_smoothing_twice_is_refused(workdir: Path) -> None:
    from vitexp.run import build_run

    config = compose_and_check(["debug=fast", "model=vit_debug", "augment=deit", "method.label_smoothing=0.1"])
    with pytest.raises(UserError, match=r"method\.label_smoothing=0\.1, augment\.label_smoothing=0\.1"):
        build_run(config)
