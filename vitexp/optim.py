"""From a recipe's numbers to an optimizer: the learning rate, the parameter groups, and the only place that sets lr.

Layer-wise decay lives in each group's `lr_scale`, and `set_lr` multiplies it in at every update: a group that only
carries the number (as timm's do without a timm scheduler) would train every layer at the full rate.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from vitexp.errors import UserError, nearest
from vitexp.schedules import number_in_range

OptimizerFactory = Callable[..., Optimizer]  # (params, *, lr), as a YAML's `optimizer:` with `_partial_: true` gives it

_TOKENS = {"cls_token", "class_token", "dist_token", "mask_token", "reg_token", "register_tokens"}
_POSITION = re.compile(r"(^|[._])(pos|position|positional)_(emb|embed|embedding|embeddings|bias)([._]|$)")
_POSITION_TABLES = ("relative_position_bias_table", "rel_pos_h", "rel_pos_w")


@dataclass(frozen=True)
class NoDecay:
    """Which parameters are spared from weight decay: those that any of the rules names."""

    bias: bool = True  # every bias, also those of norms
    norm: bool = True  # scales of norms, and every other parameter of one dimension (LayerScale)
    token: bool = True  # class, distillation, mask and register tokens
    pos_embed: bool = True  # position embeddings, absolute and relative
    not_kernel: bool = False  # everything but the weights of linear and convolution layers
    model_list: bool = False  # what the model's own no_weight_decay() names, as timm does
    names: tuple[str, ...] = ()  # further ones by name or its last part; * stands for anything


# The sets of published recipes. For a ViT they differ in its tokens and position embedding only.
NO_DECAY = {
    "default": NoDecay(),
    "none": NoDecay(bias=False, norm=False, token=False, pos_embed=False),  # decay everything
    "mae_pretrain": NoDecay(token=False, pos_embed=False),  # timm 0.3.2 add_weight_decay, nothing on its skip list
    "mae_finetune": NoDecay(token=False, names=("cls_token",)),  # 1-D, pos_embed, cls_token
    "deit": NoDecay(token=False, names=("cls_token",)),  # dist_token is decayed: timm 0.3.2 did not know it
    "big_vision": NoDecay(not_kernel=True),  # only .*/kernel decays
    "timm": NoDecay(model_list=True),
}


def resolve_lr(*, lr: float | None, base_lr: float | None, reference_batch: int, global_batch: int) -> float:
    """The peak learning rate: lr as it is, else base_lr x global_batch / reference_batch (arXiv:1706.02677).

    global_batch counts the pictures of one update: per process x processes x accumulate. Raises UserError when
    neither rate is given or a number is out of range.
    """
    if lr is not None:
        return number_in_range("optim.lr", lr)
    if base_lr is None:
        raise UserError("optim.lr=null and optim.base_lr=null: give one of them")
    number_in_range("optim.reference_batch", reference_batch, low=1)
    number_in_range("the global batch", global_batch, low=1)
    return number_in_range("optim.base_lr", base_lr) * global_batch / reference_batch


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Give every group lr times its lr_scale. Takes the bare optimizer or Accelerate's wrapper around it."""
    for group in optimizer.param_groups:
        scaled = lr * group["lr_scale"]
        if isinstance(group["lr"], Tensor):  # capturable optimizers hold lr on the device, where a graph reads it
            group["lr"].fill_(scaled)
        else:
            group["lr"] = scaled


def build_optimizer(
    factory: OptimizerFactory,
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    layer_decay: float = 1.0,
    no_decay: str | Mapping[str, Any] | NoDecay = "default",
) -> Optimizer:
    """The optimizer over parameter_groups(model), each group at lr times its lr_scale.

    Raises UserError for what the optimizer refuses, and for a weight_decay that it would ignore.
    """
    groups = parameter_groups(model, weight_decay=weight_decay, layer_decay=layer_decay, no_decay=no_decay)
    try:
        optimizer = factory([{**group, "lr": lr * group["lr_scale"]} for group in groups], lr=lr)
    except (TypeError, ValueError) as error:
        name = getattr(getattr(factory, "func", factory), "__name__", str(factory))
        raise UserError(f"optim.optimizer: {name} refuses its arguments: {error}") from error
    if weight_decay > 0 and "weight_decay" not in optimizer.defaults:
        raise UserError(f"optim.weight_decay={weight_decay:g}: {type(optimizer).__name__} has none; give 0")
    return optimizer


def parameter_groups(
    model: nn.Module,
    *,
    weight_decay: float,
    layer_decay: float = 1.0,
    no_decay: str | Mapping[str, Any] | NoDecay = "default",
) -> list[dict[str, Any]]:
    """Every trainable parameter of a method or model once, grouped by (lr_scale, weight_decay) in order of appearance.

    Each group has params, names, lr_scale and weight_decay. no_decay is a name of NO_DECAY or its rules. With
    layer_decay below 1, lr_scale = layer_decay ** (num_layers - layer) as in MAE's fine-tuning (BEiT,
    arXiv:2106.08254): see `layer_scales`. Raises UserError when nothing can be trained.
    """
    number_in_range("optim.weight_decay", weight_decay)
    rules = no_decay_rules(no_decay)
    scales = layer_scales(model, layer_decay)
    spared_by_model = _own_no_decay_names(model) if rules.model_list else frozenset()
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter, owner in _trainable(model):
        spared = name in spared_by_model or _spared(rules, name, parameter, owner)
        key = (scales[name], 0.0 if spared else float(weight_decay))
        new = {"params": [], "names": [], "lr_scale": key[0], "weight_decay": key[1]}
        group = groups.setdefault(key, new)
        group["params"].append(parameter)
        group["names"].append(name)
    if not groups:
        raise UserError(f"{type(model).__name__} has no trainable parameter: everything is frozen")
    return list(groups.values())


def no_decay_rules(no_decay: str | Mapping[str, Any] | NoDecay) -> NoDecay:
    """The rules a name or a mapping of switches stands for. Raises UserError for an unknown one."""
    if isinstance(no_decay, NoDecay):
        return no_decay
    if isinstance(no_decay, str):
        if no_decay not in NO_DECAY:
            near = nearest(no_decay, NO_DECAY)
            raise UserError(f"optim.no_decay={no_decay}: no such set.{near}\nsets: {', '.join(NO_DECAY)}")
        return NO_DECAY[no_decay]
    known = [field.name for field in fields(NoDecay)]
    for key, value in no_decay.items():
        if key not in known:
            near = nearest(key, known)
            raise UserError(f"optim.no_decay.{key}: no such rule.{near}\nrules: {', '.join(known)}")
        if key == "names":
            if isinstance(value, str) or not all(isinstance(name, str) for name in value):
                raise UserError(f"optim.no_decay.names={value}: needs a list of names")
        elif not isinstance(value, bool):
            raise UserError(f"optim.no_decay.{key}={value}: needs true or false")
    rules: dict[str, Any] = {**no_decay, "names": tuple(no_decay.get("names", ()))}
    return NoDecay(**rules)


def layer_scales(model: nn.Module, layer_decay: float) -> dict[str, float]:
    """The lr_scale of every trainable parameter by name: 1 for the head, layer_decay less for every layer below.

    Layers are numbered by the backbone inside the model, with layer_of(name) and num_layers (a ViT: 0 for tokens,
    position and patch embedding, i + 1 for block i, depth + 1 for the rest). What lies outside the backbone counts as
    head. Raises UserError when layer_decay is below 1 and no part of the model numbers its layers.
    """
    number_in_range("optim.layer_decay", layer_decay, high=1.0)
    if layer_decay <= 0:
        raise UserError(f"optim.layer_decay={layer_decay:g}: needs a number above 0, at most 1")
    names = [name for name, _, _ in _trainable(model)]
    if layer_decay == 1.0:
        return dict.fromkeys(names, 1.0)
    numbered = _depth_below_head(model, set(names))
    if not numbered:
        raise UserError(f"optim.layer_decay={layer_decay:g}: {type(model).__name__} has no numbered layers; give 1")
    return {name: layer_decay ** numbered.get(name, 0) for name in names}


def _depth_below_head(model: nn.Module, wanted: set[str]) -> dict[str, int]:
    """num_layers - layer for the parameters of the outermost modules that number their layers."""
    depths: dict[str, int] = {}
    for prefix, module in _outermost(model, "layer_of"):
        for name, _ in module.named_parameters():
            if prefix + name in wanted:
                depths[prefix + name] = module.num_layers - module.layer_of(name)
    return depths


def _own_no_decay_names(model: nn.Module) -> frozenset[str]:
    outermost = _outermost(model, "no_weight_decay")
    patterns = [(prefix, pattern) for prefix, module in outermost for pattern in module.no_weight_decay()]
    names = [name for name, _ in model.named_parameters()]
    return frozenset(n for n in names if any(fnmatch.fnmatchcase(n, prefix + pattern) for prefix, pattern in patterns))


def _outermost(module: nn.Module, attribute: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(name prefix, module) of the modules that have the attribute, without looking inside them."""
    if hasattr(module, attribute):
        yield prefix, module
        return
    for name, child in module.named_children():
        yield from _outermost(child, attribute, f"{prefix}{name}.")


def _trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Module]]:
    """(name, parameter, module that holds it), a parameter shared by several modules once."""
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter, modules[name.rpartition(".")[0]]


def _spared(rules: NoDecay, name: str, parameter: Tensor, owner: nn.Module) -> bool:
    last = name.rpartition(".")[2]
    bias = last == "bias" or (parameter.ndim <= 1 and last.endswith("_bias"))
    norm = not bias and (parameter.ndim <= 1 or "norm" in type(owner).__name__.lower())
    return (
        (rules.bias and bias)
        or (rules.norm and norm)
        or (rules.token and last in _TOKENS)
        or (rules.pos_embed and _is_position_embedding(name, owner))
        or (rules.not_kernel and not _is_kernel(last, owner))
        or any(fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(last, pattern) for pattern in rules.names)
    )


def _is_position_embedding(name: str, owner: nn.Module) -> bool:
    """A table of positions; the layers of a network that computes positions are ordinary weights."""
    if isinstance(owner, nn.Linear | nn.modules.conv._ConvNd):
        return False
    return _POSITION.search(name) is not None or name.rpartition(".")[2] in _POSITION_TABLES


def _is_kernel(last: str, owner: nn.Module) -> bool:
    if isinstance(owner, nn.MultiheadAttention):
        return last.endswith("_weight")  # in_proj_weight: q, k and v in one
    return last == "weight" and isinstance(owner, nn.Linear | nn.modules.conv._ConvNd)
