"""Token labeling against slow obvious versions: of a forward with a given box, and of labels from stored maps."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.data.test_geometry import Maps, moving, walked_back
from tests.data.test_token_labels import slow_labels
from vitexp.config import compose_and_check
from vitexp.data.augmentations import Augmented, AugmentedWhole, RandAugment
from vitexp.data.geometry import Places
from vitexp.data.loader import open_split, train_batches
from vitexp.data.sources.fake import FakeImages
from vitexp.data.transforms import PadCropFlip, ResizedCropFlip, TrackedTransform
from vitexp.errors import UserError
from vitexp.methods.token_labeling import TokenLabeling
from vitexp.mixing import InTurn, Mix, RandomErasing, RolledMixup, one_hot
from vitexp.models.lvvit import LVViT
from vitexp.models.timm_backbone import TimmBackbone
from vitexp.models.vit import VisionTransformer
from vitexp.seeding import uniforms
from vitexp.types import Batch, LabelMaps, Progress

START = Progress(0, 1, 0.0, 1.0)
GRID, CLASSES = (2, 4), 6
MOVES_MOST = "rand-m9-n2-mstd0.5-inc1"  # each of two operations with chance 0.5


def lvvit(num_classes: int = CLASSES, **settings: Any) -> LVViT:
    torch.manual_seed(0)
    return LVViT(
        **{"image_size": (16, 32), "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "stem_channels": 8}
        | {"num_classes": num_classes}
        | settings
    )


def vit(num_classes: int = CLASSES, **settings: Any) -> VisionTransformer:
    torch.manual_seed(0)
    shape = {"image_size": (16, 32), "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "init": "timm"}
    return VisionTransformer(**shape | {"num_classes": num_classes} | settings)


def some_batch(count: int = 5, num_classes: int = CLASSES, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.rand(count, num_classes, 3, 5, generator=generator).argsort(dim=1)[:, :3].int()
    values = 4 * torch.randn(count, 3, 3, 5, generator=generator)
    boxes = torch.rand(count, 4, generator=generator) * torch.tensor([0.4, 0.4, 0.2, 0.2]) + torch.tensor(
        [0, 0, 0.4, 0.4]
    )
    maps = LabelMaps(values.half(), numbers, boxes, torch.arange(count) % 2 == 0)
    images = torch.randn(count, 3, 16, 32, generator=generator)
    return Batch(images, torch.randint(num_classes, (count,), generator=generator), torch.arange(count), maps)


def slow_targets(batch: Batch, num_classes: int, *, smoothing: float) -> tuple[np.ndarray, np.ndarray]:
    """(b, k) of the crops and (b, n, k) of the tokens, one crop after another."""
    assert batch.maps is not None
    crops, tokens = [], []
    for i in range(len(batch.images)):
        given = [part[i].numpy() for part in (batch.maps.values.float(), batch.maps.numbers, batch.maps.boxes)]
        crops.append(slow_labels(*given, num_classes, (1, 1))[0])
        of_tokens = slow_labels(*given, num_classes, GRID).reshape(*GRID, num_classes)
        tokens.append((of_tokens[:, ::-1] if batch.maps.mirrored[i] else of_tokens).reshape(-1, num_classes))
    off = smoothing / num_classes
    return tuple(np.stack(part) * (1 - smoothing + off) + off for part in (crops, tokens))  # type: ignore[return-value]


def slow_cross_entropy(logits: Tensor, targets: np.ndarray) -> float:
    """Of one row."""
    shifted = logits.detach().double().numpy()
    shifted = shifted - shifted.max()
    return float(-sum(targets * (shifted - math.log(np.exp(shifted).sum()))))


@pytest.mark.parametrize("box", [(0, 2, 1, 3), (1, 2, 0, 4), (1, 1, 0, 0)])
@pytest.mark.parametrize("backbone", [lvvit, vit])
def test_a_forward_with_a_given_box_equals_the_slow_one(backbone: Any, box: tuple[int, int, int, int]) -> None:
    method = TokenLabeling(backbone(), label_smoothing=0.1).train()
    batch, (top, bottom, left, right) = some_batch(), box
    count = len(batch.images)
    inside = [[top <= i < bottom and left <= j < right for j in range(GRID[1])] for i in range(GRID[0])]
    inside = list(itertools.chain(*inside))
    tokens = method.backbone.embed(batch.images)
    mixed = torch.stack(
        [torch.stack([tokens[count - 1 - k if inside[n] else k, n] for n in range(len(inside))]) for k in range(count)]
    )
    features = method.backbone.encode(mixed)
    head = method.backbone.aux_head if method.token_head is None else method.token_head
    of_crops, of_tokens = slow_targets(batch, CLASSES, smoothing=0.1)
    share = sum(inside) / len(inside)
    cls_loss = token_loss = 0.0
    for k in range(count):
        wanted = (1 - share) * of_crops[k] + share * of_crops[count - 1 - k]
        cls_loss += slow_cross_entropy(method.backbone.head(features.cls[k]), wanted) / count
        for n in range(len(inside)):
            owner = count - 1 - k if inside[n] else k  # whose token stands at n of the sequence of k
            loss = slow_cross_entropy(head(features.patches[k, n]), of_tokens[owner, n])
            token_loss += loss / (count * len(inside))
    found = method(batch, START, box=box)
    assert found.loss.item() == pytest.approx(cls_loss + 0.5 * token_loss, rel=1e-5)
    found.loss.backward()
    assert all(p.grad is not None for p in method.parameters())


# ---- labels from stored maps, through both orders of augmentation ----------------------------------------------------
@pytest.mark.parametrize(
    "transform",
    [
        Augmented(PadCropFlip((16, 32)), steps=[moving(RandAugment(MOVES_MOST))]),
        Augmented(ResizedCropFlip((16, 32)), steps=[moving(RandAugment(MOVES_MOST))]),
        AugmentedWhole(
            ResizedCropFlip((16, 32), flip=0.0, interpolation="random"), steps=[moving(RandAugment(MOVES_MOST))]
        ),
    ],
)
def test_labels_after_crop_flip_and_rand_augment_equal_the_slow_ones(transform: TrackedTransform) -> None:
    count, cells, rng = 16, (4, 6), np.random.default_rng(0)
    images = FakeImages(first=0, count=count, num_classes=CLASSES, image_size=(24, 40), channels=3, seed=0)
    numbers = rng.random((count, CLASSES, *cells)).argsort(axis=1)[:, :3].astype(np.int32)
    store = Maps((4 * rng.standard_normal(numbers.shape)).astype(np.float16), numbers)
    split = open_split(images, transform, maps=(store, np.arange(count)))
    batch = next(train_batches(split, batch_size=count, seed=1, workers=0))
    crops, tokens = TokenLabeling(lvvit()).targets(batch, grids=[GRID])

    index = batch.index.numpy()
    u = uniforms(1, 0, index, transform.num_uniforms)
    fixed = np.stack([transform.fixed(images.read(int(i))) for i in index])
    _, places = transform.tracked(fixed, u)
    top, left, tall, wide = transform.view(24, 40)
    cut = [
        top + places.cut[:, 0] * tall,
        left + places.cut[:, 1] * wide,
        places.cut[:, 2] * tall,
        places.cut[:, 3] * wide,
    ]
    places = Places(np.stack(cut, axis=1), places.mirrored, places.moves, places.shown)
    assert 0 < places.moved.sum() < count
    for k, i in enumerate(index.tolist()):
        values, classes, box = store.values[i].astype(float), store.numbers[i], places.cut[k]
        if places.moved[k]:  # a map of the moved picture, cell by cell
            laid = [np.empty_like(part) for part in (values, classes)]
            for row, column in itertools.product(range(cells[0]), range(cells[1])):
                middle = np.array([(row + 0.5) / cells[0], (column + 0.5) / cells[1]])
                back, there = walked_back(middle, places, k, moved=True)
                at = tuple(min(max(int(np.floor(x * n)), 0), n - 1) for x, n in zip(back, cells, strict=True))
                laid[0][:, row, column], laid[1][:, row, column] = values[:, *at] * there, classes[:, *at]
            (values, classes), box = laid, places.shown[k]
            mirrored = False
        else:  # a flip of the whole, then a box of that, or a box and then its flip
            mirrored = bool(places.mirrored[k])
            if not np.array_equal(places.shown[k], [0, 0, 1, 1]):
                values, classes = (part[..., ::-1] if mirrored else part for part in (values, classes))
                box, mirrored = places.shown[k], False
        for grid, found in (((1, 1), crops[k][None]), (GRID, tokens[k])):
            expected = slow_labels(values, classes, box, CLASSES, grid).reshape(*grid, CLASSES)
            expected = expected[:, ::-1] if mirrored else expected
            np.testing.assert_allclose(found.numpy(), expected.reshape(-1, CLASSES), rtol=2e-4, atol=1e-6)


# ---- what the settings do --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("num_classes", [2, 3000])
def test_any_batch_and_any_number_of_classes_is_taught(count: int, num_classes: int) -> None:
    method = TokenLabeling(lvvit(num_classes), label_smoothing=0.1)
    batch = some_batch(count, num_classes)
    output = method(batch, START)
    crops, tokens = method.targets(batch, grids=[GRID])
    assert (crops.shape, tokens.shape) == ((count, num_classes), (count, 8, num_classes))
    assert torch.isfinite(output.loss)
    torch.testing.assert_close(tokens.sum(-1), torch.full((count, 8), 1 + 0.1 / num_classes))


def test_the_box_is_drawn_from_torchs_generator() -> None:
    method, batch = TokenLabeling(lvvit(patch_size=4)).train(), some_batch()

    def loss(seed: int) -> float:
        torch.manual_seed(seed)
        return method(batch, START).loss.item()

    losses = [loss(seed) for seed in range(12)]
    assert losses == [loss(seed) for seed in range(12)]
    assert len(set(losses)) > 5
    method.mix_tokens = False
    assert len({loss(seed) for seed in range(5)}) == 1
    assert loss(0) == pytest.approx(method(batch, START, box=(0, 0, 0, 0)).loss.item())


def test_the_label_of_the_crop_alone_teaches_any_model() -> None:
    resnet = TimmBackbone("resnet18", image_size=(16, 32), num_classes=CLASSES)
    with pytest.raises(UserError, match=r"method\.labels=tokens: TimmBackbone hands out no tokens"):
        TokenLabeling(resnet)
    for backbone in (resnet, lvvit(token_head=False, output="cls"), lvvit(), vit()):
        method, batch = TokenLabeling(backbone, labels="picture", cls_weight=2.0, label_smoothing=0.1), some_batch()
        of_crops, _ = slow_targets(batch, CLASSES, smoothing=0.1)
        logits = backbone.train()(batch.images)
        expected = np.mean([slow_cross_entropy(logits[k], of_crops[k]) for k in range(5)])
        assert method.train()(batch, START).loss.item() == pytest.approx(2 * expected, rel=1e-5)
        assert method.parts == {}
    with pytest.raises(UserError, match=r"model\.token_head=false"):
        TokenLabeling(lvvit(token_head=False, output="cls"))
    with pytest.raises(UserError, match="no classes"):
        TokenLabeling(vit(0))


def test_a_plain_vit_gets_a_classifier_of_tokens_and_is_evaluated_without() -> None:
    method, batch = TokenLabeling(vit()).eval(), some_batch()
    assert method.parts["token_head"] is method.token_head
    assert torch.equal(method.logits(batch.images), method.backbone(batch.images))
    assert TokenLabeling(lvvit()).parts == {}


def test_without_a_teacher_every_token_learns_the_class() -> None:
    batch = replace(some_batch(), maps=None)
    method = TokenLabeling(lvvit(), labels="ground_truth", label_smoothing=0.1).train()
    truth = one_hot(batch.targets, CLASSES, smoothing=0.1)
    crops, tokens = method.targets(batch, grids=[GRID])
    assert torch.equal(crops, truth)
    assert torch.equal(tokens.expand(5, 8, CLASSES), truth[:, None].expand(5, 8, CLASSES))
    mixed = replace(
        batch, targets=torch.eye(CLASSES)[batch.targets].lerp(torch.eye(CLASSES)[batch.targets.flip(0)], 0.3)
    )
    torch.testing.assert_close(method.targets(mixed)[0], truth.lerp(truth.flip(0), 0.3))
    box = (0, 2, 0, 2)
    whole = method(batch, START, box=box).loss
    method.token_weight = 0.0
    cls_alone = method(batch, START, box=box).loss
    method.token_weight, method.cls_weight = 1.0, 0.0
    assert whole.item() == pytest.approx(cls_alone.item() + 0.5 * method(batch, START, box=box).loss.item(), rel=1e-6)
    with pytest.raises(UserError, match="the batch has no label maps"):
        TokenLabeling(lvvit())(batch, START)


def test_the_class_number_may_have_a_share_in_the_crops_label() -> None:
    batch = some_batch(24)
    plain, mixing = (TokenLabeling(lvvit(), ground_truth_mixing=on) for on in (False, True))
    (label, tokens), (found, same) = (method.targets(batch, grids=[GRID]) for method in (plain, mixing))
    truth = one_hot(batch.targets, CLASSES, smoothing=0.0)
    agree = label.argmax(1) == batch.targets
    assert 0 < agree.sum() < 24
    for k in range(24):
        share = 0.5 if agree[k] else 0.9
        torch.testing.assert_close(found[k], share * label[k] + (1 - share) * truth[k])
    assert torch.equal(tokens, same)


def test_the_official_axes_are_another_crop() -> None:
    batch = some_batch()
    ours, theirs = (TokenLabeling(lvvit(), official_axes=on).targets(batch)[0] for on in (False, True))
    assert batch.maps is not None
    boxes, mirrored = batch.maps.boxes, batch.maps.mirrored[:, None]
    assert mirrored.any()
    assert not mirrored.all()
    shown = boxes[:, [1, 0, 3, 2]]  # exchanged as shown, where a mirrored map lies the other way round
    turned = torch.cat([torch.where(mirrored, 1 - shown[:, :2] - shown[:, 2:], shown[:, :2]), shown[:, 2:]], dim=1)
    turned = replace(batch, maps=replace(batch.maps, boxes=turned))
    assert not torch.allclose(ours, theirs)
    torch.testing.assert_close(theirs, TokenLabeling(lvvit()).targets(turned)[0])


# ---- mixing in pixels ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0)])
def test_pixels_mixed_as_a_whole_mix_all_labels_by_the_same_share(mixup: float, cutmix: float) -> None:
    batch, method = some_batch(), TokenLabeling(lvvit(), label_smoothing=0.1)
    steps = InTurn([RandomErasing(prob=0.5), Mix(mixup_alpha=mixup, cutmix_alpha=cutmix)])
    for seed in range(4):
        given = replace(batch, images=batch.images.clone())
        mixed = steps(given, num_classes=CLASSES, seed=seed)
        assert mixed.maps is not None
        lam = mixed.maps.lam
        assert 0 < lam < 1
        torch.testing.assert_close(
            mixed.targets, torch.eye(CLASSES)[batch.targets].lerp(torch.eye(CLASSES)[batch.targets.flip(0)], 1 - lam)
        )
        before, after = (method.targets(one, grids=[GRID]) for one in (batch, mixed))
        for part, expected in zip(after, before, strict=True):
            torch.testing.assert_close(part, lam * expected + (1 - lam) * expected.flip(0))
        assert torch.isfinite(method(mixed, START).loss)


def test_other_kinds_of_mixing_are_refused() -> None:
    for mode in ("pair", "elem"):
        with pytest.raises(UserError, match=f"mode={mode} cannot mix token labels"):
            Mix(mixup_alpha=0.8, cutmix_alpha=0.0, mode=mode)(some_batch(), num_classes=CLASSES, seed=0)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="RolledMixup cannot mix token labels"):
        RolledMixup(alpha=0.2)(some_batch(), num_classes=CLASSES, seed=0)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["method=token_labeling"], r"method\.labels=tokens: needs train\.token_labels=<store>"),
        (["method=token_labeling", "method.labels=picture"], r"method\.labels=picture: needs train\.token_labels"),
        (["method=token_labeling", "method.labels=ground_truth", "train.token_labels=x"], "not read by method.labels"),
        (["train.token_labels=x"], r"train\.token_labels=x: not read by this method"),
        (
            ["method=token_labeling", "train.token_labels=x", "augment=deit", "augment.mix_mode=elem"],
            "one share a batch",
        ),
        (["method=token_labeling", "train.token_labels=x", "augment=big_vision"], "one share a batch"),
        (
            ["method=token_labeling", "train.token_labels=x", "method.labels=token"],
            r"method\.labels=token: expected one",
        ),
    ],
)
def test_settings_that_do_not_fit_together_are_refused_before_data(overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        compose_and_check(overrides)


def test_a_store_that_is_not_there_is_named(tmp_path: Any) -> None:
    from vitexp.run import build_run

    with pytest.raises(UserError, match="there is no such label store"):
        build_run(compose_and_check(["method=token_labeling", f"train.token_labels={tmp_path / 'none'}"]))
