"""Weights that need not be stored: random values made from a tensor's name and shape."""

from __future__ import annotations

import math
import zlib

import numpy as np


def seeded(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Random values for the tensor of this name: float32, of the spread its kind needs."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    noise = rng.standard_normal(shape, dtype=np.float32)
    if len(shape) > 1:
        return noise * np.float32(1.3 / math.sqrt(shape[-1]))
    return np.float32(1) + np.float32(0.3) * noise if name.endswith("weight") else 0.3 * noise
