"""Masked autoencoding in the whole loop: equal to a plain one, resumed to the bit, passed on, and on bare pictures."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

import vitexp
from tests.data.pictures import picture, write_folder
from vitexp import journal, reports
from vitexp.config import compose_and_check, reload
from vitexp.data.sampler import train_positions
from vitexp.errors import BadImage, UserError
from vitexp.models.build import build_model
from vitexp.run import build_run
from vitexp.seeding import derive_seed
from vitexp.train import train

DRIVER = Path(__file__).parent / "drivers" / "killed_runs.py"
DECODER = {"decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
TINY = ["method=mae", *(f"method.{key}={value}" for key, value in DECODER.items()), "model=vit_debug"]
TINY += ["model.position_embedding=sincos", "model.init=mae", "optim.betas=[0.9, 0.95]", "optim.weight_decay=0.05"]
TINY += ["optim.no_decay=mae_pretrain", "augment=none", "evaluators=none", "train.clip_norm=null"]
TINY += ["tracking=none", "runtime.device=cpu", "runtime.precision=fp32", "train.workers=0", "train.log_every=1"]
FAKE = [*TINY, "data=fake", "data.num_train=56", "data.num_val=12", "train.batch_size=8"]  # 7 micro-batches an epoch


def run(folder: Path, *overrides: str) -> dict[str, Any]:
    return train(compose_and_check([*overrides, f"output_dir={folder}"]))


def rows(folder: Path) -> list[dict[str, Any]]:
    """What must repeat: all but what the clock says."""
    found = journal.read(folder / "metrics.jsonl")
    return [{key: value for key, value in row.items() if not key.startswith("perf/")} for row in found]


def states(folder: Path) -> list[dict[str, Any]]:
    """Every checkpoint, the oldest first."""
    found = sorted((folder / "checkpoints").glob("step_*"))
    return [torch.load(path / "state.pt", weights_only=True) for path in found]


def without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A method's state under the official names."""
    return {name.removeprefix("autoencoder."): tensor for name, tensor in state.items() if name.startswith("auto")}


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pictures drawn: they take a second a run."""
    monkeypatch.setattr(reports, "draw_pictures", lambda run, folder: None)
    monkeypatch.setattr(reports.plots, "curves", lambda *given: None)


# ---- a plain loop ------------------------------------------------------------------------------------------------
def plain_loss(w: dict[str, Tensor], images: Tensor, noise: Tensor) -> Tensor:
    """The loss as arXiv:2111.06377 and its code say it, slowly: every patch embedded, tokens put back in their places,
    every patch predicted, and the loss of each weighed by the mask. ViT of vit_debug, norm_pix_loss, mask ratio .75."""
    b, c, side, p = *images.shape[:3], 8
    n = (side // p) ** 2
    pixels = images.reshape(b, c, side // p, p, side // p, p).permute(0, 2, 4, 3, 5, 1).reshape(b, n, p * p * c)
    tokens = F.conv2d(images, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=p)
    tokens = tokens.flatten(2).transpose(1, 2) + w["pos_embed"][:, 1:]
    shuffle = noise.argsort(dim=1)
    restore, seen = shuffle.argsort(dim=1), int(n * (1 - 0.75))
    tokens = torch.stack([tokens[i, shuffle[i, :seen]] for i in range(b)])
    cls = (w["cls_token"] + w["pos_embed"][:, :1]).expand(b, -1, -1)
    latent = plain_blocks(w, "blocks", torch.cat([cls, tokens], dim=1), heads=2)
    latent = plain_linear(w, "decoder_embed", plain_norm(w, "norm", latent))
    padded = torch.cat([latent[:, 1:], w["mask_token"].expand(b, n - seen, -1)], dim=1)
    unshuffled = torch.stack([padded[i, restore[i]] for i in range(b)])
    decoded = torch.cat([latent[:, :1], unshuffled], dim=1) + w["decoder_pos_embed"]
    decoded = plain_norm(w, "decoder_norm", plain_blocks(w, "decoder_blocks", decoded, heads=2))
    prediction = plain_linear(w, "decoder_pred", decoded)[:, 1:]
    mean, variance = pixels.mean(-1, keepdim=True), pixels.var(-1, keepdim=True)
    error = ((prediction - (pixels - mean) / (variance + 1e-6).sqrt()) ** 2).mean(dim=-1)
    mask = (restore >= seen).float()
    return (error * mask).sum() / mask.sum()


def plain_blocks(w: dict[str, Tensor], name: str, x: Tensor, *, heads: int) -> Tensor:
    b, n, d = x.shape
    for i in range(len({key.split(".")[1] for key in w if key.startswith(f"{name}.")})):
        block = f"{name}.{i}"
        qkv = plain_linear(w, f"{block}.attn.qkv", plain_norm(w, f"{block}.norm1", x))
        q, k, v = qkv.reshape(b, n, 3, heads, d // heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) / math.sqrt(d // heads)).softmax(dim=-1)
        x = x + plain_linear(w, f"{block}.attn.proj", (weights @ v).transpose(1, 2).reshape(b, n, d))
        hidden = F.gelu(plain_linear(w, f"{block}.mlp.fc1", plain_norm(w, f"{block}.norm2", x)))
        x = x + plain_linear(w, f"{block}.mlp.fc2", hidden)
    return x


def plain_linear(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def plain_norm(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)


def plain_training(
    w: dict[str, Tensor], pictures: list[Tensor], *, seed: int, epochs: int, batch: int, accumulate: int
) -> Iterator[tuple[float, float, dict[str, Tensor]]]:
    """(loss, lr, weights) after every update of MAE's recipe: blr .016 at 256, one epoch of warm-up, cosine to 0."""
    learned = [name for name in w if name not in ("pos_embed", "decoder_pos_embed")]
    for name in learned:
        w[name].requires_grad_()
    plain = [name for name in learned if w[name].ndim == 1]
    decayed = [w[name] for name in learned if name not in plain]  # class and mask token among them
    groups = [
        {"params": [w[name] for name in plain], "weight_decay": 0.0},
        {"params": decayed, "weight_decay": 0.05},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95))
    per_epoch = len(pictures) // batch
    order = train_positions(len(pictures), batch_size=batch, seed=seed)
    peak = 0.016 * batch * accumulate / 256
    for number in range(epochs * per_epoch):
        epoch, it = divmod(number, per_epoch)
        if it % accumulate == 0:
            e = epoch + it / per_epoch
            lr = peak * e / 1 if e < 1 else peak * 0.5 * (1 + math.cos(math.pi * (e - 1) / (epochs - 1)))
            group = min(accumulate, per_epoch - it)  # the last of an epoch may be short, and is averaged over its own
            losses = []
        images = torch.stack([pictures[i] for i in next(order).index])
        noise = torch.rand(batch, 16, generator=torch.Generator().manual_seed(derive_seed(seed, number, 0, 0xF0)))
        loss = plain_loss(w, images, noise)
        (loss / group).backward()
        losses.append(loss.item())
        if len(losses) == group:
            for part in optimizer.param_groups:
                part["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
            yield sum(losses) / group, lr, w


def but_key_biases(name: str, tensor: Tensor) -> Tensor:
    """Without the key third of qkv.bias: its gradient is zero but for rounding, which Adam makes a step of."""
    if not name.endswith("attn.qkv.bias"):
        return tensor
    q, _, v = tensor.chunk(3)
    return torch.cat([q, v])


def test_every_update_equals_that_of_a_plain_loop(tmp_path: Path, quiet: None) -> None:
    overrides = [*FAKE, "schedule=mae", "schedule.warmup_epochs=1", "train.epochs=3", "train.accumulate=2", "seed=4"]
    overrides += ["optim.base_lr=0.016", "optim.reference_batch=256", "train.save_every=1", "train.keep=0"]
    start = build_run(compose_and_check([*overrides, f"output_dir={tmp_path / 'start'}"]))
    images = start.source.train
    pictures = [torch.from_numpy(images.read(i)).permute(2, 0, 1) / 255 * 2 - 1 for i in range(len(images))]
    weights = {name: tensor.clone() for name, tensor in without_prefix(start.method.state_dict()).items()}
    fresh = {name: tensor.clone() for name, tensor in weights.items()}

    run(tmp_path / "run", *overrides)
    logged, kept = [row for row in rows(tmp_path / "run") if "train/loss" in row], states(tmp_path / "run")
    assert len(logged) == len(kept) == 12, "7 micro-batches by twos, three times"
    plain = plain_training(weights, pictures, seed=4, epochs=3, batch=8, accumulate=2)
    for row, state, (loss, lr, expected) in zip(logged, kept, plain, strict=True):
        step = state["step"]
        assert row["train/loss"] == pytest.approx(loss, rel=1e-6), step
        assert row["train/lr"] == pytest.approx(lr, rel=1e-12), step
        found = without_prefix(state["model"])
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            pair = but_key_biases(name, tensor), but_key_biases(name, expected[name].detach())
            torch.testing.assert_close(*pair, rtol=0, atol=1e-6, msg=lambda m, at=(step, name): f"{at}: {m}")
    moved = {name: float((found[name] - fresh[name]).abs().max()) for name in found}
    for name, by in moved.items():
        assert (by == 0) if name.endswith("pos_embed") else (by > 1e-3), (name, by)
    assert logged[0]["train/lr"] == 0
    assert logged[-1]["train/loss"] < logged[0]["train/loss"]


# ---- resume ------------------------------------------------------------------------------------------------------
def test_killed_and_started_again_it_ends_bit_for_bit_the_same(tmp_path: Path) -> None:
    settings = [*FAKE, "augment=light", "data.flip=0.5", "model.dropout=0.1", "model.drop_path=0.2"]
    settings += ["method.online_probe=true", "evaluators=mae_probe", "evaluators.reconstruction.pictures=0"]
    settings += ["train.epochs=2", "train.accumulate=2", "train.ema_decay=0.9", "train.clip_norm=1"]
    settings += ["train.log_every=2", "train.eval_every=3", "train.save_every=2"]  # 8 updates, 4 saves
    # Between two saves, inside one, and a little later once more.
    plan = {"whole": [], "killed": [("step", 3), ("rename", 2), ("step", 2)]}
    command = [sys.executable, str(DRIVER), str(tmp_path), json.dumps(plan), *settings]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    told = {report["name"]: report for report in map(json.loads, done.stdout.splitlines())}
    assert told["whole"]["last"] == told["killed"]["last"] == 0, done.stderr[-3000:]
    assert told["killed"]["killed"] == [True, True, True]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert rows(killed) == rows(whole)
    state = states(whole)[-1]
    assert_same(states(killed)[-1], state, "state")
    assert state["step"] == 8
    assert {"autoencoder.decoder_pred.weight", "probe.0.running_mean"} < state["model"].keys()
    assert any("val_ema/probe_top1" in row for row in rows(whole))
    for file in ("model.safetensors", "autoencoder.safetensors"):
        assert (killed / file).read_bytes() == (whole / file).read_bytes(), file


def assert_same(one: Any, other: Any, where: str) -> None:
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype, where
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for number, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where}.{number}")
    else:
        assert one == other, where


# ---- what a run leaves, and what it can be started from ----------------------------------------------------------
PROBED = [*FAKE, "seed=2", "train.max_steps=2", "train.save_every=1", "train.keep=0", "train.ema_decay=0.5"]
PROBED += ["method.online_probe=true", "evaluators=mae_probe", "optim.lr=0.01", "schedule=constant"]


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two updates with everything beside the reconstruction."""
    folder = tmp_path_factory.mktemp("mae") / "run"
    run(folder, *PROBED)
    return folder


def test_a_probe_is_reported_and_changes_no_reconstruction(probed: Path, tmp_path: Path, quiet: None) -> None:
    run(tmp_path / "alone", *PROBED, "method.online_probe=false", "evaluators=reconstruction", "train.ema_decay=null")
    watched, alone = rows(probed), rows(tmp_path / "alone")
    assert {"val/probe_top1", "val/loss", "val/knn_top1", "val_ema/probe_top1", "val_ema/loss"} < watched[-1].keys()
    assert {"train/probe_loss", "train/probe_top1"} < watched[0].keys()
    assert not {"train/probe_loss", "val/probe_top1"} & {key for row in alone for key in row}
    for ours, bare in zip(watched, alone, strict=True):
        assert {key: ours[key] for key in bare} == bare
    here, there = load_file(probed / "autoencoder.safetensors"), load_file(tmp_path / "alone/autoencoder.safetensors")
    assert_same(here, there, "weights")


def test_the_average_of_weights_holds_the_decoder_and_is_measured(probed: Path) -> None:
    one, two = states(probed)
    key = "autoencoder.decoder_pred.weight"
    assert torch.equal(one["ema"][key], one["model"][key]), "the first update copies"
    kept = min(0.5, 1 - 2 ** (-2 / 3))  # warmed up
    assert two["ema"].keys() == two["model"].keys()
    for name in (key, "autoencoder.mask_token", "autoencoder.blocks.0.attn.qkv.weight", "probe.1.weight"):
        assert not torch.equal(two["model"][name], one["model"][name])
        expected = kept * one["model"][name] + (1 - kept) * two["model"][name]
        torch.testing.assert_close(two["ema"][name], expected)
    assert rows(probed)[-1]["val_ema/loss"] != rows(probed)[-1]["val/loss"]


def test_the_exports_are_the_encoder_and_the_whole_under_official_names(probed: Path) -> None:
    official = build_model("mae", image_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, **DECODER)
    whole = load_file(probed / "autoencoder.safetensors")
    official.load_state_dict(whole)  # every name and shape, none more
    assert_same(whole, without_prefix(states(probed)[-1]["model"]), "the last weights")
    loaded = vitexp.load_run(probed)
    assert loaded.model.num_classes == 0
    assert_same(dict(loaded.model.state_dict()), dict(official.encoder.state_dict()), "encoder")
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loaded.model(images), official.encoder.eval()(images))


def test_another_run_goes_on_from_the_whole_or_from_the_encoder(probed: Path, tmp_path: Path, quiet: None) -> None:
    whole = load_file(probed / "autoencoder.safetensors")
    other = [*FAKE, "seed=9", "train.max_steps=1"]
    bare = build_run(compose_and_check(other)).method.whole
    everything = build_run(compose_and_check([*other, f"init_from={probed}/autoencoder.safetensors"]))
    encoder = build_run(compose_and_check([*other, f"init_from={probed}"]))
    assert bare is not None
    assert everything.method.whole is not None
    assert encoder.method.whole is not None
    fresh, found = bare.state_dict(), encoder.method.whole.state_dict()
    assert_same(dict(everything.method.whole.state_dict()), whole, "whole")
    for name in whole:
        of_decoder = name.startswith(("decoder_", "mask_token"))
        assert torch.equal(found[name], fresh[name] if of_decoder else whole[name]), name
    said = {name: " ".join(run.notes) for name, run in (("whole", everything), ("encoder", encoder))}
    assert "fresh in the model" not in said["whole"]
    assert "fresh in the model: " in said["encoder"]
    assert "decoder" in said["encoder"]
    run(tmp_path / "on", *other, f"init_from={probed}/autoencoder.safetensors")
    assert rows(tmp_path / "on")[0]["train/loss"] < rows(probed)[0]["train/loss"]


def test_a_run_with_its_probe_is_evaluated_from_its_exports(probed: Path) -> None:
    from vitexp.commands.evaluate import evaluate

    last = [row for row in rows(probed) if "val/probe_top1" in row][-1]
    found = evaluate(reload(probed, []), run_dir=probed)
    for name in ("val/loss", "val/probe_top1", "val/knn_top1"):
        assert found[name] == pytest.approx(last[name], rel=1e-5), name
    alone = evaluate(reload(probed, ["evaluators=knn"]), run_dir=probed)
    assert set(alone) == {"val/knn_top1"} | {name for name in alone if name == "val/knn_top5"}
    with pytest.raises(UserError, match="evaluators=kn: no such option"):
        reload(probed, ["evaluators=kn"])


# ---- what does not go together -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["model=timm", "model.name=resnet10t", "model.image_size=32"],
            r"TimmBackbone: a masked autoencoder needs separate patches",
        ),
        (["augment=deit"], r"augment\.batch mixes labels.*augment\.batch=null"),
        (["evaluators=classification"], r"trains no classifier to evaluate.*method\.online_probe=true"),
    ],
    ids=["timm", "mixing", "classification"],
)
def test_what_does_not_fit_is_one_clear_error(overrides: list[str], says: str, tmp_path: Path, quiet: None) -> None:
    usual = [word for word in FAKE if not (overrides[0] == "model=timm" and word.startswith("model"))]
    with pytest.raises(UserError, match=says) as error:
        run(tmp_path / "run", *usual, *overrides, "train.max_steps=1")
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "run" / "metrics.jsonl").exists(), "before training"


# ---- one's own pictures ------------------------------------------------------------------------------------------
def test_a_flat_folder_of_bare_pictures(tmp_path: Path, quiet: None) -> None:
    files = {f"{number:02}.jpg": picture(number, 40, 36) for number in range(29)}
    files |= {"29.JPEG": picture(29, 90, 20), "notes.txt": b"no picture", ".hidden.jpg": b"", "list.csv": b"a,b"}
    root = write_folder(tmp_path / "pictures", files | {"13b.jpg": picture(13)[:150]})
    bare = [word for word in TINY if not word.startswith(("model=", "evaluators="))]
    bare += ["stage=pretrain", "data=folder", f"data.root={root}", "evaluators=mae", "model.image_size=32"]
    bare += ["model.patch_size=8", "model.depth=1", "train.batch_size=4", "train.max_steps=2"]
    with pytest.raises(BadImage, match=r"13b\.jpg: cut short or damaged"):
        run(tmp_path / "broken", *bare, "data.cache=memory")
    (root / "13b.jpg").unlink()
    run(tmp_path / "run", *bare)
    said = (tmp_path / "run" / "train.log").read_text()
    assert "27 pictures to train, 3 to validate, no labels" in said
    assert "3 files left out (" in said
    assert ".txt 1" in said
    assert "evaluators left out, for no picture has a label: knn" in said
    assert {"val/loss", "val/effective_rank"} < rows(tmp_path / "run")[-1].keys()
    assert not any("knn" in key for row in rows(tmp_path / "run") for key in row)

    run(tmp_path / "all", *bare, "data.val_fraction=0")  # nothing held out: nothing to measure, and it trains
    assert "30 pictures to train, none to validate, no labels" in (tmp_path / "all" / "train.log").read_text()
    assert [row["step"] for row in rows(tmp_path / "all")] == [1, 2]
