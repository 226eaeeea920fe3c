"""CPU and memory limits of this process's control group, version 1 or 2 (cgroups(7)).

A limit of any ancestor binds too, so the folders from our group up to the mount are read. Inside
a container the path in /proc/self/cgroup may be the host's, which is not visible: then those of
its folders that exist are read, at least the mount itself, which is the container's own group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MOUNT = "sys/fs/cgroup"

#: Version 1 says "no limit" with the largest multiple of a page below 2**63.
_NO_LIMIT = 1 << 62


@dataclass(frozen=True)
class CgroupLimits:
    """What the control group allows; None for no limit.

    Attributes:
        version: 1 or 2; None where there is no control group.
        cpus: CPUs' worth of time.
        memory_bytes: the tightest limit.
        memory_used_bytes: counted against it, but for file pages that the kernel would drop.
    """

    version: int | None
    cpus: float | None
    memory_bytes: int | None
    memory_used_bytes: int


def cgroup_limits(root: Path = Path("/")) -> CgroupLimits:
    """Reads the limits below `root`."""
    paths = _paths(root)
    version = None if not paths else 2 if set(paths) == {""} else 1
    cpus: list[float] = []
    memory: list[tuple[int, int]] = []
    for folder in _folders(root, paths.get(""), ("", "unified")):
        cpus += _cpu_v2(folder)
        memory += _memory(folder, "memory.max", "memory.current", "inactive_file")
    for folder in _folders(root, paths.get("cpu"), ("cpu", "cpu,cpuacct")):
        cpus += _cpu_v1(folder)
    for folder in _folders(root, paths.get("memory"), ("memory",)):
        memory += _memory(
            folder, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        )
    # The group with the least left binds first.
    limit, used = min(memory, key=lambda pair: pair[0] - pair[1], default=(None, 0))
    return CgroupLimits(version, min(cpus, default=None), limit, used)


def _paths(root: Path) -> dict[str, str]:
    """Controller -> path of our group; the key of version 2 is empty."""
    paths: dict[str, str] = {}
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        parts = line.split(":", 2)
        if len(parts) == 3:
            for controller in parts[1].split(","):
                paths[controller] = parts[2]
    return paths


def _folders(root: Path, path: str | None, mounts: tuple[str, ...]) -> Iterator[Path]:
    """The group's folder and its ancestors', up to and with the mount, in each mount."""
    if path is None:
        return
    parts = [part for part in path.split("/") if part not in ("", "..")]
    for mount in mounts:
        base = root / MOUNT / mount
        for depth in range(len(parts), -1, -1):
            yield base.joinpath(*parts[:depth])


def _cpu_v2(folder: Path) -> list[float]:
    """`cpu.max` holds `QUOTA PERIOD` in microseconds, or `max PERIOD`."""
    words = (_read(folder / "cpu.max") or "").split()
    if len(words) != 2 or not (words[0].isdigit() and words[1].isdigit()):
        return []
    return [int(words[0]) / int(words[1])] if int(words[1]) else []


def _cpu_v1(folder: Path) -> list[float]:
    """`cpu.cfs_quota_us` is -1 for no limit."""
    quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
    return [quota / period] if quota and period else []


def _memory(folder: Path, limit: str, usage: str, inactive: str) -> list[tuple[int, int]]:
    """`(limit, used)` in bytes, or nothing where there is no limit."""
    most = _number(folder / limit)
    if most is None or most >= _NO_LIMIT:
        return []
    used = _number(folder / usage) or 0
    for line in (_read(folder / "memory.stat") or "").splitlines():
        name, _, value = line.partition(" ")
        if name == inactive and value.isdigit():
            used = max(used - int(value), 0)
    return [(most, used)]


def _number(path: Path) -> int | None:
    text = (_read(path) or "").strip()
    return int(text) if text.isdigit() else None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
