"""Is a resolved configuration one that can run? Answered from text and numbers alone: no torch, no data, no model.

Signatures of vitexp's own components are read from their source, so that a misspelt argument or a wrong type is
named in a fraction of a second, before the heavy imports.
"""

from __future__ import annotations

import ast
import functools
import glob
import importlib
import importlib.util
import inspect
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitexp.errors import UserError, nearest
from vitexp.models.weights_hub import is_hub_name

# Where components may come from. Of other packages only classes that are optimizers or modules: functions there load
# pickles, write files and start processes.
OWN_COMPONENTS = (
    *(f"vitexp.{place}." for place in ("models", "methods", "optimizers", "schedules", "evaluators", "sweeps")),
    "vitexp.data.sources.",
    "vitexp.data.transforms.",
    "vitexp.data.augmentations.",
    "vitexp.mixing.",
    "vitexp.tracking.Mirror",
    "vitexp.tracking.NoMirror",
)
FOREIGN_COMPONENTS = ("torch.optim.", "torch.nn.", "timm.optim.", "timm.layers.", "timm.loss.")
EXTRA_TARGETS_VARIABLE = "VITEXP_ALLOW_TARGETS"  # a person's own packages, e.g. "mylab.models.,mylab.losses."

WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "None": "null"}


@dataclass(frozen=True)
class Allowed:
    """Values one key may have."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False  # low itself is not allowed
    whole: bool = False
    none: bool = False  # null is allowed
    word: str | None = None  # so is this one

    def describe(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        low = "" if self.low == -math.inf else f" {'above' if self.above else 'of at least'} {self.low:g}"
        high = "" if self.high == math.inf else f"{' and' if low else ''} at most {self.high:g}"
        return f"{kind}{low}{high}{', or null' if self.none else ''}{f', or {self.word}' if self.word else ''}"

    def holds(self, value: Any) -> bool:
        if value is None:
            return self.none
        if isinstance(value, str):
            return value == self.word
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        if self.whole and not isinstance(value, int):
            return False
        return (self.low < value if self.above else self.low <= value) and value <= self.high


COUNT = Allowed(1, whole=True)
COUNT_OR_NULL = Allowed(1, whole=True, none=True)
DURATION = Allowed(0, none=True)
FRACTION = Allowed(0, 1)
RATE = Allowed(0, above=True, none=True)
RANGES: dict[str, Allowed] = {
    "seed": Allowed(0, 2**63 - 1, whole=True),
    "stage.train_blocks": Allowed(0, whole=True, word="all"),
    "train.overfit": COUNT_OR_NULL,
    "train.epochs": Allowed(0, above=True, none=True),
    "train.max_steps": COUNT_OR_NULL,
    "train.fraction": Allowed(0, 1, above=True),
    "train.repeats": COUNT,
    "train.batch_size": COUNT,
    "train.accumulate": COUNT,
    "train.clip_norm": RATE,
    "train.ema_decay": Allowed(0, 1, none=True),
    "train.eval_every": COUNT_OR_NULL,
    "train.save_every": COUNT_OR_NULL,
    "train.keep": Allowed(0, whole=True),
    "train.log_every": COUNT,
    "train.workers": Allowed(0, whole=True, none=True),
    "runtime.processes": COUNT,
    "sweep.jobs": COUNT,
    "sweep.time_limit": Allowed(0, above=True, none=True),
    "sweep.silence_limit": Allowed(0, above=True, none=True),
    "runtime.threads": COUNT_OR_NULL,
    "runtime.profile": COUNT_OR_NULL,
    "optim.lr": RATE,
    "optim.base_lr": RATE,
    "optim.reference_batch": COUNT,
    "optim.weight_decay": Allowed(0),
    "optim.layer_decay": Allowed(0, 1, above=True),
    "optim.momentum": FRACTION,
    "schedule.warmup_epochs": DURATION,
    "schedule.warmup_steps": DURATION,
    "schedule.warmup_fraction": Allowed(0, 1, none=True),
    "schedule.warmup_start_lr": Allowed(0),
    "schedule.min_lr": Allowed(0),
    "data.flip": FRACTION,
    "data.val_fraction": Allowed(0, 0.99),
    "model.depth": COUNT,
    "model.embed_dim": COUNT,
    "model.num_heads": COUNT,
    "model.in_channels": COUNT,
    "model.num_classes": COUNT_OR_NULL,
    "model.mlp_ratio": Allowed(0, above=True),
    "model.dropout": FRACTION,
    "model.attention_dropout": FRACTION,
    "model.drop_path": Allowed(0, 1, none=True),
    "model.norm_eps": Allowed(0, above=True),
    "model.representation_dim": COUNT_OR_NULL,
    "method.label_smoothing": FRACTION,
    "method.cls_weight": Allowed(0),
    "method.token_weight": Allowed(0),
    "method.alpha": FRACTION,
    "method.temperature": Allowed(0, above=True),
}
CHOICES: dict[str, tuple[str | None, ...]] = {
    "resume": ("auto", "must", "never"),
    "runtime.precision": ("auto", "fp32", "bf16", "fp16"),
    "runtime.device": ("auto", "cpu", "cuda", "mps"),
    "stage.head": ("auto", "keep", "fresh"),
    "stage.head_init": ("zero", "timm", "mae_finetune", "mae_linear_probe"),
    "stage.position_mode": (None, "jax", "mae", "timm"),
    "data.cache": ("auto", "memory", "none"),
}
NO_DECAY_SETS = ("default", "none", "mae_pretrain", "mae_finetune", "deit", "big_vision", "timm")
IN_MLFLOW = ("mlflow:", "runs:/")  # a run there; it is looked up when it is needed
PATHS = ("run", "init_from", "data.root", "data.train", "data.val")
NOT_EMPTY = ("name", "output_dir", *PATHS)  # an empty path would mean the folder one happens to be in
# Far more than is of use, fewer than a machine breaks at.
A_CORE = {"runtime.processes": 32, "runtime.threads": 64, "train.workers": 32}


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a nested configuration that is not itself a mapping, dotted, with its value."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, node


def show(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def check_shape(config: dict[str, Any], defaults: dict[str, Any], prefix: str = "", *, needed: bool = True) -> None:
    """Raises UserError where settings were taken out that are needed, or something else stands in their place.

    defaults: what the chosen options make, so a component is where one has to be. Its arguments are not `needed`, for
    it has defaults of its own, nor is an evaluator."""
    for name, default in defaults.items():
        key = f"{prefix}{name}"
        if name not in config:
            if needed or name == "_target_":
                raise UserError(f"{key}: was taken out, and is needed; {prefix.rstrip('.')} has: {', '.join(defaults)}")
            continue
        value, component = config[name], isinstance(default, dict) and "_target_" in default
        if isinstance(default, dict) and not isinstance(value, dict):
            if key == "augment.batch" or (key == "optim.no_decay" and isinstance(value, str)):
                continue  # judged below
            expected = "a component with its _target_" if component else f"settings: {', '.join(map(str, default))}"
            off = f"; ~{key} takes it out" if prefix == "evaluators." else ""
            raise UserError(f"{key}={show(value)}: expected {expected}{off}")
        if component and value.get("_partial_", False) != default.get("_partial_", False):
            raise UserError(f"{key}._partial_={show(value.get('_partial_'))}: stays as it is, for what calls it knows")
        if isinstance(default, dict):
            check_shape(value, default, f"{key}.", needed=not component and key != "evaluators")


def check_values(config: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Raises UserError for the first value out of its range, of another kind than its default, or a missing path."""
    usual = dict(leaves(defaults))
    for key, value in leaves(config):
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise UserError(f"{key}={show(value)}: expected a finite number")
        if key in RANGES and not RANGES[key].holds(value):
            raise UserError(f"{key}={show(value)}: expected {RANGES[key].describe()}")
        if key in CHOICES and value not in CHOICES[key]:
            words = [show(choice) for choice in CHOICES[key]]
            raise UserError(f"{key}={show(value)}: expected one of {', '.join(words)}.{nearest(show(value), words)}")
        if key not in RANGES and key not in CHOICES and not _has_signature(config, key):
            _check_kind(key, value, usual.get(key))
            if value is None and usual.get(key) is not None and not _in_component(config, key):
                raise UserError(f"{key}=null: expected a value, such as {show(usual[key])}")
        if key in NOT_EMPTY and value == "":
            raise UserError(f"{key}='': is empty; expected {'a name' if key == 'name' else 'a path'}")
        if key in A_CORE and isinstance(value, int) and value > A_CORE[key] * (os.cpu_count() or 1):
            raise UserError(
                f"{key}={value}: expected at most {A_CORE[key] * (os.cpu_count() or 1)}; this machine has "
                f"{os.cpu_count()} cores"
            )
    betas, two = _select(config, "optim.betas"), usual.get("optim.betas")
    fits = all(isinstance(beta, int | float) and 0 <= beta < 1 for beta in betas or ())
    if betas is not None and two is not None and not (fits and len(betas) == len(two)):
        raise UserError(f"optim.betas={betas}: expected {len(two)} numbers from 0 to below 1, such as {two}")
    rules = _select(config, "optim.no_decay")
    if isinstance(rules, str) and rules not in NO_DECAY_SETS:
        sets = ", ".join(NO_DECAY_SETS)
        raise UserError(f"optim.no_decay={rules}: expected one of {sets}.{nearest(rules, NO_DECAY_SETS)}")
    for phase in ("warmup", "decay"):
        units = [f"schedule.{phase}_{unit}" for unit in ("epochs", "steps", "fraction")]
        given = [f"{unit}={_select(config, unit)}" for unit in units if _select(config, unit) is not None]
        if len(given) > 1:
            raise UserError(f"{' '.join(given)}: give one of them, and null for the other")
    for key in PATHS:
        value = _select(config, key)
        if isinstance(value, str):
            if key != "init_from" or not (value.startswith(IN_MLFLOW) or is_hub_name(value)):
                _check_path(key, value)
        elif isinstance(value, list):
            for one in filter(lambda one: isinstance(one, str), value):
                _check_path(key, one)


def _has_signature(config: dict[str, Any], key: str) -> bool:
    """Whether it is an argument of which a component of our own tells the kinds; its default is only one of them."""
    place, _, name = key.rpartition(".")
    target = _select(config, f"{place}._target_")
    if not isinstance(target, str) or not target.startswith("vitexp."):
        return False
    annotation = signature_of(target, f"{place}._target_")[1].get(name)
    return annotation is not None and _is_plain(annotation)


def _in_component(config: dict[str, Any], key: str) -> bool:
    places = key.split(".")
    return any("_target_" in (_select(config, ".".join(places[:n])) or {}) for n in range(1, len(places)))


def _check_kind(key: str, value: Any, default: Any) -> None:
    if default is None or value is None or str(default) == "???" or "${" in str(default):
        return
    for kind, word in ((bool, "true or false"), (int | float, "a number"), (str, "text"), (list, "a list")):
        if isinstance(default, kind):
            if not isinstance(value, kind) or isinstance(value, bool) != isinstance(default, bool):
                raise UserError(f"{key}={show(value)}: expected {word}, such as {show(default)}")
            if isinstance(default, list) and default and _are_numbers(default) and not _are_numbers(value):
                raise UserError(f"{key}={value}: expected a list of numbers, such as {default}")
            return


def _are_numbers(values: Any) -> bool:
    return all(isinstance(one, int | float) and not isinstance(one, bool) for one in values)


def _check_path(key: str, value: str) -> None:
    if any(mark in value for mark in "*?[") and glob.glob(os.path.expanduser(value)):
        return
    path = Path(os.path.expanduser(value))
    if path.exists():
        return
    parent = path.parent
    while not parent.exists():
        parent = parent.parent
    siblings = [child.name for child in parent.iterdir()] if parent.is_dir() else []
    missing = path.relative_to(parent).parts[0]
    raise UserError(f"{key}={value}: no such file or folder; {parent} has no {missing!r}.{nearest(missing, siblings)}")


def _select(config: dict[str, Any], key: str) -> Any:
    node: Any = config
    for part in key.split("."):
        if not isinstance(node, dict) or part not in node:
            return None
        node = node[part]
    return node


def check_model_shape(model: dict[str, Any]) -> None:
    """The two divisions every ViT needs: the patch divides the picture, the heads divide the width."""
    image, patch = model.get("image_size"), model.get("patch_size")
    for name, size in (("image_size", image), ("patch_size", patch)):
        if isinstance(size, list) and len(size) != 2:
            raise UserError(f"model.{name}={size}: expected one number or two, [height, width]")
    if image is not None and patch is not None:
        sizes, patches = (x if isinstance(x, list) else [x, x] for x in (image, patch))
        for size, side in zip(sizes, patches, strict=False):
            if side < 1 or size < 1 or size % side:
                fits = [d for d in range(1, max(size, 1) + 1) if size % d == 0]
                close = sorted(sorted(fits, key=lambda d, side=side: abs(d - side))[:3])
                raise UserError(
                    f"model.patch_size={show(patch)}: does not divide model.image_size={show(image)}; "
                    f"nearest that do: {', '.join(map(str, close))}"
                )
    width, heads = model.get("embed_dim"), model.get("num_heads")
    if width is not None and heads is not None and width % heads:
        fits = [d for d in range(1, width + 1) if width % d == 0]
        close = sorted(sorted(fits, key=lambda d: abs(d - heads))[:3])
        raise UserError(
            f"model.num_heads={heads}: does not divide model.embed_dim={width}; "
            f"nearest that do: {', '.join(map(str, close))}"
        )


DISTILLATION, TOKEN_LABELING, MIX, ROLLED = (
    "vitexp.methods.distillation.Distillation",
    "vitexp.methods.token_labeling.TokenLabeling",
    "vitexp.mixing.Mix",
    "vitexp.mixing.RolledMixup",
)


def check_token_labels(config: dict[str, Any]) -> None:
    """Raises UserError where store, method and mixing of a batch do not fit together; the store itself is not read."""
    store, target, labels = (_select(config, key) for key in ("train.token_labels", "method._target_", "method.labels"))
    own = target == TOKEN_LABELING
    if own and store is None and labels != "ground_truth" and config["stage"]["trains"]:
        raise UserError(
            f"method.labels={labels}: needs train.token_labels=<store>, which python -m vitexp label makes;\n"
            "method.labels=ground_truth trains without one"
        )
    if store is None:
        return
    if own and labels == "ground_truth":
        raise UserError(f"train.token_labels={store}: not read by method.labels=ground_truth; give tokens or picture")
    if not own and str(target).startswith("vitexp."):
        raise UserError(f"train.token_labels={store}: not read by this method; give method=token_labeling, or null")
    for key, node in _component_nodes(config["augment"].get("batch"), "augment.batch"):
        mixes = node["_target_"] == MIX and (node.get("mixup_alpha") or node.get("cutmix_alpha"))
        if node["_target_"] == ROLLED or (mixes and node.get("mode", "batch") != "batch"):
            raise UserError(
                f"{key}: token labels are mixed with one share a batch: vitexp.mixing.Mix with mode=batch "
                "(augment.mix_mode), or no mixing (augment.batch=null)"
            )


def check_teacher(config: dict[str, Any]) -> None:
    """Raises UserError for a method that learns from a teacher and has none; the teacher itself is not read."""
    own = _select(config, "method._target_") == DISTILLATION
    if own and _select(config, "method.teacher") is None and config["method"]["alpha"] and config["stage"]["trains"]:
        raise UserError("method=distillation: needs method.teacher=<run folder, weights it exported, or timm:<name>>")


def check_fields(values: dict[str, Any], kind: type, prefix: str) -> None:
    """Raises UserError for a value that the field of a dataclass does not take. prefix: "train." of its keys."""
    _, annotations, _ = signature_of(f"{kind.__module__}.{kind.__name__}", prefix)
    for name, value in values.items():
        if name in annotations and not _accepts(annotations[name], value):
            raise UserError(f"{prefix}{name}={show(value)}: expected {_describe(annotations[name])}")


def check_components(resolved: dict[str, Any], raw: dict[str, Any]) -> None:
    """Raises UserError for a `_target_` that is not allowed or missing, and for arguments it does not take.

    raw is the same tree before interpolation: an error names the key a person set, not the one that refers to it."""
    for name, node in resolved.get("evaluators", {}).items():
        if not (isinstance(node, dict) and "_target_" in node):
            raise UserError(
                f"evaluators.{name}={show(node)}: expected a component with its _target_; see evaluators=knn"
            )
    batch = _select(resolved, "augment.batch")
    if batch is not None and not (isinstance(batch, dict) and "_target_" in batch):
        raise UserError(
            f"augment.batch={show(batch)}: expected a component with its _target_, or null; see augment=deit"
        )
    nodes = list(_component_nodes(resolved, ""))
    for key, node in nodes:
        _check_allowed(f"{key}._target_", str(node["_target_"]))
    # Own components first: their source answers at once, while a foreign signature costs an import of torch.
    for key, node in sorted(nodes, key=lambda item: not str(item[1]["_target_"]).startswith("vitexp.")):
        _check_arguments(key, node, _select(raw, key) if key else raw)


def _component_nodes(node: Any, prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(node, dict):
        if "_target_" in node:
            yield prefix, node
        for key, value in node.items():
            yield from _component_nodes(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(node, list):
        for position, value in enumerate(node):
            yield from _component_nodes(value, f"{prefix}.{position}")


def _extra_targets() -> tuple[str, ...]:
    return tuple(part.strip() for part in os.environ.get(EXTRA_TARGETS_VARIABLE, "").split(",") if part.strip())


def _check_allowed(key: str, target: str) -> None:
    allowed = OWN_COMPONENTS + FOREIGN_COMPONENTS + _extra_targets()
    if not target.startswith(allowed) or any(not part.isidentifier() for part in target.split(".")):
        raise UserError(
            f"{key}={target}: not allowed here. Components come from {', '.join(p.rstrip('.') for p in allowed)};\n"
            f"name your own packages in the environment variable {EXTRA_TARGETS_VARIABLE}"
        )


def _check_arguments(key: str, node: dict[str, Any], raw: Any) -> None:
    target = str(node["_target_"])
    names, annotations, takes_any = signature_of(target, f"{key}._target_")
    for name, value in node.items():
        if name in ("_target_", "_partial_"):
            continue
        if name.startswith("_") and name.endswith("_"):
            raise UserError(f"{key}.{name}: only _target_ and _partial_ are understood beside a component's arguments")
        if name not in names and not takes_any:
            raise UserError(
                f"{key}.{name}: {target} takes no argument {name!r}.{nearest(name, names)}\nit takes {', '.join(names)}"
            )
        annotation = annotations.get(name)
        if f"{key}.{name}" == "model.num_classes" and value is None:
            continue  # the data says how many, when it has been read
        if annotation is not None and not _accepts(annotation, value):
            origin = raw.get(name) if isinstance(raw, dict) else None
            named = f"{key}.{name}"
            if isinstance(origin, str) and origin.startswith("${") and origin.endswith("}") and ":" not in origin:
                named = origin[2:-1]
            raise UserError(f"{named}={show(value)}: expected {_describe(annotation)}")


def signature_of(target: str, key: str) -> tuple[list[str], dict[str, ast.expr], bool]:
    """Argument names, their annotations as syntax trees, and whether **keywords are taken."""
    module_name, _, name = target.rpartition(".")
    if target.startswith("vitexp."):
        return _written_signature(module_name, name, key)
    found = _import(module_name, name, target, key)
    parameters = inspect.signature(found).parameters.values()
    keywords = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    return [p.name for p in parameters if p.kind in keywords], {}, takes_any


@functools.cache
def _written_signature(module_name: str, name: str, key: str) -> tuple[list[str], dict[str, ast.expr], bool]:
    """Read from the module's source: of a function, a class's __init__, or a dataclass's fields."""
    try:
        spec = importlib.util.find_spec(module_name)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise UserError(f"{key}={module_name}.{name}: there is no module {module_name}")
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    found = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name[0] != "_"}
    for node in tree.body:  # a package may show at its top what a module of it defines
        inside = isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{module_name}.")
        if inside and any(alias.name == name for alias in node.names):
            return _written_signature(str(node.module), name, key)
    if name not in found:
        raise UserError(f"{key}={module_name}.{name}: {module_name} defines no {name!r}.{nearest(name, found)}")
    node, aliases = found[name], _Aliases(tree)
    if isinstance(node, ast.ClassDef):
        function = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
        if function is None:
            fields = [
                n for n in node.body if isinstance(n, ast.AnnAssign) and "ClassVar" not in ast.unparse(n.annotation)
            ]
            annotated = {n.target.id: aliases.visit(n.annotation) for n in fields if isinstance(n.target, ast.Name)}
            bases = [aliases.origin.get(base.id) for base in node.bases if isinstance(base, ast.Name)]
            if not annotated and bases and bases[0] is not None:  # another module's class has the constructor
                return _written_signature(*bases[0], key)
            return list(annotated), annotated, False
        node = function
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    annotated = {a.arg: aliases.visit(a.annotation) for a in arguments if a.annotation is not None}
    return [a.arg for a in arguments if a.arg != "self"], annotated, node.args.kwarg is not None


class _Aliases(ast.NodeTransformer):
    """Puts what `Pool = Literal["cls", "mean"]` stands for in the place of `Pool`, which may be imported."""

    def __init__(self, tree: ast.Module) -> None:
        plain = [n for n in tree.body if isinstance(n, ast.Assign) and isinstance(n.value, ast.Subscript | ast.BinOp)]
        self.meaning = {n.targets[0].id: n.value for n in plain if isinstance(n.targets[0], ast.Name)}
        imports = [n for n in tree.body if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("vitexp.")]
        self.origin = {alias.asname or alias.name: (str(n.module), alias.name) for n in imports for alias in n.names}

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id in self.origin:
            module_name, name = self.origin[node.id]
            return _aliases_of(module_name).meaning.get(name, node)
        return self.meaning.get(node.id, node)


@functools.cache
def _aliases_of(module_name: str) -> _Aliases:
    spec = importlib.util.find_spec(module_name)
    assert spec is not None
    assert spec.origin is not None
    return _Aliases(ast.parse(Path(spec.origin).read_text(encoding="utf-8")))


def _import(module_name: str, name: str, target: str, key: str) -> Any:
    try:
        module = importlib.import_module(module_name)
    except ImportError:
        raise UserError(f"{key}={target}: there is no module {module_name}") from None
    found = getattr(module, name, None)
    if found is None:
        names = [n for n in vars(module) if not n.startswith("_")]
        raise UserError(f"{key}={target}: {module_name} has no {name!r}.{nearest(name, names)}")
    if target.startswith(_extra_targets() or ("\0",)):
        return found
    from torch import nn, optim

    if not (inspect.isclass(found) and issubclass(found, nn.Module | optim.Optimizer)):
        raise UserError(f"{key}={target}: not allowed here. Of other packages only optimizer and module classes are")
    return found


def _accepts(annotation: ast.expr, value: Any) -> bool:
    """Whether a plain value fits an annotation; components and unknown annotations fit."""
    if isinstance(value, dict) and "_target_" in value:
        return True
    if isinstance(annotation, ast.BinOp):
        return _accepts(annotation.left, value) or _accepts(annotation.right, value)
    if isinstance(annotation, ast.Constant):
        return value is None if annotation.value is None else True
    if isinstance(annotation, ast.Subscript):
        outer = ast.unparse(annotation.value).rsplit(".", 1)[-1]
        inner = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
        if outer == "Literal":
            return value in [n.value for n in inner if isinstance(n, ast.Constant)]
        if outer in ("tuple", "list", "Sequence"):
            if not isinstance(value, list | tuple):
                return False
            if outer == "tuple" and not (isinstance(inner[-1], ast.Constant) and inner[-1].value is ...):
                return len(value) == len(inner) and all(map(_accepts, inner, value))
            return all(_accepts(inner[0], one) for one in value)
        return True
    match annotation:
        case ast.Name(id="int"):
            return isinstance(value, int) and not isinstance(value, bool)
        case ast.Name(id="float"):
            return isinstance(value, int | float) and not isinstance(value, bool)
        case ast.Name(id="bool"):
            return isinstance(value, bool)
        case ast.Name(id="str"):
            return isinstance(value, str)
    return True


def _is_plain(annotation: ast.expr) -> bool:
    """Whether `_accepts` knows all that it says."""
    if isinstance(annotation, ast.BinOp):
        return _is_plain(annotation.left) and _is_plain(annotation.right)
    if isinstance(annotation, ast.Subscript):
        return ast.unparse(annotation.value).rsplit(".", 1)[-1] in ("Literal", "tuple", "list", "Sequence")
    return isinstance(annotation, ast.Constant) or (isinstance(annotation, ast.Name) and annotation.id in WORDS)


def _describe(annotation: ast.expr) -> str:
    if isinstance(annotation, ast.BinOp):
        return f"{_describe(annotation.left)} or {_describe(annotation.right)}"
    if isinstance(annotation, ast.Subscript):
        outer = ast.unparse(annotation.value).rsplit(".", 1)[-1]
        inner = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
        if outer == "Literal":
            return f"one of {', '.join(str(n.value) for n in inner if isinstance(n, ast.Constant))}"
        plain = ", ".join(_describe(n) for n in inner if not (isinstance(n, ast.Constant) and n.value is ...))
        return f"a list of {plain}"
    text = ast.unparse(annotation)
    return WORDS.get(text, text)
