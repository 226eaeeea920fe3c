"""safetensors files, one tensor at a time.

Layout, little-endian: `u64 n`, then `n` bytes of UTF-8 JSON beginning with `{` (spaces may pad
its end), then the data. The JSON maps a name to `{"dtype", "shape", "data_offsets": [begin, end]}`
with offsets relative to the data; `__metadata__` is a map of strings. The data holds no holes.

Source: safetensors 0.8, README section "Format" and `safetensors/src/tensor.rs` (`validate`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edge_mmllm.errors import CheckpointError, CorruptCheckpoint

from .base import Float32, TensorInfo
from .files import (
    NUMPY_DTYPES,
    WeightFile,
    check_ranges,
    elements,
    lookup,
    read_floats,
    row_range,
    valid_shape,
)

#: The format's own limit on the header. Source: safetensors `MAX_HEADER_SIZE`.
MAX_HEADER_BYTES = 100_000_000

#: Bits an element of every dtype the format defines.
DTYPE_BITS: dict[str, int] = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}


class SafetensorsFile:
    """One `.safetensors` file: its header checked whole, its tensors read on demand.

    Raises: CorruptCheckpoint for anything the format forbids, before any tensor is read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = WeightFile(path)
        try:
            self._data_start, header = _read_header(self._file)
            self.tensors: Mapping[str, TensorInfo]
            self.tensors, self._offsets = _parse_header(self._file, self._data_start, header)
        except BaseException:
            self._file.close()
            raise

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Float32:
        """Rows `[start, stop)` of the first axis as float32. Thread-safe."""
        info = lookup(self.tensors, name, self.path)
        if info.dtype not in NUMPY_DTYPES:
            raise CheckpointError(
                f"tensor {name!r} has dtype {info.dtype}, which needs scales to be read",
                where=str(self.path),
                expected="one of " + ", ".join(NUMPY_DTYPES),
                found=info.dtype,
                fix="use the model's unquantized (BF16, F16 or F32) checkpoint",
            )
        begin, end = row_range(info, start, stop)
        row = elements(info.shape[1:])
        offset = self._offsets[name] + begin * row * (DTYPE_BITS[info.dtype] // 8)
        flat = read_floats(self._file, offset, (end - begin) * row, info.dtype)
        return flat.reshape((end - begin, *info.shape[1:]) if info.shape else ())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _read_header(file: WeightFile) -> tuple[int, dict[str, Any]]:
    """Byte at which the data starts, and the parsed JSON header."""
    where, name = str(file.path), file.path.name
    if file.size_bytes < 8:
        raise CorruptCheckpoint(
            f"{name} is too short for a safetensors file",
            where=where,
            expected="at least 8 bytes",
            found=f"{file.size_bytes} bytes",
            fix="download or copy the file again",
        )
    length = int.from_bytes(file.read(0, 8), "little")
    if length > min(MAX_HEADER_BYTES, file.size_bytes - 8):
        raise CorruptCheckpoint(
            f"the header of {name} is longer than the file or the format allows",
            where=where,
            expected=f"at most {min(MAX_HEADER_BYTES, file.size_bytes - 8)} bytes",
            found=f"{length} bytes",
            fix="not a safetensors file, or truncated: download or copy it again",
        )
    raw = file.read(8, length)
    if not raw.startswith(b"{"):
        raise CorruptCheckpoint(
            f"the header of {name} is not JSON", where=where, expected="'{'", found=repr(raw[:16])
        )
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(
            f"the header of {name} is not valid JSON", where=where, found=str(error)
        ) from error
    return 8 + length, header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """`object_pairs_hook` that refuses what `json` would silently overwrite."""
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = sorted(key for key, count in Counter(k for k, _ in pairs).items() if count > 1)
        raise ValueError(f"duplicate keys {', '.join(map(repr, twice[:20]))}")
    return result


def _parse_header(
    file: WeightFile, data_start: int, header: dict[str, Any]
) -> tuple[dict[str, TensorInfo], dict[str, int]]:
    """Checks every entry; returns the tensors and their absolute byte offsets."""
    tensors: dict[str, TensorInfo] = {}
    offsets: dict[str, int] = {}
    ranges: list[tuple[int, int, str]] = []
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise CorruptCheckpoint(
            f"__metadata__ of {file.path.name} is not a map", where=str(file.path)
        )
    for name, entry in header.items():
        dtype, shape, begin, end = _parse_entry(file.path, name, entry)
        bits = elements(shape) * DTYPE_BITS[dtype]
        if bits % 8 or bits // 8 != end - begin:
            raise CorruptCheckpoint(
                f"tensor {name!r} has a size that is not its shape's in {file.path.name}",
                where=str(file.path),
                expected=f"{bits / 8:g} bytes for {dtype} {list(shape)}",
                found=f"{end - begin} bytes (data_offsets {[begin, end]})",
            )
        tensors[name] = TensorInfo(name, shape, dtype, end - begin)
        offsets[name] = data_start + begin
        ranges.append((begin, end, name))
    check_ranges(file.path, ranges, file.size_bytes - data_start, holes=False)
    return tensors, offsets


def _parse_entry(path: Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """Types of one header entry: dtype, shape, begin, end."""

    def bad(expected: str, found: object) -> CorruptCheckpoint:
        return CorruptCheckpoint(
            f"tensor {name!r} has a malformed header entry in {path.name}",
            where=str(path),
            expected=expected,
            found=repr(found)[:200],
        )

    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise bad("dtype, shape and data_offsets", entry)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise bad("a dtype of the format: " + ", ".join(DTYPE_BITS), dtype)
    if not isinstance(shape, list) or not valid_shape(shape):
        raise bad("a shape of at most 64 non-negative integers, 2^48 elements", shape)
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(type(o) is int and o >= 0 for o in offsets)
        or offsets[0] > offsets[1]
    ):
        raise bad("data_offsets [begin, end] with begin <= end", offsets)
    return dtype, tuple(shape), offsets[0], offsets[1]
