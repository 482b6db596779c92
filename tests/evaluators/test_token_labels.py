"""What is drawn of token labeling is what training shows and what the model says, and drawing changes nothing."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.made_up_store import made_up_store
from tests.data.test_geometry import TRANSFORMS, picture_of_places
from vitexp import reports
from vitexp.config import compose_and_check
from vitexp.data.images import ArrayImages
from vitexp.data.label_store import open_store
from vitexp.data.loader import Split, open_split
from vitexp.data.sampler import Position
from vitexp.data.transforms import ResizedCropFlip, Transform
from vitexp.evaluators.token_labels import labelled_pictures
from vitexp.methods.token_labeling import TokenLabeling
from vitexp.mixing import InTurn, Mix, RandomErasing
from vitexp.models.lvvit import LVViT
from vitexp.models.timm_backbone import TimmBackbone
from vitexp.models.vit import VisionTransformer
from vitexp.plots import LabelledPicture, PlaceLabels, token_labels
from vitexp.run import open_source
from vitexp.train import train
from vitexp.types import Batch, LabelMaps

CLASSES = [f"class {c}" for c in range(7)]
SHAPE = {"image_size": (24, 32), "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 7}
PIXELS = {"mean": [0.5], "std": [0.25]}


def vit(**settings: Any) -> TokenLabeling:
    torch.manual_seed(0)
    method = TokenLabeling(VisionTransformer(**SHAPE | {"dropout": 0.5}), label_smoothing=0.1, **settings)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return method.train()


def pictures_of_places(count: int = 11, size: tuple[int, int] = (48, 40)) -> ArrayImages:
    pictures = np.stack([picture_of_places(*size)] * count)
    return ArrayImages(pictures, np.arange(count) % 7, [f"{i}.png" for i in range(count)])


def split_of(place: Path, images: ArrayImages, transform: Transform, *, crop: str = "whole", cache: str) -> Split:
    store = open_store(made_up_store(place / "store", images, CLASSES, grid=(3, 5)))
    store = replace(store, head=store.head | {"crop": crop})
    rows = store.rows_for(images, classes=CLASSES)
    return open_split(images, transform, cache=cache, progress=False, maps=(store, rows))


def resized() -> ResizedCropFlip:
    return ResizedCropFlip((24, 32), area=(0.2, 1.0))


def best(shares: torch.Tensor, grid: tuple[int, int]) -> PlaceLabels:
    return PlaceLabels(shares.argmax(1).view(grid).numpy(), shares.amax(1).view(grid).detach().numpy())


def assert_places(found: PlaceLabels | None, wanted: PlaceLabels) -> None:
    assert found is not None
    np.testing.assert_array_equal(found.classes, wanted.classes)
    np.testing.assert_allclose(found.shares, wanted.shares, rtol=1e-4)


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_labels_are_the_trainings_and_answers_those_to_the_mixed_picture(tmp_path: Path, cache: str) -> None:
    images, method = pictures_of_places(), vit()
    split = split_of(tmp_path, images, resized(), cache=cache)
    mix = InTurn([RandomErasing(prob=1.0), Mix(mixup_alpha=0.8, cutmix_alpha=0.0)])
    found = labelled_pictures(method, split, images, mix=mix, seed=3, **PIXELS)
    assert [row.own for row in found] == [0, 2, 4, 6, 1, 3]  # of pictures 0, 2, 4, 6, 8, 10
    assert len({row.crop.tobytes() for row in found}) == 6

    # The same batch by hand; the method's own forward is told the box.
    pictures, targets, *maps = map(torch.from_numpy, split.fetch_with_maps(Position(3, 0, np.arange(0, 11, 2))))
    batch = mix(
        Batch((pictures / 255 - 0.5) / 0.25, targets, torch.arange(6), LabelMaps(*maps)),
        num_classes=7,
        seed=_seed_of_the_first(3),
    )
    assert batch.maps is not None
    assert batch.maps.lam < 1
    np.testing.assert_allclose(np.stack([row.crop for row in found]), batch.images.numpy(), atol=1e-5)
    label, tokens = method.targets(batch, grids=[(3, 4)])
    method.eval()
    backbone: Any = method.backbone
    for i, row in enumerate(found):
        assert_places(row.tokens, best(tokens[i], (3, 4)))
        top, bottom, left, right = (np.array(row.box) * [24, 24, 32, 32]).round().astype(int)
        exchanged = batch.images[i].clone()
        exchanged[:, top:bottom, left:right] = batch.images[5 - i, :, top:bottom, left:right]
        assert not torch.equal(exchanged, batch.images[i])
        np.testing.assert_allclose(row.mixed, exchanged.numpy(), atol=1e-5)
        features = backbone.encode(backbone.embed(exchanged[None]))
        assert method.token_head is not None
        assert_places(row.said, best(method.token_head(features.patches)[0].softmax(1), (3, 4)))
        answer = backbone(exchanged[None]).softmax(1)[0]
        np.testing.assert_allclose(row.answer, answer.detach().numpy(), rtol=1e-4, atol=1e-6)
        kept = 1 - (bottom - top) * (right - left) / (24 * 32)
        np.testing.assert_allclose(row.label, kept * label[i] + (1 - kept) * label[5 - i], rtol=1e-4)


def _seed_of_the_first(seed: int) -> int:
    from vitexp.seeding import derive_seed

    return derive_seed(seed, 0)


def test_the_map_is_that_of_the_store_cell_by_cell(tmp_path: Path) -> None:
    images, method = pictures_of_places(), vit()
    split = split_of(tmp_path, images, resized(), cache="none")
    store = open_store(tmp_path / "store")
    for row, number in zip(
        labelled_pictures(method, split, images, mix=None, seed=0, **PIXELS), range(0, 11, 2), strict=True
    ):
        for cell in np.ndindex(3, 5):
            logits = np.zeros(7)
            logits[store.numbers[number, :, cell[0], cell[1]]] = store.values[number, :, cell[0], cell[1]]
            shares = np.exp(logits) / np.exp(logits).sum()
            assert row.map.classes[cell] == shares.argmax()
            assert row.map.shares[cell] == pytest.approx(shares.max(), rel=1e-4)
        np.testing.assert_array_equal(row.original, images.read(number).transpose(2, 0, 1))


@pytest.mark.parametrize("name", ["pad", "resized", "moved, cut", "moved twice"])
@pytest.mark.parametrize("crop", ["whole", "center"])
def test_the_outline_lies_where_the_pixels_come_from(tmp_path: Path, name: str, crop: str) -> None:
    """The pictures' colours say of every pixel where in the picture it was."""
    images, transform = pictures_of_places(40), TRANSFORMS[name]
    split = split_of(tmp_path, images, transform, crop=crop, cache="none")
    height, width = transform.size if hasattr(transform, "size") else transform.crop.size
    method = TokenLabeling(
        VisionTransformer(**SHAPE | {"image_size": (height, width), "patch_size": 4, "depth": 1}), mix_tokens=False
    )
    errors = []
    for row in labelled_pictures(method, split, images, mix=None, seed=1, pictures=20, **PIXELS):
        pixels, covered = (row.crop * 0.25 + 0.5) * 255, row.original
        first, down, across = row.corners[0], row.corners[3] - row.corners[0], row.corners[1] - row.corners[0]
        for i in range(1, height - 1, 4):
            for j in range(1, width - 1, 4):
                if pixels[2, i - 1 : i + 2, j - 1 : j + 2].min() < 250:
                    continue  # nothing of the picture, or its edge
                at = first + (i + 0.5) / height * down + (j + 0.5) / width * across
                pixel = np.clip(np.floor(at * covered.shape[1:]), 0, np.array(covered.shape[1:]) - 1).astype(int)
                errors.append(np.abs(covered[:2, pixel[0], pixel[1]] - pixels[:2, i, j]).max() / 200)
    assert len(errors) > 300
    assert np.mean(errors) < 0.02
    assert np.percentile(errors, 98) < 0.06


def test_nothing_that_training_depends_on_is_touched(tmp_path: Path) -> None:
    images = pictures_of_places()
    torch.manual_seed(0)
    method = TokenLabeling(LVViT(**SHAPE, stem_channels=4, drop_path=0.3)).train()
    method.backbone.patch_embed.bn1.eval()
    split = split_of(tmp_path, images, TRANSFORMS["moved, cut"], cache="none")

    def state() -> list[Any]:
        weights = [value.clone() for value in method.state_dict().values()]
        modes = [module.training for module in method.modules()]
        numpy = np.random.get_state()  # noqa: NPY002
        return [*weights, modes, torch.get_rng_state(), random.getstate(), numpy[1].tolist(), numpy[2:]]

    before = state()
    mix = Mix(mixup_alpha=0.8, cutmix_alpha=1.0)
    one, other = (labelled_pictures(method, split, images, mix=mix, seed=0, **PIXELS) for _ in range(2))
    for was, now in zip(before, state(), strict=True):
        assert torch.equal(was, now) if isinstance(was, torch.Tensor) else was == now
    for row, again in zip(one, other, strict=True):
        assert (row.crop == again.crop).all()
        assert (row.answer == again.answer).all()
    assert all(parameter.grad is None for parameter in method.parameters())


def test_each_kind_of_labels_is_shown_as_it_is(tmp_path: Path) -> None:
    images, transform = pictures_of_places(3), ResizedCropFlip(32)
    split = split_of(tmp_path, images, transform, cache="memory")

    def shown(method: TokenLabeling) -> list[LabelledPicture]:
        rows = labelled_pictures(method, split, images, mix=None, seed=0, **PIXELS)
        token_labels(rows, CLASSES, tmp_path / "t.png", pixel_mean=PIXELS["mean"], pixel_std=PIXELS["std"])
        return rows

    net = TimmBackbone("test_resnet", image_size=32, num_classes=7)
    rows = shown(TokenLabeling(net, labels="picture"))
    assert len(rows) == 3
    assert rows[0].tokens is rows[0].mixed is rows[0].said is None
    alone = shown(TokenLabeling(VisionTransformer(**SHAPE | {"image_size": 32}), mix_tokens=False))
    assert alone[0].mixed is None
    assert alone[0].said is not None
    tiny = shown(TokenLabeling(VisionTransformer(**SHAPE | {"image_size": 32, "patch_size": 32})))
    assert tiny[0].mixed is None, "a box in a single token is empty"


RUN = [
    *("model=lvvit", "model.image_size=32", "model.patch_size=8", "model.embed_dim=16", "model.depth=1"),
    *("model.num_heads=2", "model.stem_channels=4", "model.drop_path=0.2", "data=fake", "data.num_train=16"),
    *("data.num_val=8", "train.batch_size=8", "train.epochs=2", "augment=lvvit", "tracking=none"),
    *("runtime.device=cpu", "runtime.precision=fp32", "train.workers=0", "method=token_labeling"),
]


@pytest.fixture
def alone(monkeypatch) -> None:
    """Whatever is due, and no other picture: they take most of a short run's time."""
    monkeypatch.setattr(reports, "PICTURES_EVERY_S", 0.0)
    monkeypatch.setattr(reports, "draw_pictures", lambda run, folder: None)
    for name in ("curves", "confusion_matrix", "reliability"):
        monkeypatch.setattr(reports.plots, name, lambda *given: None)


@pytest.mark.usefixtures("alone")
def test_a_run_draws_them_now_and_then_and_learns_the_same_without(tmp_path: Path, monkeypatch) -> None:
    source = open_source(compose_and_check([*RUN, "train.token_labels=none"]))
    store = made_up_store(tmp_path / "store", source.train, source.classes)
    train(compose_and_check([*RUN, f"train.token_labels={store}", f"output_dir={tmp_path / 'drawn'}"]))
    found = sorted((tmp_path / "drawn" / "plots" / "token_labels").iterdir())
    assert [path.name for path in found] == ["epoch_0001.0.png", "epoch_0002.0.png"]
    assert found[0].read_bytes() != found[1].read_bytes()
    assert Image.open(found[0]).size == Image.open(found[1]).size
    monkeypatch.setattr(reports, "draw_token_labels", lambda run, folder, *, epoch: None)
    train(compose_and_check([*RUN, f"train.token_labels={store}", f"output_dir={tmp_path / 'not'}"]))
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("drawn", "not")]
    assert weights[0] == weights[1]


@pytest.mark.usefixtures("alone")
def test_a_picture_that_cannot_be_drawn_fails_no_run(tmp_path: Path, monkeypatch) -> None:
    source = open_source(compose_and_check([*RUN, "train.token_labels=none"]))
    store = made_up_store(tmp_path / "store", source.train, source.classes)

    def broken(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(reports, "labelled_pictures", broken)
    settings = [*RUN, f"train.token_labels={store}", f"output_dir={tmp_path / 'run'}"]
    assert train(compose_and_check(settings))["step"] == 4
    assert (tmp_path / "run" / "train.log").read_text().count("is drawn: no room") == 2
