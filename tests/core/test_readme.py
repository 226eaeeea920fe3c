"""README's commands and Python run as printed; its support table names what there is."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from edge_mmllm_export.models import ARCHITECTURES

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `examples`, after README's `edge-mmllm` commands."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "examples").symlink_to(ROOT / "examples")
    lines = [line for language, block in BLOCKS if not language for line in block.splitlines()]
    commands = [line for line in lines if line.startswith("edge-mmllm ")]
    assert len(commands) >= 2
    for command in commands:
        words = [sys.executable, "-m", "edge_mmllm", *shlex.split(command)[1:]]
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    return folder


def test_the_commands_answer(workplace: Path) -> None:
    assert (workplace / "tiny-mamba2.int4/manifest.json").is_file()


def test_the_python_runs(workplace: Path) -> None:
    (block,) = [block for language, block in BLOCKS if language == "python"]
    done = subprocess.run(
        [sys.executable, "-c", block], cwd=workplace, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) > 10


def test_every_make_target_named_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"make ([a-z]+(?:-[a-z]+)?)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_support_table_names_every_architecture() -> None:
    rows = [line for line in README.splitlines() if line.startswith("| ")]
    status = [r for r in rows if re.search(r"\| (verified|structural|unsupported) \|", r)]
    for name in ARCHITECTURES:
        assert any(re.search(rf"\b{name}\b", row) for row in status), name
