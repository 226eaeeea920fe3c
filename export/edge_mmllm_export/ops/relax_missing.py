"""Ops that the TVM backend does not have yet: each says so by its name."""

from __future__ import annotations

from typing import Generic, NoReturn, TypeVar

from edge_mmllm.errors import UnsupportedArchitecture
from edge_mmllm.spec import StateSpec
from edge_mmllm_export.ops.base import Wkv7, Wkv7Weights
from edge_mmllm_export.weights import Weight

T = TypeVar("T")


def _missing(op: str) -> NoReturn:
    raise UnsupportedArchitecture(
        f"the mlc format has no {op} yet", fix="export to onnx, which runs this architecture"
    )


class MissingOps(Generic[T]):
    """The ops of RWKV, and learned positions. See `Ops` for what they compute."""

    def positions(self, x: T, table: Weight, *, offset: int = 0) -> T:
        _missing("positions")

    def token_shift(self, x: T, state: StateSpec) -> T:
        _missing("token_shift")

    def mix(self, x: T, previous: T, *mu: Weight) -> tuple[T, ...]:
        _missing("mix")

    def lerp(self, x: T, y: T, amount: T) -> T:
        _missing("lerp")

    def wkv4(self, k: T, v: T, decay: Weight, bonus: Weight, state: StateSpec) -> T:
        _missing("wkv4")

    def wkv6(self, r: T, k: T, v: T, log_decay: T | Weight, bonus: Weight, state: StateSpec) -> T:
        _missing("wkv6")

    def wkv7(self, x: Wkv7[T], w: Wkv7Weights, state: StateSpec) -> tuple[T, T]:
        _missing("wkv7")
