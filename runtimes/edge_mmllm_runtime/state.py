"""State buffers in plain memory, for engines that take their states as arrays.

A state that grows (`kv` with a `CAPACITY` dimension) has one buffer of the full capacity, past
and present in one; so has a state that the graph can update in place. Any other has two, read and
written in turn ("ping-pong"), because an engine may still read the old value while it writes the
new one. (Mamba-2's states are as large as half of its weights: one buffer makes a token a third
faster, since it fits the cache where two do not.)

All buffers lie in one anonymous mapping. Pages that were never written take no memory, so a
large context costs address space, not RSS.
"""

from __future__ import annotations

import mmap
from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_mmllm.errors import SessionError, StateMismatch
from edge_mmllm.spec import CAPACITY, StateSpec
from edge_mmllm_runtime.engine import Arrays

#: Bytes; one cache line, and what AVX-512 kernels and onnxruntime's own allocator use.
ALIGNMENT = 64


def allocate(sizes: list[int]) -> list[NDArray[np.uint8]]:
    """Zeroed byte buffers, each aligned to `ALIGNMENT`, committed when first written.

    Raises:
        SessionError: the address space cannot be had.
    """
    starts, end = [], 0
    for size in sizes:
        starts.append(end)
        end += -(-size // ALIGNMENT) * ALIGNMENT
    try:
        memory = mmap.mmap(-1, max(end, 1))
    except (OSError, ValueError, OverflowError) as error:
        raise SessionError(
            "no memory for the model's states",
            found=f"{end / 2**20:.0f} MiB asked for: {error}",
            fix="load(..., context=N) with a smaller N",
        ) from error
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        # A huge page would commit 2 MiB for the first token of every head.
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    whole = np.frombuffer(memory, dtype=np.uint8)
    return [whole[start : start + size] for start, size in zip(starts, sizes, strict=True)]


class StateBuffers:
    """The buffers of a state contract, at one capacity.

    Attributes:
        specs: the contract.
        capacity: tokens; None where no state grows.
        pairs: name -> (even, odd) buffers; the same array twice where there is one.
        parity: which of the two holds the present value: 0 or 1.
        size_bytes: bytes reserved.
    """

    def __init__(
        self, specs: tuple[StateSpec, ...], capacity: int | None, in_place: Collection[str] = ()
    ) -> None:
        self.specs, self.capacity, self.parity = specs, capacity, 0
        shapes = [s.at(capacity or 0) for s in specs]
        layout = [(s, shape) for s, shape in zip(specs, shapes, strict=True)]
        layout += [(s, shape) for s, shape in layout if not s.grows and s.name not in in_place]
        sizes = [int(np.prod(shape)) * np.dtype(s.dtype).itemsize for s, shape in layout]
        self.size_bytes = sum(sizes)
        self.pairs: dict[str, tuple[NDArray[Any], NDArray[Any]]] = {}
        for (spec, shape), raw in zip(layout, allocate(sizes), strict=True):
            array = raw.view(spec.dtype).reshape(shape)
            self.pairs[spec.name] = (self.pairs.get(spec.name, (array,))[0], array)
        self.fixed = tuple(s for s in specs if not s.grows)

    def swap(self) -> None:
        """The buffers written last hold the present value."""
        self.parity ^= 1

    def clear(self) -> None:
        """Zeroes what does not grow; a growing state is empty at position 0 anyway."""
        for spec in self.fixed:
            self.pairs[spec.name][self.parity].fill(0)

    def rewind(self, position: int, to: int) -> bool:
        """See `Engine.rewind`: free of cost where every state grows. A place can go back as long
        as it is where text alone would be."""
        places = [self.pairs[s.name][self.parity] for s in self.fixed if s.kind == "place"]
        if to == position or not self.fixed:
            return True
        if len(places) < len(self.fixed) or any(int(p[0]) != position for p in places):
            return False
        for place in places:
            place[0] = to
        return True

    def mark(self) -> Arrays:
        """Copies of the states that do not grow: the others keep their first tokens anyway."""
        return {s.name: self.pairs[s.name][self.parity].copy() for s in self.fixed}

    def rollback(self, mark: Arrays) -> None:
        """Puts a mark back."""
        for name, value in mark.items():
            self.pairs[name][self.parity][...] = value

    def save(self, position: int) -> Arrays:
        """See `Engine.save`."""
        return {s.name: self.pairs[s.name][self.parity][_first(s, position)] for s in self.specs}

    def load(self, states: Arrays, position: int) -> None:
        """See `Engine.load`.

        Raises:
            StateMismatch: names, dtypes or shapes do not fit; nothing was changed.
        """
        expected = {s.name: (s.at(position), s.dtype) for s in self.specs}
        found = {name: (a.shape, str(a.dtype)) for name, a in states.items()}
        if expected != found:
            wrong = sorted(
                name
                for name in expected.keys() | found.keys()
                if expected.get(name) != found.get(name)
            )
            raise StateMismatch(
                f"{len(wrong)} states of the snapshot do not fit this model",
                where=", ".join(wrong[:5]),
                expected=str(expected.get(wrong[0], "no such state")),
                found=str(found.get(wrong[0], "missing")),
            )
        for spec in self.specs:
            self.pairs[spec.name][self.parity][_first(spec, position)] = states[spec.name]


def _first(spec: StateSpec, position: int) -> tuple[slice, ...]:
    """Selects the first `position` tokens of a state that grows, all of one that does not."""
    return tuple(slice(position) if d == CAPACITY else slice(None) for d in spec.shape)
