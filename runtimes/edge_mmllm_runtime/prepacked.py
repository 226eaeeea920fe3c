"""A cache of weights in the layout that this CPU's kernels want.

When it loads a graph, onnxruntime repacks the weights of its matrix products into anonymous
memory of about the same size. It can also write them to a file once and map that file ever
after: the same speed, but memory that the system can evict and that processes share. The price
is disk space: a cached graph holds both layouts.

    CACHE/<key>/decoder.onnx, weights.bin, complete.json

The key names everything the layout depends on: the bundle, the graph, onnxruntime's version and
the CPU. A folder is made beside its place and renamed, so that a killed process leaves no half
cache, and `complete.json` holds the sizes. Who may write to the cache folder is trusted as much
as who may write to the bundle.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import tempfile
from pathlib import Path

import onnxruntime as ort

from edge_mmllm.errors import SessionError

_GRAPH, _WEIGHTS, _COMPLETE = "decoder.onnx", "weights.bin", "complete.json"

#: Goes up when this module writes something else.
_LAYOUT_VERSION = 1

#: Lines of /proc/cpuinfo that decide which kernels run: x86, then Arm.
_CPU_LINES = ("model name", "flags", "CPU implementer", "CPU part", "Features")


def cached_graph(graph: Path, bundle_sha256: str, cache: str | os.PathLike[str]) -> Path:
    """The prepacked form of `graph`, made now if the cache lacks it.

    Raises:
        SessionError: the cache cannot be written.
    """
    place = Path(cache) / cache_key(bundle_sha256, graph.name)
    if not _whole(place):
        try:
            _make(graph, place)
        except OSError as error:
            raise _unwritable(cache, str(error)) from error
    return place / _GRAPH


def cache_key(bundle_sha256: str, graph_name: str) -> str:
    """The name of a cached graph's folder."""
    parts = [str(_LAYOUT_VERSION), bundle_sha256, graph_name, ort.__version__, cpu_identity()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def cpu_identity() -> str:
    """All that may change the choice of kernels, as text."""
    lines = [platform.system(), platform.machine(), platform.processor()]
    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        info = ""
    found = {line.replace("\t", "") for line in info.splitlines() if line.startswith(_CPU_LINES)}
    return "\n".join(lines + sorted(found))


def _whole(place: Path) -> bool:
    """Whether a cached graph is there with the sizes it was written with."""
    try:
        sizes = json.loads((place / _COMPLETE).read_bytes())
        return bool(sizes) and all(
            (place / name).stat().st_size == size for name, size in sizes.items()
        )
    except (OSError, ValueError, AttributeError):
        return False


def _make(graph: Path, place: Path) -> None:
    """Writes the cached graph beside its place, then renames it."""
    cache = place.parent
    cache.mkdir(parents=True, exist_ok=True)
    needed = 3 * sum(f.stat().st_size for f in graph.parent.rglob("*") if f.is_file())
    free = shutil.disk_usage(cache).free
    if free < needed:
        raise _unwritable(cache, f"{free >> 20} MiB free", f"{needed >> 20} MiB free")
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=cache))
    try:
        _pack(graph, partial)
        sizes = {f.name: f.stat().st_size for f in partial.iterdir()}
        (partial / _COMPLETE).write_text(json.dumps(sizes), encoding="utf-8")
        shutil.rmtree(place, ignore_errors=True)
        try:
            partial.rename(place)
        except OSError:
            if not _whole(place):  # else another process was faster
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _pack(graph: Path, folder: Path) -> None:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    # Beyond EXTENDED lie layout changes of image models only, which cannot be saved.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(folder / _GRAPH)
    for key, value in (
        ("session.save_external_prepacked_constant_initializers", "1"),
        ("session.optimized_model_external_initializers_file_name", _WEIGHTS),
        ("session.optimized_model_external_initializers_min_size_in_bytes", "1024"),
    ):
        options.add_session_config_entry(key, value)
    try:
        ort.InferenceSession(graph, sess_options=options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors share no base class but this
        raise _unwritable(folder.parent, str(error)) from error
    if not (folder / _GRAPH).is_file():
        raise _unwritable(folder.parent, "onnxruntime wrote no graph")


def _unwritable(
    cache: str | os.PathLike[str], found: str, expected: str | None = None
) -> SessionError:
    return SessionError(
        "cannot write the cache of prepacked weights",
        where=str(cache),
        expected=expected,
        found=found,
        fix="make room, name another folder, or leave prepacked_cache out",
    )
