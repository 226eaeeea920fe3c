"""The TVM runtime without the compiler: loads a model library and calls its functions.

`import tvm` loads a compiler of 250 MB. What a device needs is `libtvm_runtime.so` (3.4 MB), which
lies in the same package, and `tvm_ffi` (4 MB); the first is found by `EDGE_MMLLM_TVM_RUNTIME`, its
path, where a device has no `tvm` package.

A library is native code: who opens a bundle with one runs what its maker compiled.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import threading
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_mmllm.errors import CorruptBundle, MissingDependency

#: Path of `libtvm_runtime.so`, where it is not in the `tvm` package.
RUNTIME = "EDGE_MMLLM_TVM_RUNTIME"
_LIBRARY = "libtvm_runtime.so"
#: DLPack's number of a CPU, and the virtual machine's of an allocator that keeps what it frees.
_CPU, _POOLED = 1, 2
#: Worker threads are not tied to cores: those of this process, any of them.
_SHARE_ALL_CORES = -3

_loaded: list[ctypes.CDLL] = []


def load_runtime() -> Any:
    """`tvm_ffi`, with the runtime's functions made known to it once.

    Raises:
        MissingDependency: the package, or the library, is nowhere.
    """
    try:
        import tvm_ffi
    except ImportError as error:
        raise MissingDependency("tvm_ffi", "mlc") from error
    if _loaded:
        return tvm_ffi
    path = _find()
    if path is None:
        raise MissingDependency("tvm", "mlc")
    # Read when the thread pool starts: pinned to cores 0, 1, ... it would fight with others.
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    try:
        _loaded.append(ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL))
    except OSError as error:
        raise MissingDependency("tvm", "mlc") from error
    return tvm_ffi


def _find() -> Path | None:
    named = os.environ.get(RUNTIME)
    if named:
        return Path(named)
    spec = importlib.util.find_spec("tvm")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for part in ("lib", "."):
            if (path := Path(folder) / part / _LIBRARY).is_file():
                return path
    return None


def runtime_version() -> str:
    """For reports: the version of what runs the library."""
    for package in ("apache-tvm", "apache-tvm-ffi"):
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:
            continue
    return "tvm runtime of unknown version"


def tensor(array: NDArray[Any]) -> Any:
    """A tensor over the array's own memory, which must be writable, contiguous and aligned to 64
    bytes (what compiled code may assume)."""
    return load_runtime().from_dlpack(array, require_alignment=64, require_contiguous=True)


class Library:
    """A loaded model library.

    Args:
        path: of the shared library.
        threads: to compute with.

    Attributes:
        metadata: what it says of itself, see `docs/mlc.md`.

    Raises:
        MissingDependency: there is no runtime.
        CorruptBundle: the file is no such library.
    """

    def __init__(self, path: Path, threads: int) -> None:
        ffi = load_runtime()
        self._threads = threads
        try:
            module = ffi.load_module(str(path))
            self._machine = module["vm_load_executable"]()
            self._machine["vm_initialization"](_CPU, 0, _POOLED)
            self.metadata: dict[str, Any] = json.loads(str(self._machine["_metadata"]()))
            self._set = self._machine["set_input"]
            self._invoke = self._machine["invoke_stateful"]
            self._output = self._machine["get_output"]
        except Exception as error:  # tvm_ffi raises any of Python's own
            raise CorruptBundle(
                "the model library cannot be loaded",
                where=str(path),
                found=f"{type(error).__name__}: {error}"[:300],
                fix="export the model again for this machine and this release's TVM",
            ) from error
        self._configure = ffi.get_global_func("runtime.config_threadpool")
        self._thread = 0

    def function(self, name: str) -> Any:
        """A function of the library, to be called with tensors."""
        return self._machine[name]

    def bind(self, name: str, arguments: Sequence[Any]) -> None:
        """Keeps the arguments of a function for `run`."""
        self._set(name, *arguments)

    def run(self, name: str) -> NDArray[np.float32]:
        """Calls a function with the arguments it was bound to; its result, without a copy."""
        self.ready()
        self._invoke(name)
        return np.asarray(np.from_dlpack(self._output(name)), np.float32)

    def ready(self) -> None:
        """Sets the number of threads, which TVM keeps for each calling thread."""
        thread = threading.get_ident()
        if thread != self._thread:
            cores = _cores()
            self._configure(_SHARE_ALL_CORES, self._threads, [str(c) for c in cores])
            self._thread = thread


def _cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
