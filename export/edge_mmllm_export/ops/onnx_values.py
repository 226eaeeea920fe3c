"""What the ops of `OnnxOps` hand to each other."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Value:
    """A graph value `(1, seq, width)`, or one part of a packed one that is split on first use."""

    name: str
    width: int
    packed: Packed | None = None
    part: int = 0


@dataclass
class Packed:
    """Several values side by side along the last axis."""

    name: str
    widths: tuple[int, ...]
    parts: list[str] | None = None
