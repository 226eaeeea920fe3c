"""Tiny encoders whose weights come from their names, so that only shapes need to be stored.

`make_encoders.py` writes `tests/goldens/encoders/NAME.json` (config and tensors of the published
layout) and `NAME.npz` (what transformers computes); the tests write the same checkpoint again.
numpy's RandomState keeps its streams for ever (NEP 19).
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

FOLDER = Path(__file__).resolve().parents[1] / "goldens" / "encoders"
#: Tensors of one axis named so are not near 1.
_BIAS = ("bias", "embedding", "token", "probe")


def noise(name: str, *shape: int) -> NDArray[np.float32]:
    """Normal numbers, the same for a name always."""
    return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype("f")


def weight(name: str, shape: list[int]) -> NDArray[np.float32]:
    """A value for a tensor of a checkpoint that shows when it is wrong or forgotten."""
    x = noise(name, *shape)
    if name.endswith(("embedding", "embeddings", "token", "probe")) or "position" in name:
        return 0.7 * x
    if len(shape) == 1 and not name.endswith(_BIAS):  # norms and scales of branches
        return 1 + 0.3 * x
    if len(shape) <= 1 or "gate" in name.rsplit(".", 1)[-1]:
        return 0.3 * x
    return x * np.float32(1.3 / np.sqrt(np.prod(shape[1:])))


def read(name: str) -> dict[str, Any]:
    """`config` and `tensors` (name -> shape) of a reference."""
    entry: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return entry


def write(folder: Path, config: dict[str, Any], tensors: dict[str, list[int]], prefix: str) -> None:
    """A checkpoint folder; `prefix` goes before each name."""
    arrays = {prefix + name: weight(name, shape) for name, shape in tensors.items()}
    save_file(arrays, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
