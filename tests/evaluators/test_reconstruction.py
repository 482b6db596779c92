from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from vitexp.errors import UserError
from vitexp.evaluators.reconstruction import Reconstruction
from vitexp.methods.supervised import Supervised
from vitexp.models.mae import MaskedAutoencoder, masked_autoencoder
from vitexp.plots import reconstructions
from vitexp.seeding import uniforms
from vitexp.types import Batch, Method


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


class Autoencoding(Method):
    def __init__(self, autoencoder: MaskedAutoencoder) -> None:
        super().__init__()
        self.autoencoder, self.backbone = autoencoder, autoencoder.encoder


def method(**options) -> Autoencoding:
    """Of pictures of 8 x 12 in a grid of 2 x 6 patches."""
    torch.manual_seed(0)
    small = {"image_size": (8, 12), "patch_size": (4, 2), "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}
    return Autoencoding(masked_autoencoder(**small, decoder_dim=8, decoder_depth=1, decoder_num_heads=2, **options))


def pictures(count: int = 23) -> torch.Tensor:
    return torch.randn(count, 3, 8, 12, generator=torch.Generator().manual_seed(1))


def walk(images: torch.Tensor, size: int = 10, rank: int = 0, world: int = 1):
    """Without labels: it needs none."""
    index = torch.arange(len(images)).split(size)[rank::world] if len(images) else ()
    return {"val": [Batch(images[part], torch.full((len(part),), -1), part) for part in index]}.__getitem__


def drawn(evaluation) -> dict[str, np.ndarray]:
    return {name.removeprefix("reconstruction_"): values for name, values in evaluation.arrays.items()}


@pytest.mark.parametrize("options", [{}, {"norm_pix_loss": True}, {"masking": "block", "mask_ratio": 0.6}])
def test_the_loss_is_that_of_each_picture_alone(accelerator, options):
    images, model = pictures(), method(**options)
    found = Reconstruction()(model, walk(images), accelerator, [])
    model.eval()
    losses = []
    for number, image in enumerate(images):
        noise = torch.from_numpy(uniforms(0, 0, np.array([number]), 12)).float()
        with torch.no_grad():
            _, prediction, mask = model.autoencoder(image[None], noise)
        target = image.unfold(1, 4, 4).unfold(2, 2, 2).permute(1, 2, 3, 4, 0).reshape(12, 24)
        if options.get("norm_pix_loss"):
            target = (target - target.mean(1, keepdim=True)) / (target.var(1, keepdim=True) + 1e-6).sqrt()
        losses += [float((prediction[0, n] - target[n]).square().mean()) for n in range(12) if mask[0, n]]
    assert found.count == 23
    assert found.metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert all(type(value) is float for value in found.metrics.values())


def test_batch_size_order_and_the_global_random_state_change_nothing(accelerator):
    images, model = pictures(), method()
    one = Reconstruction(pictures=5)(model, walk(images), accelerator, [])
    torch.manual_seed(7)
    before = torch.get_rng_state()
    other = Reconstruction(pictures=5)(model, lambda split: walk(images, 4)(split)[::-1], accelerator, [])
    assert torch.equal(torch.get_rng_state(), before)
    assert other.metrics == pytest.approx(one.metrics, rel=1e-5)
    assert set(other.arrays) == set(one.arrays)
    for name, values in one.arrays.items():
        np.testing.assert_allclose(other.arrays[name], values, rtol=1e-4, atol=1e-5)


def test_the_pictures_drawn_are_spread_over_the_split_and_in_its_order(accelerator):
    images = pictures(2000)
    found = drawn(Reconstruction()(method(), walk(images, 500), accelerator, []))["originals"]
    where = [int((images - torch.from_numpy(picture)).abs().amax((1, 2, 3)).argmin()) for picture in found]
    assert len(where) == 8
    assert where == sorted(where)
    assert where[0] < 700 < 1300 < where[-1]


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_the_arrays_are_what_their_names_say(accelerator, norm_pix_loss):
    images, model = pictures(6), method(norm_pix_loss=norm_pix_loss)
    found = Reconstruction(pictures=99)(model, walk(images, 4), accelerator, [])
    arrays = drawn(found)
    assert {name: values.shape for name, values in arrays.items() if name not in ("means", "stds")} == {
        "originals": (6, 3, 8, 12), "predictions": (6, 3, 8, 12), "masks": (6, 2, 6), "losses": (6, 2, 6),
    }  # fmt: skip
    assert ("means" in arrays) == ("stds" in arrays) == norm_pix_loss
    np.testing.assert_array_equal(arrays["originals"], images.numpy())
    assert (arrays["masks"].sum((1, 2)) == 9).all()
    assert arrays["losses"][arrays["masks"] == 1].mean() == pytest.approx(found.metrics["loss"], rel=1e-5)
    for n, row, column in np.ndindex(6, 2, 6):
        here = (n, slice(None), slice(4 * row, 4 * row + 4), slice(2 * column, 2 * column + 2))
        true, predicted = arrays["originals"][here], arrays["predictions"][here]
        if norm_pix_loss:
            mean, std = arrays["means"][n, row, column], arrays["stds"][n, row, column]
            assert (mean, std) == pytest.approx((true.mean(), math.sqrt(true.var(ddof=1) + 1e-6)), rel=1e-4, abs=1e-6)
            true = (true - mean) / std
        assert arrays["losses"][n, row, column] == pytest.approx(np.square(predicted - true).mean(), rel=1e-4)


def test_the_arrays_can_be_drawn(accelerator, tmp_path: Path):
    found = Reconstruction()(method(norm_pix_loss=True), walk(pictures()), accelerator, [])
    path = reconstructions(tmp_path / "r.png", **drawn(found), pixel_mean=(0.5,) * 3, pixel_std=(0.5,) * 3)
    assert path.stat().st_size > 10_000
    assert Reconstruction(pictures=0)(method(), walk(pictures()), accelerator, []).arrays == {}


def test_the_effective_rank_is_that_of_the_centred_features(accelerator):
    images, model = pictures(), method()
    with torch.no_grad():
        model.autoencoder.encoder.norm.bias.fill_(30.0)  # far from the origin: not centred it would be about 1
    found = Reconstruction()(model, walk(images), accelerator, []).metrics["effective_rank"]
    encoder = model.autoencoder.encoder.eval()
    with torch.no_grad():
        features = encoder.encode(encoder.embed(images)).patches.mean(1).double().numpy()
    singular = np.linalg.svd(features - features.mean(0), compute_uv=False)
    share = singular[singular > 1e-9] / singular.sum()
    assert found == pytest.approx(np.exp(-np.sum(share * np.log(share))), rel=1e-4)
    assert 4 < found < 16


def test_features_that_are_all_alike_have_no_rank(accelerator):
    model = method()
    with torch.no_grad():
        model.autoencoder.encoder.norm.weight.zero_()
        model.autoencoder.encoder.norm.bias.normal_()
    assert Reconstruction()(model, walk(pictures()), accelerator, []).metrics["effective_rank"] == 0.0
    with torch.no_grad():
        model.autoencoder.encoder.norm.bias.fill_(math.nan)
    metrics = Reconstruction()(model, walk(pictures()), accelerator, []).metrics
    assert math.isnan(metrics["effective_rank"])
    assert math.isnan(metrics["loss"])


def test_modes_are_restored_and_it_can_be_trained_after_it(accelerator):
    model = method().train()
    model.autoencoder.decoder_blocks.eval()
    Reconstruction()(model, walk(pictures()), accelerator, [])
    assert (model.autoencoder.training, model.autoencoder.decoder_blocks.training) == (True, False)
    model.autoencoder(pictures(2)).loss.backward()
    assert model.autoencoder.mask_token.grad is not None


def test_low_precision_gives_nearly_the_same(accelerator, monkeypatch):
    model = method(norm_pix_loss=True)
    full = Reconstruction()(model, walk(pictures()), accelerator, [])
    monkeypatch.setattr(accelerator, "autocast", lambda: torch.autocast("cpu", torch.bfloat16))
    low = Reconstruction()(model, walk(pictures()), accelerator, [])
    assert low.metrics == pytest.approx(full.metrics, rel=0.02)
    assert low.metrics != full.metrics
    np.testing.assert_array_equal(low.arrays["reconstruction_stds"], full.arrays["reconstruction_stds"])


def test_what_cannot_be_measured_is_refused(accelerator):
    with pytest.raises(UserError, match="method=mae"):
        Reconstruction()(Supervised(nn.Linear(2, 2)), walk(pictures()), accelerator, [])
    with pytest.raises(UserError, match="split is empty"):
        Reconstruction()(method(), walk(pictures(0)), accelerator, [])
    with pytest.raises(UserError, match=r"evaluators\.reconstruction\.pictures"):
        Reconstruction(pictures=-1)
