"""A checkpoint held in memory, and weights of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edge_mmllm.spec import TextSpec
from edge_mmllm_export.checkpoints.base import TensorInfo, TextAssets
from edge_mmllm_export.quantize.schemes import F32, Scheme
from edge_mmllm_export.weights import Role, Source, Weight


class MemoryCheckpoint:
    """Keeps the `Checkpoint` protocol over a dict of float32 arrays."""

    layout = "hub"
    source = Path("memory")
    config: dict = {}  # noqa: RUF012
    files = ()

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self.arrays = arrays
        self.tensors = {n: TensorInfo(n, a.shape, "F32", a.nbytes) for n, a in arrays.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        array = self.arrays[name]
        return np.ascontiguousarray(array[start:stop] if array.ndim else array, np.float32)

    def text(self) -> TextAssets:
        return TextAssets(TextSpec("none"))

    def close(self) -> None:
        pass


def weight(
    array: np.ndarray, scheme: Scheme = F32, role: Role = "matrix", name: str = "w"
) -> Weight:
    """An array as a bound weight."""
    return Weight(name, array.shape, role, MemoryCheckpoint({name: array}), Source(name), scheme)
