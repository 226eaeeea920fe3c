"""Ops that the TVM backend does not have yet: each says so by its name."""

from __future__ import annotations

from typing import Generic, NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray

from edge_mmllm.errors import UnsupportedArchitecture
from edge_mmllm.spec import StateSpec
from edge_mmllm_export.ops.memory import Blind, RelativeBias
from edge_mmllm_export.weights import Weight

T = TypeVar("T")


def _missing(op: str) -> NoReturn:
    raise UnsupportedArchitecture(
        f"the mlc format has no {op} yet", fix="export to onnx, which runs this architecture"
    )


class MissingOps(Generic[T]):
    """The ops of RWKV, learned positions and memories. See `Ops` for what they compute."""

    def remember(self, x: T, state: StateSpec) -> None:
        _missing("remember")

    def remember_span(self, x: T, span: T, state: StateSpec) -> None:
        _missing("remember_span")

    def cross_attention(
        self,
        q: T,
        k_state: StateSpec,
        v_state: StateSpec,
        *,
        heads: int,
        scale: float,
        span: StateSpec | None = None,
        blind: Blind = "nothing",
    ) -> T:
        _missing("cross_attention")

    def sees(self, x: T, span: StateSpec) -> T:
        _missing("sees")

    def stream_angles(
        self, state: StateSpec, inv_freq: NDArray[np.float32], streams: NDArray[np.int64]
    ) -> T:
        _missing("stream_angles")

    def relative_bias(self, x: T, bias: RelativeBias) -> T:
        _missing("relative_bias")

    def patches(self, pixels: T, shape: tuple[int, ...], size: int) -> T:
        _missing("patches")

    def input_rows(self, x: T, width: int, *, transposed: bool = False) -> T:
        _missing("input_rows")

    def windows(self, x: T, width: int, *, stride: int = 1, padding: int = 0) -> T:
        _missing("windows")

    def table(self, weight: Weight) -> T:
        _missing("table")

    def concat_rows(self, *x: T) -> T:
        _missing("concat_rows")

    def take_rows(self, x: T, start: int, stop: int | None = None) -> T:
        _missing("take_rows")

    def first_rows(self, x: T, count: T, stride: int = 1) -> T:
        _missing("first_rows")

    def split_rows(self, x: T, count: T, each: int) -> tuple[T, T]:
        _missing("split_rows")

    def repeat_rows(self, x: T, times: int) -> T:
        _missing("repeat_rows")

    def zeros(self, rows: int, width: int) -> T:
        _missing("zeros")

    def concat(self, *x: T) -> T:
        _missing("concat")

    def fold_rows(self, x: T, count: int) -> T:
        _missing("fold_rows")

    def unfold_rows(self, x: T, count: int) -> T:
        _missing("unfold_rows")

    def average_rows(self, x: T, count: int) -> T:
        _missing("average_rows")

    def pixel_shuffle(self, x: T, grid: tuple[int, int], factor: int) -> T:
        _missing("pixel_shuffle")

    def full_attention(
        self,
        q: T,
        k: T,
        v: T,
        *,
        heads: int,
        scale: float,
        kv_heads: int | None = None,
        bias: T | None = None,
        frames: T | None = None,
    ) -> T:
        _missing("full_attention")

    def grid_angles(self, grid: T, inv_freq: NDArray[np.float32], merge: int) -> T:
        _missing("grid_angles")

    def rotary(self, x: T, angles: T, heads: int) -> T:
        _missing("rotary")
