"""Huge pages: which ranges are asked for, and that asking never fails."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest

from edge_mmllm_runtime import hugepages

MB = 1 << 20


def _line(start: int, stop: int, rest: str = "rw-p 00000000 00:00 0") -> str:
    return f"{start:x}-{stop:x} {rest}"


def test_only_new_anonymous_memory_in_whole_huge_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(hugepages, "_advise", lambda a, b: asked.append((a, b)))
    monkeypatch.setattr(sys, "platform", "linux")
    maps = tmp_path / "maps"
    old = [_line(10 * MB, 20 * MB), _line(64 * MB, 66 * MB, "r--p 00000000 08:01 7   /a file")]
    maps.write_text("\n".join(old))
    with hugepages.huge_pages(maps):
        maps.write_text(
            "\n".join(
                [
                    _line(9 * MB, 25 * MB),  # grew on both sides: 9-10 holds no whole page
                    _line(31 * MB, 33 * MB),  # two half pages
                    _line(40 * MB, 45 * MB),
                    _line(50 * MB, 60 * MB, "rw-p 00000000 00:00 0   [stack]"),
                    _line(62 * MB, 64 * MB, "rw-p 00000000 00:00 0   [heap]"),
                    _line(70 * MB, 90 * MB, "r-xp 00000000 00:00 0"),
                ]
            )
        )
    assert asked == [(20 * MB, 24 * MB), (40 * MB, 44 * MB), (62 * MB, 64 * MB)]


def test_advice_on_real_memory_keeps_its_content() -> None:
    with hugepages.huge_pages():
        block = mmap.mmap(-1, 8 * MB)
        block[5 * MB] = 7
    assert block[5 * MB] == 7
    block.close()
