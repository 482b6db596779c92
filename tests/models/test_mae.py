"""The masked autoencoder against numbers of the official code, and what it promises beside them."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from vitexp.ema import Ema
from vitexp.errors import UserError
from vitexp.masking import block_order, grid_order, len_keep
from vitexp.models.build import build_model
from vitexp.models.mae import MaskedAutoencoder, patch_statistics
from vitexp.models.pos_embed import big_vision_pos_embed, sincos, sincos_pos_embed
from vitexp.models.timm_backbone import TimmBackbone
from vitexp.models.vit import VisionTransformer

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = {"image_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4}
TINY |= {"decoder_dim": 32, "decoder_depth": 2, "decoder_num_heads": 4}
NARROW = {"image_size": (16, 32), "patch_size": (4, 8), "embed_dim": 16, "depth": 1, "num_heads": 2, "in_channels": 2}
NARROW |= {"decoder_dim": 8, "decoder_depth": 1, "decoder_num_heads": 2}
TOLERANCE = {"f64": 1e-9, "f32": 1e-5}
DTYPE = {"f64": torch.float64, "f32": torch.float32}


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    with np.load(GOLDEN / "mae_forward.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files if key != "gradnorm_names"}


@pytest.fixture(scope="module")
def names() -> list[str]:
    with np.load(GOLDEN / "mae_forward.npz") as file:
        return file["gradnorm_names"].tolist()


def tiny(golden: dict, *, precision: str = "f64", **options: object) -> MaskedAutoencoder:
    model = build_model("mae", **TINY | options).to(DTYPE[precision])
    model.load_state_dict({key[3:]: tensor for key, tensor in golden.items() if key.startswith("sd/")})
    return model


def close(actual: torch.Tensor, expected: torch.Tensor, precision: str = "f64") -> None:
    tolerance = TOLERANCE[precision]
    torch.testing.assert_close(actual.detach(), expected.to(actual.dtype), rtol=tolerance, atol=tolerance)


def gradients(model: MaskedAutoencoder) -> dict[str, torch.Tensor]:
    """By the official names."""
    return {n.removeprefix("encoder."): p.grad for n, p in model.named_parameters() if p.grad is not None}


# ---- the official numbers ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("precision", ["f64", "f32"])
def test_forward_equals_the_official_one(golden: dict, precision: str) -> None:
    model = tiny(golden, precision=precision)
    images = golden["images"].to(DTYPE[precision])
    order = model.order(images, golden["noise"])
    assert torch.equal(order[:, :4], golden["ids_keep"])
    assert torch.equal(order.argsort(1), golden["ids_restore"])
    features = model.see(images, order)
    close(torch.cat([features.cls[:, None], features.patches], dim=1), golden[f"{precision}/latent"], precision)
    found = model(images, golden["noise"])
    close(found.prediction, golden[f"{precision}/pred"], precision)
    assert torch.equal(found.mask, golden["mask"].to(images.dtype))


@pytest.mark.parametrize("everywhere", [True, False])
@pytest.mark.parametrize("loss", ["raw", "norm"])
@pytest.mark.parametrize("precision", ["f64", "f32"])
def test_losses_and_gradients_equal_the_official_ones(
    golden: dict, names: list[str], precision: str, loss: str, everywhere: bool
) -> None:
    model = tiny(golden, precision=precision, norm_pix_loss=loss == "norm")
    found = model(golden["images"].to(DTYPE[precision]), golden["noise"], everywhere=everywhere)
    close(found.loss, golden[f"{precision}/loss_{loss}"], precision)
    found.loss.backward()
    grads = gradients(model)
    assert set(grads) == set(names)
    close(torch.stack([grads[name].norm() for name in names]), golden[f"{precision}/gradnorm_{loss}"], precision)
    whole = [key for key in golden if key.startswith(f"f64/grad_{loss}/")]
    assert len(whole) == 6
    for key in whole:
        close(grads[key.split("/")[-1]], golden[key], precision)


def test_targets_and_pictures_of_patches_equal_the_official_ones(golden: dict) -> None:
    model = tiny(golden)
    images = golden["images"].double()
    assert torch.equal(model.patchify(images), golden["target"].double())
    assert torch.equal(model.targets(images), model.patchify(images))
    assert torch.equal(model.unpatchify(golden["f32/pred"]), golden["unpatchify_pred"])
    model.norm_pix_loss = True
    close(model.targets(images).float(), golden["target_norm"], "f32")


def test_a_constant_patch_has_target_zero_and_statistics_undo_the_target(golden: dict) -> None:
    model = tiny(golden, norm_pix_loss=True)
    images = golden["images"].double()
    flat = int(golden["flat_patch_index"])
    assert golden["mask"][0, flat] == 1
    assert not model.targets(images)[0, flat].any()
    mean, std = patch_statistics(model.patchify(images))
    close(model.targets(images) * std + mean, model.patchify(images))


def test_features_without_a_mask_are_the_official_ones_in_raster_order(golden: dict) -> None:
    model = tiny(golden)
    features = model.encoder.encode(model.encoder.embed(golden["images"].double()))
    shuffled = golden["f64/latent_mask_ratio0"]
    restore = golden["mask_ratio0_ids_restore"][..., None]
    close(features.cls, shuffled[:, 0])
    close(features.patches, shuffled[:, 1:].take_along_dim(restore, dim=1))


def test_so_many_patches_stay_as_in_the_official_code() -> None:
    with np.load(GOLDEN / "mae_len_keep.npz") as file:
        rows = list(zip(*(file[key].tolist() for key in ("L", "mask_ratio", "len_keep")), strict=True))
    assert len(rows) == 210
    assert [len_keep(count, ratio) for count, ratio, _ in rows] == [keep for _, _, keep in rows]


def test_real_sizes_have_the_official_positions() -> None:
    with np.load(GOLDEN / "mae_sincos_rows.npz") as file:
        tables = [key for key in file.files if re.fullmatch(r"rows_d\d+_g\d+_cls1", key)]
        assert len(tables) == 5
        for key in tables:
            dim, side = (int(part) for part in re.findall(r"\d+", key)[:2])
            table = sincos_pos_embed((side, side), dim, num_prefix_tokens=1).numpy()
            assert table.shape == tuple(file[f"{key}/shape"])
            np.testing.assert_allclose(table[file[f"{key}/index"]], file[key], rtol=0, atol=1e-12)
            np.testing.assert_allclose(np.abs(table).sum(), file[f"{key}/abs_sum"], rtol=1e-12)
        for dim in (2, 6, 8, 64):
            line = sincos(torch.from_numpy(file["pe1d_pos"]), dim // 2, steps=dim // 2)
            np.testing.assert_allclose(line.numpy(), file[f"pe1d_d{dim}"], rtol=0, atol=1e-12)


SIZES = {
    "mae_vit_base_patch16": {},
    "mae_vit_large_patch16": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "mae_vit_huge_patch14": {"embed_dim": 1280, "depth": 32, "num_heads": 16, "patch_size": 14},
}


@pytest.mark.parametrize("name", SIZES)
def test_names_shapes_and_counts_are_the_official_ones(name: str) -> None:
    known = json.loads((GOLDEN / "mae_shapes.json").read_text())
    with torch.device("meta"):
        model = build_model("mae", **SIZES[name])
    state = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    assert len(state) == known[f"{name}/n_keys"]
    later_block = re.compile(r"(decoder_)?blocks\.([1-9]|\d\d)\.")
    assert {key: shape for key, shape in state.items() if not later_block.match(key)} == known[name]
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    assert sum(size for size, _ in sizes) == known[f"{name}/n_params_total"]
    assert sum(size for size, trained in sizes if trained) == known[f"{name}/n_params_trainable"]
    assert sum(p.numel() for p in model.encoder.parameters()) == known[f"{name}/n_params_encoder_incl_pos"]


# ---- start -------------------------------------------------------------------------------------------------------
def test_it_starts_as_the_official_code_does() -> None:
    torch.manual_seed(0)
    model = build_model("mae", image_size=32, patch_size=4, embed_dim=192, depth=1, num_heads=3, decoder_dim=128)
    checked = 0
    for name, p in model.named_parameters():
        if name == "encoder.patch_embed.proj.bias":
            assert p.abs().max() <= 48**-0.5
            assert p.std() > 0.05
        elif name in ("mask_token", "encoder.cls_token"):
            assert p.std().item() == pytest.approx(0.02, rel=0.15), name
        elif name.endswith("pos_embed"):
            table = sincos_pos_embed((8, 8), p.shape[-1], num_prefix_tokens=1)
            assert torch.equal(p[0], table.float())
            assert not p.requires_grad
        elif name.endswith("weight") and "norm" not in name:
            matrix = p.flatten(1)
            bound = (6 / sum(matrix.shape)) ** 0.5
            assert matrix.abs().max() <= bound, name
            assert matrix.std().item() == pytest.approx(bound / 3**0.5, rel=0.03), name
        else:
            assert torch.equal(p, torch.full_like(p, float(name.endswith("weight")))), name
        checked += 1
    assert checked == len(model.state_dict())


def test_fixed_positions_of_big_vision() -> None:
    # From the formula, one number at a time: frequencies 10000^(-i/(D/4-1)), sin x, cos x, sin y, cos y.
    table = big_vision_pos_embed((2, 3), 12)
    for row, column in ((0, 2), (1, 1)):
        for i, frequency in enumerate((1.0, 0.01, 0.0001)):
            angles = torch.tensor([column * frequency, row * frequency], dtype=torch.float64)
            expected = torch.stack([angles.sin(), angles.cos()], dim=1).flatten()
            torch.testing.assert_close(table[row * 3 + column, i::3], expected, rtol=0, atol=1e-12)
    vit = {"image_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 3}
    model = VisionTransformer(**vit, position_embedding="sincos_big_vision")
    assert "pos_embed" not in model.state_dict()
    assert "pos_embed" not in dict(model.named_parameters())
    torch.testing.assert_close(model.embed(torch.zeros(1, 3, 32, 32))[0], big_vision_pos_embed((4, 4), 16).float())
    with torch.no_grad():
        model.blocks[0].attn.proj.weight.zero_()
        model.blocks[0].mlp.fc2.weight.zero_()
        model.blocks[0].mlp.fc2.bias.zero_()
        model.cls_token.copy_(torch.randn(1, 1, 16))
    features = model.encode(model.embed(torch.rand(1, 3, 32, 32)))
    torch.testing.assert_close(features.cls, model.norm(model.cls_token[:, 0]))  # no position was added to it
    with torch.device("meta"):
        better = build_model(
            "vit_small",
            class_token=False,
            pool="mean",
            representation_dim=384,
            position_embedding="sincos_big_vision",
        )
    assert sum(p.numel() for p in better.parameters()) == 22_122_472


# ---- the seam ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("positions", ["learned", "sincos", "sincos_big_vision"])
@pytest.mark.parametrize("class_token", [True, False])
def test_only_the_patches_named_are_embedded_in_their_order(positions: str, class_token: bool) -> None:
    options = {key: value for key, value in NARROW.items() if not key.startswith("decoder")}
    pool = "cls" if class_token else "mean"
    model = VisionTransformer(
        **options, num_classes=0, position_embedding=positions, class_token=class_token, pool=pool
    ).double()
    images = torch.randn(3, 2, 16, 32, dtype=torch.float64)
    keep = torch.tensor([[5, 0, 15], [2, 2, 7], [15, 14, 1]])
    every = model.embed(images)
    torch.testing.assert_close(model.embed(images, keep), every.take_along_dim(keep[..., None], dim=1))
    # A patch that is not named has no influence and no gradient.
    images.requires_grad_()
    model.embed(images, keep).square().sum().backward()
    touched = images.grad.unflatten(2, (4, 4)).unflatten(4, (4, 8)).abs().amax((1, 3, 5)).flatten(1) > 0
    assert torch.equal(touched, torch.zeros(3, 16).scatter_(1, keep, 1).bool())


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_only_what_the_loss_needs_gives_the_same_loss_and_gradients(norm_pix_loss: bool, class_token: bool) -> None:
    options = {key: value for key, value in NARROW.items() if not key.startswith("decoder")}
    encoder = VisionTransformer(
        **options, num_classes=0, class_token=class_token, pool="cls" if class_token else "mean"
    )
    model = MaskedAutoencoder(
        encoder, decoder_dim=8, decoder_depth=1, decoder_num_heads=2, norm_pix_loss=norm_pix_loss
    ).double()
    images, noise = torch.randn(2, 2, 16, 32, dtype=torch.float64), torch.rand(2, 16)
    whole, part = model(images, noise), copy.deepcopy(model)(images, noise, everywhere=False)
    torch.testing.assert_close(part.loss, whole.loss, rtol=1e-12, atol=0)
    assert torch.equal(part.mask, whole.mask)
    hidden = model.order(images, noise)[:, 4:]
    torch.testing.assert_close(part.prediction, whole.prediction.take_along_dim(hidden[..., None], dim=1))
    # Both against the definition: per patch, times the mask, over the number of hidden patches.
    error = (whole.prediction - model.targets(images)).square().mean(-1)
    torch.testing.assert_close(whole.loss, (error * whole.mask).sum() / whole.mask.sum())
    other = copy.deepcopy(model)
    other(images, noise, everywhere=False).loss.backward()
    model(images, noise).loss.backward()
    for key, grad in gradients(model).items():
        torch.testing.assert_close(gradients(other)[key], grad, rtol=1e-9, atol=1e-14)


def test_patches_of_rectangles_are_in_raster_order_with_channels_last() -> None:
    model = build_model("mae", **NARROW)
    images = torch.randn(2, 2, 16, 32)
    patches = model.patchify(images)
    corner = images[1, :, 8:12, 16:24]  # third row of patches, third of four across
    assert torch.equal(patches[1, 2 * 4 + 2], corner.permute(1, 2, 0).flatten())
    assert torch.equal(model.unpatchify(patches), images)


def test_a_hidden_patch_has_no_influence_on_what_is_predicted(golden: dict) -> None:
    model = tiny(golden)
    images = golden["images"].double()
    changed = model.patchify(images) + 5 * golden["mask"][..., None]
    other = model(model.unpatchify(changed), golden["noise"])
    close(other.prediction, golden["f64/pred"])


# ---- masks -------------------------------------------------------------------------------------------------------
def test_equal_noise_is_broken_in_raster_order_and_no_noise_draws_new_masks(golden: dict) -> None:
    model = tiny(golden)
    images = golden["images"].double()
    assert model.order(images, torch.zeros(3, 16)).tolist() == [list(range(16))] * 3
    torch.manual_seed(3)
    first, second = model(images).mask, model(images).mask
    torch.manual_seed(3)
    assert torch.equal(model(images).mask, first)
    assert not torch.equal(first, second)
    with pytest.raises(UserError, match=r"noise is \(3, 9\).*\(3, 16\)"):
        model(images, torch.rand(3, 9))


def test_grid_masks_keep_the_same_one_of_every_2x2() -> None:
    torch.manual_seed(0)
    order = grid_order(torch.rand(64, 24), grid=(4, 6), keep=6)
    assert torch.equal(order.sort(1).values, torch.arange(24).expand(64, 24))
    seen = torch.zeros(64, 24).scatter_(1, order[:, :6], 1).reshape(64, 2, 2, 3, 2)
    assert (seen.sum((2, 4)) == 1).all()
    corners = seen.permute(0, 2, 4, 1, 3).flatten(3)
    assert (corners == corners[..., :1]).all()  # the same one in each
    assert (corners[..., 0].sum(0) > 0).all()  # and over the pictures each of the four


@pytest.mark.parametrize(("grid", "keep"), [((14, 14), 49), ((14, 14), 98), ((4, 4), 4), ((8, 3), 6), ((2, 2), 1)])
def test_block_masks_hide_rectangles_and_the_very_number_asked_for(grid: tuple[int, int], keep: int) -> None:
    torch.manual_seed(0)
    count = grid[0] * grid[1]
    noise = torch.rand(256, count)
    order = block_order(noise, grid=grid, keep=keep)
    assert torch.equal(order.sort(1).values, torch.arange(count).expand(256, count))
    assert torch.equal(block_order(noise, grid=grid, keep=keep), order)
    if grid == (14, 14):
        # A patch's neighbour across is hidden as it is far more often than when patches are drawn one by one.
        mask = torch.ones(256, count).scatter_(1, order[:, :keep], 0).unflatten(1, grid)
        alike = (mask[:, :, 1:] == mask[:, :, :-1]).float().mean()
        by_chance = (keep / count) ** 2 + (1 - keep / count) ** 2
        assert alike > by_chance + 0.6 * (1 - by_chance)
        places = mask.mean(0)
        assert places.min() > 0  # no place is always seen, though blocks reach corners seldom, as BEiT's do


@pytest.mark.parametrize("masking", ["block", "grid"])
def test_maskings_train(masking: str) -> None:
    model = build_model("mae", **NARROW, masking=masking)
    found = model(torch.randn(2, 2, 16, 32), everywhere=False)
    assert found.mask.sum(1).tolist() == [12, 12]
    found.loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


# ---- names -------------------------------------------------------------------------------------------------------
def test_the_state_goes_out_and_in_under_the_official_names() -> None:
    torch.manual_seed(0)
    source, target = build_model("mae", **NARROW), build_model("mae", **NARROW)
    state = source.state_dict()
    assert not any(key.startswith("encoder.") for key in state)
    assert target.load_state_dict(state) == ([], [])
    for model in (target, copy.deepcopy(source)):
        assert list(model.state_dict()) == list(state)
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    wrapped = nn.ModuleDict({"backbone": source.encoder, "module": source})
    nested = wrapped.state_dict()
    assert {key for key in nested if key.startswith("module.")} == {f"module.{key}" for key in state}
    assert {key for key in nested if key.startswith("backbone.")} == {
        f"backbone.{key}" for key in source.encoder.state_dict()
    }
    assert wrapped.load_state_dict(nested) == ([], [])
    copied = copy.deepcopy(source)
    copied.load_state_dict({key: torch.zeros_like(tensor) for key, tensor in state.items()})
    assert not any(tensor.any() for tensor in copied.state_dict().values())
    assert source.state_dict()["blocks.0.norm1.weight"].all()  # the copy's hooks fill the copy
    with pytest.raises(RuntimeError, match=r"norm\.weight"):
        target.load_state_dict({key: tensor for key, tensor in state.items() if key != "norm.weight"})
    with pytest.raises(RuntimeError, match="stranger"):
        target.load_state_dict(state | {"stranger": torch.zeros(1)})


def test_averaged_weights_survive_the_renaming() -> None:
    model = build_model("mae", **NARROW)
    ema = Ema(model, decay=0.5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    ema.update(0)
    averaged = build_model("mae", **NARROW)
    averaged.load_state_dict(ema.state_dict())
    for p, q in zip(model.parameters(), averaged.parameters(), strict=True):
        torch.testing.assert_close(q, p - 0.5)


# ---- refusals ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"decoder_dim": 10, "decoder_num_heads": 2}, "decoder_dim=10: 4 does not divide"),
        ({"decoder_num_heads": 3}, "decoder_num_heads=3 does not divide decoder_dim=8"),
        ({"mask_ratio": 1.0}, "mask_ratio=1.0"),
        ({"mask_ratio": 0.0}, "mask_ratio=0.0 keeps 16 of 16"),
        ({"mask_ratio": 0.95}, "mask_ratio=0.95 keeps 0 of 16"),
        ({"masking": "blok"}, "masking='blok'.*block"),
        ({"masking": "grid", "mask_ratio": 0.5}, "masking=grid.*not 0.5 of 4x4"),
        ({"masking": "grid", "image_size": (12, 32)}, "masking=grid.*3x4"),
        ({"embed_dim": 18}, "width 18"),
        ({"num_classes": 5}, "num_classes=5.*method=mae"),
        ({"decoder_heads": 2}, "decoder_num_heads"),
        ({"decoder_depth": 0}, "decoder_depth=0"),
        ({"mlp_ratio": 0}, "mlp_ratio"),
    ],
)
def test_what_does_not_fit_is_named(options: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        build_model("mae", **NARROW | options)


def test_backbones_without_the_seam_are_refused() -> None:
    with pytest.raises(UserError, match="TimmBackbone"):
        MaskedAutoencoder(TimmBackbone("resnet10t", num_classes=0, image_size=32))
    with pytest.raises(UserError, match=r"Linear.*embed\(\) and encode\(\)"):
        MaskedAutoencoder(nn.Linear(2, 2))
    vit = {key: value for key, value in NARROW.items() if not key.startswith("decoder")}
    for options, words in (
        ({"num_classes": 3}, "num_classes=3"),
        ({"num_classes": 0, "pool": "mean", "norm": "after_pool"}, "norm=before_pool"),
        ({"num_classes": 0, "representation_dim": 8}, "representation_dim=null"),
    ):
        with pytest.raises(UserError, match=words):
            MaskedAutoencoder(VisionTransformer(**vit, **options))
