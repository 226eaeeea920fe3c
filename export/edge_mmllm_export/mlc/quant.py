"""mlc-llm's group quantization, number for number.

Each group of weights w along K has `scale = max|w| / zero`, `zero = 2^(bits-1) - 1`, and codes
`clip(round(w / scale + zero), 0, 2 zero)`, halves to even. mlc-llm computes in the type that the
quantization names: with float16 the weights, the scale, the quotient and the sum are each rounded
to it, which decides some codes. A group of zeros has scale 0 and codes 0.

A reader asks no more than `w = (code - zero) * scale`. So for models that mlc-llm does not have,
four bits take the scales that every format here is searched for (`quantize.blocks`): all sixteen
codes, and a third less divergence.

Source: mlc-llm, `quantization/group_quantization.py`; compared with what tvm compiles of it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge_mmllm.errors import ExportError
from edge_mmllm_export.checkpoints.base import Float32
from edge_mmllm_export.quantize import blocks
from edge_mmllm_export.quantize.schemes import Scheme
from edge_mmllm_runtime.mlc.weights import Quantization, from_bfloat16, to_bfloat16

UInt32 = NDArray[np.uint32]

_LARGEST = float(np.finfo(np.float16).max)
#: Weights quantized at a time: temporaries of them fit a 1 MB L2 cache.
_PIECE = 1 << 15


def quantize(
    rows: Float32, quant: Quantization, *, searched: bool = False
) -> tuple[UInt32, Float32]:
    """Float32 `(N, K)` -> words uint32 `(N, words)` and scales float32 `(N, groups)`.

    The scales are those the codes were made with: of a float32 quantization they lose bits when
    they are stored (`stored_scales`).

    Args:
        searched: search for scales, where there are 4 bits, instead of mlc-llm's numbers.

    Raises:
        ExportError: a weight beyond float16, where the quantization computes in it.
    """
    n, k = rows.shape
    if searched and quant.bits == 4:
        found = blocks.quantize(rows, Scheme(4, quant.group))
        # (q - 8) s = (15 - q - 7) (-s)
        return _packed(15 - found.q.reshape(n, -1), quant), -found.scale
    groups, short = quant.groups(k), k % quant.group
    if short:
        rows = np.pad(rows, ((0, 0), (0, quant.group - short)))
    flat = rows.reshape(n * groups, quant.group)
    words = np.empty((n * groups, quant.group // quant.a_word), np.uint32)
    scale = np.empty(n * groups, np.float32)
    step = max(1, _PIECE // quant.group)
    for start in range(0, len(flat), step):
        piece = slice(start, start + step)
        # One group a column, so that every reduction runs along contiguous memory.
        columns, scale[piece] = _words(np.ascontiguousarray(flat[piece].T), quant)
        words[piece] = columns.T
    words = words.reshape(n, groups, -1)
    if short:
        kept = np.zeros((1, quant.group), np.uint8)
        kept[:, :short] = (1 << quant.bits) - 1
        words[:, -1] &= _packed(kept, quant)
    return words.reshape(n, -1), scale.reshape(n, groups)


def _words(w: Float32, quant: Quantization) -> tuple[UInt32, Float32]:
    """Groups `(group, n)` -> words `(words, n)`, scales `(n,)`. Raises: ExportError."""
    zero = np.float32(quant.zero)
    if quant.half:
        w = half(w)
    scale = np.maximum(w.max(axis=0), -w.min(axis=0)) / zero
    if quant.half:
        scale = scale.astype(np.float16).astype(np.float32)
    # A scale that float16 rounds to 0 makes infinities, and 0 / 0: the code of that is 0.
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        x = w / scale
    if quant.half:
        _round_to_half(x)
    x += zero
    if quant.half:
        _round_to_half(x)
    np.rint(x, out=x)
    np.minimum(x, 2 * zero, out=x)
    np.maximum(x, 0, out=x)
    if not scale.all():
        np.nan_to_num(x, copy=False, nan=0)
    codes = x.astype(np.uint32).reshape(-1, quant.a_word, w.shape[1])
    words = codes[:, 0]
    for i in range(1, quant.a_word):
        words |= codes[:, i] << np.uint32(i * quant.bits)
    return words, scale


def _round_to_half(x: Float32) -> None:
    """To the 11 significant bits of float16, in place; exponents are left as they are (quotients
    below float16's smallest vanish in the sum that follows)."""
    bits = x.view(np.uint32)
    bits += ((bits >> np.uint32(13)) & np.uint32(1)) + np.uint32(0xFFF)
    bits &= np.uint32(0xFFFFE000)


def _packed(codes: NDArray[np.uint8], quant: Quantization) -> UInt32:
    """`(N, K)` -> words, lowest K in the lowest bits."""
    parts = codes.reshape(len(codes), -1, quant.a_word)
    words = np.zeros(parts.shape[:2], np.uint32)
    for i in range(quant.a_word):
        words |= parts[..., i].astype(np.uint32) << np.uint32(i * quant.bits)
    return words


def half(values: Float32) -> Float32:
    """As float16 holds them. Raises: ExportError."""
    if np.abs(values).max(initial=0) > _LARGEST:
        raise ExportError(
            "a weight cannot be stored as float16",
            expected=f"at most {_LARGEST:g}",
            found=f"{np.abs(values).max():g}",
            fix="--mlc-quant q4f32_1 or q0f32",
        )
    return values.astype(np.float16).astype(np.float32)


def brief(values: Float32) -> Float32:
    """As bfloat16 holds them."""
    return from_bfloat16(to_bfloat16(values))


def stored_scales(scale: Float32, quant: Quantization) -> Float32:
    """Scales as the files hold them: float16, or float32 shortened to bfloat16."""
    return scale if quant.half else brief(scale)
