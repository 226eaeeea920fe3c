"""The machine and its limits, on made-up /proc and /sys trees."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_mmllm.profiling import machine
from edge_mmllm.profiling.cgroup import CgroupLimits, cgroup_limits
from edge_mmllm.profiling.machine import (
    affinity,
    cpu_features,
    cpu_model,
    default_threads,
    load_average,
    physical_cores,
    read_machine,
)

GIB = 1 << 30
X86 = """processor\t: 0
model name\t: Some CPU 3000
flags\t\t: fpu sse4_1 avx avx2 fma f16c avx512f avx512_vnni hypervisor

processor\t: 1
model name\t: Another CPU
"""
ARM = """processor\t: 0
Features\t: fp asimd asimdhp asimddp i8mm
CPU implementer\t: 0x41

Hardware\t: BCM2835
Model\t\t: Some Board 5
"""


def _write(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def _cpus(siblings: list[str]) -> dict[str, str]:
    folder = "sys/devices/system/cpu"
    return {
        f"{folder}/cpu{i}/topology/thread_siblings_list": f"{text}\n"
        for i, text in enumerate(siblings)
    }


# --- control groups -----------------------------------------------------------------------------


def test_no_control_group(tmp_path: Path) -> None:
    assert cgroup_limits(tmp_path) == CgroupLimits(None, None, None, 0)


def test_version_2_the_tightest_ancestor_binds(tmp_path: Path) -> None:
    group = "sys/fs/cgroup"
    _write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/pod/job\n",
            f"{group}/cpu.max": "max 100000\n",
            f"{group}/pod/cpu.max": "150000 100000\n",
            f"{group}/pod/job/cpu.max": "400000 100000\n",
            f"{group}/pod/memory.max": f"{4 * GIB}\n",
            f"{group}/pod/memory.current": f"{3 * GIB}\n",
            f"{group}/pod/memory.stat": f"anon 5\ninactive_file {1 * GIB}\n",
            f"{group}/pod/job/memory.max": "max\n",
        },
    )
    assert cgroup_limits(tmp_path) == CgroupLimits(2, 1.5, 4 * GIB, 2 * GIB)


def test_version_2_in_a_container_that_sees_only_the_hosts_path(tmp_path: Path) -> None:
    _write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/../../system.slice/docker-abc.scope\n",
            "sys/fs/cgroup/cpu.max": "50000 100000",
            "sys/fs/cgroup/memory.max": str(GIB),
        },
    )
    assert cgroup_limits(tmp_path) == CgroupLimits(2, 0.5, GIB, 0)


@pytest.mark.parametrize("mount", ["cpu", "cpu,cpuacct"])
def test_version_1(tmp_path: Path, mount: str) -> None:
    _write(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/job\n3:cpu,cpuacct:/job\n1:name=systemd:/\n0::/\n",
            f"sys/fs/cgroup/{mount}/job/cpu.cfs_quota_us": "250000\n",
            f"sys/fs/cgroup/{mount}/job/cpu.cfs_period_us": "100000\n",
            f"sys/fs/cgroup/{mount}/cpu.cfs_quota_us": "-1\n",
            f"sys/fs/cgroup/{mount}/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": f"{2 * GIB}\n",
            "sys/fs/cgroup/memory/job/memory.usage_in_bytes": f"{GIB}\n",
            "sys/fs/cgroup/memory/job/memory.stat": f"total_inactive_file {GIB // 2}\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        },
    )
    assert cgroup_limits(tmp_path) == CgroupLimits(1, 2.5, 2 * GIB, GIB // 2)


def test_version_1_without_limits(tmp_path: Path) -> None:
    _write(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/\n3:cpu:/\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        },
    )
    assert cgroup_limits(tmp_path) == CgroupLimits(1, None, None, 0)


@pytest.mark.parametrize("content", ["", "max", "100000", "100000 0", "a b", "-1 100000"])
def test_a_malformed_quota_is_none(tmp_path: Path, content: str) -> None:
    _write(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": content})
    assert cgroup_limits(tmp_path).cpus is None


# --- threads ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("allowed", "quota", "siblings", "threads"),
    [
        (4, None, None, 4),
        (4, "150000 100000", None, 2),  # rounded up
        (4, "50000 100000", None, 1),
        (2, "800000 100000", None, 2),
        (4, None, ["0-1", "0-1", "2-3", "2-3"], 2),
        (2, None, ["0,2", "1,3", "0,2", "1,3"], 2),
        (4, "100000 100000", ["0", "1", "2", "3"], 1),
    ],
)
def test_default_threads_is_the_least_of_the_bounds(
    tmp_path: Path, allowed: int, quota: str | None, siblings: list[str] | None, threads: int
) -> None:
    _write(tmp_path, {"proc/self/cgroup": "0::/\n", **_cpus(siblings or [])})
    if quota:
        _write(tmp_path, {"sys/fs/cgroup/cpu.max": quota})
    assert default_threads(tmp_path, frozenset(range(allowed))) == threads


def test_cores_are_those_behind_the_affinity_mask(tmp_path: Path) -> None:
    _write(tmp_path, _cpus(["0,4", "1,5", "2,6", "3,7", "0,4", "1,5", "2,6", "3,7"]))
    assert physical_cores(frozenset({0, 4}), tmp_path) == 1
    assert physical_cores(frozenset({0, 1, 5}), tmp_path) == 2
    assert physical_cores(frozenset(range(8)), tmp_path) == 4
    assert physical_cores(frozenset({0, 99}), tmp_path) is None


# --- the rest -----------------------------------------------------------------------------------


def test_an_x86_processor(tmp_path: Path) -> None:
    _write(tmp_path, {"proc/cpuinfo": X86})
    assert cpu_model(tmp_path) == "Some CPU 3000"
    features = ("sse4_1", "avx", "avx2", "fma", "f16c", "avx512f", "avx512_vnni")
    assert cpu_features(tmp_path) == features


def test_an_arm_board(tmp_path: Path) -> None:
    _write(tmp_path, {"proc/cpuinfo": ARM})
    assert cpu_model(tmp_path) == "Some Board 5"
    assert cpu_features(tmp_path) == ("asimd", "asimdhp", "asimddp", "i8mm")
    _write(tmp_path, {"proc/cpuinfo": "", "proc/device-tree/model": "Other Board\0"})
    assert cpu_model(tmp_path) == "Other Board"


@pytest.mark.parametrize(
    ("isa", "features"), [("rv64imafdcv_zicsr", ("rvv",)), ("rv64imafdc_zve32f", ())]
)
def test_a_riscv_processor(tmp_path: Path, isa: str, features: tuple[str, ...]) -> None:
    _write(tmp_path, {"proc/cpuinfo": f"isa\t: {isa}\nuarch\t: vendor,core\n"})
    assert cpu_features(tmp_path) == features
    assert cpu_model(tmp_path) == "vendor,core"


def test_load_average(tmp_path: Path) -> None:
    assert load_average(tmp_path) is None
    _write(tmp_path, {"proc/loadavg": "1.25 0.5 0.1 2/300 77\n"})
    assert load_average(tmp_path) == 1.25


def test_available_memory_stays_within_the_cgroup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "affinity", lambda: frozenset({0, 1}))
    meminfo = f"MemTotal: {16 << 20} kB\nMemAvailable: {8 << 20} kB\n"
    _write(tmp_path, {"proc/meminfo": meminfo})
    free = read_machine(tmp_path)
    assert (free.memory_bytes, free.available_bytes) == (16 * GIB, 8 * GIB)
    assert (free.memory_limit_bytes, free.affinity_cpus) == (None, 2)
    _write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": str(2 * GIB),
            "sys/fs/cgroup/memory.current": str(GIB),
        },
    )
    bound = read_machine(tmp_path)
    assert (bound.available_bytes, bound.memory_limit_bytes) == (GIB, 2 * GIB)


def test_the_real_machine_can_be_read() -> None:
    found = read_machine()
    assert 1 <= found.default_threads <= found.affinity_cpus == len(affinity())
    assert found.memory_bytes is None or found.memory_bytes > 1 << 20
    assert set(found.to_json()) >= {"cpu_model", "cpu_quota", "load_average"}


def test_an_empty_tree_gives_no_guesses(tmp_path: Path) -> None:
    found = read_machine(tmp_path)
    assert (found.cpu_model, found.cpu_features, found.physical_cores) == (None, (), None)
    assert (found.memory_bytes, found.available_bytes, found.load_average) == (None, None, None)
