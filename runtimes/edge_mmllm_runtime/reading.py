"""What a context is given to read: checked, known by identity, and put through the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import numpy as np

from edge_mmllm.errors import UsageError
from edge_mmllm.spec import ModelSpec
from edge_mmllm_runtime.engine import Engine, Float32, Int64
from edge_mmllm_runtime.inputs import checked_embeddings, checked_ids
from edge_mmllm_runtime.prompted import Prompted

#: Called between the chunks of a long prefill (a restored beginning counts as one) with (tokens
#: done, tokens in all). Whatever it raises (`Cancelled`, by convention) ends the prefill and
#: undoes it.
Progress = Callable[[int, int], None]

#: Ids int64 `(n,)`, embeddings float32 `(n, hidden)`, or a prompt with pictures; checked.
Given = Int64 | Float32 | Prompted


def checked(
    x: Sequence[int] | Int64 | Float32 | Prompted, engine: Engine, spec: ModelSpec
) -> Given:
    """`x` as int64 `(n,)`, float32 `(n, hidden)` or a prompt that is known to be right.

    Raises:
        UsageError: empty, not integers, outside the vocabulary, or a wrong shape.
    """
    if isinstance(x, Prompted):
        return x
    if isinstance(x, np.ndarray) and x.dtype.kind == "f":
        if not engine.accepts_embeddings:
            raise UsageError("this bundle's decoder takes token ids, not embeddings")
        return checked_embeddings(cast("Float32", x), spec.hidden_size)
    return checked_ids(x, spec.vocab_size + spec.extra_ids)


def identities(x: Given) -> Int64 | None:
    """The identity of each position; None for embeddings that nobody named."""
    if isinstance(x, Prompted):
        return x.ids
    return cast("Int64", x) if x.ndim == 1 else None


def decoder_input(engine: Engine, x: Given) -> Any:
    """What the decoder takes: ids, embeddings, or a prompt where the engine reads one itself."""
    if not isinstance(x, Prompted) or (x.spans and getattr(engine, "takes_prompts", False)):
        return x
    return x.embeddings(engine.embed) if x.spans else x.tokens


def look(engine: Engine, x: Prompted) -> None:
    """Puts what stands beside the tokens into the states, each with the span that sees it."""
    for i, seen in enumerate(x.looks):
        span = np.array([seen.start, seen.end], np.int64)
        given: dict[str, Any] = {"features": seen.rows(), "span": span}
        engine.remember(seen.stage, given, append=i > 0)


def forward(
    engine: Engine,
    x: Given,
    start: int,
    restored: int,
    chunk: int,
    logits: Literal["last", "all"] | Int64,
    progress: Progress | None,
) -> list[Float32]:
    """Puts `x` through the engine, in chunks.

    Args:
        start: position of the first token of `x`.
        restored: tokens of `x` that are in the state already.
        chunk, progress: see `Context.prefill`.
        logits: which tokens' are wanted; rising numbers, where not all or the last.

    Returns:
        float32 `(rows, vocab)` of each chunk: of the tokens wanted that are in it.
    """
    parts, total = list[Float32](), len(x)
    for begin in range(restored, total, chunk):
        if begin and progress is not None:
            progress(begin, total)
        part = decoder_input(engine, x[begin : begin + chunk])
        if not isinstance(logits, str):
            rows = logits[(logits >= begin) & (logits < begin + len(part))] - begin
        elif logits == "all":
            rows = np.arange(len(part))
        elif begin + len(part) == total:
            rows = np.array([len(part) - 1])
        else:
            rows = np.empty(0, np.int64)
        placed = x[begin : begin + len(part)] if isinstance(x, Prompted) else None
        places = None if placed is None else placed.own_places()
        if places is None:
            parts.append(engine.forward(part, start + begin, rows))
        else:
            parts.append(engine.forward(part, start + begin, rows, places))
    return parts
