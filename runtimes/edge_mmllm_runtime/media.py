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


def _image() -> Reader:
    from edge_mmllm.image import ImageSettings, open_image, prepare_image

    def identify(source: Any) -> tuple[bytes, Any]:
        found = file_or_bytes(source)
        if found is not None:
            return found, source
        picture = open_image(source)
        head = f"RGB {picture.width} {picture.height} ".encode()
        return hashlib.sha256(head + picture.tobytes()).digest(), picture

    def prepare(source: Any, settings: ImageSettings) -> Prepared:
        made = prepare_image(source, settings)
        shape = replace(made, pixels=np.empty(0, np.float32))
        extra: dict[str, NDArray[Any]] = {}
        if made.patch_grid is not None:
            extra["grid"] = np.asarray(made.patch_grid, np.int64)
        if made.tile_mask is not None:
            extra["shape_id"] = np.asarray([made.shape_id], np.int64)
            extra["tile_mask"] = made.tile_mask
        if extra:  # all at once
            return Prepared(({"pixels": made.pixels, **extra},), shape)
        return Prepared(tuple({"pixels": tile} for tile in made.pixels), shape)

    return Reader(identify, ImageSettings.from_json, prepare)


#: Modality -> makes its reader; what that needs is imported on first use.
READERS: dict[str, Callable[[], Reader]] = {
    "image": _image,
}
