"""Targets from label maps: what a teacher saw at each place of a picture, cut to the crop that a student is shown.

Re-labeling (arXiv:2101.05022) gives one label a crop, token labeling (LV-ViT, arXiv:2104.10858) one label a token, too.
A map is sparse: the k largest of a teacher's logits in each of h x w cells, `values` (b, k, h, w) and the class
`numbers` (b, k, h, w) they belong to. A class that a cell does not name has logit 0 there, as in the official code, so
the logits kept are to be those of a classifier whose others lie around 0.

A crop is (top, left, height, width) in fractions of the picture that the map covers, which vitexp's crops become when
they are divided by its height and width. `mirrored` says which crops were then flipped from left to right.

RoI-align is linear, and separable: the cells' shares in a bin are those of its row times those of its column. So a map
is pooled by two small products over the classes that occur in it, and is dense only in the targets handed out. The
results are torchvision's roi_align with aligned=False and sampling_ratio=-1 on the dense map, and a softmax after it.
Nothing here changes what it is given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vitexp.errors import UserError
from vitexp.mixing import one_hot

Grid = tuple[int, int]  # tokens down, tokens across

_EXACT_IN_HALF = 2048  # whole numbers up to here survive float16, in which official maps store classes


class TokenTargets(NamedTuple):
    """What a batch of crops is to be taken for."""

    ground_truth: Tensor  # (b, k) the class number, smoothed
    cls: Tensor  # (b, k) the map's label of the whole crop
    tokens: Tensor  # (b, n, k) its labels of the tokens, in raster order


def token_targets(
    values: Tensor,
    numbers: Tensor,
    boxes: Tensor,
    mirrored: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    grid: Grid,
    smoothing: float = 0.0,
    official_axes: bool = False,
) -> TokenTargets:
    """All three targets of crops with class numbers `labels` (b,); the rest as in `crop_labels`."""
    cls, tokens = crop_labels(
        values,
        numbers,
        boxes,
        mirrored,
        num_classes=num_classes,
        grids=((1, 1), grid),
        smoothing=smoothing,
        official_axes=official_axes,
    )
    return TokenTargets(one_hot(labels, num_classes, smoothing=smoothing), cls[:, 0], tokens)


def crop_labels(
    values: Tensor,
    numbers: Tensor,
    boxes: Tensor,
    mirrored: Tensor,
    *,
    num_classes: int,
    grids: Sequence[Grid],
    smoothing: float = 0.0,
    official_axes: bool = False,
) -> tuple[Tensor, ...]:
    """float32 (b, gh * gw, num_classes) probabilities for each grid laid over the crops; (1, 1) is re-labeling.

    Smoothing s makes p into p (1 - s + s / k) + s / k, which sums to 1 + s / k: the official code's way.
    official_axes=True exchanges the box's axes, as the official code does: it pools the crop from the top right out of
    the map's bottom left. Only for repeating its numbers. boxes (b, 4) and mirrored (b,) best stay on the CPU.
    """
    maps, occurring = _occurring_classes(values, numbers, num_classes)
    top, left, height, width = boxes.float().unbind(1)
    down, across = (top, top + height), (left, left + width)
    if official_axes:  # those of the box in the picture as shown, where a mirrored map lies the other way round
        sides = ((left, width), (top, height))
        row, column = (torch.where(mirrored, 1 - start - side, start) for start, side in sides)
        down, across = (row, row + width), (column, column + height)
    pooled = []
    for rows, columns in grids:
        shares_down = _shares(*down, bins=rows, cells=maps.shape[2])
        shares_across = _shares(*across, bins=columns, cells=maps.shape[3])
        shares_across = torch.where(mirrored[:, None, None], shares_across.flip(1), shares_across)
        shares = (share.to(maps.device, non_blocking=True) for share in (shares_down, shares_across))
        pooled.append(torch.einsum("brh,buhw,bcw->brcu", next(shares), maps, next(shares)).flatten(1, 2))
    labels = _probabilities(torch.cat(pooled, dim=1), occurring, num_classes, smoothing=smoothing)
    return labels.split([rows * columns for rows, columns in grids], dim=1)


def mix_targets(targets: TokenTargets, *, lam: float) -> TokenTargets:
    """Targets of crops that mixup has mixed: lam of each and 1 - lam of its partner's, b - 1 - i of picture i."""
    return TokenTargets(*(torch.lerp(part.flip(0), part, lam) for part in targets))


# ---- the official code's layouts -------------------------------------------------------------------------------------


def read_official(stored: Tensor, *, num_classes: int) -> tuple[Tensor, Tensor]:
    """values float16 and numbers int32 of official maps (..., 2, k, h, w), one `.pt` file each or a stack of them.

    Raises UserError where the classes are more than float16 can number, or are not what the maps were made for."""
    if num_classes > _EXACT_IN_HALF:
        raise UserError(
            f"{num_classes} classes: official label maps number them in float16, which is exact up to {_EXACT_IN_HALF}"
        )
    values, stored_numbers = stored.unbind(-4)
    numbers = stored_numbers.to(torch.int32)
    if not torch.equal(numbers.to(stored.dtype), stored_numbers) or numbers.min() < 0 or numbers.max() >= num_classes:
        raise UserError(
            f"label maps name classes from {stored_numbers.min():g} to {stored_numbers.max():g}: "
            f"not whole numbers from 0 to {num_classes - 1}"
        )
    return values.to(torch.float16), numbers


def read_official_crop(packed: Tensor) -> tuple[Tensor, Tensor]:
    """boxes (b, 4) and class numbers (b,) from the third plane of the official loader's (b, 3, k, h, w) batches."""
    plane = packed[:, 2, 0, 0]
    return plane[:, :4], plane[:, 5].long()


def pack_official(targets: TokenTargets) -> Tensor:
    """(b, k, 2 + n), the official targets: column 0 the ground truth, 1 the crop's label, then the tokens'."""
    return torch.cat([targets.ground_truth[:, None], targets.cls[:, None], targets.tokens], dim=1).transpose(1, 2)


# ---- arithmetic ------------------------------------------------------------------------------------------------------


def _occurring_classes(values: Tensor, numbers: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """float32 maps (b, u, h, w) over u classes of each picture, and their numbers (b, u): all that occur in its map.

    u is what the richest map of the batch needs. The others' last maps are of classes that do not occur, and zero."""
    batch, _, height, width = values.shape
    named = numbers.flatten(2).long()
    occurs = torch.zeros(batch, num_classes, dtype=torch.bool, device=values.device)
    occurs.scatter_(1, named.flatten(1), True)
    most = int(occurs.sum(1).max())
    occurring = occurs.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
    place = occurs.cumsum(1) - 1  # of each occurring class in that order
    at = place.gather(1, named.flatten(1)).view_as(named)
    maps = torch.zeros(batch, most, height * width, device=values.device)
    maps.scatter_(1, at, values.flatten(2).float())
    return maps.view(batch, most, height, width), occurring


def _shares(low: Tensor, high: Tensor, *, bins: int, cells: int) -> Tensor:
    """(b, bins, cells): the share of each cell in each of the bins that part low..high (b,), fractions of the cells.

    RoI-align along one axis. Cell i has its centre at i; an interval below one cell is widened to one, upwards. A bin
    is the mean of ceil(its length) evenly spread points, each between its two neighbours; one up to a cell outside
    takes the border's value, one further out is 0."""
    start, end = low * cells - 0.5, high * cells - 0.5
    length = (end - start).clamp(min=1)[:, None, None]
    count = (length / bins).ceil()  # points a bin
    point, bin_number = torch.arange(int(count.max())), torch.arange(bins)[:, None]
    at = start[:, None, None] + (bin_number + (point + 0.5) / count) * (length / bins)  # (b, bins, points)
    counts = (point < count) & (at >= -1) & (at <= cells)
    distance = (at.clamp(0, cells - 1)[..., None] - torch.arange(cells)).abs()
    return ((1 - distance).clamp(min=0) * counts[..., None]).sum(2) / count


def _probabilities(logits: Tensor, occurring: Tensor, num_classes: int, *, smoothing: float) -> Tensor:
    """(b, n, num_classes) softmax of (b, n, u) logits of the occurring classes and 0 for every other, smoothed."""
    batch, count, named = logits.shape
    others = torch.tensor(math.log(num_classes - named) if named < num_classes else -math.inf, device=logits.device)
    log_sum = torch.logaddexp(logits.logsumexp(2, keepdim=True), others)
    off = smoothing / num_classes
    on = 1 - smoothing + off
    dense = ((-log_sum).exp() * on + off).repeat(1, 1, num_classes)
    return dense.scatter_(2, occurring[:, None].expand(batch, count, named), (logits - log_sum).exp() * on + off)
