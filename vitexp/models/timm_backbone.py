"""Any timm model by name, in the same stages and with the same members as the ViT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import timm
import torch
from timm.layers import PatchEmbed
from timm.models import group_parameters
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import Tensor, nn

from vitexp.errors import UserError, nearest
from vitexp.models.checks import divides, flag, fraction, height_width, one_of, whole
from vitexp.models.vit import HEAD_INITS
from vitexp.types import Features


@dataclass(frozen=True)
class TimmFeatures(Features):
    """Features of a plain timm ViT."""

    tokens: Tensor  # (b, prefix tokens + n, d) all of them, as timm's own pooling takes them


class TimmBackbone(nn.Module):
    """Logits (b, num_classes) from pictures, computed by `timm.create_model(name)`.

    Parameter names and state-dict keys are the timm model's own. `image_size` is handed to models built for one size
    (ViTs); a convolutional network takes any and is made as timm makes it. `pretrained` downloads timm's weights.
    `options` are further arguments of timm's constructor, such as {drop_rate: 0.1}. The seam, from `embed` to
    `classify`, and what a masked autoencoder asks exist for timm's plain ViTs only. Raises UserError for unknown names
    and for options that the model does not have."""

    timm_model: Any  # the nn.Module that timm made; its members differ from model to model

    def __init__(
        self,
        name: str,
        *,
        image_size: int | Sequence[int] = 224,
        num_classes: int = 1000,
        in_channels: int = 3,
        pretrained: bool = False,
        drop_path: float | None = None,
        gradient_checkpointing: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(name, str) or not timm.is_model(name):
            raise UserError(f"model.name={name!r}: timm has no such model.{_nearest_timm(str(name))}")
        self.name = name
        self.image_size = height_width("model.image_size", image_size)
        self.in_channels = whole("model.in_channels", in_channels)
        self.num_classes = whole("model.num_classes", num_classes, at_least=0)
        asked = dict(options or {})
        if drop_path is not None:
            asked["drop_path_rate"] = fraction("model.drop_path", drop_path)
        # Tried without memory first: only the constructor itself knows whether it takes a size.
        sized = takes_image_size(name, self.image_size)
        model: Any = _create(
            name,
            pretrained=flag("model.pretrained", pretrained),
            num_classes=self.num_classes,
            in_chans=self.in_channels,
            **({"img_size": self.image_size} if sized else {}),
            **asked,
        )
        if isinstance(model, TimmViT):  # timm would leave the last rows and columns of the picture out without a word
            for patch, side in zip(model.patch_embed.patch_size, self.image_size, strict=True):
                divides("model.name's patch", patch, "model.image_size", side, shown=(patch, image_size))
        if flag("model.gradient_checkpointing", gradient_checkpointing):
            if not hasattr(model, "set_grad_checkpointing"):
                raise UserError(f"model.gradient_checkpointing=true: timm's {name} has no gradient checkpointing")
            model.set_grad_checkpointing(True)
        # The timm model's own tables, shared and not copied: names carry no "timm_model." in front, and a head that
        # timm replaces is replaced here too. It is kept outside of _modules for the same reason.
        self._parameters, self._buffers, self._modules = model._parameters, model._buffers, model._modules
        self._non_persistent_buffers_set = model._non_persistent_buffers_set
        self.__dict__["timm_model"] = model

    def train(self, mode: bool = True) -> TimmBackbone:
        self.training = mode
        self.timm_model.train(mode)
        return self

    # ---- forward -------------------------------------------------------------------------------------------------
    def forward(self, images: Tensor) -> Tensor:
        return self.timm_model(images)

    def embed(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """(b, patches, d) patch tokens with their positions, without class token. UserError unless a plain ViT.

        With `keep` (b, m), raster positions, (b, m, d) of these patches in that order."""
        vit = self._plain_vit()
        tokens = vit.patch_embed(images)
        tokens = tokens.flatten(1, 2) if vit.dynamic_img_size else tokens  # (b, gh, gw, d) then
        tokens = tokens if vit.pos_embed is None else tokens + vit.pos_embed[:, self._num_rows_before_patches(vit) :]
        return tokens if keep is None else tokens.take_along_dim(keep[..., None], dim=1)

    def encode(self, tokens: Tensor) -> TimmFeatures:
        """Features of any patch tokens from `embed`. UserError unless a plain ViT."""
        vit = self._plain_vit()
        prefix: list[Tensor] = [token for token in (vit.cls_token, vit.reg_token) if token is not None]
        if prefix:
            joined = torch.cat(prefix, dim=1)
            rows = self._num_rows_before_patches(vit)
            joined = joined + vit.pos_embed[:, :rows] if rows and vit.pos_embed is not None else joined
            tokens = torch.cat([joined.expand(tokens.shape[0], -1, -1), tokens], dim=1)
        tokens = vit.norm_pre(vit.patch_drop(vit.pos_drop(tokens)))
        if vit.grad_checkpointing and vit.training and torch.is_grad_enabled():
            tokens = timm.models.checkpoint_seq(vit.blocks, tokens)
        else:
            tokens = vit.blocks(tokens)
        tokens = vit.norm(tokens)
        cls = tokens[:, 0] if vit.cls_token is not None else None
        return TimmFeatures(cls=cls, patches=tokens[:, vit.num_prefix_tokens :], tokens=tokens)

    def pooled(self, features: TimmFeatures) -> Tensor:
        """(b, d) one vector a picture: what the classifier reads, by timm's own pooling."""
        return self._plain_vit().forward_head(features.tokens, pre_logits=True)

    def classify(self, vectors: Tensor) -> Tensor:
        """Logits from `pooled` vectors."""
        return self._plain_vit().head(vectors)

    # ---- what training and loading ask ---------------------------------------------------------------------------
    @cached_property
    def _layers(self) -> dict[str, int]:
        if not hasattr(self.timm_model, "group_matcher"):
            raise UserError(f"timm's {self.name} gives no order of its layers: optim.layer_decay must be 1.0")
        matcher = self.timm_model.group_matcher(coarse=False)
        layers = group_parameters(self.timm_model, matcher, reverse=True)
        return cast(dict[str, int], layers)  # what reverse=True makes of it

    @property
    def num_layers(self) -> int:
        """The highest number `layer_of` gives, timm's group of the head."""
        return max(self._layers.values())

    def layer_of(self, parameter_name: str) -> int:
        """Depth of a parameter by timm's grouping: 0 for the stem, num_layers for the head and whatever it leaves out.

        timm puts a ViT's last norm with the last block, MAE's rule (our ViT) with the head."""
        return self._layers.get(parameter_name, self.num_layers)

    @property
    def head_prefixes(self) -> tuple[str, ...]:
        """How the names of the classifier's parameters begin."""
        names = self.timm_model.pretrained_cfg.get("classifier") or ()
        return tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))

    @property
    def grid_size(self) -> tuple[int, int] | None:
        """Rows and columns of patches where the model has a table of positions for them."""
        grid = getattr(getattr(self.timm_model, "patch_embed", None), "grid_size", None)
        return tuple(grid) if grid is not None and getattr(self.timm_model, "pos_embed", None) is not None else None

    @property
    def embed_dim(self) -> int:
        """Width of the tokens. UserError unless a plain ViT."""
        return self._plain_vit().embed_dim

    @property
    def num_prefix_tokens(self) -> int:
        """How many tokens stand in front of the patches'. UserError unless a plain ViT."""
        return self._plain_vit().num_prefix_tokens

    @property
    def patch_size(self) -> tuple[int, int]:
        """(height, width) in pixels. UserError unless a plain ViT that embeds each patch by itself."""
        vit = self._plain_vit()
        if type(vit.patch_embed) is not PatchEmbed:
            stem = type(vit.patch_embed).__name__
            raise UserError(
                f"model.name={self.name}: its stem, {stem}, looks beyond a patch; patches cannot be left out"
            )
        height, width = vit.patch_embed.patch_size
        return int(height), int(width)

    def reset_head(self, num_classes: int, *, init: str = "zero") -> None:
        """A new classifier for `num_classes` (0: none) on the same device; `init` as for the ViT. Raises UserError."""
        std = HEAD_INITS[one_of("init", init, tuple(HEAD_INITS))]
        self.num_classes = whole("num_classes", num_classes, at_least=0)
        device = next(self.parameters()).device
        self.timm_model.reset_classifier(self.num_classes)
        for name, module in self.named_modules():
            if f"{name}.".startswith(self.head_prefixes) and isinstance(module, (nn.Linear, nn.Conv2d)):
                module.to(device)
                nn.init.trunc_normal_(module.weight, std=std) if std else nn.init.zeros_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def _plain_vit(self) -> TimmViT:
        vit = self.timm_model
        plain = isinstance(vit, TimmViT) and all(
            getattr(type(vit), method) is getattr(TimmViT, method) for method in ("_pos_embed", "forward_features")
        )
        if not plain:
            raise UserError(
                f"model.name={self.name}: only a plain timm ViT can be split into embed and encode; "
                "use one such as vit_small_patch16_224, or our own model=vit_small"
            )
        return vit

    @staticmethod
    def _num_rows_before_patches(vit: TimmViT) -> int:
        return 0 if vit.no_embed_class else vit.num_prefix_tokens


def _create(name: str, **arguments: Any) -> nn.Module:
    try:
        return timm.create_model(name, **arguments)
    except TypeError as error:
        raise UserError(f"model.name={name}: {_reason(error)}; see model.options") from None
    except (AssertionError, RuntimeError, ValueError, OSError) as error:
        raise UserError(f"model.name={name}: timm cannot build it ({type(error).__name__}: {_reason(error)})") from None


def takes_image_size(name: str, image_size: tuple[int, int]) -> bool:
    try:
        with torch.device("meta"):
            timm.create_model(name, img_size=image_size)
    except TypeError as error:
        return "img_size" not in str(error)
    except (AssertionError, RuntimeError, ValueError):
        return True  # it knows the argument; what is wrong with the value is said when it is really built
    return True


def _nearest_timm(name: str) -> str:
    return nearest(name, timm.list_models()) or " See timm.list_models()."


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
