"""This process's memory, as the kernel counts it.

Sources: Linux `/proc/<pid>/{status,smaps_rollup,clear_refs}` (proc(5)). Elsewhere only the peak
is known, through getrusage(2); what cannot be measured is None, never a guess.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")


@dataclass(frozen=True)
class MemoryUse:
    """A moment's memory, in bytes; None where the system does not tell.

    Attributes:
        rss_bytes: resident pages, shared ones counted in full.
        peak_rss_bytes: the highest RSS so far, or since `reset_peak`.
        pss_bytes: resident pages, each divided by the number of processes that map it.
        anonymous_bytes: the part of PSS that no file backs: heap, scratch, packed weights.
        file_bytes: the part of PSS that files back: mapped weights, libraries. The kernel can
            drop it when memory is short.
    """

    rss_bytes: int | None
    peak_rss_bytes: int | None
    pss_bytes: int | None
    anonymous_bytes: int | None
    file_bytes: int | None


def rss_bytes(pid: int | None = None, *, proc: Path = PROC) -> int | None:
    """Resident set size now (VmRSS). `pid`: None for this process."""
    return _kilobytes(_folder(proc, pid) / "status").get("VmRSS")


def peak_rss_bytes(pid: int | None = None, *, proc: Path = PROC) -> int | None:
    """Highest resident set size (VmHWM).

    Linux's getrusage would do worse: a process starts with its parent's peak there.
    """
    peak = _kilobytes(_folder(proc, pid) / "status").get("VmHWM")
    if peak is None and pid is None and proc == PROC:
        return _getrusage_peak()
    return peak


def pss_bytes(pid: int | None = None, *, proc: Path = PROC) -> int | None:
    """Proportional set size now. Walks the page tables: milliseconds, not for a hot loop."""
    return _kilobytes(_folder(proc, pid) / "smaps_rollup").get("Pss")


def memory_use(pid: int | None = None, *, proc: Path = PROC) -> MemoryUse:
    """All of it at one moment."""
    rollup = _kilobytes(_folder(proc, pid) / "smaps_rollup")
    return MemoryUse(
        rss_bytes=rss_bytes(pid, proc=proc),
        peak_rss_bytes=peak_rss_bytes(pid, proc=proc),
        pss_bytes=rollup.get("Pss"),
        anonymous_bytes=rollup.get("Pss_Anon"),
        file_bytes=rollup.get("Pss_File"),
    )


def reset_peak(*, proc: Path = PROC) -> bool:
    """Sets this process's peak back to its present RSS. Returns whether the system allows it."""
    try:
        # proc(5): writing 5 to clear_refs resets the peak resident set size.
        with (_folder(proc, None) / "clear_refs").open("wb", buffering=0) as file:
            file.write(b"5")
    except OSError:
        return False
    return True


def _folder(proc: Path, pid: int | None) -> Path:
    return proc / ("self" if pid is None else str(pid))


def _kilobytes(path: Path) -> dict[str, int]:
    """The lines `Name:   123 kB` of a /proc file, in bytes; empty where there is no such file."""
    try:
        text = path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return {}
    sizes: dict[str, int] = {}
    for line in text.splitlines():
        words = line.split()
        if len(words) == 3 and words[2] == "kB" and words[1].isdigit():
            sizes[words[0].rstrip(":")] = int(words[1]) * 1024
    return sizes


def _getrusage_peak() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, kB elsewhere
