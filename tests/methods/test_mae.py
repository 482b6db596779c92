"""Masked autoencoding as a method: the model's own loss and gradients, masks by position, and a probe that watches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vitexp.errors import UserError
from vitexp.methods.mae import MaskedAutoencoding
from vitexp.models.timm_backbone import TimmBackbone
from vitexp.models.vit import VisionTransformer
from vitexp.runtime import seed_forward
from vitexp.seeding import derive_seed
from vitexp.types import Batch, Method, Progress

START = Progress(step=0, total_steps=10, epoch=0.0, total_epochs=1.0)
PATCHES = 16


def tiny(*, classes: int = 3, **options: Any) -> MaskedAutoencoding:
    """The same weights at every call; float64, so that equal means equal."""
    torch.manual_seed(0)
    vit = VisionTransformer(
        image_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=classes, init="mae"
    )
    return MaskedAutoencoding(vit, decoder_dim=8, decoder_depth=1, decoder_num_heads=2, **options).double()


def pictures(targets: list[int]) -> Batch:
    images = torch.randn(len(targets), 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return Batch(images=images, targets=torch.tensor(targets), index=torch.arange(len(targets)))


def gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def step(method: Method, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and metrics of the forward at one place of a run; the gradients are left in the method."""
    seed_forward(5, 7, 0)
    output = method(batch, START)
    output.loss.backward()
    return output.loss.detach(), output.metrics


@pytest.mark.parametrize("norm_pix_loss", [False, True])
@pytest.mark.parametrize("masking", ["random", "block", "grid"])
def test_loss_and_gradients_are_the_autoencoders_for_the_noise_of_that_place(masking: str, norm_pix_loss: bool) -> None:
    method = tiny(masking=masking, norm_pix_loss=norm_pix_loss)
    alone = copy.deepcopy(method.autoencoder)
    batch = pictures([0, 1, 2, -1])
    seed_forward(5, 7, 1)
    found = method(batch, START)
    found.loss.backward()

    noise = torch.rand(4, PATCHES, generator=torch.Generator().manual_seed(derive_seed(5, 7, 1, 0xF0)))
    expected = alone(batch.images, noise)  # prediction of all patches, loss of the hidden ones
    expected.loss.backward()
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-12, atol=0)
    ours, theirs = gradients(method.autoencoder), gradients(alone)
    assert ours.keys() == theirs.keys()
    assert {"encoder.cls_token", "mask_token", "decoder_pred.weight"} < ours.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-9, atol=1e-12)


def test_masks_depend_on_seed_position_and_rank() -> None:
    method, batch = tiny(), pictures([0, 1])

    def order(seed: int, position: int, rank: int) -> list:
        seed_forward(seed, position, rank)
        return method.autoencoder.order(batch.images).tolist()

    first = order(1, 2, 3)
    torch.rand(11)  # what was drawn meanwhile does not matter
    assert order(1, 2, 3) == first
    assert first[0] != first[1], "each picture has its own"
    assert first not in (order(2, 2, 3), order(1, 3, 3), order(1, 2, 4))


def test_the_probe_learns_and_the_backbone_does_not_notice() -> None:
    without, watched = tiny(), tiny(online_probe=True)
    batch = pictures([0, 1, 2, 1])
    loss, _ = step(without, batch)
    same, metrics = step(watched, batch)
    assert torch.equal(loss, same)
    before, after = gradients(without.autoencoder), gradients(watched.autoencoder)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)

    # The probe's own lesson, from its definition: the mean of the visible patches, normalised over the batch.
    assert watched.probe is not None
    seed_forward(5, 7, 0)
    features = without.autoencoder.see(batch.images, without.autoencoder.order(batch.images)).patches.mean(dim=1)
    spread = features.var(dim=0, unbiased=False, keepdim=True)
    normalised = ((features - features.mean(dim=0, keepdim=True)) / (spread + 1e-6).sqrt()).detach()
    logits = normalised @ watched.probe[1].weight.T + watched.probe[1].bias
    expected = F.cross_entropy(logits, batch.targets)
    torch.testing.assert_close(metrics["probe_loss"], expected.detach(), rtol=1e-9, atol=0)
    assert metrics["probe_top1"] == (logits.argmax(1) == batch.targets).double().mean()
    weight, bias = torch.autograd.grad(expected, [watched.probe[1].weight, watched.probe[1].bias])
    torch.testing.assert_close(watched.probe[1].weight.grad, weight, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(watched.probe[1].bias.grad, bias, rtol=1e-9, atol=1e-12)


def test_pictures_without_label_teach_the_probe_nothing() -> None:
    some, none = tiny(online_probe=True), tiny(online_probe=True)
    loss, metrics = step(some, pictures([2, -1, 0, -1]))
    assert some.probe is not None
    seed_forward(5, 7, 0)
    images = pictures([0] * 4).images
    with torch.no_grad():
        features = some.autoencoder.see(images, some.autoencoder.order(images)).patches.mean(dim=1)
        logits = copy.deepcopy(some.probe)(features)[[0, 2]]
    expected = F.cross_entropy(logits, torch.tensor([2, 0]))
    torch.testing.assert_close(metrics["probe_loss"], expected, rtol=1e-9, atol=0)
    shares = (logits.softmax(1) - F.one_hot(torch.tensor([2, 0]), 3)).mean(0)
    torch.testing.assert_close(some.probe[1].bias.grad, shares, rtol=1e-9, atol=1e-12)

    alone, metrics = step(none, pictures([-1] * 4))
    assert none.probe is not None
    assert torch.equal(alone, loss), "what the pictures are called changes no reconstruction"
    assert metrics["probe_loss"] == metrics["probe_top1"] == 0
    assert not any(grad.any() for grad in gradients(none.probe).values())


def test_the_classifier_is_the_probe_on_whole_pictures() -> None:
    method, images = tiny(online_probe=True), pictures([0, 1]).images
    step(method.train(), pictures([0, 1]))
    method.eval()
    patches = method.backbone.encode(method.backbone.embed(images)).patches
    assert patches.shape[1] == PATCHES
    assert method.probe is not None
    torch.testing.assert_close(method.logits(images), method.probe(patches.mean(dim=1)))
    assert method.logits(images).shape == (2, 3)
    with pytest.raises(UserError, match=r"method\.online_probe=true"):
        tiny().logits(images)


def test_what_does_not_fit_together_is_said() -> None:
    with pytest.raises(UserError, match=r"method\.online_probe=true: the pictures have no classes"):
        tiny(classes=0, online_probe=True)
    with pytest.raises(UserError, match=r"TimmBackbone.*model=vit"):
        MaskedAutoencoding(TimmBackbone("resnet10t", num_classes=3, image_size=32))
    assert tiny(classes=3).backbone.num_classes == 0, "the classifier is taken off"
