"""Stages after each other: what a probe or a partial fine-tuning takes over, leaves alone and trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vitexp.config import compose_and_check
from vitexp.errors import UserError
from vitexp.models.build import build_model
from vitexp.run import build_run
from vitexp.train import train

TINY = ["model=vit_debug", "data=fake", "data.num_train=32", "data.num_val=16", "tracking=none", "train.batch_size=8"]
TINY += ["train.log_every=1", "train.workers=0", "augment=none"]
PROBE = [*TINY, "stage=linear_probe", "model.head_norm=batch", "optim=lars", "train.epochs=2", "train.ema_decay=0.9"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights as a pretraining leaves them, with a classifier of another kind."""
    file = tmp_path_factory.mktemp("weights") / "model.safetensors"
    torch.manual_seed(1)
    save_file(build_model("vit_debug", num_classes=3, init="timm").state_dict(), file)
    return file


def _run(folder: str, *overrides: str) -> dict[str, Tensor]:
    """The weights that the run leaves, all on one schedule of two epochs, eight updates."""
    train(compose_and_check([*overrides, f"output_dir={folder}"]))
    return load_file(f"{folder}/model.safetensors")


def _rows(folder: str) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("perf/")} for row in rows]


def test_a_probe_trains_its_head_alone_and_goes_on_where_it_was_killed(workdir: Path, pretrained: Path) -> None:
    probe = [*PROBE, f"init_from={pretrained}"]
    weights, before = _run("whole", *probe), load_file(pretrained)
    features = [name for name in weights if not name.startswith("head.")]
    assert features
    assert all(torch.equal(weights[name], before[name]) for name in features)
    assert weights["head.0.num_batches_tracked"] == 8
    assert weights["head.1.weight"].any()
    assert any("val_ema/top1" in row for row in _rows("whole"))

    _run("cut", *probe, "train.max_steps=5")
    resumed = _run("cut", *probe, "resume=must", "allow_changes=true")
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)
    assert _rows("cut")[-1] == _rows("whole")[-1]


def test_partial_fine_tuning_moves_the_last_blocks_and_what_follows(workdir: Path, pretrained: Path) -> None:
    tuned = ["stage=finetune", "stage.train_blocks=1", "stage.head_init=timm", f"init_from={pretrained}"]
    weights, before = _run("run", *TINY, *tuned), load_file(pretrained)
    last = f"blocks.{len({name.split('.')[1] for name in weights if name.startswith('blocks.')}) - 1}."
    for name in weights:
        if not name.startswith("head."):
            assert torch.equal(weights[name], before[name]) != name.startswith((last, "norm.")), name


def _head(*overrides: str) -> Tensor:
    return build_run(compose_and_check([*TINY, "stage=finetune", *overrides])).backbone.get_parameter("head.weight")


@pytest.mark.parametrize(("init", "std"), [("zero", 0.0), ("mae_finetune", 2e-5), ("timm", 0.02)])
def test_a_fresh_head_starts_as_the_stage_says_and_by_the_seed(pretrained: Path, init: str, std: float) -> None:
    asked = [f"init_from={pretrained}", f"stage.head_init={init}"]
    head = _head(*asked)
    assert head.std().item() == pytest.approx(std, rel=0.1)
    assert torch.equal(head, _head(*asked))
    assert torch.equal(head, _head(*asked, "seed=1")) == (std == 0)


def test_a_head_that_fits_is_not_drawn_anew(pretrained: Path) -> None:
    asked = [f"init_from={pretrained}", "stage.head_init=timm", "data.num_classes=3"]
    assert torch.equal(_head(*asked, "stage.head=auto"), load_file(pretrained)["head.weight"])
    assert not torch.equal(_head(*asked), load_file(pretrained)["head.weight"])


def test_a_norm_that_no_file_filled_is_not_frozen_silently(pretrained: Path) -> None:
    asked = [*PROBE, f"init_from={pretrained}", "model.pool=mean", "model.norm=after_pool"]
    with pytest.raises(UserError, match=r"train_blocks=0: fc_norm\.weight .*\n.*model\.norm=before_pool"):
        build_run(compose_and_check(asked))


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("stage=linear_probe", "init_from"),
        ("stage.train_blocks=-1", "a whole number of at least 0, or all"),
        ("stage.train_blocks=most", "a whole number of at least 0, or all"),
        ("stage.train_blocks=1.5", "a whole number of at least 0, or all"),
        ("stage.train_blocks=null", "a whole number of at least 0, or all"),
        ("stage.head_init=zro", "'zero'"),
    ],
)
def test_a_mistake_is_named_with_what_is_allowed(override: str, word: str) -> None:
    with pytest.raises(UserError) as error:
        compose_and_check([override])
    assert override in str(error.value)
    assert word in str(error.value)


def test_pictures_that_are_no_squares_are_asked_for_on_the_command_line(workdir: Path) -> None:
    wide = [*TINY, "model.image_size=[16,32]", "model.patch_size=[8,4]", "train.max_steps=2"]
    for name, more in {
        "pretrained": ["method=mae", "evaluators=mae"],
        "tuned": ["stage=finetune", "stage.head_init=timm", "init_from=pretrained"],
        "taller": ["stage=finetune", "init_from=pretrained", "model.image_size=[32,32]"],
    }.items():
        weights = _run(name, *wide, *more)
        assert weights["pos_embed"].shape[1] == (33 if name == "taller" else 17)
        assert weights["patch_embed.proj.weight"].shape[2:] == (8, 4)


def test_one_class_alone_is_nothing_to_classify_but_enough_for_an_autoencoder(workdir: Path) -> None:
    one = [*TINY, "data.num_classes=1", "train.max_steps=1"]
    with pytest.raises(UserError, match=r"one class, 'class_0', and a classifier needs two"):
        build_run(compose_and_check(one))
    assert _run("run", *one, "method=mae", "evaluators=mae")


def test_files_of_a_person_are_neither_moved_nor_removed(workdir: Path) -> None:
    own = [workdir / "work" / name for name in ("thesis.txt", ".notes.tmp.txt", ".swap.tmp")]
    own[0].parent.mkdir()
    for path in own:
        path.write_text("mine")
    for more in ([], ["resume=never"]):
        with pytest.raises(UserError, match=r"output_dir=.*work: holds files that no run left \(.*thesis\.txt"):
            _run("work", *TINY, "train.max_steps=1", *more)
    assert all(path.read_text() == "mine" for path in own)
