"""Limits that a measured child runs under: memory (RLIMIT_DATA) and CPUs.

RLIMIT_DATA bounds private writable mappings: heap, packed weights, states, scratch, threads'
stacks, whether touched or not. Mapped weight files and libraries do not count (setrlimit(2),
Linux 4.7 and later), so it is another figure than RSS. It needs no privilege, and a run that does
not fit gets an allocation error instead of a kill.

A child sets its limits itself, before it imports anything that starts threads (`apply`); the
parent explains how it ended (`ended`).
"""

from __future__ import annotations

import os
import re
import signal
import sys
from dataclasses import dataclass
from typing import NoReturn

from edge_mmllm.errors import DoesNotFit, EdgeError, UsageError
from edge_mmllm.profiling.machine import affinity, physical_cores

#: How allocation failures are worded: Python, C++, the kernel's errors, OpenBLAS, onnxruntime.
_NO_MEMORY = re.compile(
    r"MemoryError|out of memory|bad_?alloc|ENOMEM|[Cc]annot allocate memory|"
    r"[Ff]ailed to allocate|[Uu]nable to allocate|Memory allocation still failed|"
    r"can't start new thread|[Tt]hread creation failed|pthread_create|"
    r"[Nn]o memory\b|Resource temporarily unavailable|failed to map segment",
)
#: Signals that end a program whose allocation failed: abort (an uncaught bad_alloc), a null
#: pointer used, and the kernel's own killer.
_FATAL = (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS, getattr(signal, "SIGKILL", 9))


@dataclass(frozen=True)
class Limits:
    """What a child may use; None for no limit.

    Attributes:
        memory_bytes: bound of its private writable mappings (RLIMIT_DATA), not of its RSS.
        cpus: CPUs that it may run on; an engine's default threads follow.
    """

    memory_bytes: int | None = None
    cpus: int | None = None

    def __post_init__(self) -> None:
        for name in ("memory_bytes", "cpus"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1", found=str(value))

    @property
    def any(self) -> bool:
        """Whether there is a limit at all."""
        return self.memory_bytes is not None or self.cpus is not None


def apply(limits: Limits) -> None:
    """Puts this process, and what it starts from now on, under `limits`.

    Call it before numpy or an engine is imported: their thread pools ask once how many CPUs there
    are, and their memory counts.

    Raises:
        UsageError: this system has no such limit.
        DoesNotFit: the process already holds more.
    """
    if limits.cpus is not None:
        _confine(limits.cpus)
    if limits.memory_bytes is not None:
        _bound(limits.memory_bytes)


def chosen_cpus(count: int, allowed: frozenset[int]) -> frozenset[int]:
    """`count` of the CPUs `allowed`: one a core first, then the others; all where there are
    fewer."""
    picked: list[int] = []
    for cpu in sorted(allowed):
        cores = physical_cores(frozenset((*picked, cpu)))
        if cores is None or cores > len(picked):
            picked.append(cpu)
    picked += sorted(allowed - set(picked))
    return frozenset(picked[:count])


def _confine(cpus: int) -> None:
    if not hasattr(os, "sched_setaffinity"):
        raise UsageError("this system cannot limit a process to some CPUs", fix="use --threads")
    os.sched_setaffinity(0, chosen_cpus(cpus, affinity()))


def _bound(size: int) -> None:
    if not sys.platform.startswith("linux"):
        raise UsageError(
            "this system does not bound a process's private memory",
            expected="Linux 4.7 or later",
            found=sys.platform,
        )
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard not in (resource.RLIM_INFINITY,) and size > hard:
        raise UsageError(
            "the memory limit is above the one this process is under",
            expected=f"at most {hard} bytes",
            found=f"{size} bytes",
        )
    resource.setrlimit(resource.RLIMIT_DATA, (size, size))


def says_no_memory(text: str) -> bool:
    """Whether an error's text, or what a dead child printed, tells of a failed allocation."""
    return _NO_MEMORY.search(text) is not None


def does_not_fit(limits: Limits, found: str, where: str | None = None) -> DoesNotFit:
    """The error for a run that ran out of the memory it was allowed."""
    size = limits.memory_bytes
    allowed = "the memory there is" if size is None else f"{size / 2**20:.0f} MiB"
    return DoesNotFit(
        "the run does not fit the memory allowed",
        where=where,
        expected=f"at most {allowed} of private writable memory (RLIMIT_DATA)"
        if size is not None
        else f"at most {allowed}",
        found=found[:300],
        fix="a smaller quantization, a smaller --context, fewer --threads, or a higher "
        "--limit-memory; `edge-mmllm fit` says what it takes",
    )


def ended(status: int, printed: str, limits: Limits, where: str) -> NoReturn:
    """Explains a child that ended without its answer.

    Args:
        status: its exit status, negative for a signal (as `subprocess` says it).
        printed: the end of what it wrote on stderr.

    Raises:
        DoesNotFit: it ran out of memory, or was ended in the ways that this looks like while
            under a limit.
        EdgeError: anything else.
    """
    lines = [line for line in printed.strip().splitlines() if line.strip()]
    last = lines[-1].strip() if lines else ""
    how = f"exit status {status}" if status >= 0 else f"signal {_signal_name(-status)}"
    if says_no_memory(printed):
        named = next((line.strip() for line in reversed(lines) if says_no_memory(line)), last)
        raise does_not_fit(limits, f"{named} ({how})", where)
    if status < 0 and limits.memory_bytes is not None and -status in _FATAL:
        raise does_not_fit(limits, f"the process was ended by {how} under the limit", where)
    raise EdgeError(
        "the measuring process ended without an answer",
        where=where,
        found=": ".join(part for part in (how, last[:300]) if part),
        fix="run it again; if a system-wide memory killer ended it, see the kernel's log"
        if status == -9
        else None,
    )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)
