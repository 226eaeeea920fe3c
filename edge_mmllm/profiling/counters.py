"""What a process has used so far: CPU time, page faults, context switches; and what the others
on the machine used meanwhile. Sources: getrusage(2), Linux /proc/stat (proc(5)).
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path("/")


@dataclass(frozen=True)
class Counters:
    """A moment's counts; the difference of two moments tells what happened between.

    Attributes:
        wall_s: of a clock that never goes back.
        cpu_user_s, cpu_system_s: of this process, all its threads.
        minor_faults, major_faults: pages that came from memory; that had to come from a disk.
        voluntary_switches, involuntary_switches: context switches: waited; was put aside for
            another process.
        machine_busy_s: CPU time of every process of the machine; None where it is not told.
    """

    wall_s: float
    cpu_user_s: float
    cpu_system_s: float
    minor_faults: int | None
    major_faults: int | None
    voluntary_switches: int | None
    involuntary_switches: int | None
    machine_busy_s: float | None


def read_counters(root: Path = ROOT) -> Counters:
    """The counts now."""
    times = os.times()
    faults: tuple[int | None, int | None, int | None, int | None] = (None,) * 4
    try:
        import resource
    except ImportError:  # Windows
        pass
    else:
        used = resource.getrusage(resource.RUSAGE_SELF)
        faults = (used.ru_minflt, used.ru_majflt, used.ru_nvcsw, used.ru_nivcsw)
    return Counters(time.perf_counter(), times.user, times.system, *faults, _machine_busy_s(root))


@dataclass(frozen=True)
class Used:
    """What happened between two moments; fields as in `Counters`.

    Attributes:
        others_cpu_s: CPU time of all other processes of the machine.
        cpus: CPUs' worth of time this process used, on average.
        others_cpus: the same of all others.
    """

    wall_s: float
    cpu_user_s: float
    cpu_system_s: float
    minor_faults: int | None
    major_faults: int | None
    voluntary_switches: int | None
    involuntary_switches: int | None
    others_cpu_s: float | None
    cpus: float
    others_cpus: float | None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def used_between(before: Counters, after: Counters) -> Used:
    """The difference of two moments."""
    wall = max(after.wall_s - before.wall_s, 1e-9)
    user, system = after.cpu_user_s - before.cpu_user_s, after.cpu_system_s - before.cpu_system_s
    others = None
    if before.machine_busy_s is not None and after.machine_busy_s is not None:
        others = max(after.machine_busy_s - before.machine_busy_s - user - system, 0.0)
    return Used(
        wall_s=wall,
        cpu_user_s=user,
        cpu_system_s=system,
        minor_faults=_less(after.minor_faults, before.minor_faults),
        major_faults=_less(after.major_faults, before.major_faults),
        voluntary_switches=_less(after.voluntary_switches, before.voluntary_switches),
        involuntary_switches=_less(after.involuntary_switches, before.involuntary_switches),
        others_cpu_s=others,
        cpus=(user + system) / wall,
        others_cpus=None if others is None else others / wall,
    )


def _less(after: int | None, before: int | None) -> int | None:
    return None if after is None or before is None else after - before


def _machine_busy_s(root: Path) -> float | None:
    """CPU time of everything but idling: the `cpu` line of /proc/stat, in USER_HZ."""
    try:
        line = (root / "proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()
        # user nice system idle iowait irq softirq steal; guest time is in user already.
        ticks = [int(word) for word in line[1:9]]
        hertz = os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError):
        return None
    if line[:1] != ["cpu"] or len(ticks) < 5:
        return None
    return (sum(ticks) - ticks[3] - ticks[4]) / hertz
