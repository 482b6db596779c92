from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from vitexp.errors import UserError
from vitexp.evaluators import knn
from vitexp.evaluators.knn import Knn, class_votes, nearest_neighbours, place_of_truth
from vitexp.methods.supervised import Supervised
from vitexp.models.timm_backbone import TimmBackbone
from vitexp.models.vit import VisionTransformer
from vitexp.types import Batch


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def vit(**options) -> VisionTransformer:
    torch.manual_seed(0)
    given = {"image_size": (8, 12), "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 7}
    return VisionTransformer(**given, dropout=0.5, **options)


def splits(classes: int = 7, train: int = 60, val: int = 23) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Pictures that differ a little by class, so that the figures are neither 0 nor 1."""
    generator = torch.Generator().manual_seed(1)
    found, pattern = {}, torch.randn(classes, 3, 8, 12, generator=generator)
    for name, count in (("train", train), ("val", val)):
        targets = torch.randint(0, classes, (count,), generator=generator)
        found[name] = 0.4 * pattern[targets] + torch.randn(count, 3, 8, 12, generator=generator), targets
    return found


def walk(data: dict, size: int = 10, rank: int = 0, world: int = 1):
    def batches(split: str) -> list[Batch]:
        images, targets = data[split]
        index = torch.arange(len(images)).split(size)[rank::world]
        return [Batch(images[part], targets[part], part) for part in index]

    return batches


def vectors_of(model: VisionTransformer, images: torch.Tensor, pool: str) -> np.ndarray:
    model.eval()
    with torch.no_grad():
        features = model.encode(model.embed(images))
        found = {"mean": features.patches.mean(1), "cls": features.cls, "model": model.pooled(features)}[pool]
    found = found.double().numpy()
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def slow(bank, labels, queries, truth, *, classes: int, k: int, temperature: float) -> tuple[float, float]:
    """Picture by picture, neighbour by neighbour."""
    right = five = 0
    for query, wanted in zip(queries, truth, strict=True):
        similar = [float(np.dot(row, query)) for row in bank]
        votes = dict.fromkeys(range(classes), 0.0)
        for number in sorted(range(len(bank)), key=lambda n: -similar[n])[:k]:
            votes[int(labels[number])] += math.exp(similar[number] / temperature)
        best = [c for c in sorted(votes, key=lambda c: -votes[c]) if votes[c] > 0]
        right += best[0] == wanted
        five += int(wanted) in best[:5]
    return right / len(queries), five / len(queries)


@pytest.mark.parametrize(
    ("pool", "k", "temperature"), [("mean", 20, 0.07), ("cls", 5, 1.0), ("model", 1, 0.07), ("mean", 500, 0.01)]
)
def test_it_equals_a_slow_loop(accelerator, monkeypatch, pool, k, temperature):
    monkeypatch.setattr(knn, "SIMILARITIES", 4 * 60)  # four validation pictures at once
    model, data = vit(norm="after_pool", pool="mean"), splits()
    with torch.no_grad():
        model.fc_norm.weight.normal_()
    found = Knn(k=k, temperature=temperature, pool=pool)(Supervised(model), walk(data), accelerator, "abcdefg")
    bank, queries = (vectors_of(model, data[name][0], pool) for name in ("train", "val"))
    expected = slow(bank, data["train"][1], queries, data["val"][1], classes=7, k=k, temperature=temperature)
    assert found.count == 23
    assert (found.metrics["knn_top1"], found.metrics["knn_top5"]) == expected
    assert 0.1 < expected[0] < 0.9
    assert all(type(value) is float for value in found.metrics.values())


def test_figures_differ_between_pools_and_temperatures(accelerator):
    """Else the comparison above could not tell them apart."""
    model, data = vit(), splits(val=200)
    options = [{}, {"pool": "cls"}, {"temperature": 10.0, "k": 60}, {"k": 1}]
    found = [Knn(**o)(Supervised(model), walk(data), accelerator, "abcdefg").metrics for o in options]
    assert len({tuple(metrics.values()) for metrics in found}) == 4


def test_training_pictures_find_themselves(accelerator):
    data = splits()
    data["val"] = data["train"]
    assert Knn(k=1)(Supervised(vit()), walk(data), accelerator, "abcdefg").metrics["knn_top1"] == 1.0


def test_the_batch_size_and_the_order_of_the_shares_change_nothing(accelerator):
    model, data = vit(), splits()
    one = Knn()(Supervised(model), walk(data, 7), accelerator, "abcdefg")
    backwards = lambda split: walk(data, 9)(split)[::-1]  # noqa: E731
    assert Knn()(Supervised(model), backwards, accelerator, "abcdefg") == one


def test_equal_similarities_at_the_edge_are_taken_in_order():
    similarity = torch.tensor([[0.5, 0.9, 0.5, 0.1, 0.5, 0.5], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [1.0] * 6])
    values, positions = nearest_neighbours(similarity, 3)
    assert [sorted(row) for row in positions.tolist()] == [[0, 1, 2], [3, 4, 5], [0, 1, 2]]
    assert torch.equal(values, similarity.gather(1, positions))


def test_equal_votes_go_to_the_lower_class_and_no_vote_is_no_answer():
    votes = torch.tensor([[1.0, 2.0, 2.0, 0.0]])
    places = [int(place_of_truth(votes, torch.tensor([c]))) for c in range(4)]
    assert places == [2, 0, 1, 4]


def test_a_small_temperature_leaves_the_nearest_alone_to_vote():
    similarity = torch.tensor([[0.99, 0.98, 0.98, -1.0]])
    votes = class_votes(similarity, torch.tensor([2, 0, 0, 1]), num_classes=3, k=4, temperature=1e-4)
    assert votes[0] == pytest.approx([0, 0, 1])
    warm = class_votes(similarity, torch.tensor([2, 0, 0, 1]), num_classes=3, k=4, temperature=1.0)
    assert warm.argmax() == 0


def test_features_that_are_nan_are_no_accuracy(accelerator):
    model = vit()
    with torch.no_grad():
        model.norm.bias.fill_(math.nan)
    metrics = Knn()(Supervised(model), walk(splits()), accelerator, "abcdefg").metrics
    assert metrics == {"knn_top1": 0.0, "knn_top5": 0.0}


def test_modes_are_restored_and_the_model_can_be_trained_after_it(accelerator):
    model, data = vit().train(), splits(classes=3)
    model.blocks[0].eval()
    found = Knn()(Supervised(model), walk(data), accelerator, "abc")
    assert set(found.metrics) == {"knn_top1"}  # five guesses at three classes say nothing
    assert (model.training, model.blocks[0].training, model.blocks[1].training) == (True, False, True)
    model(data["val"][0]).sum().backward()
    assert model.head.weight.grad is not None


def test_features_are_made_in_the_runs_precision_and_compared_in_float32(monkeypatch):
    low = Accelerator(cpu=True, mixed_precision="bf16")
    seen = []

    class Watched(VisionTransformer):
        def encode(self, tokens):
            features = super().encode(tokens)
            seen.append(self.head(features.cls).dtype)
            return features

    model = Watched(image_size=(8, 12), patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=7)
    votes = knn.class_votes
    monkeypatch.setattr(knn, "class_votes", lambda s, *a, **k: seen.append(s.dtype) or votes(s, *a, **k))
    Knn()(Supervised(model), walk(splits(), 60), low, "abcdefg")
    assert seen == [torch.bfloat16, torch.bfloat16, torch.float32]


@pytest.mark.parametrize(
    ("name", "pools"), [("vit_tiny_patch16_224", ("mean", "cls", "model")), ("resnet18", ("model",))]
)
def test_timm_models_are_measured(accelerator, name, pools):
    model = TimmBackbone(name, image_size=32, num_classes=3)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 3, 32, 32, generator=generator)
    data = {"train": (images, torch.arange(8) % 3), "val": (images[:5], torch.arange(5) % 3)}
    for pool in pools:
        found = Knn(k=1, pool=pool)(Supervised(model), walk(data), accelerator, "abc")
        assert found.metrics == {"knn_top1": 1.0}
    if "mean" not in pools:
        with pytest.raises(UserError, match=r"evaluators\.knn\.pool=model works"):
            Knn()(Supervised(model), walk(data), accelerator, "abc")


def test_what_cannot_be_measured_is_refused(accelerator):
    data = splits()
    without = vit(class_token=False, pool="mean")
    with pytest.raises(UserError, match="no class token"):
        Knn(pool="cls")(Supervised(without), walk(data), accelerator, "abcdefg")
    with pytest.raises(UserError, match=r"pool=mean: Linear gives no tokens"):
        Knn()(Supervised(nn.Linear(3, 3)), walk(data), accelerator, "abcdefg")
    for split, word in (("train", "training"), ("val", "validation")):
        images, targets = data[split]
        for strange in (-1, 7):
            broken = {**data, split: (images, targets.index_fill(0, torch.tensor([2, 5]), strange))}
            with pytest.raises(UserError, match=f"2 {word} pictures have no class from 0 to 6"):
                Knn()(Supervised(vit()), walk(broken), accelerator, "abcdefg")
        with pytest.raises(UserError, match=f"no {word} pictures"):
            Knn()(Supervised(vit()), walk({**data, split: (images[:0], targets[:0])}), accelerator, "abcdefg")
    for wrong in ({"k": 0}, {"k": 1.5}, {"temperature": 0}, {"pool": "max"}):
        with pytest.raises(UserError, match=r"evaluators\.knn\." + next(iter(wrong))):
            Knn(**wrong)
