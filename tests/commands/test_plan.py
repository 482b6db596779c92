from __future__ import annotations

from functools import partial

import pytest
import timm
import torch
from torch import nn

from vitexp.commands.plan import lr_table, main, pictures_seen, plan, slots_of
from vitexp.horizon import plan_horizon
from vitexp.schedules import constant, cosine


def small_vit(num_classes: int) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(
            "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=48, num_classes=num_classes
        )


def vit_huge(num_classes: int) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model("vit_huge_patch14_224", num_classes=num_classes)


def page(
    *, build=small_vit, num_classes: int = 10, max_steps: int | None = None, image_size: int = 32
) -> dict[str, str]:
    text = plan(
        model=build(num_classes),
        model_with_classes=build,
        num_classes=num_classes,
        image_size=image_size,
        in_channels=3,
        horizon=plan_horizon(25, accumulate=2, epochs=4, max_steps=max_steps),
        lr=3e-4,
        schedule=partial(cosine, warmup_epochs=1),
        global_batch=128,
        num_train=1590,
        optimizer_slots=1,
    )
    return {line[:11].strip(): line[12:] for line in text.split("\n\n")[0].splitlines()}


def test_vit_huge_with_few_classes_still_shows_the_published_count():
    told = page(build=vit_huge, image_size=224)["parameters"]
    assert "630,777,610 with 10 classes" in told
    assert "632,045,800 with ImageNet's 1,000" in told


def test_imagenets_count_is_not_told_twice():
    assert page(num_classes=1000)["parameters"].count("1,000") == 1


def test_frozen_parameters_are_told_apart_and_cost_no_gradient():
    def frozen_but_head(num_classes: int) -> nn.Module:
        model = small_vit(num_classes).requires_grad_(False)
        model.head.requires_grad_(True)
        return model

    told = page(build=frozen_but_head)
    assert "490 of them trained" in told["parameters"]
    assert "gradients 0.0 MiB + optimizer 0.0 MiB" in told["memory"]
    assert "gradients 0.0 MiB" not in page()["memory"]


def test_both_ways_of_counting_arithmetic_are_named():
    told = page(build=vit_huge, num_classes=1000, image_size=224)["forward"]
    assert "334.6 GFLOPs a picture of 224x224x3" in told
    assert "167.3 G multiply-adds" in told  # timm's and the papers' figure


def test_steps_and_pictures_are_those_the_loop_will_make():
    told = page()
    assert told["steps"] == "13 updates an epoch (1,590 pictures, global batch 128), 4 epochs, 52 updates"
    assert told["training"].startswith("6,360 pictures seen")
    assert told["peak lr"] == "0.0003"


def test_a_run_cut_short_says_so_and_counts_what_is_left():
    told = page(max_steps=15)
    assert told["steps"].endswith("52 updates; train.max_steps ends the run after 15")
    assert told["training"].startswith(f"{1590 + 2 * 128:,} pictures seen")


def test_pictures_of_dropped_short_batches_are_not_counted():
    horizon = plan_horizon(3, accumulate=1, epochs=2, max_steps=None)
    assert pictures_seen(horizon, global_batch=8, num_train=30) == 48
    assert pictures_seen(horizon, global_batch=12, num_train=30) == 60


def test_the_table_shows_first_top_and_last_rate():
    horizon = plan_horizon(10, accumulate=1, epochs=10, max_steps=None)
    rows = [line.split() for line in lr_table(partial(cosine, warmup_epochs=1.5), horizon, lr=1e-3)][1:]
    rates = {row[0]: float(row[2]) for row in rows}
    assert rates["0"] == 0
    assert rates["15"] == 1e-3
    assert 0 < rates["99"] < 1e-6
    assert len(rows) == 12


def test_the_top_is_found_to_the_update_in_a_long_run():
    horizon = plan_horizon(1251, accumulate=1, epochs=300, max_steps=None)
    rows = lr_table(partial(cosine, warmup_steps=10_003), horizon, lr=1e-3)
    assert any(row.split()[0] == "10,003" for row in rows)


def test_a_run_of_one_update_has_a_table_of_one_row():
    horizon = plan_horizon(10, accumulate=1, epochs=1, max_steps=1)
    assert len(lr_table(constant, horizon, lr=1e-3)) == 2
    assert len(lr_table(partial(constant, warmup_epochs=1), horizon, lr=1e-3)) == 2


@pytest.mark.parametrize(
    ("optimizer", "slots"),
    [
        (torch.optim.AdamW, 2),
        (partial(torch.optim.AdamW, amsgrad=True), 3),
        (partial(torch.optim.SGD, momentum=0.9), 1),
        (torch.optim.SGD, 0),
    ],
)
def test_slots_are_the_tensors_that_the_optimizer_really_keeps(optimizer, slots: int):
    assert slots_of(optimizer, weight_decay=0.1) == slots


def test_the_command_plans_the_shipped_vit_huge_and_writes_nothing(workdir, capsys):
    assert main(["model=vit_huge", "optim=adam", "schedule=linear_warmup", "train.batch_size=32"], None) == 0
    told = capsys.readouterr().out
    assert "632,045,800 with ImageNet's 1,000" in told
    assert "334.6 GFLOPs" in told
    assert "global batch 32" in told
    assert list(workdir.iterdir()) == []
