"""mlc-llm's numbers, against its formula written down here element by element."""

from __future__ import annotations

import numpy as np
import pytest

from edge_mmllm.errors import ExportError
from edge_mmllm_export.mlc.quant import quantize, stored_scales
from edge_mmllm_runtime.mlc.weights import (
    QUANTIZATIONS,
    dequantize,
    from_bfloat16,
    to_bfloat16,
)

#: Name -> bits, weights that share a scale, type of the arithmetic.
FACTS = {
    "q4f16_1": (4, 32, np.float16),
    "q4f16_0": (4, 32, np.float16),
    "q4f32_1": (4, 32, np.float32),
    "q3f16_1": (3, 40, np.float16),
}


def weights(rows=24, k=200, seed=0):
    """Rows of all magnitudes, and rows at the edges: ties, zeros, what float16 loses."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((rows, k)).astype(np.float32)
    w *= 10.0 ** rng.integers(-6, 3, (rows, 1))
    w[0] = 0
    w[1] = (np.arange(k) % 29 - 14) * 0.5  # quotients that end in .5
    w[2] = 0
    w[2, ::7] = 7
    w[3] = 1e-7 * np.arange(k)  # subnormal in float16
    w[4] = 3e-8  # a scale that float16 rounds to 0
    return w.astype(np.float32)


def by_the_formula(w, name):
    """Codes and scales one by one, each operation rounded to the type."""
    bits, group, kind = FACTS[name]
    zero = kind(2 ** (bits - 1) - 1)
    per_word = 32 // bits
    groups = -(-w.shape[1] // group)
    words = np.zeros((len(w), groups * group // per_word), np.uint32)
    scales = np.zeros((len(w), groups), kind)
    with np.errstate(all="ignore"):
        for n, row in enumerate(w.astype(kind)):
            for g in range(groups):
                part = row[g * group : (g + 1) * group]
                scale = scales[n, g] = kind(np.abs(part).max() / zero)
                for i, value in enumerate(part):
                    x = float(kind(kind(value / scale) + zero))
                    code = 0 if np.isnan(x) else round(min(max(x, -1), 99))  # halves to even
                    code = min(max(code, 0), int(2 * zero))
                    at = g * group + i
                    words[n, at // per_word] |= np.uint32(code << (at % per_word * bits))
    return words, scales.astype(np.float32)


@pytest.mark.parametrize("k", [200, 96, 33])
@pytest.mark.parametrize("name", FACTS)
def test_the_numbers_are_mlc_llms(name, k):
    w = weights(k=k)
    words, scales = quantize(w, QUANTIZATIONS[name])
    expected_words, expected_scales = by_the_formula(w, name)
    np.testing.assert_array_equal(scales, expected_scales)
    np.testing.assert_array_equal(words, expected_words)


@pytest.mark.parametrize("searched", [False, True])
@pytest.mark.parametrize("name", FACTS)
def test_the_error_is_within_half_a_step(name, searched):
    """Of the largest weight of a group: half a scale, and what scales lose when stored."""
    bits, group, _ = FACTS[name]
    w = np.random.default_rng(1).standard_normal((64, 4 * group)).astype(np.float32)
    quant = QUANTIZATIONS[name]
    words, scales = quantize(w, quant, searched=searched)
    values = dequantize(words, stored_scales(scales, quant), w.shape[1], quant)
    largest = np.abs(w.reshape(64, 4, group)).max(axis=2)
    error = np.abs(values - w).reshape(64, 4, group)
    # A searched scale may leave the largest weight out by a whole step.
    bound = largest * ((1.3 if searched else 0.55) / (2 ** (bits - 1) - 1))
    assert (error.max(axis=2) <= bound).all()
    assert error.max() > 0


def test_a_search_is_better():
    w = np.random.default_rng(2).standard_normal((64, 256)).astype(np.float32)
    quant = QUANTIZATIONS["q4f16_1"]

    def error(searched):
        words, scales = quantize(w, quant, searched=searched)
        return float(((dequantize(words, scales, 256, quant) - w) ** 2).mean())

    assert error(True) < 0.9 * error(False)


def test_a_weight_beyond_float16_is_refused():
    w = np.full((1, 32), 1e5, np.float32)
    with pytest.raises(ExportError, match="float16"):
        quantize(w, QUANTIZATIONS["q4f16_1"])
    quantize(w, QUANTIZATIONS["q4f32_1"])


def test_bfloat16_rounds_to_even_and_never_to_infinity():
    def bits(value):
        return int(np.array([value], np.float32).view(np.uint32)[0])

    def shortened(value):
        """By arithmetic on Python's integers."""
        whole = bits(value)
        if abs(value) >= np.uint32([0x7F7F0000]).view(np.float32)[0]:
            return whole >> 16
        low, high = whole & 0xFFFF, whole >> 16
        up = low > 0x8000 or (low == 0x8000 and high & 1)
        return high + up

    largest = float(np.finfo(np.float32).max)
    ties = np.array([0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001], np.uint32).view(np.float32)
    values = [0.0, -0.0, 1e-40, 1.0, -3.14159, 65504.0, largest, -largest, 3.39e38, *ties.tolist()]
    found = to_bfloat16(np.array(values, np.float32))
    assert found.tolist() == [shortened(v) for v in values]
    assert np.isfinite(from_bfloat16(found)).all()
    assert from_bfloat16(found)[3] == 1.0
