"""What every checkpoint reader offers: names, shapes, and float32 rows on demand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from edge_mmllm.spec import TextSpec

Float32 = NDArray[np.float32]
Layout = Literal["hub", "pth", "gguf"]


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as stored.

    Attributes:
        shape: row-major (numpy) order; GGUF's reversed order is turned round by its reader.
        dtype: as the format names it, e.g. `F32`, `BF16`, `Q4_1`.
        size_bytes: stored bytes.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    size_bytes: int


@dataclass(frozen=True)
class TextAssets:
    """What a checkpoint says about text: settings, and the tokenizer's file where there is one
    (`tokenizer.json`, or the vocabulary of kind `rwkv-world`)."""

    spec: TextSpec
    tokenizer_json: bytes | None = None


class Checkpoint(Protocol):
    """An opened checkpoint. Nothing is loaded until `read`; `read` uses pread, not mapped pages,
    so that peak RSS stays near the size of the rows asked for.
    """

    source: Path
    layout: Layout

    @property
    def config(self) -> dict[str, Any]:
        """`config.json` (hub), the metadata (GGUF) or `{}` (a lone `.pth` without one)."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by its stored name."""
        ...

    @property
    def files(self) -> tuple[Path, ...]:
        """The weight files, for hashing."""
        ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Float32:
        """Rows `[start, stop)` of the first axis as C-contiguous float32 (a scalar: shape `()`).

        Thread-safe. Raises: CorruptCheckpoint.
        """
        ...

    def text(self) -> TextAssets:
        """Tokenizer, special ids, chat template. A source without a tokenizer: kind `none`."""
        ...

    def close(self) -> None: ...
