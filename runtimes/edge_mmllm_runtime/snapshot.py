"""A session's state set aside: in memory, or in a file bound to its bundle."""

from __future__ import annotations

import os
from array import array
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from edge_mmllm.errors import ContextFull, CorruptState, StateMismatch
from edge_mmllm.spec import ModelSpec
from edge_mmllm_runtime import statefile
from edge_mmllm_runtime.engine import Arrays, Float32
from edge_mmllm_runtime.memory import with_rows
from edge_mmllm_runtime.statefile import Header
from edge_mmllm_runtime.storage import Bytes, Storage, packed_bytes, unpack


@dataclass(frozen=True)
class Snapshot:
    """What `Session.restore` needs. It may be restored any number of times.

    Attributes:
        bundle_sha256: the bundle it belongs to.
        position: tokens in the state.
        data: the states, as `storage.pack` made them; of those that grow, the first `position`
            tokens. Read-only.
        storage: how `data` holds them.
        logits: float32 `(vocab,)` of the last token, if it was computed.
        tokens: ids in the state (-1 for an embedding), None where they are no longer known.
        memory: rows in the cross_kv states.
    """

    bundle_sha256: str
    position: int
    data: Bytes
    storage: Storage
    logits: Float32 | None
    tokens: array[int] | None
    memory: int = 0

    @property
    def size_bytes(self) -> int:
        """Bytes of the states as stored."""
        return self.data.nbytes

    @property
    def memory_bytes(self) -> int:
        """Bytes of everything it holds."""
        logits = 0 if self.logits is None else self.logits.nbytes
        tokens = 0 if self.tokens is None else len(self.tokens) * self.tokens.itemsize
        return self.size_bytes + logits + tokens

    def states(self, spec: ModelSpec) -> Arrays:
        """The states by name, in the contract's dtypes.

        Raises:
            StateMismatch: it does not fit the contract.
        """
        states = with_rows(spec.states, self.memory)
        return unpack(states, self.data, self.position, self.storage)

    def check(self, spec: ModelSpec, bundle_sha256: str, context: int | None) -> None:
        """Raises unless a session of this bundle and context can take it.

        Raises:
            StateMismatch: it belongs to another bundle, or contradicts itself.
            ContextFull: it has more tokens than `context`.
        """
        _check_bundle(self.bundle_sha256, bundle_sha256, None)
        tokens, logits = self.tokens, self.logits
        if (
            self.position < 0
            or (tokens is not None and len(tokens) != self.position)
            or (logits is not None and logits.shape != (spec.vocab_size,))
        ):
            raise StateMismatch("the snapshot is damaged", found=f"position {self.position}")
        if context is not None and self.position > context:
            raise ContextFull(0, self.position, context)

    def save(self, path: str | os.PathLike[str], *, everything: bool = False) -> int:
        """Writes a `.state` file, whole or not at all. An older file there is replaced.

        Args:
            everything: False: the states, and what else fits into 4 KB: the logits first, then
                the token ids. Without logits `generate(None)` has nothing to go on from until a
                token was read; without ids `reuse=True` and the repetition penalty do not know
                what was read before. True: both, whatever their size.

        Returns:
            The file's size in bytes.

        Raises:
            OSError: it cannot be written.
        """
        header = Header(
            self.bundle_sha256,
            self.position,
            self.storage,
            self.size_bytes,
            logits=0,
            tokens=0,
            memory=self.memory,
        )
        payload = [self.data.data]
        if self.logits is not None:
            with_logits = replace(header, logits=len(self.logits))
            if everything or _fits(with_logits):
                header = with_logits
                payload.append(np.ascontiguousarray(self.logits, "<f4").data)
        if self.tokens is not None:
            with_tokens = replace(header, tokens=len(self.tokens))
            if everything or _fits(with_tokens):
                header = with_tokens
                payload.append(np.array(self.tokens, "<i4").data)
        statefile.write(Path(path), header, payload)
        return statefile.file_bytes(header)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        spec: ModelSpec | None = None,
        bundle_sha256: str | None = None,
        context: int | None = None,
    ) -> Snapshot:
        """Reads what `save` wrote, trusting nothing in it.

        Args:
            spec, bundle_sha256, context: of the session it is for, checked before its states are
                read; None leaves that check to `restore`.

        Raises:
            CorruptState: the file is damaged, or no state file of this release.
            StateMismatch: it belongs to another bundle.
            ContextFull: it has more tokens than `context`.
            OSError: it cannot be read.
        """
        path = Path(path)

        def accept(header: Header) -> None:
            if bundle_sha256 is not None:
                _check_bundle(header.bundle_sha256, bundle_sha256, path)
            if spec is not None:
                _check_sizes(header, spec, path)
            if context is not None and header.position > context:
                raise ContextFull(0, header.position, context)

        header, payload = statefile.read(path, accept)
        states, rest = np.split(payload, [header.states_bytes])
        logits, tokens = np.split(rest, [4 * header.logits])
        known = bool(header.tokens) or not header.position
        return cls(
            bundle_sha256=header.bundle_sha256,
            position=header.position,
            data=states,
            storage=header.storage,
            logits=np.frombuffer(logits.tobytes(), "<f4") if header.logits else None,
            tokens=array("i", tokens.view("<i4").tolist()) if known else None,
            memory=header.memory,
        )


def _fits(header: Header) -> bool:
    return statefile.file_bytes(header) - header.states_bytes <= statefile.OVERHEAD_BYTES


def _check_bundle(found: str, expected: str, path: Path | None) -> None:
    if found != expected:
        raise StateMismatch(
            "the state belongs to another bundle",
            where=None if path is None else str(path),
            expected=expected,
            found=found,
            fix="restore it in a session of the bundle it was taken from",
        )


def _check_sizes(header: Header, spec: ModelSpec, path: Path) -> None:
    states = with_rows(spec.states, header.memory)
    expected = packed_bytes(states, header.position, header.storage)
    if header.states_bytes != expected or header.logits not in (0, spec.vocab_size):
        raise CorruptState(
            "the state file contradicts its bundle",
            where=str(path),
            expected=f"{expected} bytes of states, no or {spec.vocab_size} logits",
            found=f"{header.states_bytes} bytes, {header.logits} logits",
        )
