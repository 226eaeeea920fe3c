"""States of prompts that were read before, so that a prompt with the same beginning need not be.

What counts is token ids: a cached state is restored where its ids are the first ids of a prompt.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_mmllm.errors import UsageError
from edge_mmllm_runtime.engine import Float32, Int64

if TYPE_CHECKING:
    from edge_mmllm_runtime.snapshot import Snapshot

#: Room for twenty states of a small RWKV or Mamba model, or some thousand tokens of attention.
DEFAULT_LIMIT_BYTES = 64 << 20


class PromptCache:
    """Snapshots by their token ids; the one used least recently goes first.

    Attributes:
        limit_bytes: of memory; lower it at any time, it holds from the next `add` on.
        size_bytes: of memory held now.
    """

    def __init__(self, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> None:
        self.limit_bytes, self.size_bytes = limit_bytes, 0
        self._entries: OrderedDict[bytes, Snapshot] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, ids: Sequence[int] | Int64) -> bool:
        """Whether exactly these ids are cached."""
        return _key(np.asarray(ids)) in self._entries

    def longest(self, ids: Int64 | Float32) -> Snapshot | None:
        """The snapshot of the most leading ids of `ids`; it becomes the one used last."""
        if not self._entries:
            return None
        whole = _key(ids)
        for size in sorted({len(key) for key in self._entries}, reverse=True):
            if size <= len(whole) and whole[:size] in self._entries:
                self._entries.move_to_end(whole[:size])
                return self._entries[whole[:size]]
        return None

    def check_room(self, size_bytes: int) -> None:
        """Raises `UsageError` where an entry of this size could never be kept."""
        if size_bytes > self.limit_bytes:
            raise UsageError(
                "the state is larger than the prompt cache",
                expected=f"at most {self.limit_bytes} bytes",
                found=f"{size_bytes} bytes",
                fix="raise session.prompt_cache.limit_bytes, or store it in f16 or int8",
            )

    def add(self, ids: Sequence[int] | Int64, snapshot: Snapshot) -> None:
        """Keeps a snapshot, and drops others until all fit.

        Raises:
            UsageError: it alone is too large; nothing was changed.
        """
        key = _key(np.asarray(ids))
        size = _entry_bytes(key, snapshot)
        self.check_room(size)
        self._drop(key)
        self._entries[key] = snapshot
        self.size_bytes += size
        while self.size_bytes > self.limit_bytes:
            self._drop(next(iter(self._entries)))

    def discard(self, ids: Sequence[int] | Int64) -> None:
        """Drops the snapshot of exactly these ids, if there is one."""
        self._drop(_key(np.asarray(ids)))

    def clear(self) -> None:
        """Drops everything."""
        self._entries.clear()
        self.size_bytes = 0

    def _drop(self, key: bytes) -> None:
        dropped = self._entries.pop(key, None)
        if dropped is not None:
            self.size_bytes -= _entry_bytes(key, dropped)


def _key(ids: Any) -> bytes:
    return np.asarray(ids, np.int32).tobytes()


def _entry_bytes(key: bytes, snapshot: Snapshot) -> int:
    return len(key) + snapshot.memory_bytes
