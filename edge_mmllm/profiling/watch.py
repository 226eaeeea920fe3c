"""Memory over time, and where it is: sampled by a thread, split by what it holds."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edge_mmllm.profiling.memory import PROC

#: A sample reads one short file, about 15 us.
PERIOD_S = 0.05
#: Points of a curve that is kept.
_POINTS = 400


class MemoryWatch:
    """A context in which this process's RSS is sampled.

    Attributes:
        samples: (seconds since the start, RSS in bytes); empty where there is no /proc.
        marks: (seconds since the start, what began).
    """

    def __init__(self, period_s: float = PERIOD_S, *, proc: Path = PROC) -> None:
        self.samples: list[tuple[float, int]] = []
        self.marks: list[tuple[float, str]] = []
        self._period_s, self._file = period_s, proc / "self/statm"
        self._end = threading.Event()
        self._started = time.perf_counter()

    def __enter__(self) -> MemoryWatch:
        self._take()
        if self.samples:
            self._thread = threading.Thread(target=self._watch, name="memory-watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self.samples:
            self._thread.join()
            self._take()

    def mark(self, what: str) -> None:
        """Something begins now."""
        self.marks.append((time.perf_counter() - self._started, what))

    def to_json(self) -> dict[str, Any]:
        """`points` [[s, bytes], ...], thinned out (peaks stay), and `marks` [[s, text], ...]."""
        points = [[round(t, 3), rss] for t, rss in thinned(self.samples, _POINTS)]
        return {"points": points, "marks": [[round(t, 3), what] for t, what in self.marks]}

    def _watch(self) -> None:
        while not self._end.wait(self._period_s):
            self._take()

    def _take(self) -> None:
        try:
            pages = int(self._file.read_bytes().split()[1])
        except (OSError, ValueError, IndexError):
            return
        self.samples.append((time.perf_counter() - self._started, pages * _PAGE))


_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


def thinned(samples: Sequence[tuple[float, int]], points: int) -> list[tuple[float, int]]:
    """At most `points` samples: the highest of each stretch."""
    if len(samples) <= points:
        return list(samples)
    stretch = -(-len(samples) // points)
    return [
        max(samples[i : i + stretch], key=lambda s: s[1]) for i in range(0, len(samples), stretch)
    ]


@dataclass(frozen=True)
class MemorySplit:
    """Where a process's memory is, bytes; None where the system does not tell.

    Attributes:
        weights_mapped_bytes: address space of the bundle's mapped files.
        weights_resident_bytes: how much of it is in memory. The kernel can drop it.
        packed_bytes: memory that no file backs, grown by loading: weights in the engine's own
            layout, and what else it keeps. Not to be dropped.
        state_bytes: states in use at the end.
        tokenizer_bytes: memory that the tokenizer took when it was first used.
        scratch_bytes: memory that no file backs, grown by running, without the states.
        runtime_bytes: RSS before the bundle was loaded: Python and the libraries.
        pss_bytes: PSS at the end.
    """

    weights_mapped_bytes: int | None
    weights_resident_bytes: int | None
    packed_bytes: int | None
    state_bytes: int
    tokenizer_bytes: int | None
    scratch_bytes: int | None
    runtime_bytes: int | None
    pss_bytes: int | None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def mapped_bytes(folder: Path, *, proc: Path = PROC) -> tuple[int, int] | None:
    """(address space, resident bytes) of mappings of files below `folder`; None without smaps."""
    try:
        lines = (proc / "self/smaps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    inside, size, resident = False, 0, 0
    prefix = str(folder.resolve()) + os.sep
    for line in lines:
        words = line.split(maxsplit=5)
        if words and "-" in words[0] and not words[0].endswith(":"):
            inside = len(words) == 6 and words[5].startswith(prefix)
        elif inside and words[0] in ("Size:", "Rss:"):
            if words[0] == "Size:":
                size += int(words[1]) * 1024
            else:
                resident += int(words[1]) * 1024
    return size, resident
