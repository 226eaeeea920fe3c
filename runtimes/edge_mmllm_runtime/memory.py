"""The cross_kv states of a model: what its decoder reads beside its own tokens.

A stage computes them from a prompt (encoder-decoders) or from pictures; then every step of the
decoder reads them and none writes. All hold the same number of rows, 0 before the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_mmllm.errors import StateMismatch
from edge_mmllm.spec import MEMORY, StateSpec
from edge_mmllm_runtime.engine import Arrays


def with_rows(specs: tuple[StateSpec, ...], rows: int) -> tuple[StateSpec, ...]:
    """The contract of a memory of so many rows (or bytes, of an engine with an opaque state): no
    size of a cross_kv state is left open."""
    sized = ("cross_kv", "opaque")
    return tuple(replace(s, shape=s.at(0, rows)) if s.kind in sized else s for s in specs)


def _is_memory(spec: StateSpec) -> bool:
    return spec.kind == "cross_kv"


class Memory:
    """The values of cross_kv states.

    Attributes:
        specs: the cross_kv states of the contract.
        arrays: name -> value; replaced, never written to.
        rows: of each.
    """

    def __init__(self, specs: tuple[StateSpec, ...]) -> None:
        self.specs = tuple(s for s in specs if _is_memory(s))
        self.clear()

    def clear(self) -> None:
        """Forgets everything."""
        self.rows = 0
        self.arrays: Arrays = {s.name: np.zeros(s.at(0, 0), s.dtype) for s in self.specs}

    def check(self, values: Mapping[str, NDArray[Any]]) -> int:
        """The number of rows of values for all states.

        Raises:
            StateMismatch: names, dtypes or shapes do not fit; nothing was changed.
        """
        rows = -1
        for spec in self.specs:
            value = values.get(spec.name)
            axis = spec.shape.index(MEMORY)
            if value is not None and value.ndim == len(spec.shape) and rows < 0:
                rows = value.shape[axis]
            wanted = spec.at(0, max(rows, 0)), spec.dtype
            found = None if value is None else (value.shape, str(value.dtype))
            if found != wanted:
                raise StateMismatch(
                    "a memory does not fit this model",
                    where=spec.name,
                    expected=str(wanted),
                    found=str(found),
                )
        return max(rows, 0)

    def fill(self, values: Mapping[str, NDArray[Any]], *, append: bool = False) -> None:
        """Puts values in, or behind those that are there.

        Raises:
            StateMismatch: see `check`.
        """
        rows = self.check(values)
        if append and self.rows:
            self.arrays = {
                s.name: np.concatenate(
                    [self.arrays[s.name], values[s.name]], axis=s.shape.index(MEMORY)
                )
                for s in self.specs
            }
            self.rows += rows
        else:
            self.arrays = {s.name: np.ascontiguousarray(values[s.name]) for s in self.specs}
            self.rows = rows
