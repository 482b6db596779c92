"""A trained model in the forms that other tools read, each with the way back, so that an export is compared with it.

Every form is a folder. What a form cannot say raises UserError before anything is written: nothing is left out or
approximated to make a model fit.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timm.layers import LayerScale
from torch import Tensor, nn

from vitexp import serving
from vitexp.errors import UserError
from vitexp.export import export_model
from vitexp.models.deit import DeiT
from vitexp.models.layers import Block, HMLPStem
from vitexp.models.timm_backbone import TimmBackbone, takes_image_size
from vitexp.models.vit import VisionTransformer
from vitexp.trained import TrainedRun, load_run

Model = Callable[[Tensor], Tensor]  # normalised pictures (b, c, h, w) to logits (b, classes)

TIMM_NORM_EPS = 1e-6  # of every timm ViT; its arguments cannot say another
ONNX_IN_ONE_FILE = 1_900_000_000  # bytes: a protobuf file ends at 2 GiB, larger weights lie beside it
RESAMPLE = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers, which transformers takes
HOLDS_ALL = "safetensors, torch_export, onnx"


@dataclass(frozen=True)
class Format:
    """One form of an export."""

    write: Callable[[TrainedRun, Path], None]  # into an empty folder; UserError for a model that the form cannot say
    reopen: Callable[[Path], Model]
    files: tuple[str, ...]  # all that `write` may leave
    usage: str  # lines of Python that load it; {folder}
    needs: tuple[str, ...] = ()  # packages that `write` needs beyond vitexp's own
    reads_with: tuple[str, ...] = ()  # packages that `reopen` needs beyond those


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@torch.inference_mode()
def largest_difference(run: TrainedRun, reopened: Model) -> tuple[float, float]:
    """Between the logits of the run's model and of the reopened export on the same three made-up pictures, and the
    largest of the model's own: a difference means something beside that alone."""
    height, width = run.preprocessing["image_size"]
    images = torch.randn(3, run.preprocessing["channels"], height, width, generator=torch.Generator().manual_seed(0))
    own, theirs = run.model(images), reopened(images)
    if own.shape != theirs.shape:
        return float("inf"), own.abs().max().item()
    return (own - theirs).abs().max().item(), own.abs().max().item()


# ---- safetensors: what vitexp itself reads ---------------------------------------------------------------------------


def write_safetensors(run: TrainedRun, folder: Path) -> None:
    export_model(
        folder,
        run.model.state_dict(),
        architecture=run.architecture,
        classes=run.classes,
        preprocessing=run.preprocessing,
        metrics={name: float("nan") if value is None else value for name, value in run.metrics.items()},
        stage=run.stage,
    )


def reopen_safetensors(folder: Path) -> Model:
    return load_run(folder).model


# ---- timm ------------------------------------------------------------------------------------------------------------


def write_timm(run: TrainedRun, folder: Path) -> None:
    """config.json and weights as timm's own hub repositories have them."""
    name, arguments, described, state = _as_timm(run)
    preprocessing = run.preprocessing
    height, width = preprocessing["image_size"]
    write_json(
        folder / "config.json",
        {
            "architecture": name,
            "num_classes": run.architecture["num_classes"],
            "label_names": run.classes,
            "model_args": arguments,
            "pretrained_cfg": {
                "custom_load": False,
                "input_size": [preprocessing["channels"], height, width],
                "mean": list(preprocessing["mean"]),
                "std": list(preprocessing["std"]),
                "crop_pct": preprocessing["crop_fraction"],
                "crop_mode": "center",
                "interpolation": preprocessing["interpolation"],
                "num_classes": run.architecture["num_classes"],
                **described,
            },
        },
    )
    _save(state, folder)


def reopen_timm(folder: Path) -> Model:
    import timm

    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def _as_timm(run: TrainedRun) -> tuple[str, dict[str, Any], dict[str, Any], dict[str, Tensor]]:
    """timm's name of the model, the arguments that make it, its inputs and outputs by name, and its weights."""
    model, kind = run.model, type(run.model)
    if isinstance(model, TimmBackbone):
        options = dict(run.architecture.get("options") or {})
        if takes_image_size(model.name, model.image_size):
            options["img_size"] = list(model.image_size)
        known = model.timm_model.pretrained_cfg
        described = {key: known[key] for key in ("first_conv", "classifier", "fixed_input_size") if key in known}
        return model.name, options | {"in_chans": model.in_channels}, described, dict(model.state_dict())
    if not isinstance(model, VisionTransformer) or kind not in (VisionTransformer, DeiT):
        raise _not_expressed("timm", f"timm has no {kind.__name__}", others=HOLDS_ALL)
    block, distilled = _first_block(model), isinstance(model, DeiT) and model.distilled
    reasons = {
        f"norm_eps={block.norm1.eps:g}: a timm ViT has {TIMM_NORM_EPS:g}": block.norm1.eps != TIMM_NORM_EPS,
        "attention_scale: timm takes 1 / sqrt(head width)": _own_attention_scale(model),
        "representation_dim: timm has no layer before the classifier": not isinstance(model.pre_logits, nn.Identity),
        "stem=hmlp: a timm ViT has one matrix": isinstance(model.patch_embed, HMLPStem),
        "distilled with class_position=false": distilled and model.prefix_positions == 0,
        "distilled without a classifier": distilled and model.num_classes == 0,
    }
    for reason, applies in reasons.items():
        if applies:
            raise _not_expressed("timm", reason, others=HOLDS_ALL)
    arguments: dict[str, Any] = {
        "img_size": list(model.image_size),
        "patch_size": list(model.patch_size),
        "in_chans": model.in_channels,
        "embed_dim": model.embed_dim,
        "depth": model.depth,
        "num_heads": model.num_heads,
        "mlp_ratio": run.architecture.get("mlp_ratio", 4.0),
        "qkv_bias": block.attn.qkv.bias is not None,
        "init_values": block.ls1.gamma[0].item() if isinstance(block.ls1, LayerScale) else None,
        "class_token": model.cls_token is not None,
        "no_embed_class": model.num_prefix_tokens > 0 and model.prefix_positions == 0,
        "global_pool": "avg" if model.pool == "mean" else "token",
        "fc_norm": model.norm_place == "after_pool",
        "act_layer": "gelu" if model.gelu == "erf" else "gelu_tanh",
    }
    described = {
        "first_conv": "patch_embed.proj",
        "classifier": ["head", "head_dist"] if distilled else "head",
        "fixed_input_size": True,
    }
    # Any size is the base model with other arguments.
    name = "deit_base_distilled_patch16_224" if distilled else "vit_base_patch16_224"
    arguments = {key: value for key, value in arguments.items() if value is not None}
    return name, arguments, described, _vit_weights(model)


# ---- transformers ----------------------------------------------------------------------------------------------------

_HF_NAMES = {  # ours and timm's → that of the files that transformers writes, below its name of the whole
    "cls_token": "embeddings.cls_token",
    "dist_token": "embeddings.distillation_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
_HF_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def write_hf(run: TrainedRun, folder: Path) -> None:
    """What AutoModelForImageClassification and AutoImageProcessor read: transformers' ViT, or DeiT with two tokens."""
    model = run.model
    if not isinstance(model, VisionTransformer) or type(model) not in (VisionTransformer, DeiT):
        reason = f"transformers has its layout for plain ViT and DeiT, this is {type(model).__name__}"
        raise _not_expressed("hf", reason, others=_besides_hf(run))
    block, distilled = _first_block(model), isinstance(model, DeiT) and model.distilled
    reasons = {
        "it has no classifier": model.num_classes == 0,
        "pool=mean: transformers' ViT classifies the class token": model.pool != "cls",
        "norm=after_pool: transformers' ViT normalises every token": model.norm_place != "before_pool",
        "stem=hmlp: transformers' ViT has one matrix": isinstance(model.patch_embed, HMLPStem),
        "layer_scale: transformers' ViT has none": isinstance(block.ls1, LayerScale),
        "attention_scale: transformers takes 1 / sqrt(head width)": _own_attention_scale(model),
        "representation_dim: transformers' ViT has no such layer": not isinstance(model.pre_logits, nn.Identity),
        "the class token has no position": model.prefix_positions == 0,
    }
    for reason, applies in reasons.items():
        if applies:
            raise _not_expressed("hf", reason, others=_besides_hf(run))
    kind, name = (
        ("deit", "DeiTForImageClassificationWithTeacher") if distilled else ("vit", "ViTForImageClassification")
    )
    write_json(
        folder / "config.json",
        {
            "architectures": [name],
            "model_type": kind,
            "image_size": _one_or_two(model.image_size),
            "patch_size": _one_or_two(model.patch_size),
            "num_channels": model.in_channels,
            "hidden_size": model.embed_dim,
            "num_hidden_layers": model.depth,
            "num_attention_heads": model.num_heads,
            "intermediate_size": block.mlp.fc1.out_features,
            "hidden_act": "gelu" if model.gelu == "erf" else "gelu_pytorch_tanh",
            "layer_norm_eps": block.norm1.eps,
            "qkv_bias": block.attn.qkv.bias is not None,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "id2label": {str(number): label for number, label in enumerate(run.classes)},
            "label2id": {label: number for number, label in enumerate(run.classes)},
        },
    )
    _write_processor(run.preprocessing, folder / "preprocessor_config.json")
    _save(_as_hf(_vit_weights(model), kind), folder)


def _as_hf(state: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    heads = (
        {"head": "cls_classifier", "head_dist": "distillation_classifier"} if kind == "deit" else {"head": "classifier"}
    )
    renamed: dict[str, Tensor] = {}
    for key, tensor in state.items():
        module, _, leaf = key.rpartition(".")
        if key in _HF_NAMES:
            renamed[f"{kind}.{_HF_NAMES[key]}"] = tensor
        elif module in heads:
            renamed[f"{heads[module]}.{leaf}"] = tensor
        elif module in _HF_NAMES:
            renamed[f"{kind}.{_HF_NAMES[module]}.{leaf}"] = tensor
        else:
            _, number, part = module.split(".", 2)
            place = f"{kind}.encoder.layer.{number}"
            if part == "attn.qkv":
                for third, word in zip(tensor.chunk(3), ("query", "key", "value"), strict=True):
                    renamed[f"{place}.attention.attention.{word}.{leaf}"] = third
            else:
                renamed[f"{place}.{_HF_BLOCK[part]}.{leaf}"] = tensor
    return renamed


def _write_processor(preprocessing: Mapping[str, Any], path: Path) -> None:
    """What evaluation does to a picture, in the words of transformers' processor that resizes the short side and crops.

    Only for square pictures: it knows no other short side. The card says what was done in any case."""
    height, width = preprocessing["image_size"]
    if height != width:
        return
    write_json(
        path,
        {
            "image_processor_type": "BitImageProcessor",
            "do_convert_rgb": preprocessing["channels"] == 3,
            "do_resize": True,
            "size": {"shortest_edge": int(height / preprocessing["crop_fraction"])},
            "resample": RESAMPLE[preprocessing["interpolation"]],
            "do_center_crop": True,
            "crop_size": {"height": height, "width": width},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(preprocessing["mean"]),
            "image_std": list(preprocessing["std"]),
        },
    )


def reopen_hf(folder: Path) -> Model:
    transformers: Any = importlib.import_module("transformers")
    model = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    return lambda images: model(pixel_values=images).logits


# ---- graphs: torch.export and ONNX -----------------------------------------------------------------------------------


def write_torch_export(run: TrainedRun, folder: Path) -> None:
    """model.pt2: the computation itself, with any number of pictures at a time; classes and preprocessing inside."""
    about = json.dumps(_about(run), ensure_ascii=False)
    torch.export.save(_graph(run), folder / "model.pt2", extra_files={"model.json": about})


def reopen_torch_export(folder: Path) -> Model:
    return torch.export.load(folder / "model.pt2").module()


def write_onnx(run: TrainedRun, folder: Path) -> None:
    """model.onnx, with any number of pictures at a time; classes and preprocessing are in its metadata."""
    size = sum(tensor.nbytes for tensor in run.model.state_dict().values())
    with _quiet():
        program = torch.onnx.export(
            _graph(run),
            input_names=["images"],
            output_names=["logits"],
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    for key, value in _about(run).items():
        program.model.metadata_props[key] = json.dumps(value, ensure_ascii=False)
    program.save(folder / "model.onnx", external_data=size > ONNX_IN_ONE_FILE)


def reopen_onnx(folder: Path) -> Model:
    runtime: Any = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _graph(run: TrainedRun) -> torch.export.ExportedProgram:
    # A TimmBackbone only lends its tables to the timm model that computes.
    model = run.model.timm_model if isinstance(run.model, TimmBackbone) else run.model
    height, width = run.preprocessing["image_size"]
    images = torch.zeros(2, run.preprocessing["channels"], height, width)
    with torch.no_grad(), _quiet():
        return torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))


def _about(run: TrainedRun) -> dict[str, Any]:
    return {"classes": run.classes, "preprocessing": run.preprocessing}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the tracers' remarks on their own insides."""
    disabled = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(disabled)


# ---- MLflow ----------------------------------------------------------------------------------------------------------


def write_mlflow(run: TrainedRun, folder: Path) -> None:
    """What vitexp itself reads, and MLmodel beside it, which says that vitexp.serving loads it."""
    if not run.classes:
        raise _not_expressed("mlflow", "it has no classes to predict", others=HOLDS_ALL)
    with _quiet():
        serving.write_format(folder, classes=len(run.classes))
    write_safetensors(run, folder)


def reopen_mlflow(folder: Path) -> Model:
    return serving.read_format(folder).model


# ---- shared ----------------------------------------------------------------------------------------------------------


def _vit_weights(model: VisionTransformer) -> dict[str, Tensor]:
    """A ViT's weights by timm's names; a table of positions that it keeps outside its state is added, and BatchNorm
    before the classifier becomes part of it, which is the same computation."""
    state = dict(model.state_dict()) | {"pos_embed": model.pos_embed.detach()}
    if isinstance(model.head, nn.Sequential):
        norm, linear = model.head
        assert isinstance(norm, nn.BatchNorm1d) and isinstance(linear, nn.Linear)
        assert norm.running_mean is not None and norm.running_var is not None
        state = {key: tensor for key, tensor in state.items() if not key.startswith("head.")}
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        weight = linear.weight.detach().double() * scale
        bias = linear.bias.detach().double() - weight @ norm.running_mean.double()
        state |= {"head.weight": weight.float(), "head.bias": bias.float()}
    return state


def _first_block(model: VisionTransformer) -> Block:
    block = model.blocks[0]
    assert isinstance(block, Block)
    return block


def _own_attention_scale(model: VisionTransformer) -> bool:
    attention = _first_block(model).attn
    return abs(attention.scale * (model.embed_dim // model.num_heads) ** 0.5 - 1) > 1e-9


def _one_or_two(size: tuple[int, int]) -> int | list[int]:
    return size[0] if size[0] == size[1] else list(size)


def _besides_hf(run: TrainedRun) -> str:
    try:
        _as_timm(run)
    except UserError:
        return HOLDS_ALL
    return f"timm, {HOLDS_ALL}"


def _not_expressed(name: str, reason: str, *, others: str) -> UserError:
    return UserError(f"format={name} cannot hold this model: {reason}\nformats that can: {others}")


def _save(state: Mapping[str, Tensor], folder: Path) -> None:
    whole = {key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for key, tensor in state.items()}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


FORMATS = {
    "safetensors": Format(
        write=write_safetensors,
        reopen=reopen_safetensors,
        files=("model.safetensors", "model.json"),
        usage='import vitexp\n\nrun = vitexp.load_run("{folder}")\nprint(run.predict("picture.jpg")[0])',
    ),
    "timm": Format(
        write=write_timm,
        reopen=reopen_timm,
        files=("model.safetensors", "config.json"),
        usage=(
            "import timm\n\n"
            'model = timm.create_model("local-dir:{folder}", pretrained=True).eval()\n'
            "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))"
        ),
    ),
    "torch_export": Format(
        write=write_torch_export,
        reopen=reopen_torch_export,
        files=("model.pt2",),
        usage=(
            "import json, torch\n\n"
            'inside = {{"model.json": ""}}\n'
            'model = torch.export.load("{folder}/model.pt2", extra_files=inside).module()\n'
            'about = json.loads(inside["model.json"])  # classes and preprocessing'
        ),
    ),
    "onnx": Format(
        write=write_onnx,
        reopen=reopen_onnx,
        files=("model.onnx", "model.onnx.data"),
        usage=(
            "import onnxruntime\n\n"
            'session = onnxruntime.InferenceSession("{folder}/model.onnx")\n'
            "about = session.get_modelmeta().custom_metadata_map  # classes and preprocessing, as JSON\n"
            'logits = session.run(["logits"], {{"images": pictures}})[0]  # float32 (batch, channels, height, width)'
        ),
        needs=("onnx", "onnxscript"),
        reads_with=("onnxruntime",),
    ),
    "hf": Format(
        write=write_hf,
        reopen=reopen_hf,
        files=("model.safetensors", "config.json", "preprocessor_config.json"),
        usage=(
            "from transformers import AutoImageProcessor, AutoModelForImageClassification\n\n"
            'model = AutoModelForImageClassification.from_pretrained("{folder}").eval()\n'
            'processor = AutoImageProcessor.from_pretrained("{folder}")'
        ),
        reads_with=("transformers",),
    ),
    "mlflow": Format(
        write=write_mlflow,
        reopen=reopen_mlflow,
        files=("model.safetensors", "model.json", *serving.FILES),
        usage=(
            "import mlflow\n\n"
            'model = mlflow.pyfunc.load_model("{folder}")\n'
            'print(model.predict(["picture.jpg"]))  # paths, or files in base64'
        ),
    ),
}
