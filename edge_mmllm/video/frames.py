"""Decodes the sampled frames of a list, a folder or an animated file, one after another."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy.typing as npt

from edge_mmllm.errors import CorruptMedia, MediaTooLarge, UnsupportedMedia, UsageError
from edge_mmllm.image.files import (
    DAMAGED,
    PICTURE_FORMATS,
    check_size,
    open_image,
    open_undecoded,
    to_rgb,
)
from edge_mmllm.video.settings import VideoSettings, frame_indices

if TYPE_CHECKING:
    from PIL import Image

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif"}
_ANIMATED = ("GIF", "WEBP", "PNG", "AVIF")
_MOST_DECODED = 1 << 33  # pixels of all frames of an animated file


@dataclass(frozen=True)
class Frames:
    """The sampled frames of a video.

    Attributes:
        pictures: 8-bit RGB, all of one size; a frame taken twice is there twice.
        indices: which frames they are, counted from 0.
        total: frames the video has.
        fps: frames a second of the video, where it says so.
    """

    pictures: tuple[Image.Image, ...]
    indices: tuple[int, ...]
    total: int
    fps: float | None


def open_frames(
    source: str
    | os.PathLike[str]
    | bytes
    | BinaryIO
    | Sequence[str | os.PathLike[str] | bytes | BinaryIO | Image.Image | npt.NDArray[Any]],
    settings: VideoSettings,
    *,
    fps: float | None = None,
) -> Frames:
    """Opens a video and decodes the frames `settings` want.

    Raises:
        UsageError: there is no such file or folder, or `fps` is not above 0.
        UnsupportedMedia: not an animated picture; frames that differ in size.
        MediaTooLarge: more frames, or more pixels in all frames taken, than the settings allow.
        CorruptMedia: no frames, or a damaged one.
    """
    if fps is not None and not fps > 0:
        raise UsageError("a video's fps is above 0", found=str(fps))
    if isinstance(source, (str, os.PathLike)) and Path(source).is_dir():
        return _pictures(_folder(Path(source)), str(source), settings, fps)
    if isinstance(source, (list, tuple)):
        return _pictures(source, "list of frames", settings, fps)
    single: Any = source  # what a Sequence still could be, the next line tells
    if isinstance(single, (str, os.PathLike, bytes, bytearray)) or hasattr(single, "read"):
        return _animation(single, settings)
    raise UsageError(
        "this is not a video",
        expected="a folder of pictures, a list of pictures, or an animated GIF, WebP or PNG",
        found=type(source).__name__,
    )


def _folder(folder: Path) -> list[Path]:
    """The folder's pictures, in the natural order of their names (2 before 10)."""

    def key(path: Path) -> list[tuple[int, int, str]]:
        parts = re.split(r"(\d+)", path.name.lower())
        return [(0, int(p), p) if p.isdecimal() else (1, 0, p) for p in parts if p]

    files = [p for p in folder.iterdir() if p.suffix.lower() in _SUFFIXES and p.is_file()]
    if not files:
        raise CorruptMedia(
            "the folder holds no pictures",
            where=str(folder),
            expected=", ".join(sorted(_SUFFIXES)),
        )
    return sorted(files, key=key)


def _pictures(
    sources: Sequence[Any], where: str, settings: VideoSettings, fps: float | None
) -> Frames:
    _check_count(len(sources), where, settings)
    indices = frame_indices(len(sources), fps, settings.sampling)
    opened: dict[int, Image.Image] = {}
    pixels = 0
    for index in sorted(set(indices)):
        picture = open_image(sources[index], pixel_limit=settings.image.pixel_limit)
        pixels = _check_frame(picture, opened, index, pixels, where, settings)
        opened[index] = picture
    return Frames(tuple(opened[i] for i in indices), indices, len(sources), fps)


def _animation(
    source: str | os.PathLike[str] | bytes | BinaryIO, settings: VideoSettings
) -> Frames:
    from PIL import Image

    try:
        with open_undecoded(source, pixel_limit=settings.image.pixel_limit) as (file, where):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    return _decoded(file, where, settings)
            except Image.DecompressionBombError as error:
                raise MediaTooLarge(
                    "the video is too large to decode", where=where, found=str(error)
                ) from error
            except DAMAGED as error:
                raise CorruptMedia(
                    "the video is damaged or cut short", where=where, found=str(error)
                ) from error
    except UnsupportedMedia as error:
        if error.expected != PICTURE_FORMATS:
            raise
        raise UnsupportedMedia(
            "this is not a video that can be read",
            where=error.where,
            expected="an animated GIF, WebP or PNG, or a folder of pictures",
            found=error.found,
            fix="make frames of it: ffmpeg -i VIDEO -vf fps=2 FOLDER/%05d.jpg",
        ) from error


def _decoded(file: Image.Image, where: str, settings: VideoSettings) -> Frames:
    if file.format not in _ANIMATED:
        raise UnsupportedMedia(
            "this is a picture, not a video",
            where=where,
            expected="an animated GIF, WebP or PNG, or a folder of pictures",
            found=str(file.format),
        )
    total = int(getattr(file, "n_frames", 1))
    _check_count(total, where, settings)
    if total * file.width * file.height > _MOST_DECODED:
        raise MediaTooLarge(
            "the video is too large to decode",
            where=where,
            expected=f"at most {_MOST_DECODED} pixels in all its frames",
            found=f"{total} frames of {file.width} x {file.height}",
        )
    fps = _speed(file, total, where, settings.image.pixel_limit)
    indices = frame_indices(total, fps, settings.sampling)
    opened: dict[int, Image.Image] = {}
    pixels = 0
    for index in sorted(set(indices)):
        file.seek(index)
        picture = to_rgb(file, where, settings.image.pixel_limit)
        picture = picture.copy() if picture is file else picture  # the next frame overwrites it
        pixels = _check_frame(picture, opened, index, pixels, where, settings)
        opened[index] = picture
    return Frames(tuple(opened[i] for i in indices), indices, total, fps)


def _speed(file: Image.Image, total: int, where: str, pixel_limit: int) -> float | None:
    """Frames a second, the mean over all frames; None where the file does not say."""
    millis = 0.0
    for index in range(total):
        file.seek(index)
        check_size(file, where, pixel_limit)  # a GIF's frames may outgrow its header
        file.load()
        millis += float(file.info.get("duration", 0) or 0)
    file.seek(0)
    return total * 1000 / millis if millis > 0 and total > 1 else None


def _check_count(total: int, where: str, settings: VideoSettings) -> None:
    if total < 1:
        raise CorruptMedia("the video has no frames", where=where)
    if total > settings.frame_limit:
        raise MediaTooLarge(
            "the video has too many frames",
            where=where,
            expected=f"at most {settings.frame_limit}",
            found=str(total),
            fix="cut it, or take fewer frames a second",
        )


def _check_frame(
    picture: Image.Image,
    opened: dict[int, Image.Image],
    index: int,
    pixels: int,
    where: str,
    settings: VideoSettings,
) -> int:
    """Pixels of all frames so far, `picture` included."""
    first = next(iter(opened.values()), picture)
    if picture.size != first.size:
        raise UnsupportedMedia(
            "the frames of a video differ in size",
            where=f"{where}, frame {index}",
            expected=f"{first.width} x {first.height}",
            found=f"{picture.width} x {picture.height}",
            fix="resize them to one size",
        )
    pixels += picture.width * picture.height
    if pixels > settings.pixel_limit:
        raise MediaTooLarge(
            "the frames taken of this video have too many pixels",
            where=where,
            expected=f"at most {settings.pixel_limit} in all",
            found=f"{pixels} after {len(opened) + 1} frames",
            fix="scale the video down, or take fewer frames",
        )
    return pixels
