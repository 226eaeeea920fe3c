"""Odd and damaged pictures: each is opened rightly or refused by name."""

from __future__ import annotations

import contextlib
import io
import random
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from media import picture
from numpy.typing import NDArray
from PIL import Image, features

from edge_mmllm.errors import (
    CorruptMedia,
    MediaError,
    MediaTooLarge,
    UnsupportedMedia,
    UsageError,
)
from edge_mmllm.image import open_image


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(source: Any) -> NDArray[np.uint8]:
    opened = open_image(source)
    assert opened.mode == "RGB"
    return np.asarray(opened)


RGB = picture(20, 30)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_exact_formats_give_their_pixels(kind: str) -> None:
    assert np.array_equal(pixels(encoded(Image.fromarray(RGB), kind)), RGB)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF"])
def test_lossy_formats_open(kind: str) -> None:
    assert pixels(encoded(Image.fromarray(RGB), kind)).shape == (20, 30, 3)


def test_every_kind_of_source_gives_the_same(tmp_path: Path) -> None:
    path = tmp_path / "no suffix"
    data = encoded(Image.fromarray(RGB))
    path.write_bytes(data)
    file = io.BytesIO(b"junk" + data)
    file.seek(4)
    for source in (path, str(path), data, bytearray(data), file, Image.fromarray(RGB), RGB):
        assert np.array_equal(pixels(source), RGB)
    with path.open("rb") as opened:
        assert np.array_equal(pixels(opened), RGB)
        assert not opened.closed


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    upright = {
        1: RGB,
        2: RGB[:, ::-1],
        3: RGB[::-1, ::-1],
        4: RGB[::-1],
        5: RGB.transpose(1, 0, 2),
        6: np.rot90(RGB, -1),
        7: RGB.transpose(1, 0, 2)[::-1, ::-1],
        8: np.rot90(RGB),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(RGB), exif=exif)
    assert np.array_equal(pixels(data), upright[orientation])
    assert np.array_equal(pixels(Image.open(io.BytesIO(data))), upright[orientation])


@pytest.mark.parametrize("mode", ["RGBA", "LA", "palette"])
def test_alpha_is_composited_on_white(mode: str) -> None:
    gray = np.full((2, 3), 100, np.uint8)
    alpha = np.array([[0, 255, 128]] * 2, np.uint8)
    if mode == "palette":
        image = Image.fromarray(np.array([[0, 1, 1]] * 2, np.uint8), "P")
        image.putpalette([7, 8, 9, 100, 100, 100])
        made = pixels(encoded(image, transparency=0))
        assert made[0].tolist() == [[255, 255, 255], [100, 100, 100], [100, 100, 100]]
        return
    bands = [gray, gray, gray, alpha] if mode == "RGBA" else [gray, alpha]
    image = Image.merge("RGBA" if mode == "RGBA" else "LA", [Image.fromarray(b) for b in bands])
    made = pixels(encoded(image))[0]
    # 100 * 128/255 + 255 * 127/255 = 177
    assert made.tolist() == [[255, 255, 255], [100, 100, 100], [177, 177, 177]]


def test_gray_palette_and_one_bit_become_rgb() -> None:
    gray = RGB[..., 1]
    assert np.array_equal(pixels(encoded(Image.fromarray(gray))), np.stack([gray] * 3, -1))
    palette = Image.fromarray(RGB).quantize(16)
    assert np.array_equal(pixels(encoded(palette)), np.asarray(palette.convert("RGB")))
    bits = Image.fromarray(gray).convert("1")
    assert set(np.unique(pixels(encoded(bits)))) <= {0, 255}


def test_sixteen_bit_gray_is_scaled_and_not_clipped() -> None:
    deep = np.array([[0, 257, 32896, 65535]], np.uint16)
    assert pixels(encoded(Image.fromarray(deep)))[0, :, 0].tolist() == [0, 1, 128, 255]
    assert pixels(encoded(Image.fromarray(deep), "TIFF"))[0, :, 0].tolist() == [0, 1, 128, 255]
    wide = Image.fromarray(np.array([[0, 70000]], np.int32))
    with pytest.raises(UnsupportedMedia, match="16 bits"):
        open_image(wide)


def test_cmyk_becomes_rgb() -> None:
    image = Image.fromarray(RGB).convert("CMYK")
    made = pixels(encoded(image, "TIFF")).astype(int)
    assert np.abs(made - RGB).max() <= 2
    assert pixels(encoded(image, "JPEG")).shape == RGB.shape


def test_float_and_lab_pictures_are_refused() -> None:
    for mode in ("F", "LAB"):
        with pytest.raises(UnsupportedMedia, match="kind of pixels"):
            open_image(Image.new(mode, (3, 3)))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animated_file_the_first_frame_is_taken(kind: str) -> None:
    shades = [Image.new("RGB", (8, 6), (v, v, v)) for v in (255, 0, 100)]
    data = encoded(shades[0], kind, save_all=True, append_images=shades[1:], duration=40)
    assert pixels(data).min() >= 250


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1)])
def test_one_pixel_wide_pictures_open(size: tuple[int, int]) -> None:
    assert pixels(encoded(Image.new("RGB", size))).shape == (size[1], size[0], 3)


def png(width: int, height: int) -> bytes:
    """A PNG's header alone, its pixels missing."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + head
    end = b"\0\0\0\0IEND" + struct.pack(">I", zlib.crc32(b"IEND"))
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", len(head))
        + chunk
        + struct.pack(">I", zlib.crc32(chunk))
        + b"\0\0\0\0IDAT"
        + struct.pack(">I", zlib.crc32(b"IDAT"))
        + end
    )


@pytest.mark.parametrize("size", [(65536, 65536), (12000, 12000), (2**31 - 1, 2**31 - 1)])
def test_a_decompression_bomb_is_refused_undecoded(size: tuple[int, int]) -> None:
    with pytest.raises(MediaTooLarge, match="too large to decode"):
        open_image(png(*size))


def test_the_limit_counts_pixels_and_can_be_moved() -> None:
    data = encoded(Image.fromarray(RGB))
    assert open_image(data, pixel_limit=600).size == (30, 20)
    for source in (data, Image.fromarray(RGB), RGB):
        with pytest.raises(MediaTooLarge, match="at most 599 pixels"):
            open_image(source, pixel_limit=599)


@pytest.mark.parametrize("size", [(0, 5), (5, 0)])
def test_no_pixels_is_corrupt(size: tuple[int, int]) -> None:
    with pytest.raises(CorruptMedia):
        open_image(png(*size))
    with pytest.raises(CorruptMedia, match="no pixels"):
        open_image(np.zeros((*size, 3), np.uint8))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_a_picture_cut_short_is_corrupt(kind: str) -> None:
    data = encoded(Image.fromarray(picture(64, 64)), kind)
    for part in (0.3, 0.6, 0.95):
        with pytest.raises(CorruptMedia):
            open_image(data[: int(len(data) * part)])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF"])
def test_flipped_bytes_never_escape_the_error_tree(kind: str) -> None:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this build of Pillow writes no AVIF")
    data = encoded(Image.fromarray(picture(24, 24)), kind)
    random_bytes = random.Random(7)
    for _ in range(150):
        damaged = bytearray(data)
        for _ in range(random_bytes.randint(1, 6)):
            damaged[random_bytes.randrange(len(damaged))] = random_bytes.randrange(256)
        with contextlib.suppress(MediaError):
            open_image(bytes(damaged), pixel_limit=1 << 20)


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"hello, this is text\n", "text"),
        (b"%PDF-1.7\n", "a PDF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "PostScript"),
        (b"\0\0\0\x20ftypheic", "HEIC"),
        (b"\0\0\0\x20ftypisom", "MP4"),
        (b"<svg xmlns=", "SVG"),
        (b"RIFF\0\0\0\0WAVE", "RIFF"),
        (b"\x00\x01\x02\x03", "begins 00 01 02 03"),
    ],
)
def test_what_is_no_picture_is_named(data: bytes, found: str) -> None:
    with pytest.raises(UnsupportedMedia, match=found):
        open_image(data)


def test_an_empty_file_a_folder_and_a_missing_one(tmp_path: Path) -> None:
    with pytest.raises(CorruptMedia, match="empty"):
        open_image(b"")
    for path in (tmp_path, tmp_path / "missing.png"):
        with pytest.raises(UsageError, match="no such picture"):
            open_image(path)
    with pytest.raises(UsageError, match="not a picture"):
        open_image(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((3, 4, 5), np.uint8),
        np.zeros(4, np.uint8),
    ],
)
def test_an_array_that_is_no_picture_is_refused(array: NDArray[Any]) -> None:
    with pytest.raises(UnsupportedMedia, match="not a picture"):
        open_image(array)


def test_only_the_plugin_of_the_format_is_imported() -> None:
    code = (
        "import sys, edge_mmllm.image, edge_mmllm.video, edge_mmllm.audio;"
        "assert 'PIL' not in sys.modules;"
        "edge_mmllm.image.open_image(sys.stdin.buffer.read());"
        "assert 'PIL.EpsImagePlugin' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=encoded(Image.fromarray(RGB), "WEBP"), check=False
    )
    assert done.returncode == 0
