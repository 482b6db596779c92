"""Files of MAE's three kinds into masked autoencoders and into the ViTs that go on from them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from vitexp.errors import UserError
from vitexp.models.build import build_model
from vitexp.models.mae import MaskedAutoencoder
from vitexp.models.pos_embed import resize_pos_embed
from vitexp.models.vit import VisionTransformer
from vitexp.models.weights import load_weights

ENCODER = {"image_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
DECODER = {"decoder_dim": 8, "decoder_depth": 1, "decoder_num_heads": 2}
OF_DECODER = ("decoder", "mask_token")


def mae(**options: object) -> MaskedAutoencoder:
    """With weights that no fresh one has."""
    model = build_model("mae", **ENCODER | DECODER | options)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) if p.requires_grad else 0.0)
    return model


def vit(**options: object) -> VisionTransformer:
    return VisionTransformer(**ENCODER | {"num_classes": 5, "init": "mae"} | options)


def saved(tmp_path: Path, state: dict[str, Tensor], name: str = "mae.pth") -> Path:
    torch.save({"model": state}, tmp_path / name)
    return tmp_path / name


def equal(model: nn.Module, state: dict[str, Tensor], *, but: tuple[str, ...] = ("none",)) -> bool:
    own = model.state_dict()
    return all(torch.equal(own[key], tensor) for key, tensor in state.items() if not key.startswith(but))


def test_a_full_file_fills_encoder_and_decoder(tmp_path: Path) -> None:
    state = mae().state_dict()
    target = mae()
    report = load_weights(target, saved(tmp_path, state))
    assert equal(target, state)
    assert (report.family, report.head, report.loaded) == ("mae", "none", len(state))
    assert (report.missing, report.unexpected, report.resized) == ((), (), None)
    assert "decoder" not in str(report)


def test_an_encoder_alone_leaves_the_decoder_fresh_and_says_so(tmp_path: Path) -> None:
    source, target = mae(), mae()
    before = {key: tensor.clone() for key, tensor in target.state_dict().items()}
    report = load_weights(target, saved(tmp_path, source.encoder.state_dict()))
    assert equal(target.encoder, source.encoder.state_dict())
    assert equal(target, {key: tensor for key, tensor in before.items() if key.startswith(OF_DECODER)})
    assert set(report.missing) == {key for key in before if key.startswith(OF_DECODER)}
    assert report.family == "mae"
    for words in ("the file holds no decoder", "_full.pth", "fresh in the model: "):
        assert words in str(report)


def test_a_fine_tuned_file_gives_its_encoder_without_norm_and_head(tmp_path: Path) -> None:
    tuned, target = vit(pool="mean", norm="after_pool"), mae()
    before = {key: tensor.clone() for key, tensor in target.state_dict().items()}
    report = load_weights(target, saved(tmp_path, tuned.state_dict()))
    assert equal(target, tuned.state_dict(), but=("fc_norm.", "head."))
    assert equal(target, {key: tensor for key, tensor in before.items() if key.startswith(("norm.", *OF_DECODER))})
    assert set(report.unexpected) == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    assert {"norm.weight", "norm.bias"} <= set(report.missing)
    assert "fine-tuned" in str(report)
    again = vit(pool="mean", norm="after_pool")
    assert load_weights(again, tmp_path / "mae.pth").head == "kept"
    assert equal(again, tuned.state_dict())


@pytest.mark.parametrize("positions", ["learned", "sincos"])
def test_vits_take_the_encoder_of_a_full_file(tmp_path: Path, positions: str) -> None:
    source = mae()
    with torch.no_grad():
        source.encoder.pos_embed[:, 1:] += 0.5  # is loaded, not computed anew
    for target in (vit(position_embedding=positions), vit(position_embedding=positions, num_classes=0)):
        report = load_weights(target, saved(tmp_path, source.state_dict()))
        assert equal(target, source.encoder.state_dict())
        assert {key for key in source.state_dict() if key.startswith(OF_DECODER)} <= set(report.unexpected)
        assert target.pos_embed.requires_grad == (positions == "learned")


def test_both_position_tables_are_resized_in_maes_mode(tmp_path: Path) -> None:
    source, target = mae(), mae(image_size=(48, 32))
    report = load_weights(target, saved(tmp_path, source.state_dict()))
    assert (report.resized.old_grid, report.resized.new_grid, report.resized.mode) == ((4, 4), (6, 4), "mae")
    for name in ("pos_embed", "decoder_pos_embed"):
        expected = resize_pos_embed(
            source.state_dict()[name], old_grid=(4, 4), new_grid=(6, 4), num_prefix_tokens=1, mode="mae"
        )
        assert torch.equal(target.state_dict()[name], expected)
        assert not target.state_dict(keep_vars=True)[name].requires_grad


def test_another_decoder_is_refused_whole_and_the_way_out_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path, mae().state_dict())
    target = mae(decoder_depth=2)
    before = {key: tensor.clone() for key, tensor in target.state_dict().items()}
    with pytest.raises(UserError, match=r"missing \(decoder_blocks\.1.*\n.*load_weights\(model\.encoder"):
        load_weights(target, path)
    assert equal(target, before)
    load_weights(target.encoder, path)
    with pytest.raises(UserError, match=r"decoder_embed\.weight"):
        load_weights(mae(decoder_dim=16), path)
    with pytest.raises(UserError, match=r"blocks\.2\."):
        load_weights(mae(depth=3), path)


def test_files_without_positions_and_models_without_them_are_matched_by_name(tmp_path: Path) -> None:
    fixed = vit(position_embedding="sincos_big_vision")
    path = saved(tmp_path, fixed.state_dict())
    with pytest.raises(UserError, match="position_embedding=sincos_big_vision"):
        load_weights(vit(), path)
    target = vit(position_embedding="sincos_big_vision")
    load_weights(target, path)
    assert equal(target, fixed.state_dict())
    with pytest.raises(UserError, match="position_embedding=learned"):
        load_weights(target, saved(tmp_path, vit().state_dict()))


def test_a_fresh_head_keeps_the_statistics_of_its_batch_norm_at_their_start(tmp_path: Path) -> None:
    probe = vit(head_norm="batch")
    report = load_weights(probe, saved(tmp_path, mae().encoder.state_dict()))
    assert report.head == "fresh"
    assert not probe.head[1].weight.any()
    assert torch.equal(probe.head[0].running_var, torch.ones(16))
