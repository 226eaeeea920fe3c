"""A model's context: what it has read so far, and what it says about the next token.

A context serves one call at a time; a second one, from a progress callback or from another
thread, is a `SessionError`. Every call checks its arguments before it
touches the state: after a `UsageError` or `ContextFull` everything is as it was.
"""

from __future__ import annotations

import os
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from edge_mmllm.errors import ContextFull, SessionClosed, SessionError, UsageError
from edge_mmllm.spec import ModelSpec
from edge_mmllm_runtime.engine import Engine, Float32, Int64
from edge_mmllm_runtime.inputs import check_positions, checked_ids, checked_rows
from edge_mmllm_runtime.memory import with_rows
from edge_mmllm_runtime.perception import Perception
from edge_mmllm_runtime.prompt_cache import PromptCache
from edge_mmllm_runtime.prompted import Prompted
from edge_mmllm_runtime.reading import Progress, checked, decoder_input, forward, identities, look
from edge_mmllm_runtime.snapshot import Snapshot
from edge_mmllm_runtime.storage import Storage, check_storage, pack

if TYPE_CHECKING:
    from typing_extensions import Self

#: Tokens of one prefill run.
CHUNK = 512

#: Ids of the state are remembered up to this many tokens, so that a session over a model with
#: constant state takes constant memory. Beyond it only `reuse=True` is lost.
REMEMBERED_TOKENS = 1 << 16


class Context:
    """The state of one loaded model, driven through its engine.

    Args:
        engine: the adapter; closed with the context.
        spec: the model, as the manifest says it.
        bundle_sha256: identity of the bundle; snapshots are bound to it.
        context: tokens the session may hold; None for no limit.
        chunk: tokens of one prefill run.
        read_file: gives a file of the bundle, for what is loaded when it is needed.

    Attributes:
        prompt_cache: states of prompts that `prefill` need not read again.
        perception: the stages before the decoder, and the features they gave.
    """

    def __init__(
        self,
        engine: Engine,
        spec: ModelSpec,
        bundle_sha256: str,
        *,
        context: int | None = None,
        chunk: int = CHUNK,
        read_file: Callable[[str], bytes] | None = None,
    ) -> None:
        self.spec, self.bundle_sha256, self.chunk = spec, bundle_sha256, chunk
        self.context = context
        self.prompt_cache = PromptCache()
        self._beside = any(m.target == "states" for m in spec.modalities.values())
        self.perception = Perception(lambda: self.engine, spec, read_file)
        self._engine: Engine | None = engine
        self._position = 0
        self._tokens: array[int] | None = array("i")
        self._logits: Float32 | None = None
        self._version = 0
        self._running = threading.Lock()

    # -- what is in the state ---------------------------------------------------------------

    @property
    def engine(self) -> Engine:
        """The engine adapter.

        Raises:
            SessionClosed: after `close()`.
        """
        if self._engine is None:
            raise SessionClosed("the session is closed", fix="load the bundle again")
        return self._engine

    @property
    def position(self) -> int:
        """Tokens in the state."""
        return self._position

    @property
    def tokens(self) -> tuple[int, ...] | None:
        """Ids in the state (-1 for an embedding, below that the identity of a picture's row, see
        `prompted.py`); None beyond `REMEMBERED_TOKENS`."""
        return None if self._tokens is None else tuple(self._tokens)

    @property
    def logits(self) -> Float32 | None:
        """Float32 `(vocab,)` of the last token in the state, if known. Do not write to it."""
        return self._logits

    @property
    def version(self) -> int:
        """Changes with every change of the state; two equal versions are the same state."""
        return self._version

    @property
    def state_bytes(self) -> int:
        """Bytes of state in use at this position (constant for recurrent models)."""
        return self.spec.state_bytes(self._position, self.engine.memory_rows)

    @property
    def state_capacity_bytes(self) -> int:
        """Bytes the engine reserved for states; memory never written may not be committed."""
        return self.engine.state_capacity_bytes

    # -- running the model ------------------------------------------------------------------

    def prefill(
        self,
        tokens_or_embeddings: Sequence[int] | Int64 | Float32 | Prompted,
        positions: Sequence[int] | Int64 | None = None,
        logits: Literal["last", "all"] | Sequence[int] | Int64 = "last",
        *,
        progress: Progress | None = None,
    ) -> Float32:
        """Adds tokens (or embeddings) to the context, in chunks of `self.chunk`.

        Into an empty context, what `prompt_cache` has of the tokens is restored instead; the
        logits may then differ from a full prefill's by rounding, as other chunks make them differ.

        Args:
            tokens_or_embeddings: ids `(n,)`, or float32 `(n, hidden)` where the decoder takes
                embeddings; n >= 1. Or what `encode_prompt` made of a prompt with pictures.
            positions: None, or the next n positions: bundles of this release are sequential.
            logits: `last` for those of the last token, `all` for those of each, or positions in
                what is given, 0 for its first token: only theirs are computed, and the last one's.
            progress: called after each chunk but the last; may raise to cancel.

        Returns:
            float32 `(vocab,)` for `last`, `(n, vocab)` for `all`, `(positions, vocab)`.

        Raises:
            UsageError, ContextFull: nothing was changed.
            SessionError, Cancelled, or what `progress` raised: the state is as before the call
                (empty, where pictures stand beside the tokens).
        """
        engine = self.engine
        x = checked(tokens_or_embeddings, engine, self.spec)
        total = len(x)
        last = isinstance(logits, str) and logits == "last"
        chosen = None
        if not last and not (isinstance(logits, str) and logits == "all"):
            chosen = checked_rows(logits, total)
        rows = None if chosen is None else np.union1d(chosen, [total - 1])
        check_positions(positions, self._position, total)
        self._check_room(total)
        if isinstance(x, Prompted) and x.looks and self._position != x.origin:
            raise UsageError(
                "pictures that stand beside the tokens come with the whole prompt",
                expected=f"position {x.origin}",
                found=f"position {self._position}",
                fix="read the conversation from its beginning (no --state)",
            )
        known = identities(x)
        cacheable = known is not None and not self._position and last
        restored = self._restore_prefix(known) if cacheable and known is not None else 0
        if restored == total and self._logits is not None:
            return self._logits.copy()
        start = self._position - restored
        mark = None
        if not self._running.acquire(blocking=False):
            raise _in_use()
        try:
            if total > self.chunk and not restored:
                mark = engine.mark(start)
            if isinstance(x, Prompted):
                x[restored:].load()
                look(engine, x)
            self.perception.settle()
            started = time.perf_counter()
            wanted: Literal["last", "all"] = "last" if last else "all"
            parts = forward(
                engine, x, start, restored, self.chunk, wanted if rows is None else rows, progress
            )
        except BaseException:
            if mark is not None:
                engine.rollback(mark)
            self._running.release()
            if restored or (isinstance(x, Prompted) and x.looks):
                self.reset()
            raise
        self._running.release()
        self.perception.timings.prefill_ms += (time.perf_counter() - started) * 1e3
        result: Float32 = parts[-1][0] if last else np.concatenate(parts)
        self._advance([-1] * total if known is None else known[restored:].tolist())
        self._logits = result if last else result[-1].copy()
        if rows is None or chosen is None:
            return result
        return np.asarray(result[np.searchsorted(rows, chosen)])

    def decode(self, token_id: int) -> Float32:
        """Adds one token.

        Returns:
            float32 `(vocab,)`, owned by the caller.

        Raises:
            UsageError, ContextFull: nothing was changed.
        """
        result = self.step(int(self.check_ids([token_id])[0])).copy()
        self._logits = result
        return result

    def step(self, token: int) -> Float32:
        """`decode` without the copy and the check, for loops of the runtime's own.

        Args:
            token: an id that is known to be valid.

        Returns:
            float32 `(vocab,)`, a view that the next call overwrites.
        """
        engine = self.engine
        self._check_room(1)
        if not self._running.acquire(blocking=False):
            raise _in_use()
        try:
            self._logits = None  # a view, overwritten even where the engine fails
            result = engine.step(token, self._position)
            self._advance((token,))
            self._logits = result
        finally:
            self._running.release()
        return result

    def drop_logits(self) -> None:
        """Forgets `logits`: what they say was acted upon."""
        self._logits = None

    def reset(self) -> None:
        """Empties the context."""
        self._check_idle()
        self.engine.clear()
        self._set(0, array("i"), None)

    def start(self, prompt: Sequence[int] | Int64 | Float32 | Prompted) -> None:
        """Empties the context; the encoder of an encoder-decoder then reads `prompt`, whose
        answer `prefill` and `decode` read from `spec.decoder_start_id` on. Other models read
        nothing yet.

        Args:
            prompt: see `prefill`.

        Raises:
            UsageError: nothing was changed.
            SessionError: the context is empty.
        """
        x = checked(prompt, self.engine, self.spec)
        self.reset()
        stage = self.spec.stages.get("encode_text")
        if stage is None:
            return
        started = time.perf_counter()
        engine = self.engine
        taken = decoder_input(engine, x)
        if taken.dtype == np.int64 and "inputs_embeds" in stage.inputs:
            taken = engine.embed(np.asarray(taken, np.int64))
        engine.remember("encode_text", {stage.inputs[0]: taken})
        self._version += 1
        self.perception.timings.prefill_ms += (time.perf_counter() - started) * 1e3

    def rewind(self, position: int) -> bool:
        """Drops the tokens from `position` on, where that costs nothing.

        Returns:
            False, with nothing changed, where the model cannot forget (a constant state).

        Raises:
            UsageError: `position` lies beyond the state.
        """
        if not 0 <= position <= self._position:
            raise UsageError(
                "no such position", expected=f"0 to {self._position}", found=str(position)
            )
        if position == self._position:
            return True
        self._check_idle()
        if self._beside and self.engine.memory_rows:
            return False  # a later picture would still be seen
        if not self.engine.rewind(self._position, position):
            return False
        self._set(position, None if self._tokens is None else self._tokens[:position], None)
        return True

    # -- snapshots --------------------------------------------------------------------------

    def snapshot(self, storage: Storage = "f32") -> Snapshot:
        """A copy of the state; `restore` it any number of times to branch.

        Args:
            storage: `f32` is exact. `f16` and `int8` take a half and about a quarter of it; what
                follows drifts (see docs/state.md for how far).

        Raises:
            UsageError: an unknown storage.
            SessionError: a value does not fit the storage.
        """
        check_storage(storage)
        self._check_idle()
        states, memory = self.engine.save(self._position), self.engine.memory_rows
        return Snapshot(
            bundle_sha256=self.bundle_sha256,
            position=self._position,
            data=pack(with_rows(self.spec.states, memory), states, self._position, storage),
            storage=storage,
            logits=None if self._logits is None else self._logits.copy(),
            tokens=None if self._tokens is None else self._tokens[:],
            memory=memory,
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Goes back, or over, to a snapshot of the same bundle (its context may differ).

        Raises:
            StateMismatch: it belongs to another bundle; nothing was changed.
            ContextFull: it has more tokens than this context's capacity; nothing was changed.
        """
        engine = self.engine
        self._check_idle()
        snapshot.check(self.spec, self.bundle_sha256, self.context)
        engine.load(snapshot.states(self.spec), snapshot.position)
        tokens, logits = snapshot.tokens, snapshot.logits
        self._set(
            snapshot.position,
            None if tokens is None else tokens[:],
            None if logits is None else logits.copy(),
        )

    def save_state(self, path: str | os.PathLike[str], storage: Storage = "f32") -> int:
        """Writes the state to a `.state` file, atomically. See `Snapshot.save`.

        Returns:
            The file's size in bytes: the states' and at most 4,095 more.

        Raises:
            UsageError, SessionError: see `snapshot`.
            OSError: it cannot be written.
        """
        return self.snapshot(storage).save(path)

    def load_state(self, path: str | os.PathLike[str]) -> int:
        """Goes over to the state in a `.state` file of this bundle.

        Returns:
            Tokens in the state.

        Raises:
            CorruptState: the file is damaged, or no state file; nothing was changed.
            StateMismatch, ContextFull: see `restore`; nothing was changed.
            OSError: it cannot be read.
        """
        self.restore(Snapshot.load(path, self.spec, self.bundle_sha256, self.context))
        return self._position

    def _restore_prefix(self, ids: Int64) -> int:
        """Puts the longest cached beginning of the ids into the state; its length."""
        found = self.prompt_cache.longest(ids)
        if found is None:
            return 0
        self.restore(found)
        return found.position

    # -- checks and bookkeeping -------------------------------------------------------------

    def _check_idle(self) -> None:
        """Raises: SessionError: a prefill's callback or another thread is at work here."""
        if self._running.locked():
            raise _in_use()

    def check_ids(self, ids: Any) -> Int64:
        """Token ids as int64 `(n,)`.

        Raises:
            UsageError: empty, not integers, or outside the vocabulary.
        """
        return checked_ids(ids, self.spec.vocab_size + self.spec.extra_ids)

    def _check_room(self, count: int) -> None:
        if self.spec.decoder_start_id is not None and not self.engine.memory_rows:
            raise UsageError(
                "the encoder has read nothing that could be answered",
                fix="generate(prompt), or start(prompt) before prefill and decode",
            )
        if self.context is not None and self._position + count > self.context:
            raise ContextFull(self._position, count, self.context)

    def _advance(self, tokens: Sequence[int]) -> None:
        self._position += len(tokens)
        self._version += 1
        if self._tokens is not None:
            if self._position > REMEMBERED_TOKENS:
                self._tokens = None
            else:
                self._tokens.extend(tokens)

    def _set(self, position: int, tokens: array[int] | None, logits: Float32 | None) -> None:
        self._position, self._tokens, self._logits = position, tokens, logits
        self._version += 1

    # -- end --------------------------------------------------------------------------------

    def close(self) -> None:
        """Gives the engine's memory back. Closing twice is fine."""
        engine, self._engine = self._engine, None
        self._logits = None
        if engine is not None:
            engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _in_use() -> SessionError:
    return SessionError(
        "the session is in use",
        found="a call from a progress callback, or from another thread",
        fix="finish one call before the next; give each thread a session of its own",
    )
