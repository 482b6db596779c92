"""Loading: from every kind of file, with a report, and with refusals in one line."""

from __future__ import annotations

import argparse
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from vitexp.errors import UserError
from vitexp.models.pos_embed import resize_pos_embed
from vitexp.models.timm_backbone import TimmBackbone
from vitexp.models.vit import VisionTransformer
from vitexp.models.weights import LoadReport, load_weights

GOLDEN = Path(__file__).parents[1] / "golden"
SMALL = {
    "image_size": 32,
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 4,
    "num_classes": 10,
    "init": "timm",
}


def vit(**options: object) -> VisionTransformer:
    return VisionTransformer(**SMALL | options)


def saved(tmp_path: Path, content: object, name: str = "weights.pth") -> Path:
    torch.save(content, tmp_path / name)
    return tmp_path / name


def same(one: torch.nn.Module, other: torch.nn.Module, *, but: tuple[str, ...] = ("none",)) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(t, theirs[k]) for k, t in one.state_dict().items() if not k.startswith(but))


# ---- kinds of files ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("wrapper", [None, "model", "state_dict", "state_dict_ema", "net"])
@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.backbone.", "_orig_mod.module."])
def test_pytorch_files_are_read_bare_or_wrapped_and_with_prefixes(tmp_path: Path, wrapper: str, prefix: str) -> None:
    source, target = vit(), vit()
    state = {prefix + key: tensor for key, tensor in source.state_dict().items()}
    report = load_weights(target, saved(tmp_path, {wrapper: state, "epoch": 3} if wrapper else state))
    assert same(source, target)
    assert (report.family, report.head, report.resized, report.missing, report.unexpected) == (
        "timm",
        "kept",
        None,
        (),
        (),
    )
    assert report.loaded == len(state)


def test_averaged_weights_win_and_the_report_says_so(tmp_path: Path) -> None:
    averaged, raw, target = vit(), vit(), vit()
    path = saved(tmp_path, {"state_dict": raw.state_dict(), "state_dict_ema": averaged.state_dict()})
    assert "state_dict_ema" in str(load_weights(target, path))
    assert same(averaged, target)


def test_deits_own_weights_win_over_the_average_that_its_code_never_evaluates(tmp_path: Path) -> None:
    averaged, raw, target = vit(), vit(), vit()
    training = {"optimizer": {"state": {}}, "epoch": 299, "scaler": {"scale": 65536.0}}
    training |= {"args": argparse.Namespace(model="deit_tiny_patch16_224", lr=5e-4, color_jitter=None, input_size=224)}
    path = saved(tmp_path, {"model": raw.state_dict(), "model_ema": averaged.state_dict(), **training})
    assert "weights under 'model' (not 'model_ema')" in str(load_weights(target, path))
    assert same(raw, target)


def test_safetensors_and_run_folders_are_read(tmp_path: Path) -> None:
    source = vit()
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    for path in (tmp_path, str(tmp_path / "model.safetensors")):
        target = vit()
        load_weights(target, path)
        assert same(source, target)


def test_mae_checkpoints_with_their_command_line_are_read(tmp_path: Path) -> None:
    source, target = vit(), vit()
    load_weights(target, saved(tmp_path, {"model": source.state_dict(), "args": argparse.Namespace(lr=1.0)}))
    assert same(source, target)


def test_our_weights_load_in_timm_and_timms_in_ours(tmp_path: Path) -> None:
    name, size = "vit_tiny_patch16_224", {"img_size": 32, "num_classes": 5}
    theirs = timm.create_model(name, **size).eval()
    ours = VisionTransformer(
        image_size=32, patch_size=16, embed_dim=192, depth=12, num_heads=3, num_classes=5, init="timm"
    ).eval()
    images = torch.randn(2, 3, 32, 32)
    load_weights(ours, saved(tmp_path, theirs.state_dict()))
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-5)
    ours.init_weights()
    save_file(ours.state_dict(), tmp_path / "ours.safetensors")
    theirs = timm.create_model(name, checkpoint_path=str(tmp_path / "ours.safetensors"), **size).eval()
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-5)


# ---- head --------------------------------------------------------------------------------------------------------
def test_head_is_kept_when_it_fits_and_zero_otherwise(tmp_path: Path) -> None:
    source = vit()
    path = saved(tmp_path, source.state_dict())
    kept, fresh, seven = vit(), vit(), vit(num_classes=7)
    assert load_weights(kept, path).head == "kept"
    assert load_weights(fresh, path, head="fresh").head == "fresh"
    report = load_weights(seven, path)
    assert report.head == "fresh"
    assert report.missing == ("head.weight", "head.bias") == report.unexpected
    for model in (fresh, seven):
        assert same(model, source, but=("head.",))
        assert not model.head.weight.any()
        assert not model.head.bias.any()
    with pytest.raises(UserError, match=r"head=keep.*head.weight is \(10, 48\).*\(7, 48\)"):
        load_weights(vit(num_classes=7), path, head="keep")
    assert load_weights(vit(num_classes=0), path).head == "none"


def test_head_behind_a_dropped_hidden_layer_starts_fresh(tmp_path: Path) -> None:
    # As wide as the encoder, as in the paper: the classifier's shape fits, but it read other features.
    path = saved(tmp_path, vit(representation_dim=48).state_dict())
    model = vit()
    report = load_weights(model, path)
    assert report.head == "fresh"
    assert not model.head.weight.any()
    assert "pre_logits.fc.weight" in report.unexpected
    same_head = vit(representation_dim=48)
    assert load_weights(same_head, path).head == "kept"
    other = vit(representation_dim=48, num_classes=7)
    assert load_weights(other, path).head == "fresh"
    assert torch.equal(other.pre_logits.fc.weight, same_head.pre_logits.fc.weight)
    with pytest.raises(UserError, match="head=keep"):
        load_weights(vit(), path, head="keep")


def test_mae_pretraining_starts_the_fine_tuning_model(tmp_path: Path) -> None:
    encoder = vit(num_classes=0)
    with torch.no_grad():
        encoder.pos_embed[:, 0] = 0  # the fixed sin-cos table's class row
    extra = {"mask_token": torch.zeros(1, 1, 8), "decoder_pos_embed": torch.zeros(1, 17, 8)}
    extra |= {"decoder_blocks.0.norm1.weight": torch.ones(8)}
    for name, state in (("full.pth", encoder.state_dict() | extra), ("encoder.pth", encoder.state_dict())):
        model = vit(image_size=48, pool="mean", norm="after_pool")
        report = load_weights(model, saved(tmp_path, {"model": state}, name))
        assert (report.family, report.head, report.resized.mode) == ("mae", "fresh", "mae")
        assert set(report.missing) == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
        assert {"norm.weight", "norm.bias"} <= set(report.unexpected)
        assert same(encoder, model, but=("norm.", "pos_embed"))
        expected = resize_pos_embed(
            encoder.pos_embed.detach(), old_grid=(4, 4), new_grid=(6, 6), num_prefix_tokens=1, mode="mae"
        )
        assert torch.equal(model.pos_embed, expected)


# ---- positions ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", [None, "jax", "mae", "timm"])
def test_positions_are_resized_in_the_mode_asked_for(tmp_path: Path, mode: str | None) -> None:
    source, target = vit(), vit(image_size=(32, 64))
    report = load_weights(target, saved(tmp_path, source.state_dict()), position_mode=mode)
    assert (report.resized.old_grid, report.resized.new_grid, report.resized.mode) == ((4, 4), (4, 8), mode or "timm")
    expected = resize_pos_embed(
        source.pos_embed.detach(), old_grid=(4, 4), new_grid=(4, 8), num_prefix_tokens=1, mode=mode or "timm"
    )
    assert torch.equal(target.pos_embed, expected)


def test_rectangular_grids_come_from_the_model_the_run_or_the_caller(tmp_path: Path) -> None:
    source = vit(image_size=(16, 64))  # 2 x 8 patches, which could be 4 x 4
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    assert load_weights(vit(image_size=(16, 64)), tmp_path).resized is None
    assert load_weights(vit(), tmp_path).resized is None  # nothing tells that these are not 4 x 4
    assert load_weights(vit(), tmp_path, grid=(2, 8)).resized.old_grid == (2, 8)
    (tmp_path / "config.yaml").write_text("model: {image_size: [16, 64], patch_size: 8}\n")
    assert load_weights(vit(), tmp_path).resized.old_grid == (2, 8)
    (tmp_path / "model_best.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes())
    assert load_weights(vit(), tmp_path / "model_best.safetensors").resized.old_grid == (2, 8)
    assert "grid=(4, 4)" in str(load_weights(vit(image_size=(16, 64)), saved(tmp_path, vit().state_dict())))
    with pytest.raises(UserError, match=r"17 rows.*3x3"):
        load_weights(vit(), tmp_path, grid=(3, 3))


def test_class_token_without_position_is_the_same_function(tmp_path: Path) -> None:
    theirs = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=4, num_classes=10, no_embed_class=True
    ).eval()
    ours, images = vit().eval(), torch.randn(2, 3, 32, 32)
    load_weights(ours, saved(tmp_path, theirs.state_dict()))
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-5)
    assert load_weights(vit(image_size=48), saved(tmp_path, theirs.state_dict())).resized.old_grid == (4, 4)


def test_report_reads_as_one_paragraph(tmp_path: Path) -> None:
    report = load_weights(vit(num_classes=7, image_size=48), saved(tmp_path, vit().state_dict()))
    assert isinstance(report, LoadReport)
    assert "\n" not in str(report)
    for words in ("weights.pth (timm)", "head fresh", "4x4 -> 6x6 (timm)", "head.weight, head.bias"):
        assert words in str(report)


# ---- refusals ----------------------------------------------------------------------------------------------------
def refusal(model: torch.nn.Module, path: Path, **options: object) -> str:
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(UserError) as caught:
        load_weights(model, path, **options)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert len(str(caught.value).splitlines()) <= 3
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_misfits_name_the_first_three_keys_and_change_nothing(tmp_path: Path) -> None:
    path = saved(tmp_path, vit().state_dict())
    deeper = refusal(vit(depth=3), path)
    assert (
        "12 of the model's are missing (blocks.2.norm1.weight, blocks.2.norm1.bias, blocks.2.attn.qkv.weight" in deeper
    )
    assert "12 are not the model's (blocks.1." in refusal(vit(depth=1), path)
    wider = refusal(vit(embed_dim=96), path)
    assert "have another shape" in wider
    assert "(1, 1, 48) for (1, 1, 96)" in wider
    assert "patch_embed.proj.weight (48, 3, 8, 8) for (48, 3, 4, 4)" in refusal(vit(patch_size=4), path)


def test_misfits_say_which_option_mends_them(tmp_path: Path) -> None:
    path = saved(tmp_path, vit().state_dict())
    assert "model.class_token=true" in refusal(vit(class_token=False, pool="mean"), path)
    assert "model.qkv_bias=true" in refusal(vit(qkv_bias=False), path)
    gap = saved(tmp_path, vit(class_token=False, pool="mean").state_dict(), "gap.pt")
    assert "model.class_token=false model.pool=mean" in refusal(vit(), gap)
    after = saved(tmp_path, vit(pool="mean", norm="after_pool").state_dict(), "after.pt")
    assert "model.norm=after_pool" in refusal(vit(), after)


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("where", ["bare", "beside", "legacy", "pickle", "bin"])
def test_code_in_a_file_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # turns torch's own default off
    marker = tmp_path / "ran"
    content = Hostile(marker) if where == "bare" else {"model": vit().state_dict(), "extra": Hostile(marker)}
    path = tmp_path / ("weights.bin" if where == "bin" else "weights.pt")
    if where == "pickle":
        path.write_bytes(pickle.dumps(content["extra"]))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=where != "legacy")
    refusal(vit(), path)
    assert not marker.exists()


class Shell:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple:
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_what_a_pickle_would_run_is_named_whatever_its_protocol(tmp_path: Path, form: str, protocol: int) -> None:
    marker, path = tmp_path / "ran", tmp_path / "weights.pth"
    content = {"model": vit().state_dict(), "lr": Shell(f"touch {marker}")}
    if form == "pickle":
        path.write_bytes(pickle.dumps(Shell(f"touch {marker}"), protocol=protocol))
    else:
        torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=form == "zip")
    said = refusal(vit(), path)
    assert f"would run {os.system.__module__}.system\n" in said
    assert "_rebuild" not in said
    assert not marker.exists()


def test_tensors_in_a_protocol_that_is_not_read_safely_are_told_from_damage(tmp_path: Path) -> None:
    torch.save(vit().state_dict(), tmp_path / "new.pt", pickle_protocol=4)
    assert "pickle protocol 4" in refusal(vit(), tmp_path / "new.pt")


def test_pickled_arrays_in_an_npz_are_refused(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    np.savez(tmp_path / "weights.npz", cls=np.array([Hostile(marker)], dtype=object))
    refusal(vit(), tmp_path / "weights.npz")
    (tmp_path / "bare.npz").write_bytes(pickle.dumps(Hostile(marker)))
    refusal(vit(), tmp_path / "bare.npz")
    assert not marker.exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".npz"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "text"])
def test_damaged_files_are_named_in_one_line(tmp_path: Path, suffix: str, damage: str) -> None:
    path = tmp_path / f"weights{suffix}"
    if damage == "empty":
        path.touch()
    elif damage == "text":
        path.write_text("<!doctype html>not weights")
    elif damage == "cut":
        if suffix == ".npz":
            np.savez(path, **{"cls": np.zeros((1, 1, 48)), "embedding/bias": np.zeros(4800)})
        elif suffix == ".safetensors":
            save_file(vit().state_dict(), path)
        else:
            torch.save(vit().state_dict(), path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "\n" not in refusal(vit(), path)


@pytest.mark.parametrize("share", [0.001, 0.01, 0.5, 0.999])
def test_old_pytorch_files_cut_anywhere_are_damaged(tmp_path: Path, share: float) -> None:
    path = tmp_path / "weights.pth"
    torch.save(vit().state_dict(), path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert "damaged" in refusal(vit(), path)


def test_other_contents_are_refused(tmp_path: Path) -> None:
    assert "'.txt'" in refusal(vit(), saved(tmp_path, {}, "weights.txt"))
    assert "no state dict" in refusal(vit(), saved(tmp_path, {"epoch": 3}, "a.pt"))
    assert "no state dict" in refusal(vit(), saved(tmp_path, [torch.zeros(2)], "b.pt"))
    np.savez(tmp_path / "c.npz", x=np.zeros(3))
    assert "not the official ViT's layout" in refusal(vit(), tmp_path / "c.npz")
    np.savez(tmp_path / "d.npz", **{"conv_root/kernel": np.zeros((7, 7, 3, 64)), "cls": np.zeros((1, 1, 48))})
    assert "hybrid" in refusal(vit(), tmp_path / "d.npz")
    with np.load(GOLDEN / "vit_jax_token_rep0.npz") as file:
        arrays = dict(file) | {"Transformer/encoderblock_0/Strange_0/kernel": np.zeros(2)}
    np.savez(tmp_path / "e.npz", **arrays)
    assert "Strange_0" in refusal(vit(depth=3, mlp_ratio=2.0), tmp_path / "e.npz")
    arrays["Transformer/encoderblock_0/MultiHeadDotProductAttention_1/out/kernel"] = np.zeros(48)
    np.savez(tmp_path / "f.npz", **arrays)
    refusal(vit(depth=3, mlp_ratio=2.0), tmp_path / "f.npz")
    (tmp_path / "run").mkdir()
    assert "model.safetensors" in refusal(vit(), tmp_path / "run")
    with pytest.raises(UserError, match="head='maybe'"):
        load_weights(vit(), tmp_path / "a.pt", head="maybe")


def test_a_model_without_memory_is_refused(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = vit()
    with pytest.raises(UserError, match="meta"):
        load_weights(model, saved(tmp_path, vit().state_dict()))


# ---- timm models -------------------------------------------------------------------------------------------------
def test_timm_backbones_load_with_heads_and_positions(tmp_path: Path) -> None:
    resnet = TimmBackbone("resnet10t", num_classes=5, image_size=32)
    path = saved(tmp_path, resnet.state_dict())
    other = TimmBackbone("resnet10t", num_classes=7, image_size=32)
    report = load_weights(other, path)
    assert (report.head, report.missing) == ("fresh", ("fc.weight", "fc.bias"))
    assert same(resnet, other, but=("fc.",))
    assert not other.timm_model.fc.weight.any()
    tiny = {"options": {"depth": 1, "embed_dim": 48, "num_heads": 4}, "num_classes": 3}
    source = TimmBackbone("vit_tiny_patch16_224", image_size=32, **tiny)
    larger = TimmBackbone("vit_tiny_patch16_224", image_size=64, **tiny)
    report = load_weights(larger, saved(tmp_path, source.state_dict()))
    assert (report.head, report.resized.old_grid, report.resized.new_grid) == ("kept", (2, 2), (4, 4))
