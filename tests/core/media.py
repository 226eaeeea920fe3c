"""Pictures, sounds and frames that are the same wherever they are made: arithmetic, no generator.

Shared by the tests and by `tests/goldens/make_preprocessing.py`.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: name -> (height, width)
PICTURES = {
    "landscape": (427, 640),
    "portrait": (1000, 333),
    "sliver": (7, 1000),
    "upright": (400, 3),
    "even": (224, 224),
    "tiny": (5, 8),
}


def noise(shape: tuple[int, ...], seed: int = 0) -> NDArray[np.float64]:
    """Values from 0 to 1, by the mixing step of splitmix64 (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        x = np.arange(1, int(np.prod(shape)) + 1, dtype=np.uint64) + np.uint64(seed << 32)
        x = x * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(11)).reshape(shape) / float(1 << 53)


def picture(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Gradients, noise, a disc and a bar, `(height, width, 3)`."""
    y, x = np.mgrid[:height, :width].astype(np.int64)
    base = np.stack(
        [
            (x * 7 + y * 3 + seed * 40) % 200,
            y * 255 // max(height - 1, 1),
            x * 255 // max(width - 1, 1),
        ],
        axis=-1,
    )
    values = base + np.floor(noise(base.shape, seed) * 48).astype(np.int64) - 24
    disc = (x - width // 3) ** 2 + (y - height // 2) ** 2 < (min(height, width) // 4) ** 2
    values[disc] = (220, 30, 40)
    values[height // 8 : height // 4, width // 2 : width // 2 + width // 5] = (10, 200, 250)
    return np.clip(values, 0, 255).astype(np.uint8)


def frames(count: int) -> list[NDArray[np.uint8]]:
    """Frames of 90 x 120 that differ."""
    return [picture(90, 120, seed) for seed in range(count)]


def speech(rate: int, seconds: float) -> NDArray[np.float32]:
    """A buzz with moving formants, pauses and a little noise, below 7 kHz, `(samples,)`."""
    time = np.arange(round(rate * seconds)) / rate
    phase = 2 * np.pi * (120 * time - 6 * np.cos(4 * time))
    sound = np.zeros(len(time))
    for partial in range(1, 24):
        formant = (partial * 120 - 700 * (1 + np.sin(3 * time) / 2)) / 900
        sound += np.sin(partial * phase) / partial * np.exp(-(formant**2))
    sound *= np.clip(np.sin(8 * time) + 0.3, 0, 1)
    sound += 0.004 * np.sin(2 * np.pi * 6500 * time)
    return (0.25 * sound).astype(np.float32)


def spaced(values: NDArray[Any], count: int = 251) -> NDArray[Any]:
    """About `count` values of an array, evenly spaced with an odd step, the last one included."""
    flat = np.ascontiguousarray(values).reshape(-1)
    step = max(1, flat.size // count) | 1
    return np.append(flat[::step], flat[-1])


def wav(
    data: bytes,
    *,
    kind: int = 1,
    channels: int = 1,
    rate: int = 16000,
    bits: int = 16,
    size: int | None = None,
    before: bytes = b"",
    extensible: bool = False,
    block: int | None = None,
) -> bytes:
    """A WAV file around `data`; `size` is what its data chunk claims."""
    block = channels * bits // 8 if block is None else block
    head = struct.pack(
        "<HHIIHH",
        0xFFFE if extensible else kind,
        channels,
        rate,
        rate * block & 0xFFFFFFFF,
        block,
        bits,
    )
    if extensible:
        guid = struct.pack("<H", kind) + bytes.fromhex("000000001000800000aa00389b71")
        head += struct.pack("<HHI", 22, bits, 0) + guid
    body = b"WAVE" + before + b"fmt " + struct.pack("<I", len(head)) + head
    body += b"data" + struct.pack("<I", len(data) if size is None else size) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body
