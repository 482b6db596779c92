"""Parameter groups against those of the official recipes, the rate that truly reaches each layer, and LARS."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from timm.optim import param_groups_weight_decay
from torch import nn

from vitexp.errors import UserError
from vitexp.optim import NO_DECAY, NoDecay, build_optimizer, parameter_groups, resolve_lr, set_lr
from vitexp.optimizers.lars import LARS

TESTS = Path(__file__).parent
CONF = TESTS.parent / "conf" / "optim"
MAE_GROUPS = json.loads((TESTS / "golden" / "optim_mae_param_groups.json").read_text())
RECIPE_GROUPS = json.loads((TESTS / "golden" / "optim_weight_decay_groups.json").read_text())


class TinyViT(VisionTransformer):
    """timm's ViT with the layer numbers of MAE's fine-tuning."""

    def __init__(self, *, depth: int = 3, global_pool: str = "token") -> None:
        size = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": depth, "num_heads": 2, "num_classes": 5}
        super().__init__(**size, global_pool=global_pool)
        self.num_layers = depth + 1

    def layer_of(self, name: str) -> int:
        if name in ("cls_token", "pos_embed") or name.startswith("patch_embed."):
            return 0
        return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else self.num_layers


class Method(nn.Module):
    """A model the way methods hold it, with a layer of the method's own beside it."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.extra_head = nn.Linear(16, 2)


class TinyMAE(nn.Module):
    """The parameter names of the official masked autoencoder, three blocks and a decoder of two."""

    def __init__(self) -> None:
        super().__init__()
        vit = VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=3, num_heads=2, num_classes=0)
        self.cls_token, self.mask_token = vit.cls_token, nn.Parameter(torch.zeros(1, 1, 16))
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, 16), requires_grad=False)
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, 5, 16), requires_grad=False)
        self.patch_embed, self.blocks, self.norm = vit.patch_embed, vit.blocks, vit.norm
        self.decoder_embed = nn.Linear(16, 16)
        self.decoder_blocks = nn.ModuleList(Block(16, 2, qkv_bias=True) for _ in range(2))
        self.decoder_norm, self.decoder_pred = nn.LayerNorm(16), nn.Linear(16, 12)


def as_sets(groups: list[dict[str, Any]], names: str = "names") -> list[tuple[float, float, set[str]]]:
    """(lr_scale, weight_decay, names) of each group."""
    return [(group.get("lr_scale", 1.0), group["weight_decay"], set(group[names])) for group in groups]


def decayed(model: nn.Module, no_decay: Any = "default") -> set[str]:
    groups = parameter_groups(model, weight_decay=0.1, no_decay=no_decay)
    return {name for group in groups if group["weight_decay"] for name in group["names"]}


# ---- learning rate ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("base_lr", "reference", "batch", "expected"),
    [
        (1.5e-4, 256, 4096, 2.4e-3),  # MAE pretraining
        (1e-3, 256, 1024, 4e-3),  # MAE fine-tuning, ViT-L
        (5e-4, 256, 1024, 2e-3),  # MAE fine-tuning, ViT-B
        (0.1, 256, 16384, 6.4),  # MAE linear probe
        (1e-3, 1024, 256, 2.5e-4),  # LV-ViT's reference batch
    ],
)
def test_base_lr_is_scaled_once_by_the_global_batch(
    base_lr: float, reference: int, batch: int, expected: float
) -> None:
    lr = resolve_lr(lr=None, base_lr=base_lr, reference_batch=reference, global_batch=batch)
    assert lr == pytest.approx(expected, rel=1e-15)


def test_an_absolute_lr_wins_over_base_lr() -> None:
    assert resolve_lr(lr=3e-3, base_lr=1.0, reference_batch=256, global_batch=4096) == 3e-3


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "optim.lr=null and optim.base_lr=null"),
        ({"lr": -1}, "optim.lr=-1"),
        ({"lr": float("nan")}, "optim.lr=nan"),
        ({"lr": "abc"}, "optim.lr=abc"),
        ({"base_lr": -1.0}, "optim.base_lr=-1"),
        ({"base_lr": 1.0, "reference_batch": 0}, "optim.reference_batch=0"),
    ],
)
def test_impossible_rates_name_their_key(given: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        resolve_lr(**{"lr": None, "base_lr": None, "reference_batch": 256, "global_batch": 64, **given})


# ---- groups of official recipes --------------------------------------------------------------------------------------
@pytest.mark.parametrize("layer_decay", [0.75, 0.65])
@pytest.mark.parametrize(("pool", "flag"), [("avg", 1), ("token", 0)])
@pytest.mark.parametrize("no_decay", ["default", "mae_finetune"])
def test_groups_are_those_of_maes_finetuning(layer_decay: float, pool: str, flag: int, no_decay: str) -> None:
    official = MAE_GROUPS[f"lrd_globalpool{flag}_decay{layer_decay}"]
    groups = parameter_groups(TinyViT(global_pool=pool), weight_decay=0.05, layer_decay=layer_decay, no_decay=no_decay)
    ours, expected = sorted(as_sets(groups)), sorted(as_sets(official["groups"], "params"))
    assert [(decay, names) for _, decay, names in ours] == [(decay, names) for _, decay, names in expected]
    assert [scale for scale, _, _ in ours] == pytest.approx([scale for scale, _, _ in expected], rel=1e-14)


def test_groups_are_those_of_maes_pretraining() -> None:
    """Its class and mask tokens decay: only biases and one-dimensional parameters are spared."""
    groups = parameter_groups(TinyMAE(), weight_decay=0.05, no_decay="mae_pretrain")
    ours = {decay: names for _, decay, names in as_sets(groups)}
    expected = {decay: names for _, decay, names in as_sets(MAE_GROUPS["pretrain_wd_groups"], "params")}
    assert ours == expected
    assert not {name for group in groups for name in group["names"]} & set(MAE_GROUPS["pretrain_frozen"])
    assert {"cls_token", "mask_token"} == decayed(TinyMAE(), "mae_pretrain") - decayed(TinyMAE())


def test_groups_are_those_of_deits_recipe_down_to_its_decayed_distillation_token() -> None:
    model = VisionTransformerDistilled(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=5)
    spared, kept = (set(group["names"]) for group in RECIPE_GROUPS["deit"]["groups"])
    assert "dist_token" in kept
    assert decayed(model, "deit") == kept
    assert decayed(model) == kept - {"dist_token"}
    assert {name for name, _ in model.named_parameters()} == spared | kept


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",
        "deit_tiny_distilled_patch16_224",
        "vit_relpos_small_patch16_224",
        "swin_tiny_patch4_window7_224",
        "convnext_atto",
        "resnet18",
    ],
)
def test_the_timm_set_is_what_timm_builds(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    listed = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    theirs = param_groups_weight_decay(model, 0.1, no_weight_decay_list=listed)
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    expected = {by_id[id(p)] for group in theirs if group["weight_decay"] for p in group["params"]}
    assert decayed(model, "timm") == expected


def test_big_vision_decays_kernels_only() -> None:
    model = TinyViT()
    model.probe = nn.Parameter(torch.zeros(1, 1, 16))  # as of an attention-pooling head
    model.pool = nn.MultiheadAttention(16, 2)
    kernels = {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and name not in ("cls_token", "pos_embed", "probe")
    }
    assert decayed(model, "big_vision") == kernels
    assert decayed(model) == kernels | {"probe"}


def test_each_rule_of_no_decay_can_be_switched() -> None:
    model = TinyViT()
    model.embed_table = nn.Embedding(3, 16)
    everything = {name for name, _ in model.named_parameters()}
    assert decayed(model, "none") == everything
    spared = {
        rule: everything - decayed(model, {**dict.fromkeys(("bias", "norm", "token", "pos_embed"), False), rule: True})
        for rule in ("bias", "norm", "token", "pos_embed", "not_kernel", "model_list")
    }
    assert spared["bias"] == {name for name in everything if name.endswith(".bias")}
    assert spared["norm"] == {name for name in everything if "norm" in name and name.endswith(".weight")}
    assert spared["token"] == {"cls_token"}
    assert spared["pos_embed"] == {"pos_embed"}
    assert spared["model_list"] == {"cls_token", "pos_embed"}
    assert "embed_table.weight" in spared["not_kernel"]
    assert everything - decayed(model, {**vars(NO_DECAY["none"]), "names": ["blocks.0.*", "embed_table.weight"]}) == {
        name for name in everything if name.startswith("blocks.0.") or name == "embed_table.weight"
    }


def test_rules_see_through_the_method_that_holds_the_model() -> None:
    held = decayed(Method(TinyViT()))
    assert held == {f"backbone.{name}" for name in decayed(TinyViT())} | {"extra_head.weight"}
    only_listed = {**vars(NO_DECAY["none"]), "model_list": True}
    everything = {name for name, _ in Method(TinyViT()).named_parameters()}
    assert everything - decayed(Method(TinyViT()), only_listed) == {"backbone.cls_token", "backbone.pos_embed"}


def test_layers_named_after_tokens_or_positions_still_decay() -> None:
    """T2T's module tokens_to_token and a network that computes positions hold ordinary weights."""
    model = nn.Module()
    model.tokens_to_token, model.pos_embed = nn.Linear(4, 4), nn.Sequential(nn.Conv2d(4, 4, 3))
    model.relative_position_bias_table = nn.Parameter(torch.zeros(9, 2))
    assert decayed(model) == {"tokens_to_token.weight", "pos_embed.0.weight"}


@pytest.mark.parametrize(
    ("no_decay", "words"),
    [
        ("mae_finetun", "no such set. Did you mean 'mae_finetune'"),
        ({"tokens": True}, "optim.no_decay.tokens: no such rule. Did you mean 'token'"),
        ({"bias": "yes"}, "optim.no_decay.bias=yes"),
        ({"names": "cls_token"}, "optim.no_decay.names=cls_token"),
    ],
)
def test_unknown_no_decay_rules_name_the_nearest(no_decay: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        parameter_groups(TinyViT(), weight_decay=0.1, no_decay=no_decay)


# ---- every parameter once --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("no_decay", list(NO_DECAY))
@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
def test_groups_cover_every_trainable_parameter_once(no_decay: str, layer_decay: float) -> None:
    method = Method(TinyViT())
    method.tied = method.extra_head  # one layer under two names
    method.backbone.pos_embed.requires_grad_(False)
    groups = parameter_groups(method, weight_decay=0.1, layer_decay=layer_decay, no_decay=no_decay)
    listed = [parameter for group in groups for parameter in group["params"]]
    trainable = [parameter for parameter in method.parameters() if parameter.requires_grad]
    assert len(listed) == len(trainable)
    assert {id(p) for p in listed} == {id(p) for p in trainable}
    by_name = dict(method.named_parameters())
    assert all(by_name[n] is p for group in groups for n, p in zip(group["names"], group["params"], strict=True))
    assert len({(group["lr_scale"], group["weight_decay"]) for group in groups}) == len(groups)


def test_without_decay_there_is_one_group() -> None:
    assert len(parameter_groups(TinyViT(), weight_decay=0.0)) == 1


def test_a_frozen_model_is_refused() -> None:
    with pytest.raises(UserError, match="TinyViT has no trainable parameter"):
        parameter_groups(TinyViT().requires_grad_(False), weight_decay=0.0)


# ---- layer decay -----------------------------------------------------------------------------------------------------
def moved(method: Method, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """How far each parameter moves under a gradient of ones."""
    before = {name: parameter.detach().clone() for name, parameter in method.named_parameters()}
    for parameter in method.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return {name: (before[name] - parameter).mean().item() for name, parameter in method.named_parameters()}


def test_layer_decay_changes_the_rate_each_layer_is_trained_with() -> None:
    method = Method(TinyViT(depth=2))
    sgd = functools.partial(torch.optim.SGD, momentum=0.0)
    optimizer = build_optimizer(sgd, method, lr=1.0, weight_decay=0.0, layer_decay=0.5)
    scales = {"patch_embed": 0.125, "blocks.0": 0.25, "blocks.1": 0.5, "head": 1.0, "extra_head": 1.0}
    for lr in (1.0, 0.02):  # as built, and as the loop sets it
        if lr != 1.0:
            set_lr(optimizer, lr)
        steps = moved(method, optimizer)
        for layer, scale in scales.items():
            inside = [step for name, step in steps.items() if name.removeprefix("backbone.").startswith(layer + ".")]
            assert inside == pytest.approx([lr * scale] * len(inside), rel=1e-4)
        assert steps["backbone.cls_token"] == pytest.approx(lr * 0.125, rel=1e-4)


def test_layer_decay_needs_a_backbone_with_numbered_layers() -> None:
    with pytest.raises(UserError, match=r"optim\.layer_decay=0\.5: Linear has no numbered layers"):
        parameter_groups(nn.Linear(2, 2), weight_decay=0.0, layer_decay=0.5)
    for wrong in (0.0, 1.1, -1.0):
        with pytest.raises(UserError, match=r"optim\.layer_decay="):
            parameter_groups(TinyViT(), weight_decay=0.0, layer_decay=wrong)


@pytest.fixture
def accelerator() -> Iterator[Any]:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def test_the_rate_is_set_through_accelerates_wrapper_and_survives_a_checkpoint(accelerator: Any) -> None:
    model = TinyViT()
    bare = build_optimizer(torch.optim.AdamW, model, lr=1.0, weight_decay=0.1, layer_decay=0.75)
    wrapped = accelerator.prepare(bare)
    assert wrapped is not bare
    set_lr(wrapped, 0.5)
    expected = [0.5 * group["lr_scale"] for group in bare.param_groups]
    assert [group["lr"] for group in bare.param_groups] == expected
    again = build_optimizer(torch.optim.AdamW, TinyViT(), lr=1.0, weight_decay=0.1, layer_decay=0.75)
    again.load_state_dict(wrapped.state_dict())
    set_lr(again, 0.5)
    assert [group["lr"] for group in again.param_groups] == expected
    assert min(expected) < 0.5 == max(expected)


# ---- optimizers ------------------------------------------------------------------------------------------------------
def trained(factory: Any, *, steps: int = 5) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = TinyViT()
    optimizer = build_optimizer(factory, model, lr=1e-2, weight_decay=0.1, layer_decay=0.75)
    images, targets = torch.randn(4, 3, 16, 16), torch.arange(4)
    for step in range(steps):
        set_lr(optimizer, 1e-2 * (steps - step) / steps)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), targets).backward()
        # a gradient that is zero but for round-off would become a whole Adam step: give each a definite one
        for parameter in model.parameters():
            parameter.grad = parameter.grad + 0.01
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize(
    "factory",
    [
        torch.optim.AdamW,
        torch.optim.Adam,
        functools.partial(torch.optim.Adam, decoupled_weight_decay=True),
        functools.partial(torch.optim.SGD, momentum=0.9),
    ],
    ids=["adamw", "adam_l2", "adam_decoupled", "sgd"],
)
def test_fused_kernels_give_the_unfused_weights(factory: Any) -> None:
    fused, plain = (trained(functools.partial(factory, fused=flag)) for flag in (True, False))
    for one, other in zip(fused, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_decoupled_adam_is_adamw_and_coupled_is_not() -> None:
    adamw = trained(torch.optim.AdamW)
    decoupled = trained(option("adam").optimizer)
    coupled = trained(option("adam", decoupled=False).optimizer)
    for one, other in zip(adamw, decoupled, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert not all(torch.allclose(a, b, atol=1e-4) for a, b in zip(adamw, coupled, strict=True))


def option(name: str, **overrides: object) -> Any:
    """conf/optim/<name>.yaml as the program sees it: interpolated, its optimizer a factory."""
    config = OmegaConf.create({"optim": OmegaConf.merge(OmegaConf.load(CONF / f"{name}.yaml"), overrides)})
    OmegaConf.resolve(config)
    config.optim._set_flag("allow_objects", True)
    config.optim.optimizer = instantiate(config.optim.optimizer, _convert_="all")
    return config.optim


@pytest.mark.parametrize("name", sorted(path.stem for path in CONF.glob("*.yaml")))
def test_every_optimizer_option_lowers_the_loss_of_a_batch(name: str) -> None:
    node = option(name)
    assert node.name == name
    assert NoDecay(**{**node.no_decay, "names": tuple(node.no_decay.names)}) == NoDecay()
    torch.manual_seed(0)
    method = Method(TinyViT())
    batch = 16384 if name == "lars" else 2 * node.reference_batch
    lr = resolve_lr(lr=node.lr, base_lr=node.base_lr, reference_batch=node.reference_batch, global_batch=batch)
    optimizer = build_optimizer(
        node.optimizer,
        method,
        lr=lr,
        weight_decay=node.weight_decay,
        layer_decay=0.9,
        no_decay=OmegaConf.to_container(node.no_decay),
    )
    images, targets = torch.randn(5, 3, 16, 16), torch.arange(5)
    losses = []
    for _ in range(12):
        loss = nn.functional.cross_entropy(method.backbone(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # a step of LARS or LAMB moves a weight by 0.6 % of its norm at these rates
    assert losses[-1] < (0.999 if name in ("lars", "lamb") else 0.9) * losses[0]


def test_options_carry_the_published_numbers() -> None:
    adam, sgd, lars = option("adam"), option("sgd"), option("lars")
    assert (list(adam.betas), adam.weight_decay) == ([0.9, 0.999], 0.1)
    assert (sgd.momentum, sgd.weight_decay) == (0.9, 0.0)
    rate = resolve_lr(lr=lars.lr, base_lr=lars.base_lr, reference_batch=lars.reference_batch, global_batch=16384)
    assert rate == pytest.approx(6.4)
    assert (lars.optimizer.keywords["momentum"], lars.optimizer.keywords["trust_coefficient"]) == (0.9, 0.001)


def test_any_optimizer_is_taken_by_its_name() -> None:
    node = option("any", optimizer={"_target_": "timm.optim.AdaBelief", "eps": 1e-12})
    optimizer = build_optimizer(node.optimizer, TinyViT(), lr=1e-3, weight_decay=0.1, layer_decay=0.5)
    assert type(optimizer).__name__ == "AdaBelief"
    assert len({group["lr"] for group in optimizer.param_groups}) == 5


def test_what_an_optimizer_refuses_or_would_ignore_is_a_user_error() -> None:
    with pytest.raises(UserError, match=r"optim\.optimizer: AdamW refuses its arguments: Invalid beta"):
        build_optimizer(functools.partial(torch.optim.AdamW, betas=(2.0, 0.9)), TinyViT(), lr=1.0, weight_decay=0.0)
    with pytest.raises(UserError, match=r"optim\.weight_decay=0\.1: Rprop has none"):
        build_optimizer(torch.optim.Rprop, TinyViT(), lr=1.0, weight_decay=0.1)
    with pytest.raises(UserError, match="LARS refuses its arguments"):
        build_optimizer(functools.partial(LARS, momentum=1.5), TinyViT(), lr=1.0, weight_decay=0.0)


# ---- LARS ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("decay", "tag"), [(0.0, "wd0"), (1e-4, "wd1e-4")])
def test_lars_replays_maes_steps(decay: float, tag: str) -> None:
    golden = np.load(TESTS / "golden" / "optim_mae_lars.npz")
    names = [key.rpartition("/")[2] for key in golden if key.startswith(f"{tag}/init/")]
    assert len(names) == 5
    parameters = {name: nn.Parameter(torch.tensor(golden[f"{tag}/init/{name}"])) for name in names}
    optimizer = LARS(parameters.values(), lr=0.0, weight_decay=decay)
    for step, lr in enumerate(golden[f"{tag}/lrs"]):
        for name, parameter in parameters.items():
            parameter.grad = torch.tensor(golden[f"{tag}/step{step}/grad/{name}"])
        optimizer.param_groups[0]["lr"] = float(lr)
        optimizer.step()
        for name, parameter in parameters.items():
            torch.testing.assert_close(
                parameter.detach(), torch.tensor(golden[f"{tag}/step{step}/param/{name}"]), rtol=2e-6, atol=1e-6
            )
            torch.testing.assert_close(
                optimizer.state[parameter]["momentum_buffer"],
                torch.tensor(golden[f"{tag}/step{step}/mu/{name}"]),
                rtol=2e-6,
                atol=1e-8,
            )


def test_lars_continues_from_its_state() -> None:
    def make() -> tuple[nn.Linear, LARS]:
        torch.manual_seed(0)
        layer = nn.Linear(4, 3)
        return layer, LARS(layer.parameters(), lr=0.5, weight_decay=1e-3)

    def train(layer: nn.Linear, optimizer: LARS, steps: range) -> None:
        for step in steps:
            torch.manual_seed(step)
            optimizer.zero_grad()
            layer(torch.randn(2, 4)).pow(2).sum().backward()
            optimizer.step()

    straight, resumed = make(), make()
    train(*straight, range(6))
    train(*resumed, range(3))
    layer, optimizer = make()
    layer.load_state_dict(resumed[0].state_dict())
    optimizer.load_state_dict(resumed[1].state_dict())
    train(layer, optimizer, range(3, 6))
    for one, other in zip(straight[0].parameters(), layer.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
