"""Output formats: every one imports, and none needs what another is written with."""

from __future__ import annotations

import subprocess
import sys

import pytest

from edge_mmllm.errors import UsageError
from edge_mmllm_export.formats import FORMATS, output_format

#: Imports the modules named after the packages that are out of reach.
PROBE = """
import importlib, sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1].split(","):
            raise ModuleNotFoundError(f"{name} is out of reach", name=name)

sys.meta_path.insert(0, Block())
for name in sys.argv[2:]:
    importlib.import_module(name)
"""
EXPORTER = ("exporter", "planning", "verify", "inspection")


def _import(blocked: str, *names: str) -> subprocess.CompletedProcess[str]:
    modules = [f"edge_mmllm_export.{name}" for name in names]
    command = [sys.executable, "-c", PROBE, blocked, *modules]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_exporter_imports_without_any_format() -> None:
    done = _import("onnx,onnxruntime,gguf,tvm,safetensors", *EXPORTER)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("onnx", "gguf,tvm"),
        ("gguf", "onnx,onnxruntime,tvm"),
        ("mlc", "onnx,onnxruntime,gguf,safetensors,tvm"),
    ],
)
def test_a_format_needs_no_other(name: str, others: str) -> None:
    done = _import(others, *EXPORTER, f"formats.{name}")
    assert done.returncode == 0, done.stderr


def test_the_probe_would_find_a_breach() -> None:
    assert "onnx is out of reach" in _import("onnx", "formats.onnx").stderr


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_there(name: str) -> None:
    assert output_format(name).engine == name


def test_a_format_of_no_name() -> None:
    with pytest.raises(UsageError, match="unknown format"):
        output_format("savedmodel")
