"""Weights of several checkpoints against the sums written out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vitexp import checkpoint, journal
from vitexp.averaging import backbone_weights, mean_of_last, moving_average
from vitexp.config import compose_and_check
from vitexp.errors import UserError
from vitexp.train import train
from vitexp.trained import load_run


def save(folder, step: int, *, ema=None) -> dict[str, torch.Tensor]:
    torch.manual_seed(step)
    weights = {
        "backbone.head.weight": torch.randn(3, 4),
        "backbone.norm.running_mean": torch.randn(4),
        "backbone.norm.num_batches_tracked": torch.tensor(step),
        "backbone.half": torch.randn(2, dtype=torch.bfloat16),
    }
    state = {"model": weights, "ema": ema, "classes": ["a"], "world_size": 1, "optimizer": {"moment": torch.ones(9)}}
    checkpoint.save(folder, state, step=step, keep=0)
    return weights


def test_the_last_checkpoints_are_averaged_and_counters_are_the_newest(tmp_path):
    saved = {step: save(tmp_path, step) for step in (9, 100, 20, 1000)}  # in no order of time or of letters
    found = mean_of_last(tmp_path, 3)
    assert found.steps == (20, 100, 1000)
    for name, mean in found.state.items():
        tensors = [saved[step][name] for step in (20, 100, 1000)]
        if mean.is_floating_point():
            exact = sum(tensor.double() for tensor in tensors) / 3
            assert torch.equal(mean, exact.to(mean.dtype)), name
        else:
            assert mean == 1000
    assert mean_of_last(tmp_path, 1).state["backbone.head.weight"].equal(saved[1000]["backbone.head.weight"])
    assert mean_of_last(tmp_path, 4).steps == (9, 20, 100, 1000)


def test_too_few_checkpoints_are_told_with_what_there_is(tmp_path):
    with pytest.raises(UserError, match=r"average=2: .* has no checkpoint"):
        mean_of_last(tmp_path / "checkpoints", 2)
    save(tmp_path, 5), save(tmp_path, 7)
    (tmp_path / "step_00000009.damaged").mkdir()
    with pytest.raises(UserError, match=r"average=3: .* 2 checkpoints, of steps 5, 7\n.*train\.keep"):
        mean_of_last(tmp_path, 3)


def test_a_damaged_checkpoint_is_not_averaged(tmp_path):
    save(tmp_path, 5), save(tmp_path, 7)
    file = tmp_path / "step_00000005" / "state.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"step_00000005.*sha256"):
        mean_of_last(tmp_path, 2)


def test_the_moving_average_is_the_newest_checkpoints(tmp_path):
    save(tmp_path, 1, ema={"backbone.head.weight": torch.zeros(3, 4)})
    save(tmp_path, 2, ema={"backbone.head.weight": torch.ones(3, 4)})
    found = moving_average(tmp_path)
    assert found.steps == (2,)
    assert found.state["backbone.head.weight"].eq(1).all()
    save(tmp_path, 3)
    with pytest.raises(UserError, match=r"ema=true: .*step_00000003.*train\.ema_decay"):
        moving_average(tmp_path)
    with pytest.raises(UserError, match=r"ema=true: .*no checkpoint"):
        moving_average(tmp_path / "none")


def test_a_backbone_is_found_whatever_its_method_calls_it():
    backbone = nn.Linear(2, 3)
    inside = {f"autoencoder.encoder.{name}": tensor for name, tensor in backbone.state_dict().items()}
    others = {"autoencoder.decoder.weight": torch.zeros(5, 2), "decoder.bias": torch.zeros(3)}
    found = backbone_weights(others | inside, backbone.state_dict())
    assert all(found[name].equal(tensor) for name, tensor in backbone.state_dict().items())
    with pytest.raises(UserError, match="another model"):
        backbone_weights(others, backbone.state_dict())


RUN = [
    "model=vit_debug", "data=fake", "data.num_train=64", "data.num_val=20", "data.num_classes=6", "train.batch_size=16",
    "train.max_steps=6", "train.save_every=1", "train.eval_every=1", "train.keep=0", "train.ema_decay=0.6",
    "train.ema_warmup=false", "optim.lr=0.02", "schedule=constant", "tracking=none",
]  # fmt: skip


def test_a_run_keeps_its_weights_and_their_average_each_at_its_best(workdir):
    summary = train(compose_and_check([*RUN, "output_dir=run"]))
    rows = journal.read(workdir / "run" / "metrics.jsonl")
    for split, key, part, file in (
        ("val", "best/step", "model", "model_best"),
        ("val_ema", "best/val_ema/step", "ema", "model_ema"),
    ):
        scores = {row["step"]: row[f"{split}/top1"] for row in rows if f"{split}/top1" in row}
        assert list(scores) == [1, 2, 3, 4, 5, 6]
        best = max(scores, key=scores.__getitem__)  # the first of those alike
        assert (summary[key], summary[f"best/{split}/top1"]) == (best, scores[best])
        kept = load_run("run", weights=f"{file}.safetensors")
        assert kept.metrics[f"{split}/top1"] == scores[best]
        saved = checkpoint.load(checkpoint.open_checkpoint(workdir / "run" / "checkpoints" / f"step_{best:08d}"))
        expected = backbone_weights(saved[part], kept.model.state_dict())
        assert all(torch.equal(tensor, expected[name]) for name, tensor in kept.model.state_dict().items()), file


def test_an_average_that_nothing_judged_is_kept_as_it_was_at_the_end(workdir):
    train(compose_and_check([*RUN, "evaluators=none", "output_dir=run"]))
    kept = load_run("run", weights="model_ema.safetensors").model.state_dict()
    expected = backbone_weights(moving_average(workdir / "run" / "checkpoints").state, kept)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in kept.items())
    own = load_run("run").model.state_dict()
    assert not torch.equal(own["head.weight"], kept["head.weight"])


def test_an_average_without_warm_up_starts_with_the_first_weights_share(workdir):
    """ModelEmaV2's constant decay: the start counts with decay to the power of the updates made."""
    for warmup in ("true", "false"):
        train(compose_and_check([*RUN, "train.max_steps=1", f"train.ema_warmup={warmup}", f"output_dir=run_{warmup}"]))
    found = (checkpoint.latest(workdir / name / "checkpoints") for name in ("run_true", "run_false"))
    warm, cold = (checkpoint.load(one) for one in found if one is not None)
    name = next(name for name in warm["model"] if name.endswith("blocks.0.mlp.fc1.weight"))
    assert torch.equal(warm["ema"][name], warm["model"][name])
    assert not torch.allclose(cold["ema"][name], cold["model"][name], rtol=0, atol=1e-4)
