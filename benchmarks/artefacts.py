"""What the benchmarks measure: a table of models, and how each exporter makes its artefact.

A later model is one more line in `MODELS`: where its checkpoint comes from. Artefacts are kept in
the cache folder, named by what made them, so that a second run starts at once.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import harness
from smollm2 import smollm2_gguf, smollm2_hub

#: llama.cpp's number for "mostly Q4_0". Source: `enum llama_ftype` in llama.h.
FTYPE_Q4_0 = 2

_QUANTIZE = """
import ctypes, sys, llama_cpp as c
log = c.llama_log_callback(lambda *_: None)
c.llama_log_set(log, ctypes.c_void_p(0))
p = c.llama_model_quantize_default_params()
p.ftype, p.nthread, p.allow_requantize = int(sys.argv[3]), 2, True
code = c.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(p))
sys.exit(code)
"""


@dataclass(frozen=True)
class Model:
    """A model of the tables.

    Attributes:
        hub: makes or finds its hub-layout folder in a cache folder.
        gguf: the same for a GGUF file that llama.cpp can requantize; None: llama.cpp lacks it.
        engines: who runs it.
        tied: the head is the embedding, so every weight is read for a token.
    """

    hub: Callable[[Path], Path]
    gguf: Callable[[Path], Path] | None
    engines: tuple[str, ...]
    tied: bool


#: genai twice: told to use the same threads, and as it comes.
PEERS = ("ours", "genai", "genai, default threads", "llama.cpp")
MODELS = {
    "smollm2": Model(smollm2_hub, smollm2_gguf, PEERS, tied=True),
    # Too small to time; for quality.
    "mamba2": Model(lambda _: harness.ROOT / "examples/models/tiny-mamba2", None, ("ours",), True),
}
#: Those whose speed is worth a table.
TIMED = ("smollm2",)


def export_command(source: Path, out: Path, *options: str) -> list[str]:
    """Our exporter as a whole process."""
    command = [sys.executable, "-m", "edge_mmllm", "export", str(source), "--out", str(out)]
    return [*command, "--force", *options]


def builder_command(python: Path, source: Path, out: Path, scratch: Path) -> list[str]:
    """onnxruntime-genai's exporter as a whole process."""
    command = [str(python), "-m", "onnxruntime_genai.models.builder", "-m", str(source)]
    return [*command, "-o", str(out), "-p", "int4", "-e", "cpu", "-c", str(scratch)]


def ours(model: str, cache: Path, *options: str, refresh: bool = False) -> Path:
    """A bundle of ours, exported with `options` and the gate off unless they say otherwise."""
    gate = () if "--gate" in options else ("--gate", "off")
    name = "-".join(["ours", model, *(o.lstrip("-").replace("=", "-") for o in options)])
    path = cache / "benchmarks" / name
    if refresh or not (path / "manifest.json").is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        run(export_command(MODELS[model].hub(cache), path, *options, *gate))
    return path


def genai(model: str, cache: Path, python: Path) -> Path:
    """onnxruntime-genai's int4 folder."""
    path = cache / "benchmarks" / f"genai-{model}-int4"
    if not (path / "genai_config.json").is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(path, ignore_errors=True)
        run(builder_command(python, MODELS[model].hub(cache), path, cache / "benchmarks/scratch"))
    return path


def llama_cpp(model: str, cache: Path, python: Path) -> Path:
    """llama.cpp's Q4_0 file, quantized from the same weights by llama.cpp itself."""
    path = cache / "benchmarks" / f"llama.cpp-{model}-q4_0.gguf"
    make = MODELS[model].gguf
    if make is None:
        raise ValueError(f"llama.cpp does not run {model}")
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        run([str(python), "-c", _QUANTIZE, str(make(cache)), str(part), str(FTYPE_Q4_0)])
        part.replace(path)
    return path


def artefact(engine: str, model: str, cache: Path, python: Path, *, refresh: bool = False) -> Path:
    """What `engine` loads."""
    if engine == "ours":
        return ours(model, cache, "--quant", "int4", refresh=refresh)
    return {"genai": genai, "llama.cpp": llama_cpp}[engine.split(",")[0]](model, cache, python)


def interpreter(engine: str, python: Path) -> str:
    """The interpreter that has the engine."""
    return sys.executable if engine == "ours" else str(python)


def run(command: Sequence[str]) -> None:
    result = subprocess.run(
        list(command), env=harness.child_env(), capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise RuntimeError(
            f"{command[:4]} exited with {result.returncode}: {result.stderr[-1500:]}"
        )
