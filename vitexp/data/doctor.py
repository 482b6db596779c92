"""What is wrong with a data set, before a run is spoilt by it: every check as a plain function of what was seen.

Each picture is decoded once, by the function that training uses, and leaves some 100 bytes; no two pictures are held
at a time by one process. A picture that cannot be read is noted and does not stop anything.

Same and nearly same. Two pictures are the same if their decoded pixels are (blake2b, 128 bits), whatever their files.
They are nearly the same if two 64-bit perceptual hashes agree: pHash (signs of the 8x8 lowest frequencies of the
32x32 gray picture against their median) in all but NEAR_PHASH bits and dHash (which of two neighbours of the 9x8 gray
picture is brighter) in all but NEAR_DHASH. All such pairs are found, see `close_pairs`. Found are copies saved anew,
scaled, or changed a little in brightness or colour; not mirrored, turned or cropped ones.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import math
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch.utils.data import DataLoader, Dataset

from vitexp.data.images import Images, Source, listed
from vitexp.errors import BadImage, UserError

NEAR_PHASH, NEAR_DHASH = 6, 9  # bits of 64 in which two pictures that look the same may differ
NEAR_SIDE = 16  # pixels of the shorter side below which pictures of one class look the same to a hash
PLAIN_RANGE = 8  # gray levels between darkest and brightest, below which there is nothing to see, or to hash
TINY_SIDE, TINY_SHARE = 8, 0.25  # pixels of the shorter side; of the median one
HUGE_PIXELS, HUGE_BYTES = 16_000_000, 16 << 20  # which take a worker a tenth of a second and more to decode
UNEVEN = 10  # times as many pictures in the largest class as in the smallest
USUAL_MODES = ("RGB", "L")
READ_AS = {  # what images.decode makes of the others
    "RGBA": "laid over white", "LA": "laid over white", "PA": "laid over white", "P": "its palette's colours",
    "1": "black and white", "CMYK": "turned into RGB", "YCbCr": "turned into RGB", "LAB": "turned into RGB",
    "I;16": "16 bits scaled to 8", "I;16B": "16 bits scaled to 8", "I": "16 bits scaled to 8", "F": "0..1 scaled",
}  # fmt: skip
SIZES = (8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224)  # pictures that models are given; the papers' is the last
PATCHES, LEAST_GRID = (16, 8, 4, 2, 1), 8  # a ViT wants 8 x 8 tokens or more
CHUNK = 64  # pictures that a process takes at a time
ALONE = 256  # so many pictures are not worth starting processes for
BLOCK = 1 << 20  # pairs compared at a time

SEEN = np.dtype(
    [
        ("readable", "?"), ("plain", "?"), ("gray", "?"), ("height", "<i4"), ("width", "<i4"), ("kind", "<i4"),
        ("digest", "<u8", 2), ("phash", "<u8"), ("dhash", "<u8"), ("mean", "<f8", 3), ("square", "<f8", 3),
    ]
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Seen:
    """What is known of a split's pictures after looking at each."""

    table: np.ndarray  # (n,) of SEEN
    kinds: list[str]  # what `kind` numbers: `JPEG RGB`; empty for pictures that are no files
    channels: int
    reasons: dict[int, str] = field(default_factory=dict)  # why a picture cannot be read

    @property
    def good(self) -> np.ndarray:
        """Positions of the pictures that can be read."""
        return np.flatnonzero(self.table["readable"])

    @property
    def short_sides(self) -> np.ndarray:
        return np.minimum(self.table["height"], self.table["width"])


Tell = Callable[[int], object]  # so many pictures more are done


# ---- Looking at pictures -----------------------------------------------------------------------------------------


def look_at(images: Images, *, workers: int, tell: Tell = lambda _: None) -> Seen:
    """Every picture of a split decoded once, by so many processes (0: here). Raises UserError where one dies."""
    chunks = range(0, len(images), CHUNK)
    if len(images) <= ALONE or workers == 0:
        parts = (_look_at_chunk(images, begin) for begin in chunks)
    else:
        parts = _in_processes(images, chunks, workers)
    kinds: dict[str, int] = {}
    tables, reasons, channels = [], {}, 0
    for begin, (table, words, failed, depth) in zip(chunks, parts, strict=True):
        table["kind"] = [kinds.setdefault(word, len(kinds)) for word in words]
        tables.append(table)
        reasons |= {begin + i: reason for i, reason in failed.items()}
        channels = max(channels, depth)
        tell(len(table))
    return Seen(np.concatenate(tables), list(kinds), channels, reasons)


Part = tuple[np.ndarray, list[str], dict[int, str], int]  # rows, kind of each, reasons by row, channels


def _look_at_chunk(images: Images, begin: int) -> Part:
    rows = range(begin, min(begin + CHUNK, len(images)))
    table = np.zeros(len(rows), SEEN)
    kinds, reasons, channels = [], {}, 0
    for row, i in enumerate(rows):
        kinds.append(stored_kind(images, i))
        try:
            pixels = images.read(i)
        except BadImage as error:
            reasons[row] = error.reason
        else:
            channels = pixels.shape[-1]
            table[row] = look_at_pixels(pixels)
    return table, kinds, reasons, channels


def look_at_pixels(pixels: np.ndarray) -> np.ndarray:
    """The () of SEEN of one picture, uint8 (h, w, 1 or 3); its kind is left open."""
    seen = np.zeros((), SEEN)
    height, width, channels = pixels.shape
    image = Image.fromarray(pixels if channels == 3 else pixels[..., 0])
    counts = np.array(image.histogram(), np.float64).reshape(channels, 256)
    levels = np.arange(256) / 255
    seen["readable"], seen["height"], seen["width"] = True, height, width
    seen["mean"][:channels] = counts @ levels / (height * width)
    seen["square"][:channels] = counts @ levels**2 / (height * width)
    seen["gray"] = (counts == counts[0]).all() and bool((pixels == pixels[..., :1]).all())
    seen["digest"] = pixels_digest(pixels)
    seen["phash"], seen["dhash"], contrast = perceptual_hashes(image)
    seen["plain"] = contrast < PLAIN_RANGE
    return seen


def pixels_digest(pixels: np.ndarray) -> np.ndarray:
    """(2,) uint64 of shape and pixels."""
    digest = hashlib.blake2b(str(pixels.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(pixels).data)
    return np.frombuffer(digest.digest(), "<u8")


_FREQUENCIES = np.cos(np.pi * np.arange(8)[:, None] * (2 * np.arange(32) + 1) / 64)  # of the DCT-II, 32 points


def perceptual_hashes(image: Image.Image) -> tuple[int, int, int]:
    """(pHash, dHash, gray levels between the darkest and brightest of the 9x8 picture), as in the module's first lines.

    Bits in the order of rows, the first one highest."""
    gray = image.convert("L")
    small = np.asarray(gray.resize((9, 8), Image.Resampling.LANCZOS)).astype(np.int64)
    middle = np.asarray(gray.resize((32, 32), Image.Resampling.LANCZOS)).astype(np.float64)
    waves = _FREQUENCIES @ middle @ _FREQUENCIES.T
    return _bits(waves > np.median(waves)), _bits(small[:, 1:] > small[:, :-1]), int(small.max() - small.min())


def _bits(marks: np.ndarray) -> int:
    return int.from_bytes(np.packbits(marks).tobytes())


def stored_kind(images: Images, i: int) -> str:
    """`PNG RGBA`, `GIF P, animated` of the encoded picture; empty where there is none, or Pillow cannot open it."""
    stored = images.stored(i)
    if stored is None:
        return ""
    try:
        with Image.open(io.BytesIO(stored) if isinstance(stored, bytes) else stored) as image:
            moving = image.format != "MPO" and getattr(image, "is_animated", False)
            return f"{image.format} {image.mode}" + (", animated" if moving else "")
    except Exception:  # unreadable ones are found by reading them
        return ""


class _Chunks(Dataset):
    def __init__(self, images: Images) -> None:
        self.images = images

    def __getitem__(self, index: int) -> Part:
        return _look_at_chunk(self.images, index)


def _in_processes(images: Images, chunks: Sequence[int], workers: int) -> Iterator[Part]:
    """In order. Torch's loader, since its processes end with their parent however that ends."""
    loader = DataLoader(
        _Chunks(images),
        batch_size=None,
        sampler=chunks,
        num_workers=min(workers, len(chunks)),
        collate_fn=_as_it_is,
        worker_init_fn=_leave_ctrl_c_to_parent,
        multiprocessing_context="fork" if sys.platform == "linux" else None,  # they share the tables and names
    )
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            "a process that reads pictures died, most likely for lack of memory; train.workers=1: only one at a time"
        ) from error


def _as_it_is(part: Any) -> Any:
    return part


def _leave_ctrl_c_to_parent(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


# ---- Pairs -------------------------------------------------------------------------------------------------------


def close_pairs(
    hashes: np.ndarray, radius: int, *, tell: Tell = lambda _: None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All pairs (first, second) of positions whose 64-bit hashes differ in at most `radius` bits, each pair once.

    The bits are cut into radius + 1 bands: differing bits cannot lie in all of them, so every pair agrees in a band and
    only pictures that share one are compared (Norouzi et al. 2012, multi-index hashing). None is missed; BLOCK pairs
    or those of one picture are held at a time. Of n even hashes n²/2 · (radius + 1) / 2^(64 / (radius + 1)) pairs are
    compared: 28 million of 60,000 pictures with radius 6. Each is told once a band."""
    cuts = np.linspace(0, 64, radius + 2).astype(int)
    masks = [np.uint64((1 << int(high)) - (1 << int(low))) for low, high in itertools.pairwise(cuts)]
    for band, mask in enumerate(masks):
        order = np.argsort(hashes & mask, kind="stable")
        ordered = hashes[order]
        part = ordered & mask
        mates = np.searchsorted(part, part, side="right") - np.arange(len(order)) - 1  # those after it
        sums = np.cumsum(mates)
        begin = 0
        while begin < len(order):
            before = int(sums[begin - 1]) if begin else 0
            end = max(begin + 1, int(np.searchsorted(sums, before + BLOCK, side="right")))
            count = mates[begin:end]
            left = np.repeat(np.arange(begin, end), count)
            right = np.arange(len(left)) - np.repeat(np.cumsum(count) - count, count) + left + 1
            near = np.flatnonzero(bit_count(ordered[left] ^ ordered[right]) <= radius)
            left, right = left[near], right[near]
            apart = ordered[left] ^ ordered[right]
            new = np.ones(len(apart), bool)
            for earlier in masks[:band]:
                new &= (apart & earlier) != 0  # else that band had it
            if new.any():
                yield order[left[new]], order[right[new]]
            tell(end - begin)
            begin = end


def bit_count(numbers: np.ndarray) -> np.ndarray:
    """Ones in each uint64, as numpy 2's bitwise_count: sums of neighbouring bits, pairs, fours, then all bytes."""
    n = numbers - ((numbers >> np.uint64(1)) & np.uint64(0x5555555555555555))
    n = (n & np.uint64(0x3333333333333333)) + ((n >> np.uint64(2)) & np.uint64(0x3333333333333333))
    n = (n + (n >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return (n * np.uint64(0x0101010101010101)) >> np.uint64(56)


def equal_groups(digests: np.ndarray) -> list[np.ndarray]:
    """Positions of rows (n, 2) that are the same, of those that more than one has."""
    _, which = np.unique(digests, axis=0, return_inverse=True)
    return groups_of(which.ravel())


def groups_of(labels: np.ndarray) -> list[np.ndarray]:
    """Positions of equal labels, of those that more than one has, in the order of their first."""
    order = np.argsort(labels, kind="stable")
    cuts = np.flatnonzero(np.diff(labels[order])) + 1
    return sorted((part for part in np.split(order, cuts) if len(part) > 1), key=lambda part: int(part[0]))


@dataclass(frozen=True, eq=False)
class Alike:
    """Pictures that are nearly the same, none of them equal to another; positions count through both splits."""

    groups: list[np.ndarray]  # within a split: each looks like another of its group
    across: list[tuple[int, int]]  # (of val, one of train that it looks like)


def alike(phash: np.ndarray, dhash: np.ndarray, in_val: np.ndarray, *, tell: Tell = lambda _: None) -> Alike:
    """Of distinct pictures' hashes (n,). Memory does not grow with the number of pairs."""
    partner = np.full(len(phash), -1, np.int64)
    group = np.arange(len(phash))
    edges: list[tuple[np.ndarray, np.ndarray]] = []

    def merge() -> None:
        nonlocal group
        first = np.concatenate([np.arange(len(group)), *(a for a, _ in edges)])
        second = np.concatenate([group, *(b for _, b in edges)])
        graph = coo_array((np.ones(len(first), np.int8), (first, second)), shape=(len(group), len(group)))
        _, labels = connected_components(graph, directed=False)
        _, at, which = np.unique(labels, return_index=True, return_inverse=True)
        group = at[which.ravel()]
        edges.clear()

    for first, second in close_pairs(phash, NEAR_PHASH, tell=tell):
        near = bit_count(dhash[first] ^ dhash[second]) <= NEAR_DHASH
        first, second = first[near], second[near]
        mixed = in_val[first] != in_val[second]
        val = np.where(in_val[first], first, second)[mixed]
        partner[val] = (first + second)[mixed] - val
        edges.append((first[~mixed], second[~mixed]))
        if sum(len(a) for a, _ in edges) > BLOCK:
            merge()
    merge()
    return Alike(groups_of(group), [(int(v), int(partner[v])) for v in np.flatnonzero(partner >= 0)])


# ---- Checks ------------------------------------------------------------------------------------------------------

OK, LOOK, SPOILS = "ok", "look", "SPOILS"


@dataclass(frozen=True)
class Shown:
    """A picture that a check points at."""

    split: str
    index: int
    note: str = ""


@dataclass(frozen=True)
class Check:
    """What one check found. Pictures that belong together are one group."""

    name: str
    verdict: str  # OK; LOOK: a person should; SPOILS: a run would stop, or its numbers would be wrong
    says: str
    advice: str = ""
    groups: list[list[Shown]] = field(default_factory=list)


def check_all(source: Source, seen: dict[str, Seen], *, tell: Tell = lambda _: None) -> list[Check]:
    """In the order in which they are to be mended. At most NEAR_PHASH + 1 times as many as there are pictures are
    told, by the search for those that are nearly the same."""
    return [
        unreadable(seen),
        *same_pictures(source, seen),
        *near_pictures(seen, tell=tell),
        classes(source),
        imbalance(source),
        odd_modes(seen),
        tiny(seen),
        huge(source, seen),
        plain(seen),
    ]


def unreadable(seen: dict[str, Seen]) -> Check:
    bad = [Shown(split, i, why) for split, part in seen.items() for i, why in sorted(part.reasons.items())]
    if not bad:
        return Check("unreadable", OK, "every picture can be read")
    says = f"{_pictures(len(bad))} of {sum(len(part.table) for part in seen.values()):,} cannot be read"
    return Check("unreadable", SPOILS, says, "a run stops at the first of them: mend or remove", [[b] for b in bad])


def same_pictures(source: Source, seen: dict[str, Seen]) -> list[Check]:
    """Equal pixels: across the splits, within one, and of different classes."""
    where, table = _joined(seen)
    labels = np.concatenate([np.asarray(source.splits()[split].labels) for split in seen])[_good(seen)]
    groups = equal_groups(table["digest"])
    across = [g for g in groups if len({where[i].split for i in g}) > 1]
    within = {s: [kept for g in groups if len(kept := [i for i in g if where[i].split == s]) > 1] for s in seen}
    torn = [g for g in groups if len(np.unique(labels[g])) > 1]

    def shown(found: Sequence[Sequence[int] | np.ndarray]) -> list[list[Shown]]:
        """One of each split first."""
        made = []
        for group in found:
            firsts = sorted({where[i].split: int(i) for i in reversed(group)}.values())
            made.append([where[i] for i in [*firsts, *(int(i) for i in group if i not in firsts)]])
        return made

    made = []
    if len(seen) > 1:
        leaked = sum(where[i].split == "val" for g in across for i in g)
        says = f"{_pictures(leaked)} of val also in train" if across else "no picture of val is in train"
        advice = "the accuracy would be of pictures learned by heart: remove them from one side" if across else ""
        made.append(Check("same in both splits", SPOILS if across else OK, says, advice, shown(across)))
    spare = {split: sum(len(g) - 1 for g in found) for split, found in within.items() if found}
    says = ", ".join(f"{_pictures(count)} of {split} too many, copies of others" for split, count in spare.items())
    flat = [g for found in within.values() for g in found]
    advice = "they count more than the others; remove the copies if that is not meant" if flat else ""
    made.append(Check("same within", LOOK if flat else OK, says or "no picture is there twice", advice, shown(flat)))
    if source.classes:
        says = f"{_pictures(len(torn))} with more than one class" if torn else "the same picture has the same class"
        advice = "a single-label loss is told two things: keep the right one" if torn else ""
        made.append(Check("one picture, two classes", LOOK if torn else OK, says, advice, shown(torn)))
    return made


def near_pictures(seen: dict[str, Seen], *, tell: Tell = lambda _: None) -> list[Check]:
    """Perceptual hashes that nearly agree, of pictures that are not equal and not plain."""
    where, table = _joined(seen)
    if len(table) and np.median(np.minimum(table["height"], table["width"])) < NEAR_SIDE:
        return [Check("nearly the same", OK, f"not looked for: under {NEAR_SIDE} pixels all of a kind look alike")]
    _, firsts = np.unique(table["digest"], axis=0, return_index=True)
    index = np.sort(firsts[~table["plain"][firsts]])
    in_val = np.array([where[i].split == "val" for i in index], bool)
    found = alike(table["phash"][index], table["dhash"][index], in_val, tell=tell)
    made = []
    if len(seen) > 1:
        pairs = [[where[index[a]], where[index[b]]] for a, b in found.across]
        says = (
            f"{_pictures(len(pairs))} of val like one of train"
            if pairs
            else "no picture of val looks like one of train"
        )
        advice = "copies saved anew, or a series of shots? then they belong on one side" if pairs else ""
        made.append(Check("nearly the same in both splits", LOOK if pairs else OK, says, advice, pairs))
    groups = [[where[index[i]] for i in group] for group in found.groups]
    spare = Counter(group[0].split for group in groups for _ in group)
    says = ", ".join(f"{_pictures(count)} of {split} like another" for split, count in spare.items())
    advice = "look at them; copies and series count more than other pictures" if groups else ""
    says = says or "no two look the same"
    return [*made, Check("nearly the same within", LOOK if groups else OK, says, advice, groups)]


def classes(source: Source) -> Check:
    """Classes of which a split has no picture, and pictures without a class."""
    if not source.classes:
        return Check("classes", OK, "no picture has a label: for stage=pretrain, or predict")
    said, verdict = [], OK
    for split, images in source.splits().items():
        per_class = np.bincount(images.labels + 1, minlength=len(source.classes) + 1)
        missing = [source.classes[k] for k in np.flatnonzero(per_class[1:] == 0)]
        if missing:
            said.append(f"{split} has no picture of {listed(missing)}")
            verdict = SPOILS if split == "train" else max(verdict, LOOK, key=[OK, LOOK, SPOILS].index)
        if per_class[0]:
            said.append(f"{_pictures(int(per_class[0]))} of {split} without a label")
            verdict = SPOILS
    advice = "what is not in train cannot be learned, what is not in val is not measured" if said else ""
    if len(source.classes) == 1:
        said.append(f"there is one, {listed(source.classes)}")
        verdict, advice = SPOILS, "a classifier needs two at least; a folder holds one folder a class"
    return Check("classes", verdict, "; ".join(said) or f"all {len(source.classes):,} are in every split", advice)


def imbalance(source: Source) -> Check:
    counts = np.bincount(source.train.labels[source.train.labels >= 0], minlength=len(source.classes))
    if len(counts) < 2 or not counts.any():
        return Check("balance", OK, "fewer than two classes")
    most, least = int(counts.argmax()), int(np.where(counts > 0, counts, counts.max()).argmin())
    if counts[most] == counts[least]:
        return Check("balance", OK, f"train has {counts[most]:,} of each class")
    says = (
        f"train has {counts[most]:,} of {listed([source.classes[most]])}, {counts[least]:,} of "
        f"{listed([source.classes[least]])}; always saying the first is right for {counts[most] / counts.sum():.0%}"
    )
    if counts[most] < UNEVEN * counts[least]:
        return Check("balance", OK, says)
    return Check("balance", LOOK, says, "judge by the accuracy of each class, too: evaluate prints and keeps it")


def odd_modes(seen: dict[str, Seen]) -> Check:
    found: dict[str, list[Shown]] = {}
    usual: Counter[str] = Counter()
    for split, part in seen.items():
        for code, kind in enumerate(part.kinds):
            at = np.flatnonzero((part.table["kind"] == code) & part.table["readable"]).tolist()
            mode = kind.partition(" ")[2]
            if not kind or mode in USUAL_MODES:
                usual[kind] += len(at)
            elif at:
                notes = READ_AS.get(mode.partition(",")[0], "") if not mode.endswith("animated") else "its first frame"
                found.setdefault(kind, []).extend(Shown(split, i, f"{kind}: {notes}".rstrip(": ")) for i in at)
    plain_words = ", ".join(f"{kind} {count:,}" for kind, count in usual.most_common() if kind and count)
    if not found:
        return Check("odd modes", OK, plain_words or "pictures are arrays, not files")
    says = ", ".join(f"{kind} {len(some):,}" for kind, some in found.items())
    says += f" beside {plain_words}" if plain_words else ""
    advice = "they are read as docs/data.md says: see in the report whether that is what they show"
    return Check("odd modes", LOOK, says, advice, [[one] for some in found.values() for one in some])


def tiny(seen: dict[str, Seen]) -> Check:
    sides = np.concatenate([part.short_sides[part.good] for part in seen.values()])
    median = float(np.median(sides)) if len(sides) else 0.0
    limit = max(TINY_SIDE, TINY_SHARE * median)
    found = _where(seen, lambda part: part.short_sides < limit, lambda part, i: _size(part, i))
    says = f"shorter sides from {sides.min():,} to {sides.max():,}, median {median:,.0f} pixels" if len(sides) else ""
    if not found:
        return Check("tiny", OK, says)
    return Check("tiny", LOOK, f"{len(found):,} with a side under {limit:,.0f}; {says}", "icons among pictures?", found)


def huge(source: Source, seen: dict[str, Seen]) -> Check:
    stored = {split: np.asarray(images.sizes) for split, images in source.splits().items()}

    def too_large(part: Seen, sizes: np.ndarray) -> np.ndarray:
        return (part.table["height"].astype(np.int64) * part.table["width"] > HUGE_PIXELS) | (sizes > HUGE_BYTES)

    found = []
    for split, part in seen.items():
        at = np.flatnonzero(too_large(part, stored[split]) & part.table["readable"]).tolist()
        found += [[Shown(split, i, f"{_size(part, i)}, {stored[split][i] / 2**20:.1f} MiB")] for i in at]
    limit = f"{HUGE_PIXELS / 1e6:.0f} million pixels or {HUGE_BYTES >> 20} MiB"
    if not found:
        return Check("huge", OK, f"none of more than {limit}")
    return Check("huge", LOOK, f"{len(found):,} of more than {limit}", "slow to read in every epoch: scale down", found)


def plain(seen: dict[str, Seen]) -> Check:
    found = _where(seen, lambda part: part.table["plain"], lambda part, i: _size(part, i))
    if not found:
        return Check("plain", OK, "all show something")
    says = f"{len(found):,} of one colour, or nearly"
    return Check("plain", LOOK, says, "nothing can be learned of them: a failed scan or download?", found)


def mean_std(seen: Seen) -> tuple[list[float], list[float]] | None:
    """Of each channel over all pictures, each weighing the same whatever its size; in [0, 1], 4 digits, as
    data.mean and data.std take them. None where no picture can be read."""
    table = seen.table[seen.good]
    if not len(table):
        return None
    mean = table["mean"].mean(0)[: seen.channels]
    variance = np.maximum(table["square"].mean(0)[: seen.channels] - mean**2, 0)
    return [round(float(m), 4) for m in mean], [round(math.sqrt(v), 4) for v in variance]


def suggest_size(short_sides: np.ndarray) -> tuple[int, int]:
    """(image size, patch size): the largest usual size that half of the pictures reach, and the largest patch that
    leaves 8 x 8 tokens."""
    median = float(np.median(short_sides))
    size = max([s for s in SIZES if s <= median], default=SIZES[0])
    return size, next(patch for patch in PATCHES if size % patch == 0 and size // patch >= LEAST_GRID)


def _where(
    seen: dict[str, Seen], mask: Callable[[Seen], np.ndarray], note: Callable[[Seen, int], str]
) -> list[list[Shown]]:
    found = []
    for split, part in seen.items():
        at = np.flatnonzero(mask(part) & part.table["readable"]).tolist()
        found += [[Shown(split, i, note(part, i))] for i in at]
    return found


def _size(part: Seen, i: int) -> str:
    return f"{part.table['width'][i]} x {part.table['height'][i]}"


def _pictures(count: int) -> str:
    return f"{count:,} picture" + "s" * (count != 1)


def _joined(seen: dict[str, Seen]) -> tuple[list[Shown], np.ndarray]:
    """The readable pictures of all splits, one after the other."""
    where = [Shown(split, int(i)) for split, part in seen.items() for i in part.good]
    return where, np.concatenate([part.table[part.good] for part in seen.values()])


def _good(seen: dict[str, Seen]) -> np.ndarray:
    return np.concatenate([part.table["readable"] for part in seen.values()])
