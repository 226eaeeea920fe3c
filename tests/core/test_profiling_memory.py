"""Memory figures: parsed from a made-up /proc, and plausible on the real one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edge_mmllm.profiling.memory import (
    MemoryUse,
    memory_use,
    peak_rss_bytes,
    pss_bytes,
    reset_peak,
    rss_bytes,
)

ROOT = Path(__file__).parents[2]
linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no Linux /proc here")

STATUS = """Name:\tpython
VmPeak:\t  900 kB
VmHWM:\t   300 kB
VmRSS:\t   200 kB
Threads:\t1
"""
ROLLUP = """00400000-7ffd [rollup]
Rss:                 200 kB
Pss:                 150 kB
Pss_Anon:            100 kB
Pss_File:             50 kB
"""


def test_figures_of_a_made_up_process(tmp_path: Path) -> None:
    for name in ("self", "77"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "status").write_text(STATUS)
        (tmp_path / name / "smaps_rollup").write_text(ROLLUP)
    expected = MemoryUse(200 * 1024, 300 * 1024, 150 * 1024, 100 * 1024, 50 * 1024)
    assert memory_use(proc=tmp_path) == memory_use(77, proc=tmp_path) == expected


def test_what_the_system_does_not_tell_is_none(tmp_path: Path) -> None:
    assert memory_use(proc=tmp_path) == MemoryUse(None, None, None, None, None)
    assert not reset_peak(proc=tmp_path)
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "status").write_text("VmRSS:\tmany kB\nVmHWM: 3\n\n")
    assert (rss_bytes(proc=tmp_path), peak_rss_bytes(proc=tmp_path)) == (None, None)


def test_reset_peak_writes_what_proc5_says(tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    assert reset_peak(proc=tmp_path)
    assert (tmp_path / "self" / "clear_refs").read_bytes() == b"5"


@linux
def test_the_real_process_grows_and_its_peak_stays() -> None:
    script = (
        "from edge_mmllm.profiling.memory import *\n"
        "before = rss_bytes()\n"
        "block = bytearray(b'x') * (64 << 20)\n"
        "during, pss = rss_bytes(), pss_bytes()\n"
        "del block\n"
        "after, peak = rss_bytes(), peak_rss_bytes()\n"
        "allowed = reset_peak()\n"
        "print(before, during, after, peak, pss or 0, int(allowed), peak_rss_bytes())"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    before, during, after, peak, pss, allowed, later = map(int, run.stdout.split())
    block = 60 << 20
    assert during - before > block
    assert during - after > block
    assert peak - before > block  # the kernel counts in batches: not to the last page
    assert pss == 0 or block < pss <= during + (4 << 20)
    assert (peak - later > block) == bool(allowed)


@linux
def test_another_process_can_be_asked() -> None:
    assert (rss_bytes(os.getppid()) or 0) > 0
    assert rss_bytes(2**30) is None
    assert pss_bytes(2**30) is None
