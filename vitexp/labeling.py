"""Label maps: what a teacher says of each place of a picture, and what official files of such maps hold.

A classifier that follows global pooling can be asked at every place before it: a convolutional network's at those of
its last feature map, a ViT's at its patch tokens (LV-ViT, arXiv:2104.10858, section 3.2). Of timm's networks the whole
head is called, once for every place, on a feature map that is this place all over: pooling then changes nothing, and
what else a head does (a norm, a hidden layer) is done at each place.

The teacher is shown the whole picture, squashed to its size and not cropped, so that the map covers what a student's
crops are cut from.
"""

from __future__ import annotations

import copy
import math
import pickle
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vitexp.data.batch_transforms import normalise
from vitexp.data.images import Images
from vitexp.data.loader import eval_batches, open_split
from vitexp.data.token_labels import read_official
from vitexp.data.transforms import Interpolation, Resizer, resize
from vitexp.errors import UserError
from vitexp.models.lvvit import LVViT
from vitexp.models.timm_backbone import TimmBackbone
from vitexp.models.vit import VisionTransformer
from vitexp.teachers import Teacher

Grid = tuple[int, int]  # places down, places across
Maps = tuple[np.ndarray, np.ndarray]  # float16 values and int32 class numbers, both (b, k, h, w)

_OFFICIAL_CHUNK = 256  # files read between two writes
_SAME = 1e-3  # of the largest logit: how far two ways of computing it may be apart
_STIRRED = 3.0  # times a parameter's spread: what is added to it at random


def head_of(teacher: Teacher, *, classes: Sequence[str], k: int, grid: Grid) -> dict[str, Any]:
    """How a teacher's maps are made, as a store's head says it."""
    shown = {"mean": teacher.mean, "std": teacher.std}
    shown |= {"interpolation": teacher.interpolation, "resizer": teacher.resizer, "channels": teacher.channels}
    return {
        "teacher": dict(teacher.facts),
        "image_size": list(teacher.image_size),
        "preprocessing": shown,
        "crop": "whole",
        "k": k,
        "classes": list(classes),
        "grid": list(grid),
        # A class that a cell does not name has this logit, after that was taken off all logits of the cell.
        "missing": {"logit": 0.0, "taken_off": "mean of the cell's other logits"},
    }


# ---- a teacher's scores ----------------------------------------------------------------------------------------------


def dense_scores(model: nn.Module, images: Tensor) -> Tensor:
    """float32 (b, h, w, k) logits of every place; normalised pictures (b, c, H, W) in the model's size.

    Where nothing but a linear layer follows average pooling, their mean over the places is the model's own output. Of
    a ViT the class token is left out and its classifier asked of the patch tokens, or the tokens' own where there is
    one. The features are computed under the caller's autocast, the scores in float32. Raises UserError for a model
    that cannot be asked so."""
    low = torch.autocast(images.device.type, enabled=False)
    if isinstance(model, VisionTransformer):
        patches = model.encode(model.embed(images)).patches
        with low:
            if isinstance(model, LVViT) and model.aux_head is not None:
                scores = model.aux_head(patches.float())
            else:  # flat, because a head's BatchNorm takes vectors
                scores = model.classify(model.fc_norm(patches.float().flatten(0, 1)))
        return scores.reshape(len(images), *model.grid_size, -1)
    if isinstance(model, TimmBackbone):
        features = model.timm_model.forward_features(images)
        with low:
            return _timm_scores(model, features.float())
    raise UserError(f"teacher: a {type(model).__name__} has no classifier that could be asked at every place")


def check_dense(model: nn.Module, image_size: tuple[int, int], *, channels: int) -> Grid:
    """The grid of places of such a picture, after trying that its dense scores mean something. Raises UserError."""
    size = "x".join(map(str, image_size))
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, channels, *image_size, generator=generator).to(device)
    try:
        with torch.inference_mode():
            scores = dense_scores(model, images)
            if isinstance(model, TimmBackbone):
                _check_timm(model, images)
    except UserError:
        raise
    except (RuntimeError, AssertionError, TypeError, AttributeError, IndexError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"teacher: it cannot be asked at every place of a {size} picture ({reason})") from None
    return scores.shape[1], scores.shape[2]


def _timm_scores(model: TimmBackbone, features: Tensor) -> Tensor:
    net = model.timm_model
    if features.ndim == 4:
        last = getattr(net, "output_fmt", "NCHW") == "NHWC"
        places = features if last else features.permute(0, 2, 3, 1)
        grid = places.shape[1:3]
        places = places.flatten(0, 2)[:, None, None]  # each a map of one place
        scores = net.forward_head(places if last else places.permute(0, 3, 1, 2))
    elif features.ndim == 3:
        grid, before = _token_grid(model, features.shape[1])
        patches = features[:, before:]
        if getattr(net, "aux_head", None) is not None:
            scores = net.aux_head(patches)
        else:  # the class token, where there is one, says what the patch says
            scores = net.forward_head(patches.flatten(0, 1)[:, None].expand(-1, before + 1, -1))
    else:
        raise UserError(f"teacher: timm's {model.name} has no feature map or tokens before its classifier")
    return scores.reshape(len(features), *grid, -1)


def _token_grid(model: TimmBackbone, tokens: int) -> tuple[Grid, int]:
    """The patch tokens' grid, and how many others come before them."""
    net = model.timm_model
    grid = getattr(getattr(net, "patch_embed", None), "grid_size", None)
    before = getattr(net, "num_prefix_tokens", None)
    if grid is None or math.prod(grid) > tokens:  # of a hierarchical net the last tokens are fewer than the first
        before = before or int(math.isqrt(tokens) ** 2 != tokens)
        grid = (math.isqrt(tokens - before),) * 2
    before = tokens - math.prod(grid) if before is None else before
    if math.prod(grid) + before != tokens or before not in range(16):
        raise UserError(f"teacher: timm's {model.name} has {tokens} tokens, which are no grid of patches")
    return (grid[0], grid[1]), before


def _check_timm(model: TimmBackbone, images: Tensor) -> None:
    """Raises UserError unless the network is its head on its features, and the head blind to where a feature lies.

    The second is tried with other weights and features than the network's own: attention over near-equal features is
    a mean wherever they lie, and a last layer of zeros says nothing, so a head that was not trained yet shows nothing
    of what it will do. Heads that are blind differ by 1e-6 then, attention with positions by more than 0.05."""
    net = model.timm_model
    features, wanted = net.forward_features(images).float(), model(images).float()
    stirred, generator = copy.deepcopy(net), torch.Generator().manual_seed(0)
    for parameter in stirred.parameters():
        spread = max(_STIRRED * float(parameter.float().std(correction=0)), 0.1)
        parameter.add_(spread * torch.randn(parameter.shape, generator=generator).to(parameter))
    made_up = torch.randn(features.shape, generator=generator).to(features)
    if features.ndim == 4:
        last = getattr(net, "output_fmt", "NCHW") == "NHWC"
        places = made_up.flatten(1, 2) if last else made_up.flatten(2)
        elsewhere = places.roll(1, dims=1 if last else 2).view_as(made_up)
    else:
        before = _token_grid(model, features.shape[1])[1]
        elsewhere = torch.cat([made_up[:, :before], made_up[:, before:].roll(1, dims=1)], dim=1)
    its_own = _alike(net.forward_head(features), wanted)
    if not its_own or not _alike(stirred.forward_head(elsewhere), stirred.forward_head(made_up)):
        raise UserError(
            f"teacher: timm's {model.name} classifies by where its features lie, so it cannot be asked at every place"
        )


def _alike(found: Tensor, wanted: Tensor) -> bool:
    """False also where one is not finite."""
    return found.shape == wanted.shape and bool((found - wanted).abs().max() <= _SAME * wanted.abs().max())


def top_scores(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """float16 values and int32 class numbers (b, k, h, w) of the k best in each cell of logits (b, h, w, classes).

    The mean of a cell's other logits is taken off, so that 0 is what those are on average; with all classes kept, that
    of all."""
    best = scores.topk(k, dim=3)
    left = scores.shape[3] - k
    total = scores.sum(3, keepdim=True, dtype=torch.float64)
    if left:
        total -= best.values.sum(3, keepdim=True, dtype=torch.float64)
    values = best.values - total / (left or k)
    return values.half().permute(0, 3, 1, 2), best.indices.int().permute(0, 3, 1, 2)


class Squash:
    """The whole picture in the teacher's size, whatever its proportions, with the teacher's channels."""

    num_uniforms = 0

    def __init__(self, size: tuple[int, int], *, channels: int, interpolation: Interpolation, resizer: Resizer) -> None:
        self.size, self.channels = size, channels
        self.resized = {"interpolation": interpolation, "resizer": resizer}

    def fixed(self, image: np.ndarray) -> np.ndarray:
        """Planar uint8 (c, H, W)."""
        if image.shape[2] < self.channels:
            image = np.repeat(image, self.channels, axis=2)
        elif image.shape[2] > self.channels:
            image = np.array(Image.fromarray(image).convert("L"))[..., None]
        squashed = resize(image, self.size, **self.resized)
        return np.ascontiguousarray(squashed.transpose(2, 0, 1))

    def random(self, stack: np.ndarray, u: np.ndarray) -> np.ndarray:
        return stack


def score(
    teacher: Teacher,
    images: Images,
    *,
    k: int,
    batch_size: int,
    autocast: Callable[[], AbstractContextManager[Any]],
    workers: int | None = None,
) -> Iterator[Maps]:
    """Maps of the pictures in their order, batch by batch. Raises BadImage naming a picture that cannot be read."""
    device = next(teacher.model.parameters()).device
    columns = torch.tensor(teacher.columns, device=device)
    squash = Squash(
        teacher.image_size,
        channels=teacher.channels,
        interpolation=teacher.interpolation,
        resizer=teacher.resizer,
    )
    for batch in eval_batches(open_split(images, squash, cache="none"), batch_size=batch_size, workers=workers):
        with torch.inference_mode():
            pictures = normalise(batch.images.to(device), teacher.mean, teacher.std)
            with autocast():
                scores = dense_scores(teacher.model, pictures)
            values, numbers = (part.cpu().numpy() for part in top_scores(scores[..., columns], k))
        good = np.isfinite(values).all(axis=(1, 2, 3))
        if not good.all():
            name = images.names[int(batch.index[int(good.argmin())])]
            raise UserError(f"{name}: the teacher's scores of it are not finite or beyond float16")
        yield values, numbers


# ---- official files --------------------------------------------------------------------------------------------------


def official_paths(root: Path, names: Sequence[str]) -> list[Path]:
    """Of each picture `<class>/<file>` its file of maps, by the official code's rule: the last folder and the file's
    name up to the first dot in either. Raises UserError where one is not there or is two pictures'."""
    paths = [root / ("/".join(name.split("/")[-2:]).split(".")[0] + ".pt") for name in names]
    shared = [path for path, count in Counter(paths).most_common(1) if count > 1]
    if shared:
        both = [name for name, path in zip(names, paths, strict=True) if path == shared[0]]
        raise UserError(
            f"from={root}: {both[0]} and {both[1]} would both have {shared[0].relative_to(root)}, named by their last "
            "folder and up to the first dot"
        )
    lost = [path for path in paths if not path.is_file()]
    if lost:
        raise UserError(
            f"from={root}: {len(lost):,} of {len(paths):,} pictures have no file of label maps there, "
            f"first: {lost[0].relative_to(root)}"
        )
    return paths


def official_maps(paths: Sequence[Path], *, classes: Sequence[str], like: tuple[int, ...]) -> Iterator[Maps]:
    """The maps in official files, one a picture, some at a time; all of the shape `like` (k, h, w).

    There the classes are numbered as timm sorts their folders, class2 before class10; here as the data has them.
    Raises UserError naming a file that is damaged or does not fit."""
    by_timm = sorted(classes, key=_natural)
    renumbered = np.array([classes.index(name) for name in by_timm], np.int32)
    for begin in range(0, len(paths), _OFFICIAL_CHUNK):
        chunk = [read_official_file(path, num_classes=len(classes)) for path in paths[begin : begin + _OFFICIAL_CHUNK]]
        for path, (values, _) in zip(paths[begin:], chunk, strict=False):
            if values.shape != like:
                raise UserError(f"{path}: maps of shape {list(values.shape)}, in the first file {list(like)}")
        yield np.stack([values for values, _ in chunk]), renumbered[np.stack([numbers for _, numbers in chunk])]


def read_official_file(path: Path, *, num_classes: int) -> Maps:
    """float16 logits and int32 class numbers (k, h, w) of one file. Raises UserError naming it."""
    try:
        # Said aloud: an environment variable can turn torch's default off, and a pickle can run anything.
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:100]
        raise UserError(f"{path}: damaged, or no PyTorch file of a tensor ({reason})") from None
    if not isinstance(stored, Tensor) or stored.ndim != 4 or len(stored) != 2 or not stored.is_floating_point():
        found = f"{stored.dtype} {list(stored.shape)}" if isinstance(stored, Tensor) else type(stored).__name__
        raise UserError(f"{path}: no label maps, expected are half numbers [2, k, h, w] and found {found}")
    try:
        values, numbers = read_official(stored, num_classes=num_classes)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if not values.isfinite().all():
        raise UserError(f"{path}: label maps that are not finite")
    return values.numpy(), numbers.numpy()


def official_head(root: Path, *, classes: Sequence[str], shape: tuple[int, ...]) -> dict[str, Any]:
    """How official maps are made, as a store's head says it: what their teacher saw is not in the files."""
    k, height, width = shape
    return {
        "teacher": {"name": f"official label maps in {root}", "maps": str(root.resolve())},
        "image_size": None,
        "preprocessing": None,
        "crop": "center",
        "k": k,
        "classes": list(classes),
        "grid": [height, width],
        "missing": {"logit": 0.0, "taken_off": "nothing"},
    }


def _natural(name: str) -> list[int | str]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name.lower())]
