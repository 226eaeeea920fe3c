"""What the benchmarks measure: a table of models, and how each exporter makes its artefact.

A later model is one more line in `MODELS`: where its checkpoint comes from. Artefacts are kept in
the cache folder, named by what made them, so that a second run starts at once.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import harness
import random_models
from smollm2 import smollm2_gguf, smollm2_hub

from edge_mmllm.errors import KernelError
from edge_mmllm_runtime import native

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
        gguf_kept: False: the GGUF file is deleted once it is quantized.
    """

    hub: Callable[[Path], Path]
    gguf: Callable[[Path], Path] | None
    engines: tuple[str, ...]
    gguf_kept: bool = True


def _random_gguf(name: str, cache: Path) -> Path:
    from random_gguf import float16

    return float16(name, cache)


def _random(name: str) -> Model:
    """A model of `random_models`, and whether llama.cpp runs it."""
    peer = not name.startswith("rwkv4")
    return Model(
        partial(random_models.checkpoint, name),
        partial(_random_gguf, name) if peer else None,
        (*OURS, "llama.cpp") if peer else OURS,
        gguf_kept=False,
    )


#: With the native kernels, and with onnxruntime's.
OURS = ("ours native", "ours stock")
#: A library compiled by TVM, run by an interpreter that has it.
MLC = "ours mlc"
#: genai twice: told to use the same threads, and as it comes.
PEERS = (*OURS, "genai", "genai, default threads", "llama.cpp")
MODELS = {
    "smollm2": Model(smollm2_hub, smollm2_gguf, PEERS),
    # Too small to time; for quality.
    "mamba2": Model(lambda _: harness.ROOT / "examples/models/tiny-mamba2", None, OURS),
    **{name: _random(name) for name in random_models.MODELS},
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
    """A bundle of ours, exported with `options` and the gate off unless they say otherwise;
    anew where the exporter has changed."""
    gate = () if "--gate" in options else ("--gate", "off")
    name = "-".join(["ours", model, *(o.lstrip("-").replace("=", "-") for o in options)])
    path, made = cache / "benchmarks" / name, cache / "benchmarks" / f"{name}.made"
    exporter = exporter_sha256()
    current = made.is_file() and made.read_text() == exporter
    if refresh or not current or not (path / "manifest.json").is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        run(export_command(MODELS[model].hub(cache), path, *options, *gate))
        made.write_text(exporter)
    return path


def exporter_sha256() -> str:
    """Identity of what decides a bundle's bytes: the exporter's sources."""
    digest = hashlib.sha256()
    for path in sorted((harness.ROOT / "export").rglob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


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
        part, source = path.with_suffix(".part"), make(cache)
        run([str(python), "-c", _QUANTIZE, str(source), str(part), str(FTYPE_Q4_0)])
        part.replace(path)
        if not MODELS[model].gguf_kept:
            source.unlink()
    return path


def artefact(engine: str, model: str, cache: Path, python: Path, *, refresh: bool = False) -> Path:
    """What `engine` loads."""
    if engine in OURS:
        return ours(model, cache, "--quant", "int4", refresh=refresh)
    return {"genai": genai, "llama.cpp": llama_cpp}[engine.split(",")[0]](model, cache, python)


def step_bytes(engine: str, path: Path) -> int:
    """Bytes of weights that a decode step reads: all but an embedding that is no head, of which
    it reads one row, and tables of rotary embeddings."""
    if engine in OURS:
        import onnx

        graph = "decoder_native.onnx" if engine == "ours native" else "decoder.onnx"
        regions, tables = dict[str, int](), dict[str, int]()
        head = False
        for tensor in onnx.load(path / graph, load_external_data=False).graph.initializer:
            place = {entry.key: entry.value for entry in tensor.external_data}
            stem = tensor.name.split(".")[0]
            if place and stem != "rope":
                (tables if stem == "embed" else regions)[place["offset"]] = int(place["length"])
                head = head or stem == "head"
        return sum((regions if head else regions | tables).values())
    if engine == MLC:
        shards = json.loads((path / "tensor-cache.json").read_text())["records"]
        stored = {t["name"]: int(t["nbytes"]) for shard in shards for t in shard["records"]}
        head = any(name.startswith("head.") for name in stored)
        return sum(n for name, n in stored.items() if not (head and name.startswith("embed.")))
    if engine == "llama.cpp":
        from gguf import GGUFReader

        sizes = {t.name: int(t.n_bytes) for t in GGUFReader(path).tensors}
        if "output.weight" in sizes:
            del sizes["token_embd.weight"]
        return sum(sizes.values())
    return (path / "model.onnx.data").stat().st_size  # tied


def kernels() -> str | None:
    """Builds the native kernels where they are not built yet; why not, or None where they are."""
    try:
        if native.library() is None:
            native.build()
    except KernelError as error:
        return " ".join(str(error).split())
    return None


def kernels_key() -> str | None:
    """Which native kernels are built: a hash of sources, flags and CPU."""
    return native.library_place().parent.name if native.library() else None


def interpreter(engine: str, python: Path) -> str:
    """The interpreter that has the engine."""
    if engine == MLC:
        return str(harness.TVM_PYTHON)
    return sys.executable if engine in OURS else str(python)


def run(command: Sequence[str]) -> None:
    result = subprocess.run(
        list(command), env=harness.child_env(), capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise RuntimeError(
            f"{command[:4]} exited with {result.returncode}: {result.stderr[-1500:]}"
        )
