"""The device boundary: core and runtime import without the exporter and the heavy packages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (ROOT / "edge_mmllm", ROOT / "runtimes" / "edge_mmllm_runtime")
BANNED = ("torch", "transformers", "onnx", "safetensors", "gguf", "edge_mmllm_export")

#: Imports every module named on stdin with `BANNED` out of reach; prints what failed.
PROBE = """
import importlib, importlib.abc, json, sys

BANNED = set(sys.argv[1:])

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BANNED:
            raise ModuleNotFoundError(f"{name} is banned on a device", name=name)

sys.meta_path.insert(0, Block())
failed = {}
for name in json.load(sys.stdin):
    try:
        importlib.import_module(name)
    except ImportError as error:
        failed[name] = str(error)
print(json.dumps([failed, sorted(BANNED & set(sys.modules))]))
"""


def _modules() -> list[str]:
    names = []
    for package in PACKAGES:
        for path in sorted(package.rglob("*.py")):
            parts = path.relative_to(package.parent).with_suffix("").parts
            names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


def _probe(modules: list[str]) -> tuple[dict[str, str], list[str]]:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *BANNED],
        input=json.dumps(modules),
        capture_output=True,
        text=True,
        check=True,
    )
    failed, present = json.loads(done.stdout)
    return failed, present


def test_every_core_and_runtime_module_imports_on_a_device() -> None:
    modules = _modules()
    assert {"edge_mmllm.cli.export", "edge_mmllm_runtime.onnx", "edge_mmllm.text"} <= set(modules)
    failed, present = _probe(modules)
    assert not failed
    assert not present


@pytest.mark.parametrize("name", ["edge_mmllm_export", "onnx", "safetensors.numpy"])
def test_the_probe_would_find_a_breach(name: str) -> None:
    failed, _ = _probe([name])
    assert list(failed) == [name]
