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

The K and I types, whose arithmetic is llama.cpp's (`gguf.mixes`), are known here by their sizes.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from edge_mmllm.errors import ExportError
from edge_mmllm_export.checkpoints.base import Float32
from edge_mmllm_export.quantize.blocks import pack_nibbles, quantize
from edge_mmllm_export.quantize.schemes import Scheme

GgufType = Literal["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]
#: What llama.cpp quantizes to: types of tensors, and files that mix them by its own rules.
#: Left out: ternary types and MXFP4, for models that were trained so.
Mix = Literal[
    "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K", "Q2_K_S",
    "IQ4_NL", "IQ4_XS", "IQ3_M", "IQ3_S", "IQ3_XS", "IQ3_XXS", "IQ2_M", "IQ2_S", "IQ2_XS",
    "IQ2_XXS", "IQ1_M", "IQ1_S",
]  # fmt: skip
GgufWord = Literal[GgufType, Mix]
#: Types that a tensor may have.
Kind = Literal[
    GgufType, "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "IQ4_NL", "IQ4_XS", "IQ3_S", "IQ3_XXS",
    "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S",
]  # fmt: skip
WORDS: tuple[GgufWord, ...] = get_args(GgufType) + get_args(Mix)
MIXES: tuple[Mix, ...] = get_args(Mix)
KINDS: tuple[Kind, ...] = get_args(Kind)
PLAIN: tuple[GgufType, ...] = get_args(GgufType)
#: Files that cannot be made without an importance matrix.
#: Source: `tensor_requires_imatrix` in llama.cpp's src/llama-quant.cpp.
NEED_IMATRIX = frozenset(
    ("Q2_K_S", "IQ3_XS", "IQ3_XXS", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S")
)
#: Types of tensors that cannot: but for embedding and head.
KINDS_NEED_IMATRIX = frozenset(("IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"))

BLOCK = 32
#: Bits of one weight, without its share of scales and minima.
BITS: dict[Kind, int] = {
    "F32": 32, "F16": 16, "BF16": 16, "Q8_0": 8, "Q5_1": 5, "Q5_0": 5, "Q4_1": 4, "Q4_0": 4,
    "Q6_K": 6, "Q5_K": 5, "Q4_K": 4, "Q3_K": 3, "Q2_K": 2, "IQ4_NL": 4, "IQ4_XS": 4, "IQ3_S": 3,
    "IQ3_XXS": 3, "IQ2_S": 2, "IQ2_XS": 2, "IQ2_XXS": 2, "IQ1_M": 1, "IQ1_S": 1,
}  # fmt: skip
#: Weights and bytes of a block.
_BLOCKS: dict[Kind, tuple[int, int]] = {
    "Q8_0": (32, 34), "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24),
    "Q6_K": (256, 210), "Q5_K": (256, 176), "Q4_K": (256, 144), "Q3_K": (256, 110),
    "Q2_K": (256, 84), "IQ4_NL": (32, 18), "IQ4_XS": (256, 136), "IQ3_S": (256, 110),
    "IQ3_XXS": (256, 98), "IQ2_S": (256, 82), "IQ2_XS": (256, 74), "IQ2_XXS": (256, 66),
    "IQ1_M": (256, 56), "IQ1_S": (256, 50),
}  # fmt: skip
#: Blocks with a minimum of their own.
_ASYMMETRIC = frozenset(("Q4_1", "Q5_1", "Q5_K", "Q4_K", "Q2_K"))
_LARGEST = float(np.finfo(np.float16).max)

Bytes = NDArray[np.uint8]


def row_bytes(kind: Kind, k: int) -> int:
    """Stored bytes of a row of k weights."""
    if kind not in _BLOCKS:
        return k * BITS[kind] // 8
    size, stored = _BLOCKS[kind]
    return k // size * stored


def block_size(kind: Kind) -> int | None:
    """Weights in a block; None of plain numbers."""
    return _BLOCKS[kind][0] if kind in _BLOCKS else None


def symmetric(kind: Kind) -> bool | None:
    """Whether a block has no minimum of its own; None of plain numbers."""
    return kind not in _ASYMMETRIC if kind in _BLOCKS else None


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
