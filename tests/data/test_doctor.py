"""Every fault of a data set is found and named, and nothing else is."""

from __future__ import annotations

import io
import itertools
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance
from scipy.fft import dctn

from tests.data.pictures import CLASSES, write_folder, write_parquet
from vitexp.data import doctor
from vitexp.data.doctor import LOOK, OK, SPOILS, Check, Seen, check_all, close_pairs, look_at, mean_std, suggest_size
from vitexp.data.images import ArrayImages, Source
from vitexp.data.sources.fake import fake
from vitexp.data.sources.folder import folder
from vitexp.data.sources.parquet import parquet
from vitexp.errors import UserError


def scene(number: int, width: int = 80, height: int = 60) -> Image.Image:
    """Something with large shapes, as photographs have."""
    rough = np.random.default_rng(number).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC)


def file_of(image: Image.Image, kind: str = "PNG", **how: int) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def found_in(source: Source) -> tuple[dict[str, Check], dict[str, Seen]]:
    seen = {split: look_at(images, workers=0) for split, images in source.splits().items()}
    return {check.name: check for check in check_all(source, seen)}, seen


def names_in(source: Source, check: Check) -> list[set[str]]:
    splits = source.splits()
    return [{f"{one.split}/{splits[one.split].names[one.index]}" for one in group} for group in check.groups]


@pytest.fixture(scope="module")
def sick(tmp_path_factory) -> Source:
    """Class folders in which everything is wrong that the doctor knows."""
    train = {f"{name}/{n}.png": file_of(scene(100 * k + n)) for k, name in enumerate(CLASSES) for n in range(4)}
    val = {f"{name}/{n}.png": file_of(scene(1000 + 100 * k + n)) for k, name in enumerate(CLASSES) for n in range(2)}
    train |= {f"dog/more{n}.png": file_of(scene(500 + n)) for n in range(45)}
    train["bird/cut.jpg"] = file_of(scene(5), "JPEG")[:700]
    train["bird/empty.jpg"] = b""
    val["cat/page.jpg"] = b"<html>gone</html>"
    val["cat/leak.bmp"] = file_of(scene(100), "BMP")  # the pixels of train/cat/0.png
    train["cat/twice.png"] = train["cat/1.png"]
    train["cat/wrong.png"] = train["bird/1.png"]
    val["dog/saved_anew.jpg"] = file_of(scene(201).resize((60, 45)), "JPEG", quality=60)  # train/dog/1.png
    train["bird/brighter.jpg"] = file_of(ImageEnhance.Brightness(scene(3)).enhance(1.15), "JPEG")  # bird/3.png
    train["cat/ink.jpg"] = file_of(scene(301).convert("CMYK"), "JPEG")
    train["cat/glass.png"] = file_of(scene(302).convert("RGBA"))
    train["bird/dot.png"] = file_of(scene(303).resize((6, 5)))
    train["bird/wide.png"] = file_of(scene(304).resize((5000, 3300), Image.Resampling.NEAREST))
    train["bird/white.png"] = file_of(Image.new("RGB", (80, 60), "white"))
    root = tmp_path_factory.mktemp("sick")
    write_folder(root / "train", train)
    write_folder(root / "val", val)
    return folder(str(root))


def test_every_fault_is_found_and_nothing_else(sick: Source):
    checks, seen = found_in(sick)
    expected: dict[str, tuple[str, list[set[str]]]] = {
        "unreadable": (SPOILS, [{"train/bird/cut.jpg"}, {"train/bird/empty.jpg"}, {"val/cat/page.jpg"}]),
        "same in both splits": (SPOILS, [{"train/cat/0.png", "val/cat/leak.bmp"}]),
        "same within": (
            LOOK,
            [{"train/bird/1.png", "train/cat/wrong.png"}, {"train/cat/1.png", "train/cat/twice.png"}],
        ),
        "one picture, two classes": (LOOK, [{"train/bird/1.png", "train/cat/wrong.png"}]),
        "nearly the same in both splits": (LOOK, [{"train/dog/1.png", "val/dog/saved_anew.jpg"}]),
        "nearly the same within": (LOOK, [{"train/bird/3.png", "train/bird/brighter.jpg"}]),
        "odd modes": (LOOK, [{"train/cat/ink.jpg"}, {"train/cat/glass.png"}]),
        "tiny": (LOOK, [{"train/bird/dot.png"}]),
        "huge": (LOOK, [{"train/bird/wide.png"}]),
        "plain": (LOOK, [{"train/bird/white.png"}]),
        "classes": (OK, []),
        "balance": (OK, []),
    }
    for name, (verdict, groups) in expected.items():
        assert (checks[name].verdict, sorted(map(sorted, names_in(sick, checks[name])))) == (
            verdict,
            sorted(map(sorted, groups)),
        ), name
    assert checks.keys() == expected.keys()
    assert "empty" in checks["unreadable"].groups[1][0].note
    assert seen["train"].reasons.keys() == {sick.train.names.index(f"bird/{n}.jpg") for n in ("cut", "empty")}


def test_a_class_missing_in_a_split_and_uneven_classes_are_named(tmp_path: Path):
    def table(name: str, labels: list[int], first: int) -> str:
        files = {f"{n}.png": file_of(scene(first + n, 20, 20)) for n in range(len(labels))}
        return str(write_parquet(tmp_path / name, files, labels=labels))

    checks, _ = found_in(parquet(table("a.parquet", [0] * 20 + [1] * 2, 0), table("b.parquet", [0, 1, 2], 50)))
    assert (checks["classes"].verdict, checks["balance"].verdict) == (SPOILS, LOOK)
    assert "train has no picture of dog" in checks["classes"].says
    assert all(word in checks["balance"].says for word in ("20 of bird", "2 of cat", "91%"))
    checks, _ = found_in(parquet(table("c.parquet", [0, 1, 2], 0), table("d.parquet", [0, 2], 50)))
    assert (checks["classes"].verdict, checks["classes"].says) == (LOOK, "val has no picture of cat")
    checks, _ = found_in(parquet(table("e.parquet", [0, 1, -1], 0), table("f.parquet", [0, 1, 2], 50)))
    assert "1 picture of train without a label" in checks["classes"].says


def test_one_class_is_none_to_learn(tmp_path: Path):
    files = {f"train/cat/{n}.png": file_of(scene(n, 20, 20)) for n in range(20)}
    checks, _ = found_in(folder(str(write_folder(tmp_path / "one", files))))
    assert checks["classes"].verdict == SPOILS
    assert "there is one, cat" in checks["classes"].says


def test_parquet_is_looked_at_as_its_files_are(sick: Source, tmp_path: Path):
    files = {name: (Path(sick.location) / "train" / name).read_bytes() for name in sick.train.names}
    table = parquet(str(write_parquet(tmp_path / "t.parquet", files)), val_fraction=0)
    ours, theirs = look_at(table.train, workers=0), look_at(sick.train, workers=0)
    for key in theirs.table.dtype.names or ():
        if key != "kind":
            assert np.array_equal(ours.table[key], theirs.table[key]), key
    kinds = [[part.kinds[k] for k in part.table["kind"]] for part in (ours, theirs)]
    assert kinds[0] == kinds[1]
    assert ours.reasons == theirs.reasons


def test_mean_and_std_are_those_of_all_pixels():
    source = fake(num_train=30, num_val=2, num_classes=3, image_size=12)
    pixels = np.stack([source.train.read(i) for i in range(30)]) / 255
    mean, std = mean_std(look_at(source.train, workers=0)) or ([], [])
    assert mean == pytest.approx(pixels.mean((0, 1, 2)), abs=6e-5)
    assert std == pytest.approx(pixels.std((0, 1, 2)), abs=6e-5)


@pytest.mark.parametrize("radius", [0, 3, 6])
def test_all_close_pairs_are_found_once(radius: int, monkeypatch):
    monkeypatch.setattr(doctor, "BLOCK", 50)
    rng = np.random.default_rng(radius)
    start = rng.integers(0, 2**63, 40, np.uint64)
    hashes = np.concatenate([start, start[:5]])
    for _ in range(4):  # further and further away, by up to two bits each time
        flips = (np.uint64(1) << rng.integers(0, 64, (2, 45), np.uint64)).astype(np.uint64)
        hashes = np.concatenate([hashes, hashes[-45:] ^ flips[0] ^ flips[1]])
    apart = {
        (i, j): (int(hashes[i]) ^ int(hashes[j])).bit_count() for i, j in itertools.combinations(range(len(hashes)), 2)
    }
    expected = sorted(pair for pair, bits in apart.items() if bits <= radius)
    found = sorted(
        tuple(sorted(pair)) for a, b in close_pairs(hashes, radius) for pair in zip(a.tolist(), b.tolist(), strict=True)
    )
    assert found == expected
    assert len(expected) > 4


def test_hashes_are_the_published_ones():
    for number in range(5):
        image = scene(number)
        phash, dhash, _ = doctor.perceptual_hashes(image)
        gray = image.convert("L")
        waves = dctn(np.asarray(gray.resize((32, 32), Image.Resampling.LANCZOS), float))[:8, :8]
        small = np.asarray(gray.resize((9, 8), Image.Resampling.LANCZOS), int)
        bits = "".join(str(int(wave > np.median(waves))) for wave in waves.ravel())
        assert f"{phash:064b}" == bits
        assert f"{dhash:064b}" == "".join(str(int(row[x + 1] > row[x])) for row in small for x in range(8))


def test_processes_see_what_one_sees(monkeypatch):
    images = fake(num_train=300, num_val=2, num_classes=3, image_size=8).train
    told: list[int] = []
    many = look_at(images, workers=2, tell=told.append)
    assert np.array_equal(many.table, look_at(images, workers=0).table)
    assert sum(told) == 300


def test_a_process_that_dies_is_one_sentence():
    class Deadly(ArrayImages):
        def read(self, i: int) -> np.ndarray:
            if i == 290:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().read(i)

    pixels = np.zeros((300, 8, 8, 3), np.uint8)
    images = Deadly(pixels, np.zeros(300, np.int64), [str(i) for i in range(300)])
    with pytest.raises(UserError, match="a process that reads pictures died"):
        look_at(images, workers=2)


@pytest.mark.parametrize(
    ("side", "expected"), [(8, (8, 1)), (28, (24, 2)), (32, (32, 4)), (64, (64, 8)), (375, (224, 16)), (3, (8, 1))]
)
def test_sizes_leave_a_vit_eight_by_eight_tokens(side: int, expected: tuple[int, int]):
    assert suggest_size(np.array([side, side, 2 * side])) == expected
