"""Pictures (and what other modalities add) as the stages take them, and their identity.

Each modality is one entry of `READERS`: how its content is identified, and how it is prepared.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_mmllm.errors import UnsupportedBundle, UsageError

Arrays = Mapping[str, NDArray[Any]]

_PIECE = 1 << 20


@dataclass(frozen=True)
class Prepared:
    """One item, ready for the stages.

    Attributes:
        runs: inputs by name of each run of the stages: one for each tile or frame, or one in all.
        shape: what preprocessing knows of it (`edge_mmllm.image.Prepared`, ...), for layouts;
            its pixels are not kept.
    """

    runs: tuple[Arrays, ...]
    shape: Any


@dataclass(frozen=True)
class Reader:
    """How one modality is read.

    Attributes:
        identify: source -> (hash of its content, the source to prepare).
        settings: JSON of the manifest, where it stands -> settings, checked.
        prepare: source, settings -> item.
    """

    identify: Callable[[Any], tuple[bytes, Any]]
    settings: Callable[[Any, str], Any]
    prepare: Callable[[Any, Any], Prepared]


def reader_of(modality: str) -> Reader:
    """The reader of a modality. Raises: UnsupportedBundle."""
    if modality not in READERS:
        raise UnsupportedBundle(
            f"this release cannot read {modality}", expected=" | ".join(READERS), found=modality
        )
    return READERS[modality]()


def file_or_bytes(source: Any) -> bytes | None:
    """The hash of a path's or bytes' content; None for anything else.

    Raises:
        UsageError: there is no such file.
    """
    digest = hashlib.sha256()
    if isinstance(source, (bytes, bytearray, memoryview)):
        digest.update(source)
        return digest.digest()
    if not isinstance(source, (str, os.PathLike)):
        return None
    path = Path(source)
    if not path.is_file():
        raise UsageError("there is no such file", where=str(path))
    try:
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
    except OSError as error:
        raise UsageError("the file cannot be read", where=str(path), found=str(error)) from error
    return digest.digest()


def _identified(source: Any) -> tuple[bytes, Any]:
    """The content's hash of one picture in any form, and the form to prepare."""
    from edge_mmllm.image import open_image

    found = file_or_bytes(source)
    if found is not None:
        return found, source
    picture = open_image(source)
    head = f"RGB {picture.width} {picture.height} ".encode()
    return hashlib.sha256(head + picture.tobytes()).digest(), picture


def _image() -> Reader:
    from edge_mmllm.image import Canvas, ImageSettings, Patches, prepare_image

    def prepare(source: Any, settings: ImageSettings) -> Prepared:
        made = prepare_image(source, settings)
        shape = replace(made, pixels=np.empty(0, np.float32))
        if isinstance(settings.layout, Patches):
            grid = np.asarray(made.patch_grid, np.int64)
            return Prepared(({"pixels": made.pixels, "grid": grid},), shape)
        if isinstance(settings.layout, Canvas):
            tiles = np.zeros((settings.layout.most_tiles, *made.pixels.shape[1:]), np.float32)
            tiles[: len(made.pixels)] = made.pixels
            run = {
                "pixels": tiles,
                "aspect_ratio": np.array([made.shape_id], np.int64),
                "tiles": np.array([len(made.pixels)], np.int64),
            }
            return Prepared((run,), shape)
        return Prepared(tuple({"pixels": tile} for tile in made.pixels), shape)

    return Reader(_identified, ImageSettings.from_json, prepare)


def _video() -> Reader:
    from edge_mmllm.video import VideoSettings, prepare_video

    def identify(source: Any) -> tuple[bytes, Any]:
        if isinstance(source, (list, tuple)):
            pairs = [_identified(frame) for frame in source]
            return hashlib.sha256(b"".join(key for key, _ in pairs)).digest(), [s for _, s in pairs]
        if isinstance(source, (str, os.PathLike)) and Path(source).is_dir():
            files = sorted(path for path in Path(source).iterdir() if path.is_file())
            keys = [path.name.encode() + (file_or_bytes(path) or b"") for path in files]
            return hashlib.sha256(b"\0".join(keys)).digest(), source
        found = file_or_bytes(source)
        if found is None:
            source = _content(source)
            found = hashlib.sha256(source).digest()
        return found, source

    def prepare(source: Any, settings: VideoSettings) -> Prepared:
        made = prepare_video(source, settings)
        inner = made.prepared
        shape = replace(made, prepared=replace(inner, pixels=np.empty(0, np.float32)))
        if inner.patch_grid is not None:
            grid = np.asarray(inner.patch_grid, np.int64)
            return Prepared(({"pixels": inner.pixels, "grid": grid},), shape)
        return Prepared(tuple({"pixels": frame} for frame in inner.pixels), shape)

    return Reader(identify, VideoSettings.from_json, prepare)


def _audio() -> Reader:
    """A source is a WAV file in any form, or `(samples, rate)`."""
    from edge_mmllm.audio import AudioSettings, LogMel, prepare_audio

    def identify(source: Any) -> tuple[bytes, Any]:
        if isinstance(source, tuple) and len(source) == 2:
            samples, rate = np.ascontiguousarray(source[0]), source[1]
            head = f"{samples.dtype} {samples.shape} {rate} ".encode()
            return hashlib.sha256(head + samples.tobytes()).digest(), (samples, rate)
        found = file_or_bytes(source)
        if found is None:
            source = _content(source)
            found = hashlib.sha256(source).digest()
        return found, source

    def prepare(source: Any, settings: AudioSettings) -> Prepared:
        if isinstance(source, tuple):
            made = prepare_audio(source[0], settings, source_rate=source[1])
        else:
            made = prepare_audio(source, settings)
        frames = np.array([made.valid], np.int64)
        name = "mel" if isinstance(settings.layout, LogMel) else "samples"
        shape = replace(made, features=np.empty(0, np.float32))
        return Prepared(({name: made.features, "frames": frames},), shape)

    return Reader(identify, AudioSettings.from_json, prepare)


def _content(source: Any) -> bytes:
    """The bytes of an open file. Raises: UsageError for anything else."""
    if not hasattr(source, "read"):
        raise UsageError(
            "this is neither a file nor its content",
            expected="a path, bytes or a binary file",
            found=type(source).__name__,
        )
    return bytes(source.read())


#: Modality -> makes its reader; what that needs is imported on first use.
READERS: dict[str, Callable[[], Reader]] = {
    "image": _image,
    "video": _video,
    "audio": _audio,
}
