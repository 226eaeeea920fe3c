"""Rotary position frequencies of published configs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_mmllm.errors import CheckpointError, UnsupportedArchitecture
from edge_mmllm_export.models.config import Fields

Float32 = NDArray[np.float32]
_ORIGINAL = "original_max_position_embeddings"


def inverse_frequencies(theta: float, dim: int) -> Float32:
    """`theta^(-2i/dim)`, float32 `(dim / 2,)`. Source: RoFormer, arXiv 2104.09864."""
    exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return np.asarray(1.0 / np.float32(theta) ** exponent, np.float32)


def scaled_frequencies(theta: float, dim: int, scaling: dict[str, Any], where: str) -> Float32:
    """Frequencies under a config's `rope_scaling` (or `rope_parameters`).

    Raises:
        UnsupportedArchitecture: a scaling with no definition here.
        CheckpointError: numbers that give none.
    Source: `modeling_rope_utils` of transformers 5.23 for `linear` and `llama3`.
    """
    inv_freq = inverse_frequencies(theta, dim)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    fields = Fields(scaling, f"{where}, rope_scaling")
    if fields.number("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedArchitecture("rope over a part of each head", where=fields.where)
    if kind == "default":
        return inv_freq
    if kind == "linear":
        return inv_freq / np.float32(fields.number("factor", positive=True))
    if kind == "llama3":
        return _llama3(inv_freq, fields)
    raise UnsupportedArchitecture(
        f"rope scaling {kind!r} has no definition here",
        where=where,
        expected="default | linear | llama3",
        found=str(kind),
    )


def _llama3(inv_freq: Float32, fields: Fields) -> Float32:
    """Low frequencies divided by `factor`, high ones kept, a ramp between (Llama 3.1)."""
    factor, low, high, original = (
        fields.number(key, positive=True)
        for key in ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL)
    )
    if low >= high:
        raise CheckpointError(
            "the rope scaling has no range between its frequencies",
            where=fields.where,
            expected="low_freq_factor below high_freq_factor",
            found=f"{low:g} and {high:g}",
        )
    wavelength = 2 * math.pi / inv_freq
    smooth = (original / wavelength - low) / (high - low)
    ramp = (1 - smooth) * inv_freq / factor + smooth * inv_freq
    scaled = np.where(wavelength > original / low, inv_freq / factor, inv_freq)
    medium = (wavelength <= original / low) & (wavelength >= original / high)
    return np.where(medium, ramp, scaled).astype(np.float32)
