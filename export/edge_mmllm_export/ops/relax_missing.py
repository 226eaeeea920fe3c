"""Ops that a backend does not have: each says so by its name. A backend defines what it has before
this base; the native kernels stand on it too."""

from __future__ import annotations

from typing import Generic, NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray

from edge_mmllm.errors import UnsupportedArchitecture
from edge_mmllm.spec import StateSpec
from edge_mmllm_export.ops.base import Wkv7, Wkv7Weights
from edge_mmllm_export.ops.memory import Blind, RelativeBias
from edge_mmllm_export.weights import Weight

T = TypeVar("T")


def missing(op: str) -> NoReturn:
    """Raises: UnsupportedArchitecture."""
    raise UnsupportedArchitecture(
        f"this backend has no {op} yet", fix="export to onnx, which runs this architecture"
    )


class MissingOps(Generic[T]):
    """Ops that some backend lacks. See `Ops` for what they compute."""

    def remember(self, x: T, state: StateSpec) -> None:
        missing("remember")

    def remember_span(self, x: T, span: T, state: StateSpec) -> None:
        missing("remember_span")

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
        missing("cross_attention")

    def sees(self, x: T, span: StateSpec) -> T:
        missing("sees")

    def stream_angles(
        self, state: StateSpec, inv_freq: NDArray[np.float32], streams: NDArray[np.int64]
    ) -> T:
        missing("stream_angles")

    def relative_bias(self, x: T, bias: RelativeBias) -> T:
        missing("relative_bias")

    def positions(self, x: T, table: Weight, *, offset: int = 0) -> T:
        missing("positions")

    def token_shift(self, x: T, state: StateSpec) -> T:
        missing("token_shift")

    def mix(self, x: T, previous: T, *mu: Weight) -> tuple[T, ...]:
        missing("mix")

    def lerp(self, x: T, y: T, amount: T) -> T:
        missing("lerp")

    def wkv4(self, k: T, v: T, decay: Weight, bonus: Weight, state: StateSpec) -> T:
        missing("wkv4")

    def wkv6(self, r: T, k: T, v: T, log_decay: T | Weight, bonus: Weight, state: StateSpec) -> T:
        missing("wkv6")

    def wkv7(self, x: Wkv7[T], w: Wkv7Weights, state: StateSpec) -> tuple[T, T]:
        missing("wkv7")

    def patches(self, pixels: T, shape: tuple[int, ...], size: int) -> T:
        missing("patches")

    def input_rows(self, x: T, width: int, *, transposed: bool = False) -> T:
        missing("input_rows")

    def windows(self, x: T, width: int, *, stride: int = 1, padding: int = 0) -> T:
        missing("windows")

    def table(self, weight: Weight) -> T:
        missing("table")

    def concat_rows(self, *x: T) -> T:
        missing("concat_rows")

    def take_rows(self, x: T, start: int, stop: int | None = None) -> T:
        missing("take_rows")

    def first_rows(self, x: T, count: T, stride: int = 1) -> T:
        missing("first_rows")

    def split_rows(self, x: T, count: T, each: int) -> tuple[T, T]:
        missing("split_rows")

    def repeat_rows(self, x: T, times: int) -> T:
        missing("repeat_rows")

    def zeros(self, rows: int, width: int) -> T:
        missing("zeros")

    def concat(self, *x: T) -> T:
        missing("concat")

    def fold_rows(self, x: T, count: int) -> T:
        missing("fold_rows")

    def unfold_rows(self, x: T, count: int) -> T:
        missing("unfold_rows")

    def average_rows(self, x: T, count: int) -> T:
        missing("average_rows")

    def pixel_shuffle(self, x: T, grid: tuple[int, int], factor: int) -> T:
        missing("pixel_shuffle")

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
        missing("full_attention")

    def grid_angles(self, grid: T, inv_freq: NDArray[np.float32], merge: int) -> T:
        missing("grid_angles")

    def rotary(self, x: T, angles: T, heads: int) -> T:
        missing("rotary")
