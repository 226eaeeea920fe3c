"""`golden.npz`: inputs with the answers that the exported model gave on its host.

A zip of five `.npy` members, written by the exporter, read here with distrust: every member's
size is checked before it is decompressed, every array's type and shape before it is made, and
nothing is unpickled.

    ids     int64 (n,)          the tokens, fed from an empty context
    top1    int32 (n,)          the best next token after each
    margin  float32 (n,)        best minus second best logit
    rows    int64 (r,)          positions whose logits are stored, ascending
    logits  float16 (r, vocab)  their logits, less each row's maximum
"""

from __future__ import annotations

import io
import math
import re
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_mmllm.bundle.reader import read_small
from edge_mmllm.errors import CorruptBundle
from edge_mmllm_runtime.engine import Float32, Int64

#: An export writes 256 tokens and 8 rows; more than these is hostile.
MAX_TOKENS = 4096
MAX_ROWS = 64
#: Room for a `.npy` header: magic, version and a dict of some 80 characters, padded to 64.
_HEADER_BYTES = 1024
#: Room for a member's headers in the zip.
_MEMBER_BYTES = _HEADER_BYTES + 1024
_NPY = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '(<[if][248])', 'fortran_order': False, "
    rb"'shape': \((\d{1,9}), ?(\d{1,9})?\), \} *\n",
    re.DOTALL,
)

_DTYPES = {"ids": "<i8", "top1": "<i4", "margin": "<f4", "rows": "<i8", "logits": "<f2"}


@dataclass(frozen=True)
class Golden:
    """The arrays of a `golden.npz`, checked; `logits` as float32."""

    ids: Int64
    top1: NDArray[np.int32]
    margin: Float32
    rows: Int64
    logits: Float32


def read_golden(path: Path, vocab_size: int, extra_ids: int = 0) -> Golden:
    """Reads and checks golden vectors for a model of `vocab_size`, whose inputs may have
    `extra_ids` more.

    Raises:
        CorruptBundle: not such a file, or at odds with itself or the model.
        UnsafeBundle: not a plain file.
    """
    limits = {
        "ids": MAX_TOKENS * 8,
        "top1": MAX_TOKENS * 4,
        "margin": MAX_TOKENS * 4,
        "rows": MAX_ROWS * 8,
        "logits": MAX_ROWS * vocab_size * 2,
    }
    content = read_small(path, sum(limits.values()) + len(limits) * _MEMBER_BYTES)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            raw = {name: _member(archive, f"{name}.npy", limits[name]) for name in _DTYPES}
        arrays = {name: _array(data, _DTYPES[name]) for name, data in raw.items()}
    except (
        ValueError,
        KeyError,
        EOFError,
        OverflowError,
        RuntimeError,  # an encrypted member; NotImplementedError is one too
        struct.error,
        zlib.error,
        zipfile.BadZipFile,
    ) as error:
        raise _corrupt(path, str(error) or type(error).__name__) from error
    golden = Golden(
        ids=arrays["ids"],
        top1=arrays["top1"],
        margin=arrays["margin"],
        rows=arrays["rows"],
        logits=arrays["logits"].astype(np.float32),
    )
    reason = _objection(golden, vocab_size, extra_ids)
    if reason:
        raise _corrupt(path, reason)
    return golden


def _corrupt(path: Path, found: str) -> CorruptBundle:
    return CorruptBundle(
        "the golden vectors cannot be used",
        where=str(path),
        expected="golden.npz as an export of this release writes it",
        found=found,
        fix="export the checkpoint again",
    )


def _member(archive: zipfile.ZipFile, name: str, limit_bytes: int) -> bytes:
    """A member's bytes; at most `limit_bytes` and a header are ever decompressed."""
    limit_bytes += _HEADER_BYTES
    with archive.open(name) as member:
        data = member.read(limit_bytes + 1)
    if len(data) > limit_bytes:
        raise ValueError(f"{name} holds more than {limit_bytes} bytes")
    return data


def _array(data: bytes, dtype: str) -> NDArray[Any]:
    """The array of a `.npy` file (version 1.0, C order); its size must be that of its data.

    The header is matched, not evaluated as numpy's own reader does.
    Source: numpy.lib.format, "Format Version 1.0".
    """
    match = _NPY.match(data)
    if match is None:
        raise ValueError("not a .npy of version 1.0 in C order, of one or two dimensions")
    begin = match.end()
    if begin != 10 + int.from_bytes(data[8:10], "little") or match[1] != dtype.encode():
        raise ValueError(f"not a .npy of {dtype}")
    shape = tuple(int(size) for size in match.groups()[1:] if size is not None)
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if min(shape) < 1 or size != len(data) - begin:
        raise ValueError(f"shape {shape} over {len(data) - begin} bytes")
    return np.frombuffer(data, dtype, offset=begin).reshape(shape)


def _objection(golden: Golden, vocab_size: int, extra_ids: int) -> str | None:
    """What is wrong with arrays of the right types, if anything."""
    ids, rows = golden.ids, golden.rows
    n = len(ids)
    shapes = ((n,), (n,), (n,), (len(rows),), (len(rows), vocab_size))
    for name, shape in zip(_DTYPES, shapes, strict=True):
        if getattr(golden, name).shape != shape:
            return f"{name} of shape {getattr(golden, name).shape}, not {shape}"
    if ids.min() < 0 or ids.max() >= vocab_size + extra_ids:
        return "ids outside the vocabulary"
    if golden.top1.min() < 0 or golden.top1.max() >= vocab_size:
        return "top1 outside the vocabulary"
    if not (np.isfinite(golden.margin).all() and golden.margin.min() >= 0):
        return "a margin that is negative or not finite"
    if rows[0] < 0 or rows[-1] >= n or (np.diff(rows) <= 0).any():
        return "rows that are not ascending positions"
    if not np.isfinite(golden.logits).all():
        return "logits that are not finite"
    return None
