"""What an engine adapter offers. A `Session` drives it; the adapter stays a thin layer.

The session owns the position and checks every argument; the engine owns the weights and the
states. An engine may therefore trust what it is given: ids inside the vocabulary, a position
that fits its capacity. It is used by one thread at a time.

An adapter's module has `open_engine(bundle: Bundle, options: EngineOptions) -> Engine`, and a line
in `edge_mmllm_runtime.ENGINES`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from edge_mmllm_runtime.adapters import Adapter

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class EngineOptions:
    """What `load` tells an engine. An engine ignores what does not concern it.

    Attributes:
        threads: to compute with.
        context: tokens to make room for; None where no state grows and there is no limit.
        prepacked_cache: folder for weights in the CPU's own layout; None for none.
        kernels: `auto`, `native` or `stock`: see `native.wanted`.
        trace: folder for the engine's own profile of its operators, which slows it; None: none.
        lora: adapters to apply while the model runs.
        mmap: map weights into memory, where the engine can; False reads them.
    """

    threads: int
    context: int | None = None
    prepacked_cache: str | os.PathLike[str] | None = None
    kernels: str = "auto"
    trace: str | os.PathLike[str] | None = None
    lora: tuple[Adapter, ...] = ()
    mmap: bool = True


class Engine(Protocol):
    """One loaded model with one set of states.

    Attributes:
        name: the manifest's name for it, e.g. `onnx`.
        version: the version of the engine underneath, e.g. onnxruntime's.
        threads: threads it computes with.
        capacity: tokens its states have room for; None where no state grows.
        accepts_embeddings: whether `forward` takes float32 `(seq, hidden)` input. An engine that
            keeps its token embeddings to itself has `takes_prompts = True`: `forward` is then
            given a `Prompted` where rows stand between tokens.
        state_capacity_bytes: bytes reserved for states, second buffers included. Memory that
            was never written may not be committed yet.
    """

    name: str
    version: str
    threads: int
    capacity: int | None
    accepts_embeddings: bool
    state_capacity_bytes: int

    @property
    def memory_rows(self) -> int:
        """Rows in the cross_kv states."""
        ...

    def forward(
        self, chunk: Int64 | Float32, position: int, rows: Int64, places: Int64 | None = None
    ) -> Float32:
        """Runs `chunk` and advances the states by its length.

        Args:
            chunk: token ids `(seq,)` or embeddings `(seq, hidden)`, seq >= 1.
            position: tokens already in the states.
            rows: `(rows,)` which of the `seq` rows get logits; may be empty.
            places: `(3, seq)` where the tokens stand, counted from the `place` state; None: as
                text does. Of models without such a state always None.

        Returns:
            float32 `(rows, vocab)`, owned by the caller.

        Raises:
            SessionError: the engine failed; its states are as before, but for rows at or
                beyond `position` in states that grow. States that are written in place are
                lost: every call raises until `clear`, `load` or `rollback`.
        """
        ...

    def step(self, token: int, position: int) -> Float32:
        """One token: the same as `forward`, without its allocations.

        Returns:
            float32 `(vocab,)`, a view that the next call overwrites.
        """
        ...

    def clear(self) -> None:
        """Makes the states those of an empty context, without a memory."""
        ...

    def rewind(self, position: int, to: int) -> bool:
        """Drops all tokens from `to` on, if that costs nothing; False: nothing was done."""
        ...

    def mark(self, position: int) -> object:
        """Remembers the states before work that may be undone, as cheaply as possible."""
        ...

    def rollback(self, mark: object) -> None:
        """Undoes everything done since `mark`."""
        ...

    def save(self, position: int) -> Arrays:
        """The states, perhaps as views that the next call overwrites.

        Of those that grow, the first `position` tokens; of cross_kv, all rows.
        """
        ...

    def load(self, states: Arrays, position: int) -> None:
        """Puts back what `save` gave, perhaps of an engine with another capacity.

        Raises:
            StateMismatch: names, dtypes or shapes do not fit; nothing was changed.
        """
        ...

    def embed(self, ids: Int64) -> Float32:
        """Embeddings float32 `(seq, hidden)` of ids `(seq,)`, where `accepts_embeddings`."""
        ...

    def load_stage(self, name: str) -> bool:
        """Loads a stage, if it is not loaded; whether it had to be. The decoder of a bundle with
        modalities is loaded when it is first used, any other with the engine."""
        ...

    def run_stage(self, name: str, inputs: Mapping[str, NDArray[Any]]) -> Float32:
        """Runs such a stage; loads it first where needed. Returns its only output.

        Raises:
            SessionError: the engine failed.
            CorruptBundle: the stage cannot be loaded, or is not as the manifest says.
        """
        ...

    def remember(
        self, name: str, inputs: Mapping[str, NDArray[Any]], *, append: bool = False
    ) -> None:
        """Runs a stage that fills the cross_kv states, instead of or behind what they hold.

        Raises:
            SessionError, CorruptBundle: as `run_stage`; the states are as before.
        """
        ...

    def release(self, name: str) -> bool:
        """Gives a stage's memory back until it is used again; whether it was loaded."""
        ...

    def close(self) -> None:
        """Gives the memory back. Nothing else is called afterwards."""
        ...
