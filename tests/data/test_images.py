"""Pictures in every state: decoded right, or refused in one line that names the file."""

from __future__ import annotations

import io
import logging
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitexp.data import images as images_module
from vitexp.data.images import PIXEL_LIMIT, decode, printable
from vitexp.errors import BadImage

RED, GREEN, BLUE = (200, 30, 30), (20, 180, 40), (10, 60, 220)


def scene(height: int = 24, width: int = 32) -> np.ndarray:
    """Four flat quarters: what JPEG leaves nearly as it is, and what shows a turn."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = RED
    pixels[: height // 2, width // 2 :] = GREEN
    pixels[height // 2 :, : width // 2] = BLUE
    pixels[height // 2 :, width // 2 :] = (240, 240, 240)
    return pixels


def encoded(image: Image.Image | np.ndarray, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def with_orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


# How a viewer turns the stored pixels for EXIF orientations 1 to 8.
TURNED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_the_turn_that_exif_asks_for_is_made(kind: str, orientation: int) -> None:
    lossless = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    decoded = decode(encoded(scene(), kind, exif=with_orientation(orientation), **lossless), "a")
    expected = TURNED[orientation](scene())
    assert decoded.shape == expected.shape
    assert np.abs(decoded.astype(int) - expected).max() <= 3  # JPEG at its best is off by that


def palette_with_hidden_colour() -> Image.Image:
    image = Image.new("P", (32, 24), 1)
    image.putpalette([*RED, *GREEN, *BLUE])
    image.paste(0, (0, 0, 16, 24))
    image.info["transparency"] = 0
    return image


def half(left: object, right: object, mode: str) -> Image.Image:
    image = Image.new(mode, (32, 24), right)
    image.paste(left, (0, 0, 16, 24))
    return image


WHITE = (255, 255, 255)
# name: (bytes, colour of the left half, colour of the right half)
TWO_HALVES: dict[str, Callable[[], tuple[bytes, tuple[int, int, int], tuple[int, int, int]]]] = {
    "RGB PNG": lambda: (encoded(half(RED, GREEN, "RGB"), "PNG"), RED, GREEN),
    "RGB BMP": lambda: (encoded(half(RED, GREEN, "RGB"), "BMP"), RED, GREEN),
    "RGB PPM": lambda: (encoded(half(RED, GREEN, "RGB"), "PPM"), RED, GREEN),
    "RGB TIFF LZW": lambda: (encoded(half(RED, GREEN, "RGB"), "TIFF", compression="tiff_lzw"), RED, GREEN),
    "gray PNG": lambda: (encoded(half(10, 200, "L"), "PNG"), (10,) * 3, (200,) * 3),
    "gray JPEG": lambda: (encoded(half(10, 200, "L"), "JPEG", quality=100), (10,) * 3, (200,) * 3),
    "progressive JPEG": lambda: (
        encoded(half(RED, GREEN, "RGB"), "JPEG", quality=100, subsampling=0, progressive=True),
        RED,
        GREEN,
    ),
    "CMYK JPEG": lambda: (
        encoded(half((0, 255, 255, 0), (255, 0, 255, 0), "CMYK"), "JPEG", quality=100),
        (255, 0, 0),
        (0, 255, 0),
    ),
    "CMYK TIFF": lambda: (
        encoded(half((0, 255, 255, 0), (255, 0, 255, 0), "CMYK"), "TIFF"),
        (255, 0, 0),
        (0, 255, 0),
    ),
    "palette PNG": lambda: (
        encoded(half(RED, GREEN, "RGB").convert("P", palette=Image.Palette.ADAPTIVE), "PNG"),
        RED,
        GREEN,
    ),
    "palette GIF": lambda: (
        encoded(half(RED, GREEN, "RGB").convert("P", palette=Image.Palette.ADAPTIVE), "GIF"),
        RED,
        GREEN,
    ),
    "palette PNG, transparent": lambda: (encoded(palette_with_hidden_colour(), "PNG", transparency=0), WHITE, GREEN),
    "palette GIF, transparent": lambda: (encoded(palette_with_hidden_colour(), "GIF", transparency=0), WHITE, GREEN),
    "RGB PNG with a transparent colour": lambda: (
        encoded(half(RED, GREEN, "RGB"), "PNG", transparency=RED),
        WHITE,
        GREEN,
    ),
    "gray PNG with a transparent value": lambda: (
        encoded(half(10, 200, "L"), "PNG", transparency=10),
        WHITE,
        (200,) * 3,
    ),
    "LA PNG": lambda: (encoded(half((10, 0), (200, 255), "LA"), "PNG"), WHITE, (200,) * 3),
    "RGBA PNG": lambda: (encoded(half((*RED, 0), (*GREEN, 255), "RGBA"), "PNG"), WHITE, GREEN),
    "RGBA PNG, half transparent": lambda: (
        encoded(half((0, 0, 0, 128), (*GREEN, 255), "RGBA"), "PNG"),
        (127,) * 3,
        GREEN,
    ),
    "RGBA WebP": lambda: (
        encoded(half((*RED, 0), (*GREEN, 255), "RGBA"), "WEBP", lossless=True, exact=True),
        WHITE,
        GREEN,
    ),
    "RGBA TIFF": lambda: (encoded(half((*RED, 0), (*GREEN, 255), "RGBA"), "TIFF"), WHITE, GREEN),
    "1-bit PNG": lambda: (encoded(half(0, 1, "1"), "PNG"), (0,) * 3, WHITE),
    "1-bit TIFF": lambda: (encoded(half(0, 1, "1"), "TIFF", compression="group4"), (0,) * 3, WHITE),
    "16-bit PNG": lambda: (encoded(sixteen(10 * 257, 200 * 257), "PNG"), (10,) * 3, (200,) * 3),
    "16-bit TIFF": lambda: (encoded(sixteen(10 * 257, 200 * 257), "TIFF"), (10,) * 3, (200,) * 3),
    "16-bit PGM": lambda: (
        b"P5 32 24 65535\n" + sixteen(10 * 257, 200 * 257).astype(">u2").tobytes(),
        (10,) * 3,
        (200,) * 3,
    ),
    "12-bit PGM": lambda: (b"P5 32 24 4095\n" + sixteen(0, 4095).astype(">u2").tobytes(), (0,) * 3, WHITE),
    "16-bit RGB PNG": lambda: (png(np.stack([sixteen(10 * 257, 200 * 257)] * 3, -1)), (10,) * 3, (200,) * 3),
    "float TIFF": lambda: (
        encoded((sixteen(10, 200) / 255).astype(np.float32), "TIFF"),
        (10,) * 3,
        (200,) * 3,
    ),
}


def sixteen(left: int, right: int) -> np.ndarray:
    pixels = np.full((24, 32), right, np.uint16)
    pixels[:, :16] = left
    return pixels


def png(pixels: np.ndarray) -> bytes:
    """A 16-bit RGB PNG, which Pillow cannot write."""
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    chunks = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("case", TWO_HALVES)
def test_every_kind_of_pixel_comes_out_in_its_colour(case: str) -> None:
    data, left, right = TWO_HALVES[case]()
    decoded = decode(data, case)
    assert decoded.shape == (24, 32, 3)
    assert decoded.dtype == np.uint8
    for half_of, colour in ((decoded[:, :12], left), (decoded[:, 20:], right)):
        assert np.abs(half_of.astype(int) - colour).max() <= 4, case  # away from the edge, which JPEG smears


@pytest.mark.parametrize("case", TWO_HALVES)
def test_one_channel_is_the_luma_of_the_colours(case: str) -> None:
    data, left, right = TWO_HALVES[case]()
    decoded = decode(data, case, channels=1)
    assert decoded.shape == (24, 32, 1)
    for half_of, colour in ((decoded[:, :12], left), (decoded[:, 20:], right)):
        luma = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
        assert np.abs(half_of - luma).max() <= 4, case


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 4000), (4000, 1), (3, 2)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_the_smallest_and_the_thinnest_are_read(kind: str, height: int, width: int) -> None:
    assert decode(encoded(np.full((height, width, 3), 77, np.uint8), kind), "a").shape == (height, width, 3)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_gives_its_first_frame_and_one_notice(
    kind: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images_module, "_animation_said", False)
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    data = encoded(
        frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
    )
    with caplog.at_level(logging.WARNING, "vitexp.data.images"):
        for name in ("one", "two"):
            assert np.abs(decode(data, name).astype(int) - RED).max() <= 2
    assert [record.getMessage().split()[0] for record in caplog.records] == ["one"]


def huge_png(side: int) -> bytes:
    """Some 20 kB that claim side x side white pixels."""
    packed = zlib.compressobj(9)
    row = b"\0" + b"\xff" * (side // 8 + 1)
    body = b"".join(packed.compress(row) for _ in range(side)) + packed.flush()
    parts = [(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)), (b"IDAT", body), (b"IEND", b"")]
    chunks = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def truncated(kind: str, keep: float) -> bytes:
    noisy = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    whole = encoded(noisy, kind)
    return whole[: int(len(whole) * keep)]


def float_tiff(value: float) -> bytes:
    pixels = np.full((8, 8), 0.5, np.float32)
    pixels[3, 3] = value
    return encoded(pixels, "TIFF")


# name: (bytes, a word that the refusal holds)
REFUSED: dict[str, Callable[[], tuple[bytes, str]]] = {
    "empty": lambda: (b"", "empty"),
    "HTML": lambda: (b"<!DOCTYPE html><html><body>404</body></html>", "HTML"),
    "text": lambda: (b"not a picture, sorry\n" * 9, "text"),
    "Git LFS pointer": lambda: (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n", "git lfs pull"),
    "random bytes": lambda: (np.random.default_rng(1).bytes(5000), "damaged"),
    "ZIP": lambda: (b"PK\x03\x04" + b"\0" * 100, "damaged"),
    "SVG": lambda: (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "XML"),
    "EPS": lambda: (encoded(scene(), "EPS"), "holds text"),  # Pillow would start Ghostscript for it
    "PDF": lambda: (encoded(scene(), "PDF"), "damaged"),
    "JPEG, half": lambda: (truncated("JPEG", 0.5), "cut short"),
    "JPEG, all but the end": lambda: (truncated("JPEG", 0.98), "cut short"),
    "JPEG, header only": lambda: (truncated("JPEG", 0.02), ""),
    "PNG, half": lambda: (truncated("PNG", 0.5), "cut short"),
    "PNG, signature only": lambda: (truncated("PNG", 0.001), ""),
    "WebP, half": lambda: (truncated("WEBP", 0.5), ""),
    "GIF, half": lambda: (truncated("GIF", 0.5), "cut short"),
    "BMP, half": lambda: (truncated("BMP", 0.5), "cut short"),
    "TIFF, half": lambda: (truncated("TIFF", 0.5), ""),
    "PPM, half": lambda: (truncated("PPM", 0.5), "cut short"),
    "JPEG 2000, half": lambda: (truncated("JPEG2000", 0.5), ""),
    "PNG with a damaged chunk": lambda: (encoded(scene(), "PNG").replace(b"IDAT", b"IDAX"), "damaged"),
    "PNG of 13000 x 13000": lambda: (huge_png(13000), "13000 x 13000"),
    "PNG of 20000 x 20000": lambda: (huge_png(20000), "89,478,485 pixels"),
    "float TIFF with NaN": lambda: (float_tiff(float("nan")), "NaN"),
    "float TIFF with Inf": lambda: (float_tiff(float("inf")), "NaN or Inf"),
    "float TIFF from 0 to 255": lambda: (float_tiff(255.0), "255"),
    "float TIFF with negatives": lambda: (float_tiff(-1.0), "-1"),
    "32-bit TIFF": lambda: (encoded(np.full((8, 8), 70000, np.int32), "TIFF"), "32-bit"),
    "16-bit PNG with a transparent value": lambda: (encoded(sixteen(5, 9), "PNG", transparency=5), "16-bit"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_rightly_is_refused_by_name_in_one_line(case: str, tmp_path: Path) -> None:
    data, word = REFUSED[case]()
    path = tmp_path / "shelf" / "picture.jpg"
    path.parent.mkdir()
    path.write_bytes(data)
    for given in (data, path):
        with pytest.raises(BadImage) as caught:
            decode(given, "shelf/picture.jpg")
        message = str(caught.value)
        assert message.startswith("shelf/picture.jpg: ")
        assert word in message
        assert "\n" not in message


def test_a_missing_file_and_a_folder_are_refused_by_name(tmp_path: Path) -> None:
    for path in (tmp_path / "gone.png", tmp_path):
        with pytest.raises(BadImage, match=r"^some\.png: cannot be opened"):
            decode(path, "some.png")


def test_bombs_are_refused_before_their_pixels_are_looked_at() -> None:
    side = 9500  # between Pillow's limit, where it only warns, and twice that
    assert PIXEL_LIMIT < side**2 < 2 * PIXEL_LIMIT
    without_pixels = huge_png(side)[:60]
    with pytest.raises(BadImage, match="9500 x 9500 pixels"):
        decode(without_pixels, "a")


def test_torchvision_and_pillow_give_the_same_pixels() -> None:
    """The fast path for JPEG must not change a run where it cannot be taken."""
    rng = np.random.default_rng(0)
    smooth = np.asarray(
        Image.fromarray(rng.integers(0, 256, (9, 13, 3), np.uint8)).resize((101, 67), Image.Resampling.BICUBIC)
    )
    for options in ({"quality": 75}, {"quality": 95, "subsampling": 0}, {"quality": 60, "progressive": True}):
        data = encoded(smooth, "JPEG", **options)
        assert np.array_equal(decode(data, "a"), np.asarray(Image.open(io.BytesIO(data))))
        gray = encoded(Image.fromarray(smooth).convert("L"), "JPEG", **options)
        assert np.array_equal(decode(gray, "a", channels=1)[..., 0], np.asarray(Image.open(io.BytesIO(gray))))
        luma = np.asarray(Image.open(io.BytesIO(data)).convert("L"))
        assert np.array_equal(decode(data, "a", channels=1)[..., 0], luma)


def test_unreadable_exif_does_not_cost_a_good_picture() -> None:
    data = encoded(scene(), "JPEG", exif=b"Exif\0\0nonsense that no parser understands", quality=100, subsampling=0)
    assert np.abs(decode(data, "a").astype(int) - scene()).max() <= 3


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")  # Pillow's, about damaged tags
def test_damage_of_any_kind_raises_only_bad_image() -> None:
    """A small fuzz: whatever Pillow raises inside, one error class comes out, and it names the picture."""
    rng = np.random.default_rng(0)
    seeds = [encoded(scene(), kind) for kind in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")]
    refused = 0
    for n in range(700):
        data = bytearray(seeds[n % len(seeds)])
        for place in rng.integers(0, min(len(data), 300), rng.integers(1, 12)):
            data[place] = rng.integers(0, 256)
        try:
            shape = decode(bytes(data), "x/y.jpg").shape
        except BadImage as error:
            refused += 1
            shape = (1, 1, 3 if str(error).startswith("x/y.jpg: ") else 0)
        assert shape[2] == 3
    assert 100 < refused < 700


def test_names_fit_on_one_line_of_any_terminal() -> None:
    assert printable("katze 1.jpg") == "katze 1.jpg"
    assert printable("Größe/写真.png") == "Größe/写真.png"
    assert printable("a\nb.png") == "a\\nb.png"
    assert printable(b"caf\xe9.png".decode("utf-8", "surrogateescape")) == "caf\\udce9.png"
