from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from vitexp.errors import UserError
from vitexp.evaluators.classification import Classification
from vitexp.methods.supervised import Supervised
from vitexp.types import Batch


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def batches_of(images: torch.Tensor, targets: torch.Tensor, size: int) -> list[Batch]:
    index = torch.arange(len(images))
    return [Batch(*parts) for parts in zip(images.split(size), targets.split(size), index.split(size), strict=True)]


class Head(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.fc, self.drop, self.frozen = nn.Linear(12, classes), nn.Dropout(0.5), nn.BatchNorm1d(12)

    def forward(self, images):
        return self.drop(self.fc(self.frozen(images.flatten(1))))


def case(count: int = 23, classes: int = 7) -> tuple[Head, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return Head(classes), torch.randn(count, 3, 2, 2), torch.arange(count) % classes


@pytest.mark.parametrize("size", [23, 8, 1])
def test_each_picture_counts_once_when_the_batch_does_not_divide(accelerator, size):
    model, images, targets = case()
    evaluation = Classification()(
        Supervised(model), {"val": batches_of(images, targets, size)}.__getitem__, accelerator, list("abcdefg")
    )
    with torch.no_grad():
        logits = model.eval()(images)
    assert evaluation.count == evaluation.arrays["confusion"].sum() == 23
    count, right, confidence = evaluation.arrays["calibration"]
    assert count.sum() == 23
    assert right.sum() / 23 == pytest.approx(evaluation.metrics["top1"])
    mean = logits.softmax(1).amax(1).double().mean().item()
    assert np.nansum(count * confidence) / 23 == pytest.approx(mean)
    assert evaluation.metrics["top1"] == pytest.approx((logits.argmax(1) == targets).double().mean().item())
    assert evaluation.metrics["loss"] == pytest.approx(nn.functional.cross_entropy(logits, targets).item(), rel=1e-5)
    assert set(evaluation.metrics) == {"top1", "top5", "loss", "mean_class_accuracy", "ece"}
    assert all(type(value) is float for value in evaluation.metrics.values())
    np.testing.assert_array_equal(evaluation.arrays["counts"], np.bincount(targets, minlength=7))
    assert evaluation.arrays["per_class_accuracy"].shape == (7,)


def test_modes_of_every_module_are_restored_also_after_an_error(accelerator):
    model, images, targets = case()
    model.train()
    model.frozen.eval()  # as a frozen backbone in a linear probe
    running_mean = model.frozen.running_mean.clone()
    Classification()(
        Supervised(model), {"val": batches_of(images, targets, 5)}.__getitem__, accelerator, list("abcdefg")
    )
    assert (model.training, model.fc.training, model.frozen.training) == (True, True, False)
    with pytest.raises(UserError, match="7 outputs, the data 2 classes"):
        Classification()(
            Supervised(model), {"val": batches_of(images, targets, 5)}.__getitem__, accelerator, list("ab")
        )
    assert (model.training, model.frozen.training) == (True, False)
    assert torch.equal(model.frozen.running_mean, running_mean)


def test_a_model_can_be_trained_right_after_its_evaluation(accelerator):
    model, images, targets = case()
    Classification()(
        Supervised(model), {"val": batches_of(images, targets, 5)}.__getitem__, accelerator, list("abcdefg")
    )
    model.train()(images).sum().backward()
    assert model.fc.weight.grad is not None


def test_pictures_without_a_class_are_refused_and_counted(accelerator):
    model, images, targets = case()
    targets[[3, 20]] = -1
    with pytest.raises(UserError, match="2 of 23 pictures to evaluate have no class"):
        Classification()(
            Supervised(model), {"val": batches_of(images, targets, 10)}.__getitem__, accelerator, list("abcdefg")
        )


def test_a_class_the_model_lacks_and_an_empty_split_are_refused(accelerator):
    model, images, targets = case()
    with pytest.raises(UserError, match="1 pictures have a class number above 6"):
        Classification()(
            Supervised(model),
            {"val": batches_of(images, targets.index_fill(0, torch.tensor([2]), 7), 10)}.__getitem__,
            accelerator,
            "abcdefg",
        )
    with pytest.raises(UserError, match="no pictures"):
        Classification()(Supervised(model), {"val": []}.__getitem__, accelerator, list("abcdefg"))


def test_calibration_and_topk_are_options(accelerator):
    model, images, targets = case()
    evaluation = Classification(topk=[1, 3], calibration=False)(
        Supervised(model), {"val": batches_of(images, targets, 10)}.__getitem__, accelerator, list("abcdefg")
    )
    assert set(evaluation.metrics) == {"top1", "top3", "loss", "mean_class_accuracy"}
    assert "calibration" not in evaluation.arrays
    for wrong in ([], [0], [True], ["5"]):
        with pytest.raises(UserError, match="topk"):
            Classification(topk=wrong)


def test_nan_from_the_model_is_no_accuracy(accelerator):
    model, images, targets = case()
    with torch.no_grad():
        model.fc.bias.fill_(math.nan)
    metrics = Classification()(
        Supervised(model), {"val": batches_of(images, targets, 10)}.__getitem__, accelerator, list("abcdefg")
    ).metrics
    assert metrics["top1"] == metrics["top5"] == 0.0
    assert math.isnan(metrics["loss"])


def _rank(rank: int, port: int, answers: str) -> None:
    """One of two processes with unequal shares: 15 and 8 pictures in 2 and 1 batches."""
    import os

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    model, images, targets = case()
    mine = slice(0, 15) if rank == 0 else slice(15, 23)
    evaluation = Classification()(
        Supervised(model),
        {"val": batches_of(images[mine], targets[mine], 8)}.__getitem__,
        Accelerator(cpu=True),
        "abcdefg",
    )
    torch.save((evaluation.metrics, evaluation.count, evaluation.arrays["confusion"].tolist()), f"{answers}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_with_unequal_shares_equal_one(accelerator, tmp_path):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_rank, args=(port, str(tmp_path)), nprocs=2)
    model, images, targets = case()
    one = Classification()(
        Supervised(model), {"val": batches_of(images, targets, 8)}.__getitem__, accelerator, list("abcdefg")
    )
    for rank in (0, 1):
        metrics, count, confusion = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert count == 23
        assert confusion == one.arrays["confusion"].tolist()
        assert metrics == pytest.approx(one.metrics, rel=1e-6)
