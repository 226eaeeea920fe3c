"""Positioned reads of weight files, shared by every reader.

Nothing is mapped: a mapped page that was touched counts as RSS, and the exporter promises a
bounded peak. `os.preadv` fills the caller's buffer without moving a file position, so one
descriptor serves any number of threads.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edge_mmllm.errors import CheckpointError, CorruptCheckpoint, TensorMismatch, UsageError

from .base import Float32, TensorInfo

#: Stored element types that become float32 by a plain conversion, as little-endian numpy types.
#: BF16 is read as the upper half of a float32.
NUMPY_DTYPES: dict[str, str] = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "u1",
    "BOOL": "u1",
}

#: Elements converted at a time: the scratch beside the result stays under 8 MiB.
TILE_ELEMENTS = 1 << 20


class WeightFile:
    """A file opened for positioned reads; the descriptor stays open until `close` (or the end)."""

    def __init__(self, path: Path) -> None:
        try:
            self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise CheckpointError(
                f"cannot open {path.name}: {error.strerror}", where=str(path)
            ) from error
        self._finalizer = weakref.finalize(self, os.close, self._fd)
        self.path = path
        self.size_bytes = os.fstat(self._fd).st_size

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fills the whole of `buffer` (flat bytes) from byte `offset`.

        Raises: CorruptCheckpoint where the file ends early.
        """
        done, wanted = 0, len(buffer)
        while done < wanted:
            if not self._finalizer.alive:
                raise UsageError("the checkpoint is closed", where=str(self.path))
            count = os.preadv(self._fd, [buffer[done:]], offset + done)
            if count == 0:
                raise CorruptCheckpoint(
                    f"{self.path.name} ends early",
                    where=str(self.path),
                    expected=f"{wanted} bytes at byte {offset}",
                    found=f"{done} bytes; the file has {self.size_bytes}",
                    fix="download or copy the file again",
                )
            done += count

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from byte `offset`, checked against the file's size before allocating."""
        if size < 0 or offset < 0 or offset + size > self.size_bytes:
            raise CorruptCheckpoint(
                f"{self.path.name} ends early",
                where=str(self.path),
                expected=f"{size} bytes at byte {offset}",
                found=f"a file of {self.size_bytes} bytes",
                fix="download or copy the file again",
            )
        data = bytearray(size)
        self.read_into(memoryview(data), offset)
        return bytes(data)

    def close(self) -> None:
        """Closes the descriptor; later reads raise UsageError."""
        self._finalizer()


class TensorFile(Protocol):
    """One file of tensors: what a checkpoint is put together from."""

    path: Path

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Float32: ...

    def close(self) -> None: ...


def read_floats(file: WeightFile, offset: int, count: int, dtype: str) -> Float32:
    """`count` little-endian elements from byte `offset`, converted to float32, flat.

    F32 lands straight in the result; other types pass through a tile of scratch.
    """
    out = np.empty(count, np.float32)
    if count == 0:
        return out
    if dtype == "F32":
        file.read_into(out.data.cast("B"), offset)
        if not np.little_endian:
            out.byteswap(inplace=True)
        return out
    stored = np.dtype(NUMPY_DTYPES[dtype])
    scratch: NDArray[Any] = np.empty(min(count, TILE_ELEMENTS), stored)
    for begin in range(0, count, TILE_ELEMENTS):
        tile = scratch[: min(TILE_ELEMENTS, count - begin)]
        file.read_into(tile.data.cast("B"), offset + begin * stored.itemsize)
        part = out[begin : begin + len(tile)]
        if dtype == "BF16":
            bits = part.view(np.uint32)
            bits[...] = tile
            bits <<= 16
        else:
            with np.errstate(over="ignore"):  # an F64 beyond float32 becomes inf, and is reported
                part[...] = tile
    return out


def row_range(info: TensorInfo, start: int, stop: int | None) -> tuple[int, int]:
    """Checks the rows asked for; a scalar counts as one row.

    Raises: UsageError.
    """
    rows = info.shape[0] if info.shape else 1
    end = rows if stop is None else stop
    if not 0 <= start <= end <= rows:
        raise UsageError(
            f"rows {start}:{end} are outside {info.name}",
            expected=f"within 0:{rows}",
            found=f"{start}:{end}",
        )
    return start, end


def lookup(tensors: Mapping[str, TensorInfo], name: str, path: Path) -> TensorInfo:
    """The entry of `name`. Raises: TensorMismatch naming the nearest stored names."""
    info = tensors.get(name)
    if info is None:
        near = difflib.get_close_matches(name, tensors, n=3)
        raise TensorMismatch(
            f"no tensor {name!r} in {path.name}",
            where=str(path),
            found=f"{len(tensors)} tensors" + (f", near it: {', '.join(near)}" if near else ""),
        )
    return info


def check_ranges(
    path: Path,
    ranges: Sequence[tuple[int, int, str]],
    end: int,
    *,
    holes: bool,
    thing: str = "tensor",
) -> None:
    """Byte ranges `(begin, end, name)` must not overlap, nor pass `end`; see `holes`.

    Args:
        holes: whether bytes that belong to no tensor are allowed.
        thing: what the ranges are, for messages.

    Raises: CorruptCheckpoint naming the tensors at fault.
    """
    position, before = 0, ""
    for begin, stop, name in sorted(ranges):
        if stop > end:
            raise CorruptCheckpoint(
                f"{thing} {name!r} lies beyond the end of {path.name}",
                where=str(path),
                expected=f"at most byte {end} of the data",
                found=f"bytes {begin} to {stop}",
                fix="the file looks truncated: download or copy it again",
            )
        if begin < position:
            raise CorruptCheckpoint(
                f"{thing} {before!r} and {name!r} overlap in {path.name}",
                where=str(path),
                expected=f"{name!r} at or after byte {position} of the data",
                found=f"byte {begin}",
            )
        if begin > position and not holes:
            raise CorruptCheckpoint(
                f"a hole before {thing} {name!r} in {path.name}",
                where=str(path),
                expected=f"{name!r} at byte {position} of the data",
                found=f"byte {begin}",
            )
        if stop > begin:
            position, before = stop, name
    if position < end and not holes:
        raise CorruptCheckpoint(
            f"{path.name} holds bytes that belong to no tensor",
            where=str(path),
            expected=f"{position} bytes of data",
            found=f"{end}",
        )


def elements(shape: Sequence[int]) -> int:
    """Number of elements; exact whatever the size (no overflow)."""
    return math.prod(shape)


def valid_shape(shape: Sequence[object]) -> bool:
    """Whether numpy could hold `shape`: at most 64 dimensions and 2^48 elements.

    Checked before anything is multiplied, so that a hostile shape costs nothing.
    """
    if len(shape) > 64:
        return False
    product = 1
    for dim in shape:
        if type(dim) is not int or not 0 <= dim < 1 << 48:
            return False
        product *= dim or 1  # an empty tensor with absurd other dimensions is absurd too
    return product < 1 << 48


def read_json(path: Path, *, limit_bytes: int = 256 << 20) -> dict[str, Any]:
    """A JSON object from `path`. `Infinity` and `NaN` are accepted: published configs use them.

    Raises: CorruptCheckpoint.
    """
    try:
        size = path.stat().st_size
        if size > limit_bytes:
            raise CorruptCheckpoint(
                f"{path.name} is absurdly large",
                where=str(path),
                expected=f"at most {limit_bytes} bytes",
                found=f"{size}",
            )
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptCheckpoint(
            f"cannot read {path.name}", where=str(path), expected="JSON", found=str(error)
        ) from error
    if not isinstance(value, dict):
        raise CorruptCheckpoint(
            f"{path.name} is not a JSON object", where=str(path), found=type(value).__name__
        )
    return value
