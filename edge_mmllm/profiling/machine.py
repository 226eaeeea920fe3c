"""The machine a run happens on, and how much of it is ours.

Threads and memory follow what this process may use (CPU affinity, cgroup limits), not what the
host has. Sources: Linux /proc and /sys (proc(5), cgroups(7)); elsewhere the standard library.
Every function takes the root to read below, so that a made-up machine can be tested.
"""

from __future__ import annotations

import math
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edge_mmllm.profiling.cgroup import cgroup_limits

ROOT = Path("/")

#: CPU features that the engines' kernels ask for, as /proc/cpuinfo spells them.
FEATURES = (
    # x86-64
    "sse4_1",
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    # Arm
    "neon",
    "asimd",
    "asimdhp",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
    "sve2",
    "sme",
)


@dataclass(frozen=True)
class Machine:
    """What `doctor` and every benchmark print. None: the system does not tell.

    Attributes:
        system, architecture: e.g. `Linux`, `x86_64`.
        cpu_model: as the processor or the board calls itself.
        cpu_features: those of `FEATURES` that it has.
        logical_cpus: on line in the host.
        physical_cores: cores behind the CPUs that this process may use.
        affinity_cpus: CPUs that this process may use.
        cpu_quota: CPUs' worth of time that the cgroup may use; None for no limit.
        default_threads: see `default_threads`.
        memory_bytes: physical memory.
        available_bytes: memory that can be had without swapping, within the cgroup's limit.
        memory_limit_bytes: the cgroup's limit; None for no limit.
        load_average: of the last minute.
    """

    system: str
    architecture: str
    cpu_model: str | None
    cpu_features: tuple[str, ...]
    logical_cpus: int | None
    physical_cores: int | None
    affinity_cpus: int
    cpu_quota: float | None
    default_threads: int
    memory_bytes: int | None
    available_bytes: int | None
    memory_limit_bytes: int | None
    load_average: float | None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def read_machine(root: Path = ROOT) -> Machine:
    """Looks at the machine below `root`."""
    allowed = affinity()
    limits = cgroup_limits(root)
    memory = _meminfo(root)
    available = memory.get("MemAvailable")
    if limits.memory_bytes is not None:
        left = max(limits.memory_bytes - limits.memory_used_bytes, 0)
        available = left if available is None else min(available, left)
    total = memory.get("MemTotal")
    if total is None and root == ROOT:
        total = _sysconf_memory()
    return Machine(
        system=platform.system(),
        architecture=platform.machine(),
        cpu_model=cpu_model(root),
        cpu_features=cpu_features(root),
        logical_cpus=os.cpu_count(),
        physical_cores=physical_cores(allowed, root),
        affinity_cpus=len(allowed),
        cpu_quota=limits.cpus,
        default_threads=default_threads(root, allowed),
        memory_bytes=total,
        available_bytes=available,
        memory_limit_bytes=limits.memory_bytes,
        load_average=load_average(root),
    )


def affinity() -> frozenset[int]:
    """The CPUs that this process may run on."""
    try:
        return frozenset(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # macOS, Windows
        return frozenset(range(os.cpu_count() or 1))


def default_threads(root: Path = ROOT, allowed: frozenset[int] | None = None) -> int:
    """How many threads an engine should use: at least 1.

    The least of: CPUs in the affinity mask, the cgroup's quota rounded up, and the physical
    cores behind the mask where known (two threads on one core only share its arithmetic units).

    Args:
        root: where to look.
        allowed: CPUs to use; None: this process's affinity.
    """
    allowed = affinity() if allowed is None else allowed
    bounds = [len(allowed)]
    quota = cgroup_limits(root).cpus
    if quota is not None:
        bounds.append(math.ceil(quota))
    cores = physical_cores(allowed, root)
    if cores is not None:
        bounds.append(cores)
    return max(min(bounds), 1)


def physical_cores(allowed: frozenset[int], root: Path = ROOT) -> int | None:
    """Number of cores behind the CPUs `allowed`; None where the system does not tell."""
    cores: set[str] = set()
    for cpu in allowed:
        topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        siblings = _text(topology / "core_cpus_list") or _text(topology / "thread_siblings_list")
        if siblings is None:
            return None
        cores.add(siblings)
    return len(cores) or None


def cpu_model(root: Path = ROOT) -> str | None:
    """The processor's or, on Arm boards, the board's name."""
    info = _cpuinfo(root)
    for key in ("model name", "cpu model", "Model", "Hardware", "uarch"):
        if info.get(key):
            return info[key]
    board = _text(root / "proc/device-tree/model")
    if board:
        return board.rstrip("\0")
    return (platform.processor() or None) if root == ROOT else None


def cpu_features(root: Path = ROOT) -> tuple[str, ...]:
    """Those of `FEATURES` that the first CPU has, and `rvv` for RISC-V vectors."""
    info = _cpuinfo(root)
    flags = set((info.get("flags") or info.get("Features") or "").split())
    found = tuple(name for name in FEATURES if name in flags)
    # e.g. rv64imafdcv_zicsr_...: single letters up to the first underscore.
    isa = info.get("isa", "").split("_")[0]
    return (*found, "rvv") if "v" in isa[4:] else found


def load_average(root: Path = ROOT) -> float | None:
    """Processes that ran or waited to run, on average over the last minute."""
    try:
        return float((_text(root / "proc/loadavg") or "").split()[0])
    except (IndexError, ValueError):
        pass
    if root != ROOT or not hasattr(os, "getloadavg"):
        return None
    try:
        return os.getloadavg()[0]
    except OSError:
        return None


def _meminfo(root: Path) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for line in (_text(root / "proc/meminfo") or "").splitlines():
        words = line.split()
        if len(words) == 3 and words[1].isdigit():
            sizes[words[0].rstrip(":")] = int(words[1]) * 1024
    return sizes


def _sysconf_memory() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _cpuinfo(root: Path) -> dict[str, str]:
    """The `key : value` lines of /proc/cpuinfo, the first of each key."""
    info: dict[str, str] = {}
    for line in (_text(root / "proc/cpuinfo") or "").splitlines():
        key, colon, value = line.partition(":")
        if colon:
            info.setdefault(key.strip(), value.strip())
    return info


def _text(path: Path) -> str | None:
    """A file's text without white space at its ends; None where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
