"""Opens pictures that nobody vouches for: a path, bytes, a file, a Pillow picture, an array.

The format is told by the first bytes, not by the name, and only Pillow's plugin of that format
is imported and allowed to look at the file: formats that run other programs (EPS) or that hold
something else than pixels are never tried.
"""

from __future__ import annotations

import importlib
import io
import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from edge_mmllm.errors import CorruptMedia, MediaTooLarge, UnsupportedMedia, UsageError
from edge_mmllm.image.settings import PIXEL_LIMIT

if TYPE_CHECKING:
    from PIL import Image

#: What Pillow's readers are seen to raise on damaged files.
DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    AttributeError,
    EOFError,
    OverflowError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
)

#: What is read, in words.
PICTURE_FORMATS = "PNG, JPEG, WebP, GIF, BMP, TIFF, PPM, JPEG 2000 or AVIF"
#: (offset, first bytes, Pillow's name of the format)
_MAGIC = (
    (0, b"\x89PNG\r\n\x1a\n", "PNG"),
    (0, b"\xff\xd8\xff", "JPEG"),
    (0, b"GIF87a", "GIF"),
    (0, b"GIF89a", "GIF"),
    (8, b"WEBP", "WEBP"),
    (0, b"BM", "BMP"),
    (0, b"II*\x00", "TIFF"),
    (0, b"MM\x00*", "TIFF"),
    (0, b"\x00\x00\x00\x0cjP  \r\n\x87\n", "JPEG2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG2000"),
    (4, b"ftypavif", "AVIF"),
    (4, b"ftypavis", "AVIF"),
)
_PLUGINS = {
    "PNG": "PngImagePlugin",
    "JPEG": "JpegImagePlugin",
    "GIF": "GifImagePlugin",
    "WEBP": "WebPImagePlugin",
    "BMP": "BmpImagePlugin",
    "TIFF": "TiffImagePlugin",
    "PPM": "PpmImagePlugin",
    "JPEG2000": "Jpeg2KImagePlugin",
    "AVIF": "AvifImagePlugin",
}
#: What else people hand in: (offset, first bytes, what it is)
_OTHER = (
    (4, b"ftyphe", "a HEIC picture"),
    (4, b"ftypmif1", "a HEIF picture"),
    (4, b"ftyp", "an MP4 or MOV video"),
    (0, b"\x1a\x45\xdf\xa3", "a Matroska or WebM video"),
    (0, b"%PDF", "a PDF document"),
    (0, b"%!PS", "a PostScript file"),
    (0, b"RIFF", "a RIFF file that is not WebP"),
    (0, b"PK\x03\x04", "a zip archive"),
    (0, b"<svg", "an SVG drawing"),
    (0, b"<?xml", "an XML file"),
    (0, b"8BPS", "a Photoshop file"),
)


def open_image(
    source: str | os.PathLike[str] | bytes | BinaryIO | Image.Image | npt.NDArray[Any],
    *,
    pixel_limit: int = PIXEL_LIMIT,
) -> Image.Image:
    """Opens and decodes a picture as 8-bit RGB, upright.

    EXIF orientation is applied. Alpha, in any mode and in palettes, is composited on white, as
    the processors of transformers 5.23 do with a Pillow picture. 16-bit gray is scaled to 8 bits.
    Of an animated file this is the first frame.

    Args:
        source: a path, the file's bytes, a binary file, a Pillow picture, or a uint8 array
            `(height, width)`, `(height, width, 1 | 3 | 4)`.
        pixel_limit: pixels of the largest picture that is decoded.

    Raises:
        MediaTooLarge: the header says more than `pixel_limit` pixels; nothing was decoded.
        UnsupportedMedia: not a picture, or of a format or a mode that is not read.
        CorruptMedia: damaged, cut short or empty.
        UsageError: there is no such file, or `source` is of another type.
    """
    from PIL import Image

    if isinstance(source, np.ndarray):
        return to_rgb(_from_array(source), "array", pixel_limit)
    if isinstance(source, Image.Image):
        return to_rgb(source, "picture", pixel_limit)
    with open_undecoded(source, pixel_limit=pixel_limit) as (picture, where):
        return to_rgb(picture, where, pixel_limit)


@contextmanager
def open_undecoded(
    source: str | os.PathLike[str] | bytes | BinaryIO, *, pixel_limit: int = PIXEL_LIMIT
) -> Iterator[tuple[Image.Image, str]]:
    """A Pillow picture of which only the header has been read, and its name for errors.

    Afterwards its file is closed, unless it was the caller's. Raises as `open_image`.
    """
    file, where = _file(source)
    try:
        yield _open(file, where, pixel_limit), where
    finally:
        # Not Pillow's own close: some plugins forget the file once they have read it.
        if file is not source:
            file.close()


def _open(file: BinaryIO, where: str, pixel_limit: int) -> Image.Image:
    start = file.tell()
    head = file.read(64)
    file.seek(start)
    name = _format(head, where)
    from PIL import Image

    # Its own limit warns at 89 Mpx and refuses at 179: ours, checked below, replaces both.
    try:
        importlib.import_module(f"PIL.{_PLUGINS[name]}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture = Image.open(file, formats=[name])
    except Image.DecompressionBombError as error:
        raise MediaTooLarge(
            "the picture is too large to decode",
            where=where,
            expected=f"at most {pixel_limit} pixels",
            found=str(error),
            fix="scale it down first",
        ) from error
    except ImportError as error:
        raise UnsupportedMedia(
            f"this build of Pillow cannot read {name}",
            where=where,
            fix="convert the picture to PNG or JPEG",
        ) from error
    except DAMAGED as error:
        raise _damaged(where, error) from error
    check_size(picture, where, pixel_limit)
    return picture


def to_rgb(picture: Image.Image, where: str, pixel_limit: int = PIXEL_LIMIT) -> Image.Image:
    """Decodes the frame a Pillow picture stands at, turns it upright and into RGB.

    A picture that is all that already is returned itself, not copied.

    Raises as `open_image`.
    """
    from PIL import Image, ImageOps

    check_size(picture, where, pixel_limit)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture.load()
            if picture.getexif().get(0x0112, 1) != 1:
                picture = ImageOps.exif_transpose(picture)
    except Image.DecompressionBombError as error:
        raise MediaTooLarge(
            "the picture is too large to decode", where=where, found=str(error)
        ) from error
    except DAMAGED as error:
        raise _damaged(where, error) from error
    mode = picture.mode
    if mode == "RGB" and picture.info.get("transparency") is None:
        return picture
    if mode.startswith("I"):
        return _from_deep(picture, where)
    if mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        try:
            picture = picture.convert("RGBA")
        except DAMAGED as error:
            raise _mode(picture, where) from error
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, picture).convert("RGB")
    if mode not in ("RGB", "L", "P", "1", "CMYK", "YCbCr", "HSV", "RGBX"):
        raise _mode(picture, where)
    return picture.convert("RGB")


def _from_deep(picture: Image.Image, where: str) -> Image.Image:
    """Gray of 16 bits, scaled to 8. (Pillow's own conversion would clip at 255.)"""
    from PIL import Image

    values = np.asarray(picture)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise UnsupportedMedia(
            "the picture's gray values leave 16 bits",
            where=where,
            expected="values from 0 to 65535",
            found=f"values from {low} to {high}",
            fix="scale it to 8 or 16 bits",
        )
    levels = ((np.arange(65536, dtype=np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    return Image.fromarray(levels[values.astype(np.uint16)]).convert("RGB")


def _from_array(array: npt.NDArray[Any]) -> Image.Image:
    from PIL import Image

    good = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))
    if array.dtype != np.uint8 or not good:
        raise UnsupportedMedia(
            "this array is not a picture",
            expected="uint8 of shape (height, width) or (height, width, 1 | 3 | 4)",
            found=f"{array.dtype} of shape {array.shape}",
            fix="scale it to 0..255, convert it to uint8 and move the channels last",
        )
    if array.size == 0:
        raise CorruptMedia("the picture has no pixels", found=f"shape {array.shape}")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(array))


def _file(source: str | os.PathLike[str] | bytes | BinaryIO) -> tuple[BinaryIO, str]:
    """The source as a file that can seek, and its name."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return io.BytesIO(bytes(source)), "bytes"
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if not path.is_file():
            raise UsageError("there is no such picture file", where=str(path))
        try:
            return path.open("rb"), str(path)
        except OSError as error:
            raise UsageError(
                "the picture file cannot be read", where=str(path), found=str(error)
            ) from error
    if not hasattr(source, "read"):
        raise UsageError(
            "this is not a picture",
            expected="a path, bytes, a binary file, a Pillow picture or a numpy array",
            found=type(source).__name__,
        )
    name = getattr(source, "name", "file")
    if not (hasattr(source, "seekable") and source.seekable()) or source.tell():
        return io.BytesIO(source.read()), str(name)  # Pillow reads from offset 0
    return source, str(name)


def _format(head: bytes, where: str) -> str:
    if not head:
        raise CorruptMedia("the picture file is empty", where=where)
    for offset, magic, name in _MAGIC:
        if head[offset : offset + len(magic)] == magic:
            return name
    if head[:1] == b"P" and head[1:2] in b"123456" and head[2:3].isspace():
        return "PPM"
    kinds = [
        what for at, magic, what in _OTHER if head[at : at + len(magic)].lower() == magic.lower()
    ]
    text = all(32 <= byte < 127 or byte in b"\t\r\n" for byte in head)
    raise UnsupportedMedia(
        "this is not a picture that can be read",
        where=where,
        expected=PICTURE_FORMATS,
        found=kinds[0] if kinds else "text" if text else f"a file that begins {head[:8].hex(' ')}",
        fix="convert it to PNG or JPEG",
    )


def check_size(picture: Image.Image, where: str, pixel_limit: int) -> None:
    """Refuses a picture of no pixels, or of more than `pixel_limit`, before it is decoded."""
    width, height = picture.size
    if width < 1 or height < 1:
        raise CorruptMedia("the picture has no pixels", where=where, found=f"{width} x {height}")
    if width * height > pixel_limit:
        raise MediaTooLarge(
            "the picture is too large to decode",
            where=where,
            expected=f"at most {pixel_limit} pixels",
            found=f"{width} x {height} = {width * height} pixels",
            fix="scale it down first, or raise pixel_limit",
        )


def _damaged(where: str, error: Exception) -> CorruptMedia:
    return CorruptMedia(
        "the picture is damaged or cut short", where=where, found=str(error) or repr(error)
    )


def _mode(picture: Image.Image, where: str) -> UnsupportedMedia:
    return UnsupportedMedia(
        "the picture's kind of pixels is not read",
        where=where,
        expected="gray, palette, RGB, CMYK or YCbCr of 8 bits, or gray of 16",
        found=f"Pillow mode {picture.mode!r}",
        fix="convert it to 8-bit RGB",
    )
