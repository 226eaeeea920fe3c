"""The float32 oracle as a session-like object: prefill in pieces, state carried."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_mmllm.spec import MEMORY
from edge_mmllm_export.ops.base import Architecture, EncoderDecoder, Onlooker
from edge_mmllm_export.ops.numpy import NumpyOps
from edge_mmllm_export.weights import Weight

Array = NDArray[Any]


class Oracle:
    """Runs a definition in float32 numpy.

    Args:
        keep_weights: hold matrices in memory (tiny models, many forwards); by default each is
            streamed from the checkpoint and dropped, so that memory stays bounded.
        ops: what it computes with.
    """

    def __init__(
        self,
        model: Architecture,
        weights: Mapping[str, Weight],
        *,
        keep_weights: bool = False,
        ops: Callable[..., NumpyOps] = NumpyOps,
    ) -> None:
        self.model, self.weights, self._ops = model, weights, ops
        self._cache: dict[str, Array] | None = {} if keep_weights else None
        self.reset()

    def reset(self) -> None:
        """Back to the empty state."""
        self.position = 0
        self.states: dict[str, Array] = {
            s.name: np.zeros(s.at(0), np.int64 if s.dtype == "int64" else np.float32)
            for s in self.model.states()
        }

    def start(self, prompt: Array) -> None:
        """Empties the state; an encoder-decoder then reads a prompt, others nothing.

        After it `forward` takes what the decoder says, from `decoder_start_id` on.

        Args:
            prompt: ids `(seq,)` or embeddings `(seq, hidden)`.
        """
        model = getattr(self.model, "backbone", self.model)
        self.reset()
        if isinstance(model, EncoderDecoder):
            op = self._ops(self.states, 0, None, self._cache)
            x = prompt if prompt.ndim == 2 else model.embed(op, self.weights, prompt)
            model.remember(op, self.weights, x)

    def look(self, features: Array, span: tuple[int, int]) -> None:
        """An `Onlooker` reads the rows of one more picture, seen by the tokens of `span`."""
        model = getattr(self.model, "backbone", self.model)
        if not isinstance(model, Onlooker):
            raise ValueError(f"{model.name} has no memory for pictures")
        memory = {s.name: s.shape.index(MEMORY) for s in model.states() if s.kind == "cross_kv"}
        op = self._ops(dict(self.states), 0, None, self._cache)
        model.remember_features(op, self.weights, features, np.asarray(span, np.int64))
        for name, axis in memory.items():
            self.states[name] = np.concatenate([self.states[name], op.states[name]], axis=axis)

    def answer(self, ids: NDArray[np.int64]) -> Array:
        """All logits of ids `(seq,)` from an empty state; an encoder-decoder has read them as its
        prompt before."""
        self.start(ids)
        return self.forward(ids)

    def forward(self, ids: NDArray[np.int64], rows: NDArray[np.int64] | None = None) -> Array:
        """Token ids `(seq,)` -> logits `(rows, vocab)`; all rows by default."""
        return self.forward_embeddings(self.embed(ids), rows)

    def ops(self, rows: NDArray[np.int64] | None = None) -> NumpyOps:
        """The ops at the present position; `rows` get logits."""
        return self._ops(self.states, self.position, rows, self._cache)

    def embed(self, ids: NDArray[np.int64]) -> Array:
        """Token ids `(seq,)` -> `(seq, hidden)`."""
        return self.model.embed(self.ops(), self.weights, ids)

    def forward_embeddings(
        self,
        x: Array,
        rows: NDArray[np.int64] | None = None,
        places: NDArray[np.int64] | None = None,
    ) -> Array:
        """Embeddings `(seq, hidden)` -> logits `(rows, vocab)`; all rows by default.

        Args:
            places: see `Ops.stream_angles`; None for text.
        """
        op = self.ops(rows)
        op.places = np.tile(np.arange(len(x)), (3, 1)) if places is None else places
        logits = self.model.decode(op, self.weights, x)
        self.position += len(x)
        return logits
