"""Block quantization of float32 tiles, round to nearest with a search for the best scale.

For each block of weights w the search tries a few scales; each gives integers q by rounding, and
then the least-squares scale of those integers, d = sum(w q) / sum(q q), whose squared error is
sum(w w) - sum(w q)^2 / sum(q q). The candidate with the smallest error wins.
Source: the idea of `make_qx_quants` in llama.cpp (ggml-quants.c), written anew for numpy.

Work is done on `(block_size, blocks)` arrays, so that every reduction runs across contiguous
memory, in pieces that stay in a core's L2 cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edge_mmllm_export.quantize.schemes import Scheme

Float32 = NDArray[np.float32]
UInt8 = NDArray[np.uint8]

#: Candidate divisors of the largest weight of a symmetric block, as multiples of 2^(bits-1).
_SYMMETRIC_SEARCH = (1.0, 0.95, 0.9, 0.85, 1.07, 1.14)
#: Candidate shrinkings of an asymmetric block's range.
_ASYMMETRIC_SEARCH = (1.0, 0.95, 0.9, 0.85, 0.8)
#: Elements in one piece of work: four or five float32 temporaries of it fit a 1 MB L2 cache.
_PIECE = 1 << 15
#: A block whose weights (or, with a minimum, their range) are smaller counts as zero (as
#: constant): the inverse of its scale would overflow float32.
_TINY = np.float32(1e-30)


@dataclass(frozen=True)
class Quantized:
    """Rows of a weight in blocks along K.

    Attributes:
        q: uint8 `(rows, blocks, block_size)`, one value a byte, not yet packed.
        scale: float32 `(rows, blocks)`.
        zero: float32 `(rows, blocks)` or None for the symmetric 2^(bits-1).
    """

    q: UInt8
    scale: Float32
    zero: Float32 | None


def quantize(tile: Float32, scheme: Scheme) -> Quantized:
    """Quantize rows `(rows, K)`; K is padded to whole blocks.

    Floats (`f16`, `f32`) come back as one block a row, in the `scale` field, rounded to their
    type, so that `dequantize` shows what a device will see.
    """
    rows, k = tile.shape
    if not scheme.quantized:
        stored = tile if scheme.bits == 32 else _to_f16(tile).astype(np.float32)
        return Quantized(np.empty((0, 0, 0), np.uint8), stored, None)
    size = scheme.block_size
    blocks = -(-k // size)
    if short := k % size:
        # What is beyond K is multiplied by nothing. With a minimum, zeros would widen the range:
        # the block repeats itself.
        mode: Literal["wrap", "constant"] = "wrap" if scheme.zero == "float" else "constant"
        last = np.pad(tile[:, k - short :], ((0, 0), (0, size - short)), mode=mode)
        tile = np.concatenate([tile[:, : k - short], last], axis=1)
    flat = tile.reshape(rows * blocks, size)
    q = np.empty((rows * blocks, size), np.uint8)
    scale = np.empty(rows * blocks, np.float32)
    zero = None if scheme.zero == "none" else np.empty(rows * blocks, np.float32)
    step = max(1, _PIECE // size)
    for start in range(0, rows * blocks, step):
        piece = slice(start, min(start + step, rows * blocks))
        w = np.ascontiguousarray(flat[piece].T)
        if zero is None:
            codes, scale[piece] = _symmetric(w, scheme.bits)
        else:
            codes, scale[piece], zero[piece] = _asymmetric(w, scheme)
        q[piece] = codes.T
    shape = (rows, blocks)
    return Quantized(
        q.reshape(rows, blocks, size),
        scale.reshape(shape),
        None if zero is None else zero.reshape(shape),
    )


def dequantize(blocks: Quantized, scheme: Scheme, k: int) -> Float32:
    """The float32 rows `(rows, k)` that a device computes with."""
    if not scheme.quantized:
        return blocks.scale
    zero = np.float32(1 << (scheme.bits - 1)) if blocks.zero is None else blocks.zero[..., None]
    w = (blocks.q.astype(np.float32) - zero) * blocks.scale[..., None]
    return np.ascontiguousarray(w.reshape(w.shape[0], -1)[:, :k])


def pack_nibbles(q: UInt8) -> UInt8:
    """Two 4-bit values a byte along the last axis, the first in the low bits."""
    packed: UInt8 = q[..., 0::2] | (q[..., 1::2] << np.uint8(4))
    return packed


def _to_f16(tile: Float32) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):
        return np.clip(tile, -65504.0, 65504.0).astype(np.float16)


def _symmetric(w: Float32, bits: int) -> tuple[UInt8, Float32]:
    """`(block, n)` -> codes uint8 `(block, n)`, scale `(n,)`; w ~ (code - half) * scale."""
    half = np.float32(1 << (bits - 1))
    high = w.max(axis=0)
    low = w.min(axis=0)
    if bits == 8:
        # Symmetric in [-127, 127]: nothing to search at this width.
        largest = np.maximum(high, -low)
        scale = _to_half(largest / np.float32(127.0))
        inverse = np.divide(1.0, scale, out=np.zeros_like(scale), where=scale > 0)
        codes = w * inverse
        np.rint(codes, out=codes)
        codes += half
        return codes.astype(np.uint8), scale
    # The largest weight by magnitude, with its sign, goes to -half, the one code more.
    peak = np.where(high > -low, high, low)
    inverse_peak = np.divide(-half, peak, out=np.zeros_like(peak), where=abs(peak) > _TINY)
    best_gain = np.full(w.shape[1], -1.0, np.float32)
    best_scale = np.zeros(w.shape[1], np.float32)
    q = np.empty_like(w)
    product = np.empty_like(w)
    for factor in _SYMMETRIC_SEARCH:
        inverse = inverse_peak * np.float32(factor)
        _round_to_codes(w, inverse, half, out=q)
        dot = np.multiply(w, q, out=product).sum(axis=0)
        norm = np.multiply(q, q, out=product).sum(axis=0)
        scale = np.divide(dot, norm, out=np.zeros_like(dot), where=norm > 0)
        gain = dot * scale
        better = gain > best_gain
        np.copyto(best_gain, gain, where=better)
        np.copyto(best_scale, scale, where=better)
    best_scale = _to_half(best_scale)
    inverse = np.divide(1.0, best_scale, out=np.zeros_like(best_scale), where=best_scale != 0)
    _round_to_codes(w, inverse, half, out=q)
    q += half
    return q.astype(np.uint8), best_scale


def _to_half(scale: Float32) -> Float32:
    """Scales as float16 holds them, which is how they are stored, as GGUF's are. One beyond its
    range stays, for whoever stores it to refuse."""
    rounded = _to_f16(scale).astype(np.float32)
    return np.where(np.abs(scale) > np.finfo(np.float16).max, scale, rounded).astype(np.float32)


def _round_to_codes(w: Float32, inverse: Float32, half: np.float32, *, out: Float32) -> None:
    """Signed codes in [-half, half - 1]."""
    np.multiply(w, inverse, out=out)
    np.rint(out, out=out)
    np.maximum(out, -half, out=out)
    np.minimum(out, half - 1, out=out)


def _asymmetric(w: Float32, scheme: Scheme) -> tuple[UInt8, Float32, Float32]:
    """`(block, n)` -> codes, scale, zero `(n,)`; w ~ (code - zero) * scale.

    `int` zeros are whole numbers in [0, top], so zero itself is always exact.
    """
    top = np.float32((1 << scheme.bits) - 1)
    high, low = w.max(axis=0), w.min(axis=0)
    whole = scheme.zero == "int"
    if whole:
        high, low = np.maximum(high, 0), np.minimum(low, 0)
    middle, radius = (high + low) / 2, (high - low) / 2
    best = [np.zeros_like(w), np.zeros_like(high), np.zeros_like(high)]
    best_error = np.full(w.shape[1], np.inf, np.float32)
    scratch = np.empty_like(w)
    for factor in _ASYMMETRIC_SEARCH:
        bottom = middle - radius * np.float32(factor)
        scale = radius * np.float32(2 * factor / top)
        if whole:
            scale = _to_half(scale)
        inverse = np.divide(1.0, scale, out=np.zeros_like(scale), where=scale > _TINY)
        if whole:
            zero = np.clip(np.rint(-bottom * inverse), 0, top)
        else:
            # A block of one value: scale 0 would lose it, so it becomes 0 - (-1) * value.
            scale = np.where(inverse > 0, scale, np.where(low != 0, low, 1)).astype(np.float32)
            zero = np.where(inverse > 0, -bottom * inverse, np.where(low != 0, -1, 0))
            zero = zero.astype(np.float32)
        q = w * inverse
        q += zero if whole else np.where(inverse > 0, zero, 0)
        np.rint(q, out=q)
        np.clip(q, 0, top, out=q)
        np.subtract(q, zero, out=scratch)
        scratch *= scale
        scratch -= w
        np.multiply(scratch, scratch, out=scratch)
        error = scratch.sum(axis=0)
        better = error < best_error
        np.copyto(best_error, error, where=better)
        for kept, new in zip(best, (q, scale, zero), strict=True):
            np.copyto(kept, new, where=better)
    return best[0].astype(np.uint8), best[1], best[2]
