"""Files of Hugging Face transformers compute here what they compute there.

tests/golden/transformers_vits.safetensors: models of transformers 5.23 with random weights, under the names its files
have, and what they make of the same pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vitexp.errors import UserError
from vitexp.models.build import build_model
from vitexp.models.deit import DeiT
from vitexp.models.vit import VisionTransformer
from vitexp.models.weights import load_weights

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "transformers_vits.safetensors")
SIZE = {"image_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
VIT = SIZE | {"mlp_ratio": 2.0, "num_classes": 5}
MAE = SIZE | {"mlp_ratio": 2.0, "decoder_dim": 8, "decoder_depth": 1, "decoder_num_heads": 2}


def written(folder: Path, kind: str) -> dict[str, Tensor]:
    """The state dict that transformers wrote, and a file of it in the folder."""
    state = {key.removeprefix(f"{kind}/"): tensor for key, tensor in GOLDEN.items() if key.startswith(f"{kind}/")}
    save_file(state, folder / "model.safetensors")
    return state


def close(found: Tensor, name: str) -> None:
    torch.testing.assert_close(found, GOLDEN[name], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_classifiers_logits_are_transformers(tmp_path: Path) -> None:
    state = written(tmp_path, "vit")
    model = VisionTransformer(**VIT).eval()
    report = load_weights(model, tmp_path)
    assert (report.family, report.head, report.missing, report.unexpected) == ("transformers", "kept", (), ())
    assert report.loaded == len(state) - 2 * 4  # six of query, key and value become two in each of two blocks
    assert "names of transformers" in str(report)
    close(model(GOLDEN["images"]), "vit.logits")
    # Its own interpolate_pos_encoding is bicubic without antialiasing, which is MAE's way.
    larger = load_weights(VisionTransformer(**VIT | {"image_size": 24}), tmp_path)
    assert (larger.resized.new_grid, larger.resized.mode) == ((6, 6), "mae")


@torch.no_grad()
def test_a_distilled_deits_logits_are_transformers(tmp_path: Path) -> None:
    written(tmp_path, "deit")
    model = DeiT(**VIT, distilled=True).eval()
    report = load_weights(model, tmp_path)
    assert (report.family, report.head, report.missing, report.unexpected) == ("deit", "kept", (), ())
    close(model(GOLDEN["images"]), "deit.logits")


@pytest.mark.parametrize("names", ["decoder.decoder_encoder.layer.", "decoder.decoder_layers."])
@torch.no_grad()
def test_an_autoencoders_predictions_are_transformers(tmp_path: Path, names: str) -> None:
    state = written(tmp_path, "mae")
    save_file(
        {key.replace("decoder.decoder_encoder.layer.", names): tensor for key, tensor in state.items()},
        tmp_path / "model.safetensors",
    )
    model = build_model("mae", **MAE).eval()
    report = load_weights(model, tmp_path)
    assert (report.family, report.missing, report.unexpected) == ("mae", (), ())
    found = model(GOLDEN["images"], GOLDEN["noise"])
    close(found.prediction, "mae.logits")
    assert torch.equal(found.mask, GOLDEN["mae.mask"])
    encoder = VisionTransformer(**VIT)
    assert load_weights(encoder, tmp_path).head == "fresh"
    assert torch.equal(encoder.blocks[1].mlp.fc1.weight, model.encoder.blocks[1].mlp.fc1.weight)


@torch.no_grad()
def test_a_model_without_classifier_brings_its_pooler_as_representation(tmp_path: Path) -> None:
    state = written(tmp_path, "model")
    model = VisionTransformer(**VIT, representation_dim=16).eval()
    report = load_weights(model, tmp_path)
    assert (report.head, set(report.missing), report.unexpected) == ("fresh", {"head.weight", "head.bias"}, ())
    close(model.pre_logits(model.encode(model.embed(GOLDEN["images"])).cls), "model.pooled")
    plain = load_weights(VisionTransformer(**VIT), tmp_path)
    assert set(plain.unexpected) == {"pre_logits.fc.weight", "pre_logits.fc.bias"}
    # Half a layer, and layers of other models, are refused under the names that the file has.
    del state["encoder.layer.1.attention.attention.key.weight"]
    save_file(state | {"encoder.layer.0.lambda_1": torch.zeros(16)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"blocks.1.attn.qkv.weight(?s:.*)encoder.layer.0.lambda_1"):
        load_weights(VisionTransformer(**VIT), tmp_path)
