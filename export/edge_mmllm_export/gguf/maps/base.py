"""What a definition's GGUF map is made of.

A map says, for one definition, which of our weights make each tensor of a GGUF file, and the
metadata that llama.cpp builds its graph from. It lies beside the definitions as their weight maps
do: the numbers are the definition's, only names and shapes are the format's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NoReturn

import numpy as np
from numpy.typing import NDArray

from edge_mmllm.errors import UnsupportedArchitecture

#: The least a tensor may be stored in, whatever was asked: `float32` where llama.cpp computes with
#: nothing else, `float16` for adapters, `byte` (8 bits) for what a recurrence is sensitive to.
Hold = Literal["float32", "float16", "byte", "none"]
Value = bool | int | float | str | list[int] | list[float]


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of the file.

    Attributes:
        name: as llama.cpp asks for it, e.g. `blk.0.attn_q.weight`.
        parts: our names, whose rows follow one another.
        shape: in numpy order; None where it is that of the only part.
        order: their row i is our row `order[i]`; of tensors of one part.
        columns: their column j is our column `columns[j]`; of small tensors of one part.
        scale: factor of every value.
        values: the values themselves, of small tensors that are no weight of ours.
    """

    name: str
    parts: tuple[str, ...] = ()
    shape: tuple[int, ...] | None = None
    hold: Hold = "none"
    order: NDArray[np.int64] | None = field(default=None, compare=False)
    columns: NDArray[np.int64] | None = field(default=None, compare=False)
    scale: float = 1.0
    values: NDArray[np.float32] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class GgufMap:
    """A definition in the terms of llama.cpp.

    Attributes:
        architecture: of `general.architecture`.
        metadata: keys without the architecture's prefix. Whole numbers become uint32.
        context_length: the longest that llama.cpp computes rightly; None = unbounded.
    """

    architecture: str
    metadata: dict[str, Value]
    tensors: Sequence[GgufTensor]
    context_length: int | None


def refuse(what: str, architecture: str, expected: str | None = None) -> NoReturn:
    """Raises: UnsupportedArchitecture, for what llama.cpp has no graph for."""
    raise UnsupportedArchitecture(
        f"llama.cpp cannot run this {architecture}: {what}",
        expected=expected,
        fix="export with --format onnx",
    )
