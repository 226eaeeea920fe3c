"""Ops that the TVM backend does not have yet: each says so by its name."""

from __future__ import annotations

from typing import Generic, NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray

from edge_mmllm.errors import UnsupportedArchitecture
from edge_mmllm.spec import StateSpec

T = TypeVar("T")


def missing(op: str) -> NoReturn:
    """Raises: UnsupportedArchitecture."""
    raise UnsupportedArchitecture(
        f"the mlc format has no {op} yet", fix="export to onnx, which runs this architecture"
    )


class MissingOps(Generic[T]):
    """What is left: pictures beside the text, streams of positions, sounds, tiles."""

    def remember_span(self, x: T, span: T, state: StateSpec) -> None:
        missing("remember_span")

    def sees(self, x: T, span: StateSpec) -> T:
        missing("sees")

    def stream_angles(
        self, state: StateSpec, inv_freq: NDArray[np.float32], streams: NDArray[np.int64]
    ) -> T:
        missing("stream_angles")

    def windows(self, x: T, width: int, *, stride: int = 1, padding: int = 0) -> T:
        missing("windows")

    def first_rows(self, x: T, count: T, stride: int = 1) -> T:
        missing("first_rows")

    def split_rows(self, x: T, count: T, each: int) -> tuple[T, T]:
        missing("split_rows")

    def repeat_rows(self, x: T, times: int) -> T:
        missing("repeat_rows")

    def zeros(self, rows: int, width: int) -> T:
        missing("zeros")

    def fold_rows(self, x: T, count: int) -> T:
        missing("fold_rows")

    def unfold_rows(self, x: T, count: int) -> T:
        missing("unfold_rows")

    def average_rows(self, x: T, count: int) -> T:
        missing("average_rows")

    def grid_angles(self, grid: T, inv_freq: NDArray[np.float32], merge: int) -> T:
        missing("grid_angles")

    def rotary(self, x: T, angles: T, heads: int) -> T:
        missing("rotary")
