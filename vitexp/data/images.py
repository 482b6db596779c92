"""Pictures of a data set before decoding, and the one function that decodes them.

Every source, cached or streamed, goes through `decode`, so that a picture has the same pixels on every path.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from vitexp.errors import BadImage, UserError, nearest

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # deprecated since torchvision 0.29: without it Pillow gives the same pixels, more slowly
    decode_jpeg = None

PIXEL_LIMIT = 89_478_485  # Pillow's own warning line: 256 MiB as RGB. A 21 kB PNG can claim twice as many
FILE_LIMIT = 1 << 29  # bytes of one encoded picture
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")  # not EPS: Pillow runs Ghostscript
BACKGROUND = (255, 255, 255)  # under transparent pixels: the paper of a document, where most such pictures come from
_ORIENTATION = 0x0112  # EXIF tag
_log = logging.getLogger(__name__)
_animation_said = False

# Pillow only warns up to twice the limit; here the picture is refused instead, by name.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class Images(Protocol):
    """The pictures of one split, undecoded and in a fixed order."""

    @property
    def labels(self) -> np.ndarray:
        """(n,) int64 class numbers, -1 = no label."""
        ...

    @property
    def names(self) -> Sequence[str]:
        """Relative, printable, the same on every machine."""
        ...

    @property
    def sizes(self) -> np.ndarray:
        """(n,) int64 bytes as stored: tells a changed file from an unchanged one."""
        ...

    def __len__(self) -> int: ...

    def read(self, i: int) -> np.ndarray:
        """uint8 (h, w, c). Raises BadImage naming the file."""
        ...

    def stored(self, i: int) -> bytes | str | None:
        """The encoded picture, or the path of its file; None where there is none, as of arrays."""
        ...


@dataclass(frozen=True, eq=False)
class ArrayImages:
    """Pictures that are an array already: uint8 (n, h, w, c)."""

    pixels: np.ndarray
    labels: np.ndarray
    names: Sequence[str]

    @property
    def sizes(self) -> np.ndarray:
        return np.full(len(self.pixels), self.pixels[0].nbytes, np.int64)

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, i: int) -> np.ndarray:
        return self.pixels[i].copy()

    def stored(self, i: int) -> None:
        return None


class Subset:
    """Some pictures of another split, in the order given."""

    def __init__(self, images: Images, index: np.ndarray) -> None:
        self.images, self.index = images, index
        self.labels, self.sizes = images.labels[index], images.sizes[index]

    @property
    def names(self) -> Sequence[str]:
        names = self.images.names
        return [names[i] for i in self.index]

    def __len__(self) -> int:
        return len(self.index)

    def read(self, i: int) -> np.ndarray:
        return self.images.read(int(self.index[i]))

    def stored(self, i: int) -> bytes | str | None:
        return self.images.stored(int(self.index[i]))


@dataclass(frozen=True, eq=False)
class Source:
    """A data set: two splits and the names of its classes, which are those of the training split."""

    name: str
    train: Images
    val: Images | None
    classes: list[str]  # empty where nothing has a label
    location: str = ""  # where it was read: a folder, a file, or the package that makes it
    notices: tuple[str, ...] = ()  # sentences for the person who runs: files left out, splits not used

    def __post_init__(self) -> None:
        for split in self.splits().values():
            assert len(split) == len(split.labels) == len(split.sizes), self.name
            assert split.labels.min() >= -1, self.name
            assert split.labels.max() < max(len(self.classes), 1), self.name

    def splits(self) -> dict[str, Images]:
        return {"train": self.train} | ({"val": self.val} if self.val is not None else {})

    def profile(self) -> dict[str, dict[str, int]]:
        """Pictures per class of each split, with `(no label)` where there are such."""
        table = {}
        for key, split in self.splits().items():
            per_class = np.bincount(split.labels + 1, minlength=len(self.classes) + 1).tolist()
            named = dict(zip(self.classes, per_class[1:], strict=True))
            table[key] = ({"(no label)": per_class[0]} if per_class[0] else {}) | named
        return table

    def fingerprint(self) -> str:
        """12 hex digits of the classes and every picture's name, label and stored size.

        Cheap (nothing is read), so a file changed within its size goes unseen."""
        digest = hashlib.sha256("\0".join(self.classes).encode())
        for key, split in self.splits().items():
            digest.update(f"\0\0{key}\0".encode())
            digest.update("\0".join(split.names).encode())
            digest.update(split.labels.astype("<i8").tobytes() + split.sizes.astype("<i8").tobytes())
        return digest.hexdigest()[:12]

    def digests(self) -> dict[str, np.ndarray]:
        """Of each split a sorted int64 number for every picture, of its name, class and stored size.

        `changes` says what came and went between two of these."""
        found = {}
        for key, split in self.splits().items():
            rows = zip(split.names, split.labels.tolist(), split.sizes.tolist(), strict=True)
            said = (f"{name}\0{self.classes[k] if k >= 0 else ''}\0{size}".encode() for name, k, size in rows)
            whole = b"".join(hashlib.blake2b(one, digest_size=8).digest() for one in said)
            found[key] = np.sort(np.frombuffer(whole, "<i8"))
        return found

    def require_labels(self) -> None:
        """Raises UserError where a picture has no label: what training with classes needs checked once."""
        for key, split in self.splits().items():
            if (missing := np.flatnonzero(split.labels < 0)).size:
                raise UserError(
                    f"data={self.name}: {missing.size:,} of {len(split):,} pictures of {key} have no label "
                    f"(first: {split.names[missing[0]]}); this stage needs class folders or a label column"
                )


def changes(before: Mapping[str, np.ndarray], now: Mapping[str, np.ndarray]) -> str:
    """`train: 3 added, 1 gone` of two Source.digests(); empty where they are the same. A changed picture is both."""
    none, said = np.empty(0, np.int64), []
    for key in dict.fromkeys([*before, *now]):
        old, new = before.get(key, none), now.get(key, none)
        if not np.array_equal(old, new):
            added, gone = np.setdiff1d(new, old).size, np.setdiff1d(old, new).size
            said.append(f"{key}: {added:,} added, {gone:,} gone")
    return "; ".join(said)


def stratified_split(images: Images, *, val_fraction: float, split_seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of (train, val): of each class the pictures with the lowest hash of (split_seed, name) are val.

    By name and not by number, so a picture keeps its side when others are added. A class keeps at least one picture
    on each side where it has two or more."""
    if not 0 <= val_fraction < 1:
        raise UserError(f"data.val_fraction={val_fraction} is not at least 0 and below 1")
    rank = np.array(
        [int.from_bytes(hashlib.blake2b(f"{split_seed}/{n}".encode(), digest_size=8).digest()) for n in images.names],
        np.uint64,
    )
    in_val = np.zeros(len(images), bool)
    for label in np.unique(images.labels) if val_fraction else ():
        members = np.flatnonzero(images.labels == label)
        count = min(max(round(val_fraction * len(members)), 1), len(members) - 1)
        in_val[members[np.argsort(rank[members], kind="stable")[:count]]] = True
    return np.flatnonzero(~in_val), np.flatnonzero(in_val)


def split_source(source: Source, *, val_fraction: float, split_seed: int) -> Source:
    """The source with its val split taken out of train; none for val_fraction=0."""
    train, val = stratified_split(source.train, val_fraction=val_fraction, split_seed=split_seed)
    return replace(source, train=Subset(source.train, train), val=Subset(source.train, val) if val.size else None)


def keep_share(source: Source, fraction: float, *, split_seed: int = 0) -> Source:
    """The source with this share of every class's training pictures, at least one; the validation split stays whole.

    Chosen by name as in stratified_split, so a smaller share is part of a larger one."""
    if not 0 < fraction <= 1:
        raise UserError(f"train.fraction={fraction} is not above 0 and at most 1")
    if fraction == 1:
        return source
    _, kept = stratified_split(source.train, val_fraction=fraction, split_seed=split_seed)
    note = f"train.fraction={fraction:g}: {len(kept):,} of {len(source.train):,} training pictures"
    return replace(source, train=Subset(source.train, kept), notices=(*source.notices, note))


def keep_few(source: Source, count: int) -> Source:
    """The source with so many training pictures, or all there are: the first ones of all classes in turn.

    The validation split stays whole."""
    labels = np.asarray(source.train.labels)
    turn = np.zeros(len(labels), np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        turn[members] = np.arange(len(members))
    kept = np.sort(np.lexsort((labels, turn))[:count])
    note = f"train.overfit={count}: {len(kept):,} of {len(labels):,} training pictures"
    return replace(source, train=Subset(source.train, kept), notices=(*source.notices, note))


def keep_classes(source: Source, classes: Sequence[str | int]) -> Source:
    """The source with the pictures of these classes alone, in both splits, numbered in the order given.

    A class whose name is a number, as a digit's, may be given as one."""
    names = [str(name) for name in classes]
    for name in names:
        if name not in source.classes:
            raise UserError(
                f"train.classes: data={source.name} has no class {name!r}.{nearest(name, source.classes)}\n"
                f"classes: {listed(source.classes, limit=20)}"
            )
    if len(set(names)) < max(len(names), 2):
        raise UserError(f"train.classes={names}: needs two classes or more, each once")
    number = np.full(len(source.classes), -1, np.int64)
    number[[source.classes.index(name) for name in names]] = np.arange(len(names))

    def of_these(images: Images) -> Subset:
        kept = Subset(images, np.flatnonzero((images.labels >= 0) & (number[images.labels] >= 0)))
        kept.labels = number[kept.labels]
        return kept

    val = None if source.val is None else of_these(source.val)
    return replace(source, train=of_these(source.train), val=val, classes=names)


def check_channels(channels: int) -> None:
    if channels not in (1, 3):
        raise UserError(f"data.channels={channels}: pictures are read with 1 (gray) or 3 (RGB) channels")


def printable(name: str) -> str:
    """The name on one line that any terminal can show: control characters and undecodable bytes escaped."""
    shown = name.encode("utf-8", "backslashreplace").decode()
    return shown if shown.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in shown)


def listed(words: Iterable[str], *, limit: int = 5) -> str:
    """`a, b, c and 4 more`"""
    words = [printable(word) for word in words]
    return ", ".join(words[:limit]) + (f" and {len(words) - limit:,} more" if len(words) > limit else "")


def decode(data: bytes | str | os.PathLike[str], name: str, channels: int = 3) -> np.ndarray:
    """uint8 (h, w, channels) of an encoded picture, given as bytes or as the path of its file.

    Turned as EXIF says; transparency laid over white; 16-bit gray scaled by its full range and float from [0, 1];
    the first frame of an animation. Raises BadImage with `name` for everything that cannot be shown rightly."""
    if isinstance(data, str | os.PathLike):
        try:
            if (size := os.stat(data).st_size) > FILE_LIMIT:
                raise BadImage(name, f"{size:,} bytes, more than the {FILE_LIMIT:,} that one picture may have")
            data = Path(data).read_bytes()
        except OSError as error:
            raise BadImage(name, f"cannot be opened: {error.strerror}") from error
    try:
        pixels = _decode(data, name, channels)
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # on damaged files Pillow raises OSError, SyntaxError, ValueError, struct.error, ...
        raise BadImage(name, _reason(data, error)) from error
    if 0 in pixels.shape:
        raise BadImage(name, "has no pixels")
    return pixels


def _decode(data: bytes, name: str, channels: int) -> np.ndarray:
    with Image.open(io.BytesIO(data), formats=_known_formats()) as image:
        width, height = image.size
        if width * height > PIXEL_LIMIT:
            raise BadImage(name, f"{width} x {height} pixels, more than the {PIXEL_LIMIT:,} allowed; make it smaller")
        kind = image.format
        plain = kind in ("JPEG", "MPO") and image.mode in ("RGB", "L") and _orientation(image) == 1
        if plain and decode_jpeg is not None:
            try:
                return _decode_jpeg(data, image.mode, channels)
            except RuntimeError:
                pass  # what torchvision refuses (damage, rare codings), Pillow judges
        if kind != "MPO" and getattr(image, "is_animated", False):  # MPO: a phone's photograph with a preview
            _say_animated(name)
        image.load()
        if _orientation(image) != 1:
            image = ImageOps.exif_transpose(image)
        return _eight_bit(image, name, kind=kind, channels=channels)


def _known_formats() -> list[str]:
    Image.preinit()
    if not set(FORMATS) <= Image.OPEN.keys():
        Image.init()
    return [name for name in FORMATS if name in Image.OPEN]  # AVIF, JPEG2000 are missing from some builds of Pillow


def _orientation(image: Image.Image) -> int:
    if image.format == "JPEG" and not image.info.keys() & {"exif", "xmp"}:
        return 1  # saves 20 us a picture
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # unreadable EXIF in a good picture: viewers show it unturned too
        return 1


def _decode_jpeg(data: bytes, mode: str, channels: int) -> np.ndarray:
    """By torchvision: bit-equal to Pillow where both use libjpeg-turbo, 1.8x its speed, and threads run beside it."""
    assert decode_jpeg is not None
    kind = ImageReadMode.RGB if mode == "RGB" else ImageReadMode.GRAY
    decoded = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=kind)
    assert isinstance(decoded, torch.Tensor)  # a list only for a list of pictures
    pixels = decoded.permute(1, 2, 0)
    if mode == "L":
        return pixels.expand(-1, -1, channels).contiguous().numpy()
    return pixels.numpy() if channels == 3 else np.array(Image.fromarray(pixels.numpy()).convert("L"))[..., None]


def _eight_bit(image: Image.Image, name: str, *, kind: str | None, channels: int) -> np.ndarray:
    """Pillow's own convert() clips what has more than 8 bits: a 16-bit picture comes out white."""
    # PNG and PPM put 16-bit gray into Pillow's 32-bit mode as well, scaled to 0..65535.
    if image.mode.startswith("I;16") or (image.mode == "I" and kind in ("PNG", "PPM")):
        if image.has_transparency_data:
            raise BadImage(name, "16-bit gray with a transparent value; save it with 8 bits or without transparency")
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise BadImage(name, f"integers from {values.min()} to {values.max()} do not fit 16 bits")
        gray = ((values * 255 + 32767) // 65535).astype(np.uint8)
        return np.repeat(gray[..., None], channels, axis=-1)
    if image.mode == "I":
        raise BadImage(name, "32-bit integers have no agreed white; save it with 8 or 16 bits")
    if image.mode == "F":
        values = np.asarray(image)
        if not np.isfinite(values).all():
            raise BadImage(name, "holds NaN or Inf")
        if values.min() < 0 or values.max() > 1:
            raise BadImage(name, f"float pixels from {values.min():g} to {values.max():g}; only 0 to 1 is understood")
        return np.repeat(np.rint(values * 255).astype(np.uint8)[..., None], channels, axis=-1)
    if image.has_transparency_data:
        paper = Image.new("RGBA", image.size, (*BACKGROUND, 255))
        image = Image.alpha_composite(paper, image.convert("RGBA")).convert("RGB")
    if channels == 1:
        return np.array(image if image.mode == "L" else image.convert("RGB").convert("L"))[..., None]
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _say_animated(name: str) -> None:
    global _animation_said
    if not _animation_said:
        _animation_said = True
        _log.warning("%s is animated or has several pages: the first frame is taken, here and in all others", name)


def _reason(data: bytes, error: Exception) -> str:
    if len(data) == 0:
        return "the file is empty (0 bytes)"
    if isinstance(error, Image.DecompressionBombError):  # raised on opening, above twice the limit
        return f"claims more than the {PIXEL_LIMIT:,} pixels allowed; make it smaller"
    if isinstance(error, UnidentifiedImageError):
        head = bytes(data[:512]).lstrip()
        if head.startswith(b"version https://git-lfs"):
            return "a Git LFS pointer, not the picture itself; run `git lfs pull`"
        if head.startswith(b"<"):
            return "holds HTML or XML, not a picture (a failed download?)"
        if head.isascii() and head.decode().replace("\n", " ").replace("\r", " ").replace("\t", " ").isprintable():
            return "holds text, not a picture"
        return f"damaged, or not in a format that is read ({', '.join(_known_formats())})"
    said = " ".join(str(error).split()) or type(error).__name__
    return f"cut short or damaged ({printable(said)[:200]})"
