"""Public data sets by name, where torchvision's dataset classes say: CIFAR, Imagenette, Flowers-102, Oxford-IIIT Pet.

Addresses, checksums, file names and class names are those classes'. Their own download and pickle.load are not used:
an archive is unpacked by vitexp.data.download, a pickle read without running anything of it, a picture decoded like
any other. The folders are laid out as torchvision lays them out, so one that is there already is used.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torchvision import datasets

from vitexp.data.checks import existing_folder
from vitexp.data.download import Remote, ensure, md5_of
from vitexp.data.images import ArrayImages, Source, check_channels, printable
from vitexp.data.sources.folder import FileImages, folder
from vitexp.errors import UserError, nearest

CACHE = "~/.cache/vitexp"
IMAGENETTE_COUNTS = {"train": 9469, "val": 3925}


def _place(name: str, root: str | None) -> Path:
    """data.root, which must exist as a mistyped one would be filled with a download; without it one of our own."""
    if root is not None:
        return existing_folder(root, key="data.root")
    try:
        return Path(CACHE).expanduser() / name
    except RuntimeError as error:
        raise UserError(f"data={name}: there is no home folder to keep the data in; data.root names another") from error


# ---- CIFAR -----------------------------------------------------------------------------------------------------------


def cifar10(root: str | None = None, *, download: bool = True, channels: int = 3) -> Source:
    """50,000 pictures of 32x32 to train and 10,000 to test, 10 classes; in memory (Krizhevsky 2009)."""
    return _cifar("cifar10", datasets.CIFAR10, "labels", root=root, download=download, channels=channels)


def cifar100(root: str | None = None, *, download: bool = True, channels: int = 3) -> Source:
    """50,000 pictures of 32x32 to train and 10,000 to test, the 100 fine classes; in memory (Krizhevsky 2009)."""
    return _cifar("cifar100", datasets.CIFAR100, "fine_labels", root=root, download=download, channels=channels)


def _cifar(
    name: str, official: type[datasets.CIFAR10], label_key: str, *, root: str | None, download: bool, channels: int
) -> Source:
    if channels != 3:
        raise UserError(f"data.channels={channels}: {name} is read with 3 channels")
    place = _place(name, root)
    ensure(name, place, (Remote(official.url, official.tgz_md5, (official.base_folder,)),), download=download)
    base = place / official.base_folder
    meta = _read_pickle(name, base / official.meta["filename"], official.meta["md5"])
    classes = meta.get(official.meta["key"])
    if not (isinstance(classes, list) and classes and all(isinstance(word, str) for word in classes)):
        raise UserError(f"{base / official.meta['filename']}: not CIFAR's list of classes")
    train = _cifar_split(name, base, official.train_list, label_key, len(classes))
    val = _cifar_split(name, base, official.test_list, label_key, len(classes))
    return Source(name, train, val, classes, str(base))


def _cifar_split(
    name: str, base: Path, files: Sequence[Sequence[str]], label_key: str, num_classes: int
) -> ArrayImages:
    pixels, labels, names = [], [], []
    for filename, md5 in files:
        entry = _read_pickle(name, base / filename, md5)
        data, numbers = entry.get("data"), entry.get(label_key)
        rows = data.to_array() if isinstance(data, _PickledArray) else None
        if rows is None or rows.ndim != 2 or rows.shape[1] != 3 * 32 * 32 or not isinstance(numbers, list):
            raise UserError(f"{printable(str(base / filename))}: not a batch of CIFAR")
        if len(numbers) != len(rows) or not all(type(k) is int and 0 <= k < num_classes for k in numbers):
            raise UserError(f"{printable(str(base / filename))}: its labels are not {len(rows)} classes of CIFAR")
        pixels.append(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        labels += numbers
        names += [f"{filename}/{row:05d}" for row in range(len(rows))]
    return ArrayImages(np.ascontiguousarray(np.concatenate(pixels)), np.array(labels, np.int64), names)


def _read_pickle(name: str, file: Path, md5: str) -> dict[str, Any]:
    """The dictionary in one of CIFAR's files. Raises UserError where it is not that file; nothing of it is run."""
    shown = printable(str(file))
    try:
        found = md5_of(file)
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"data={name}: {shown}: {error.strerror}; delete {file.parent.name}/ and run again") from error
    if found != md5:
        raise UserError(
            f"data={name}: {shown} is damaged or changed (md5 {found}, not {md5})\n"
            f"delete the folder {printable(str(file.parent))} and run again"
        )
    try:
        entry = _NoCode(io.BytesIO(data), encoding="latin1").load()
    except Exception as error:  # a damaged pickle raises nearly anything
        raise UserError(
            f"data={name}: {shown}: refused, nothing of it was run ({printable(str(error))[:150]})"
        ) from error
    if not isinstance(entry, dict):
        raise UserError(f"data={name}: {shown} holds no dictionary")
    return entry


class _PickledArray:
    """Stands in for a numpy array while unpickling, so that not even numpy's own code is called by a file."""

    def __init__(self, *_: object) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def to_array(self) -> np.ndarray | None:
        """None where it is no plain array of bytes."""
        match self.state:
            case (_, tuple(shape), _PickledDtype(code="u1"), bool(by_column), bytes() | str() as raw):
                raw = raw.encode("latin1") if isinstance(raw, str) else raw
                if all(type(n) is int and n >= 0 for n in shape) and int(np.prod(shape, dtype=object)) == len(raw):
                    return np.frombuffer(raw, np.uint8).reshape(shape, order="F" if by_column else "C")
        return None


class _PickledDtype:
    def __init__(self, code: object = None, *_: object) -> None:
        self.code = code

    def __setstate__(self, state: object) -> None:
        pass  # byte order and fields: nothing that single bytes have


def _to_bytes(text: str, encoding: str = "latin1") -> bytes:
    """What Python 3 writes into old pickles for bytes."""
    return text.encode("latin1")


def _array(*_: object) -> _PickledArray:
    return _PickledArray()


class _NoCode(pickle.Unpickler):
    """Reads lists, dictionaries, numbers, strings and arrays of bytes; refuses every other name a pickle calls for."""

    KNOWN = {  # noqa: RUF012
        ("numpy.core.multiarray", "_reconstruct"): _array,
        ("numpy._core.multiarray", "_reconstruct"): _array,
        ("numpy", "ndarray"): _PickledArray,
        ("numpy", "dtype"): _PickledDtype,
        ("_codecs", "encode"): _to_bytes,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.KNOWN:
            raise pickle.UnpicklingError(f"it calls for {module}.{name}")
        return self.KNOWN[module, name]

    def persistent_load(self, pid: object) -> Any:
        raise pickle.UnpicklingError("it calls for an object outside of it")


# ---- Imagenette ------------------------------------------------------------------------------------------------------


def imagenette(root: str | None = None, *, size: str = "320px", download: bool = True, channels: int = 3) -> Source:
    """9,469 pictures to train and 3,925 to validate of ten easy ImageNet classes (fastai, second version).

    size: 160px, 320px (the shorter side) or full."""
    check_channels(channels)
    known = datasets.Imagenette._ARCHIVES
    if size not in known:
        raise UserError(f"data.size={size}: expected one of {', '.join(sorted(known))}.{nearest(size, known)}")
    place = _place("imagenette", root)
    url, md5 = known[size]
    base = place / url.rsplit("/", 1)[-1].removesuffix(".tgz")
    ensure("imagenette", place, (Remote(url, md5, (base.name,)),), download=download)
    source = folder(str(base), val_fraction=0.0, channels=channels)
    names = datasets.Imagenette._WNID_TO_CLASS
    counts = {key: len(split) for key, split in source.splits().items()}
    if counts != IMAGENETTE_COUNTS or source.classes != sorted(names):
        raise UserError(
            f"data=imagenette: {printable(str(base))} holds {_counted(counts)} in {len(source.classes)} classes, "
            f"not {_counted(IMAGENETTE_COUNTS)} in {len(names)}\ndelete that folder and run again"
        )
    # No notices: what the archive holds besides pictures is nothing a person can mend.
    return replace(source, name="imagenette", classes=[names[key][0] for key in source.classes], notices=())


def _counted(counts: dict[str, int]) -> str:
    return " + ".join(f"{count:,} {key}" for key, count in counts.items())


# ---- Flowers and pets ------------------------------------------------------------------------------------------------


def flowers102(root: str | None = None, *, val_split: str = "test", download: bool = True, channels: int = 3) -> Source:
    """8,189 pictures of 102 kinds of flowers in three official splits (Nilsback and Zisserman 2008).

    val_split=test trains on train + val (2,040) and measures on test (6,149), as papers report; val_split=val trains on
    train (1,020) and measures on val (1,020), for choosing settings."""
    from scipy.io import loadmat

    check_channels(channels)
    if val_split not in ("test", "val"):
        raise UserError(f"data.val_split={val_split}: expected test or val")
    official = datasets.Flowers102
    place = _place("flowers102", root)
    base = place / "flowers-102"
    prefix, files = official._download_url_prefix, official._file_dict
    ensure(
        "flowers102",
        base,
        tuple(Remote(prefix + file, md5, ("jpg",) if key == "image" else ()) for key, (file, md5) in files.items()),
        download=download,
    )
    tables: dict[str, dict[str, Any]] = {}
    for key in ("label", "setid"):
        table = base / files[key][0]
        if md5_of(table) != files[key][1]:
            raise UserError(f"data=flowers102: {printable(str(table))} is damaged or changed; delete it and run again")
        tables[key] = loadmat(table, squeeze_me=True)
    labels = tables["label"]["labels"].astype(np.int64) - 1
    numbers = {key: tables["setid"][field].astype(np.int64) for key, field in official._splits_map.items()}
    train = numbers["train"] if val_split == "val" else np.concatenate([numbers["train"], numbers["val"]])

    def pictures(chosen: np.ndarray) -> FileImages:
        paths = [f"jpg/image_{n:05d}.jpg" for n in chosen]
        return _listed_files("flowers102", base, paths, labels[chosen - 1], channels=channels)

    return Source(
        "flowers102", pictures(np.sort(train)), pictures(np.sort(numbers[val_split])), list(official.classes), str(base)
    )


def pets(root: str | None = None, *, download: bool = True, channels: int = 3) -> Source:
    """3,680 pictures to train and 3,669 to test of 37 breeds of cats and dogs (Parkhi et al. 2012)."""
    check_channels(channels)
    place = _place("pets", root)
    base = place / "oxford-iiit-pet"
    remotes = tuple(
        Remote(url, md5, (url.rsplit("/", 1)[-1].removesuffix(".tar.gz"),))
        for url, md5 in datasets.OxfordIIITPet._RESOURCES
    )
    ensure("pets", base, remotes, download=download)
    train, train_labels = _pet_list(base / "annotations" / "trainval.txt")
    val, val_labels = _pet_list(base / "annotations" / "test.txt")
    breeds = {int(k): path for path, k in zip(train, train_labels, strict=True)}
    if sorted(breeds) != list(range(len(breeds))) or not set(val_labels.tolist()) <= breeds.keys():
        raise UserError(
            f"data=pets: the lists in {printable(str(base / 'annotations'))} do not number the breeds alike"
        )
    classes = [
        " ".join(part.title() for part in Path(breeds[k]).stem.rsplit("_", 1)[0].split("_")) for k in range(len(breeds))
    ]
    return Source(
        "pets",
        _listed_files("pets", base, train, train_labels, channels=channels),
        _listed_files("pets", base, val, val_labels, channels=channels),
        classes,
        str(base),
    )


def _pet_list(file: Path) -> tuple[list[str], np.ndarray]:
    """(paths, class numbers) of lines `Abyssinian_100 1 1 1`: picture, breed from 1, species, breed of its species."""
    try:
        lines = [line.split() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        rows = sorted((f"images/{stem}.jpg", int(breed) - 1) for stem, breed, _, _ in lines)
        paths, labels = zip(*rows, strict=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"data=pets: {printable(str(file))} cannot be read; delete the folder {file.parent.name}/ and run again"
        ) from error
    return list(paths), np.array(labels, np.int64)


def _listed_files(name: str, base: Path, paths: list[str], labels: np.ndarray, *, channels: int) -> FileImages:
    sizes = []
    for path in paths:
        try:
            sizes.append((base / path).stat().st_size)
        except OSError as error:
            top = base / path.split("/")[0]
            raise UserError(
                f"data={name}: {printable(str(base / path))}: {error.strerror}; delete the folder "
                f"{printable(str(top))} and run again"
            ) from error
    return FileImages(str(base), paths, labels=labels, sizes=np.array(sizes, np.int64), channels=channels)
