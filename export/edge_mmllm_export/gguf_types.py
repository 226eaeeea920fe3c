"""GGUF's block types, written from float32 rows.

Blocks of 32 weights along K, little-endian, scales (d) and minima (m) float16:

| type | bytes a block | layout | value |
|---|---|---|---|
| Q8_0 | 34 | d, 32 int8 | q d |
| Q4_0 | 18 | d, 16 bytes: low nibbles weights 0 to 15, high ones 16 to 31 | (q - 8) d |
| Q4_1 | 20 | d, m, nibbles | q d + m |
| Q5_0 | 22 | d, uint32 of fifth bits, nibbles | (q - 16) d |
| Q5_1 | 24 | d, m, uint32 of fifth bits, nibbles | q d + m |

Source: ggml-common.h. The scales are searched as for every other format (`quantize.blocks`).
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edge_mmllm.errors import ExportError
from edge_mmllm_export.checkpoints.base import Float32
from edge_mmllm_export.quantize.blocks import pack_nibbles, quantize
from edge_mmllm_export.quantize.schemes import Scheme

GgufType = Literal["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]
BLOCK = 32
#: Bits of one weight, without its share of scales and minima.
BITS: dict[GgufType, int] = {
    "F32": 32, "F16": 16, "BF16": 16, "Q8_0": 8, "Q5_1": 5, "Q5_0": 5, "Q4_1": 4, "Q4_0": 4,
}  # fmt: skip
_BLOCK_BYTES: dict[GgufType, int] = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24}
_LARGEST = float(np.finfo(np.float16).max)

Bytes = NDArray[np.uint8]


def row_bytes(kind: GgufType, k: int) -> int:
    """Stored bytes of a row of k weights."""
    if kind in _BLOCK_BYTES:
        return k // BLOCK * _BLOCK_BYTES[kind]
    return k * BITS[kind] // 8


def encode(rows: Float32, kind: GgufType) -> Bytes:
    """Rows `(rows, K)` -> stored bytes `(rows, row_bytes)`.

    Raises:
        ExportError: a value or scale beyond float16.
    """
    if kind == "F32":
        return _raw(np.ascontiguousarray(rows, "<f4"))
    if kind == "F16":
        return _raw(_half(rows, kind))
    if kind == "BF16":
        return _raw(_bfloat16(rows))
    if kind in ("Q4_1", "Q5_1"):
        return _with_minimum(rows, kind)
    bits = BITS[kind]
    blocks = quantize(rows, Scheme(bits, BLOCK))
    d = _raw(_half(blocks.scale[..., None], kind))
    if kind == "Q8_0":
        codes = (blocks.q.astype(np.int16) - 128).astype(np.int8).view(np.uint8)
        return _joined(d, codes)
    return _joined(d, *_codes(blocks.q, bits))


def _with_minimum(rows: Float32, kind: GgufType) -> Bytes:
    """The search's scale and minimum, rounded to what is stored, and the codes nearest to that."""
    bits = BITS[kind]
    blocks = quantize(rows, Scheme(bits, BLOCK, "float"))
    assert blocks.zero is not None  # noqa: S101 - for the type checker: the scheme has one
    d = _half(blocks.scale, kind)
    m = _half(-blocks.zero * blocks.scale, kind)
    scale, minimum = d.astype(np.float32)[..., None], m.astype(np.float32)[..., None]
    q = rows.reshape(blocks.q.shape) - minimum
    q *= np.divide(1.0, scale, out=np.zeros_like(scale), where=scale != 0)
    codes = np.clip(np.rint(q), 0, (1 << bits) - 1).astype(np.uint8)
    return _joined(_raw(d[..., None]), _raw(m[..., None]), *_codes(codes, bits))


def _codes(q: Bytes, bits: int) -> tuple[Bytes, ...]:
    """`(rows, blocks, 32)` -> fifth bits where there are any, nibbles `(rows, blocks, 16)`."""
    half = BLOCK // 2
    pairs = np.stack([q[..., :half] & 15, q[..., half:] & 15], axis=-1)
    nibbles = pack_nibbles(pairs.reshape(q.shape))
    if bits == 4:
        return (nibbles,)
    return np.packbits(q >> 4, axis=-1, bitorder="little"), nibbles


def _joined(*fields: Bytes) -> Bytes:
    """Fields `(rows, blocks, bytes)` of each block one after another, blocks in a row."""
    out = np.concatenate(fields, axis=-1)
    return out.reshape(out.shape[0], -1)


def _raw(values: NDArray[Any]) -> Bytes:
    return values.view(np.uint8)


def _half(values: Float32, kind: str) -> NDArray[np.float16]:
    if values.size and max(float(values.max()), -float(values.min())) > _LARGEST:
        raise ExportError(
            f"a weight is too large for {kind}",
            expected=f"values and scales up to {_LARGEST:g}, as float16 holds",
            found=f"{float(np.abs(values).max()):g}",
            fix="--gguf-type BF16 or F32",
        )
    return np.ascontiguousarray(values, "<f2")


def _bfloat16(rows: Float32) -> NDArray[np.uint16]:
    """Round to nearest, ties to even."""
    bits = np.ascontiguousarray(rows, np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded >> np.uint32(16)).astype("<u2")
