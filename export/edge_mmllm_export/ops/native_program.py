"""A forward pass as the native kernels read it: phases of ops over buffers, in int64 words.

The kernels run all ops of a phase before the next: row ops one after another on a few rows at a
time, matrix products and sequence ops side by side. Fewer phases are fewer times that threads wait
for each other, so ops are drawn together as far as what they read allows. The words are described
in `edge_mmllm_runtime/native/src/program.h`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

VERSION = 1

Class = Literal["rows", "linear", "mix"]
_CLASSES: dict[Class, int] = {"rows": 0, "linear": 1, "mix": 2}


@dataclass(frozen=True)
class Buffer:
    """Rows of floats; `kind` 0 has one for each token, 1 one for each that gets logits."""

    id: int
    width: int
    kind: int


@dataclass(frozen=True)
class View:
    """A part of a buffer's rows."""

    buffer: Buffer
    offset: int
    width: int


@dataclass(frozen=True)
class Activations:
    """Rows quantized in blocks, for matrices with blocks of that size."""

    id: int
    width: int
    block: int
    kind: int


@dataclass(frozen=True)
class StateUse:
    """A state, by its place in the contract."""

    index: int


Operand = View | Activations | StateUse
Word = int | Operand


def real(value: float) -> int:
    """The word of a float32."""
    word: int = struct.unpack("<I", struct.pack("<f", value))[0]
    return word


@dataclass(frozen=True)
class Op:
    """One instruction. What it reads and writes decides when it may run.

    Attributes:
        words: its arguments in order.
        writes: operands it changes; every other operand among `words` it only reads.
    """

    opcode: int
    cls: Class
    kind: int
    words: tuple[Word, ...]
    writes: tuple[Operand, ...]

    def reads(self) -> Iterable[Operand]:
        return (w for w in self.words if not isinstance(w, int) and w not in self.writes)


@dataclass(frozen=True)
class Phase:
    cls: Class
    kind: int
    ops: tuple[Op, ...]


def _key(operand: Operand) -> tuple[str, int]:
    """What two operands that touch the same memory have in common."""
    if isinstance(operand, View):
        return "buffer", operand.buffer.id
    if isinstance(operand, Activations):
        return "quantized", operand.id
    return "state", operand.index


def phases(ops: Sequence[Op]) -> list[Phase]:
    """Ops drawn together into phases: row ops as soon as they can, then sequence ops, then as
    many matrix products at once as are ready."""
    needs = _dependencies(ops)
    waiting, done = list(range(len(ops))), set[int]()
    found: list[Phase] = []

    def take(cls: Class, kind: int, chained: bool) -> bool:
        """Adds a phase of the ops that are ready; `chained` ops may use each other's results."""
        chosen: list[int] = []
        for i in waiting:
            ready = needs[i] <= (done | set(chosen) if chained else done)
            if ops[i].cls == cls and ops[i].kind == kind and ready:
                chosen.append(i)
        if chosen:
            found.append(Phase(cls, kind, tuple(ops[i] for i in chosen)))
            done.update(chosen)
            waiting[:] = [i for i in waiting if i not in done]
        return bool(chosen)

    order: tuple[tuple[Class, int], ...] = (
        ("rows", 0),
        ("mix", 0),
        ("linear", 0),
        ("rows", 1),
        ("linear", 1),
    )
    while waiting:
        if not any(take(cls, kind, cls == "rows") for cls, kind in order):
            raise ValueError("ops that wait for each other")
    return found


def _dependencies(ops: Sequence[Op]) -> list[set[int]]:
    """For each op, those before it that it must come after."""
    written: dict[tuple[str, int], list[int]] = {}
    read: dict[tuple[str, int], list[int]] = {}
    needs = []
    for i, op in enumerate(ops):
        own = set[int]()
        for operand in op.reads():
            own.update(written.get(_key(operand), ()))
            read.setdefault(_key(operand), []).append(i)
        for operand in op.writes:
            # Ops may write parts of one buffer in any order; states are changed in order.
            if isinstance(operand, StateUse):
                own.update(written.get(_key(operand), ()))
            own.update(read.get(_key(operand), ()))
            written.setdefault(_key(operand), []).append(i)
        needs.append(own - {i})
    return needs


class Memory:
    """Gives buffers that are never alive together the same place.

    Args:
        found: the phases; a buffer lives from the first that writes it to the last that reads it.
        kept: buffers that outlive the program.
    """

    def __init__(self, found: Sequence[Phase], kept: Iterable[Buffer]) -> None:
        self.places: dict[tuple[str, int], int] = {}
        self.buffers: list[tuple[int, int]] = []  # width, kind
        self.quantized: list[tuple[int, int, int]] = []  # width, block, kind
        last: dict[tuple[str, int], int] = {}
        for number, phase in enumerate(found):
            for op in phase.ops:
                for operand in (*op.reads(), *op.writes):
                    last[_key(operand)] = number
        for buffer in kept:
            last["buffer", buffer.id] = len(found)
        free: dict[tuple[int, ...], list[int]] = {}
        for number, phase in enumerate(found):
            ending: list[tuple[tuple[int, ...], int]] = []
            for op in phase.ops:
                for operand in (*op.writes, *op.reads()):
                    if not isinstance(operand, StateUse):
                        shape = self._place(operand, free)
                        key = _key(operand)
                        if last[key] == number and (shape, self.places[key]) not in ending:
                            ending.append((shape, self.places[key]))
            # Only when the phase is over: its other ops run beside this one.
            for shape, place in ending:
                free.setdefault(shape, []).append(place)

    def _place(
        self, operand: View | Activations, free: dict[tuple[int, ...], list[int]]
    ) -> tuple[int, ...]:
        key = _key(operand)
        if isinstance(operand, View):
            shape: tuple[int, ...] = (operand.buffer.width, operand.buffer.kind)
        else:
            shape = (operand.width, operand.block, operand.kind)
        if key not in self.places:
            if free.get(shape):
                self.places[key] = free[shape].pop()
            elif isinstance(operand, View):
                self.buffers.append((operand.buffer.width, operand.buffer.kind))
                self.places[key] = len(self.buffers) - 1
            else:
                self.quantized.append((operand.width, operand.block, operand.kind))
                self.places[key] = len(self.quantized) - 1
        return shape

    def words(self, word: Word) -> list[int]:
        """A word as numbers."""
        if isinstance(word, int):
            return [word]
        if isinstance(word, StateUse):
            return [word.index]
        place = self.places[_key(word)]
        return [place, word.offset, word.width] if isinstance(word, View) else [place]


def encode(
    ops: Sequence[Op],
    logits: View,
    header: Sequence[int],
    matrices: Sequence[Sequence[int]],
) -> list[int]:
    """The whole program. See the module's docstring."""
    found = phases(ops)
    memory = Memory(found, [logits.buffer])
    out = [VERSION, *header]
    table: Callable[[Sequence[Sequence[int]]], list[int]] = lambda rows: [  # noqa: E731
        len(rows),
        *(value for row in rows for value in row),
    ]
    out += table(memory.buffers) + table(memory.quantized) + table(matrices)
    out.append(len(found))
    for phase in found:
        out += [_CLASSES[phase.cls], phase.kind, len(phase.ops)]
        for op in phase.ops:
            words = [value for word in op.words for value in memory.words(word)]
            out += [op.opcode, len(words), *words]
    return out + memory.words(logits)
