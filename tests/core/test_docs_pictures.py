"""The commands and the Python of docs/pictures.md run as printed, and answer."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_what_it_shows_runs(tmp_path: Path) -> None:
    page = (ROOT / "docs/pictures.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```(\w*)\n(.*?)```", page, re.DOTALL)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    lines = [line for language, block in blocks if not language for line in block.splitlines()]
    commands = [[sys.executable, "-m", "edge_mmllm", *shlex.split(line)[1:]] for line in lines]
    commands += [[sys.executable, "-c", block] for language, block in blocks if language]
    assert len(commands) == 4
    shown = []
    for command in commands:
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        shown.append(done.stdout)
    assert "It is red, bright and narrow." in shown[1]
    assert "It is red, bright and narrow." in shown[3]
    assert "It is red.\n" in shown[3]
    assert "encoded=1)" in shown[3]
    assert "encoded=0)" in shown[3]
    assert shown[3].endswith("No.\n")
