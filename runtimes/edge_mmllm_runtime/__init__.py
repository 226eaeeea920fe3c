"""The device runtime: loads a bundle, runs it, says what it costs.

Engines are imported when a bundle asks for them, so that a device needs only its own.
"""

from __future__ import annotations

import importlib
import importlib.util
import operator
import os
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from edge_mmllm.errors import MissingDependency, UnsupportedBundle, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from edge_mmllm.bundle import Bundle
    from edge_mmllm.text import Text
    from edge_mmllm_runtime.adapters import Adapter, AdapterLike
    from edge_mmllm_runtime.engine import Engine, EngineOptions
    from edge_mmllm_runtime.session import Session

__all__ = ["ENGINES", "load"]

#: Engine name -> (module with `open_engine`, package it needs, extra that installs it).
ENGINES = {
    "onnx": ("edge_mmllm_runtime.onnx", "onnxruntime", "runtime-onnx"),
    "gguf": ("edge_mmllm_runtime.gguf.engine", "llama_cpp", "gguf"),
    "mlc": ("edge_mmllm_runtime.mlc.engine", "tvm_ffi", "mlc"),
}

#: Context of a session over a model whose state grows, unless asked for; bounds the address
#: space of a model with a very long `context_length`.
DEFAULT_CONTEXT = 32768


def load(
    path: str | os.PathLike[str],
    *,
    engine: str | None = None,
    threads: int | None = None,
    context: int | None = None,
    prepacked_cache: str | os.PathLike[str] | None = None,
    kernels: str = "auto",
    trace: str | os.PathLike[str] | None = None,
    lora: AdapterLike | Sequence[AdapterLike] | None = None,
    mmproj: str | os.PathLike[str] | None = None,
    mmap: bool = True,
) -> Session:
    """Opens a bundle, or a GGUF file from elsewhere, and makes it ready to run.

    Args:
        path: the bundle's folder; or a GGUF file, which is first loaded in a child process, see
            `gguf/file.py`.
        engine: None: the one the manifest names.
        threads: None: what the CPU affinity and the cgroup's quota allow.
        context: tokens to make room for. None: the model's own context length, at most
            `DEFAULT_CONTEXT` where the state grows; no limit where it is constant.
        prepacked_cache: a folder for weights in this CPU's own layout, so that they need no
            anonymous memory and processes share them (see `prepacked.py`); made on first use.
            It takes about twice the bundle's size on disk. None: weights are repacked in memory
            at each load.
        kernels: `native`: the library that `edge-mmllm kernels --build` makes; `stock`:
            onnxruntime's own; `auto`: native where the library is built and the bundle has a
            program for it, unless $EDGE_MMLLM_KERNELS says otherwise.
        trace: a folder for the engine's own profile of its operators, written when the session
            is closed, see `edge_mmllm.profiling.operators`. It slows the engine.
        lora: of a GGUF model: adapters as GGUF files (`edge-mmllm adapter` makes them), each with
            a scale where it is `(file, scale)`. States belong to the model with its adapters.
        mmproj: of a GGUF file from elsewhere: the file with its encoder of pictures or sounds.
        mmap: of a GGUF model: False reads its weights into memory instead of mapping the file,
            which a slow or removable disk may want.

    Raises:
        KernelError: `native` kernels that are not built here, or not in the bundle.
        BundleError: the bundle is damaged, unsafe or not for this release.
        MissingDependency: the engine's package is not installed.
        SessionError: no memory for the states, or the cache cannot be written.
        UsageError: `engine`, `threads`, `context` or `lora` does not fit the bundle.
    """
    from edge_mmllm.bundle import open_bundle
    from edge_mmllm.profiling.machine import default_threads
    from edge_mmllm_runtime.engine import EngineOptions
    from edge_mmllm_runtime.gguf.file import GgufFile, is_gguf, open_file
    from edge_mmllm_runtime.session import Session

    if is_gguf(path):
        name = _engine_name(engine, "gguf")
        _opener(name)  # says what is missing
        found = open_file(path)
        source: Bundle | GgufFile = found if mmproj is None else found.with_projector(mmproj)
    elif mmproj is not None:
        raise UsageError("a projector goes with a GGUF file; a bundle has its own", where=str(path))
    else:
        source = open_bundle(path)
        name = _engine_name(engine, source.manifest.engine)
    spec = source.spec
    grows = any(s.grows for s in spec.states)
    if name == "gguf":
        from edge_mmllm_runtime.gguf.engine import STATE

        grows = spec.context_length is not None
        spec = replace(spec, states=(STATE,))
    if kernels not in ("auto", "native", "stock"):
        raise UsageError("unknown kernels", expected="auto | native | stock", found=repr(kernels))
    context = _whole("context", context)
    threads = _whole("threads", threads)
    context = _context(context, spec.context_length, grows)
    if threads is not None and not 1 <= threads <= most_threads():
        raise UsageError(
            "threads does not fit this machine",
            expected=f"1 to {most_threads()}",
            found=str(threads),
        )
    adapters = _adapters(lora, name)
    options = EngineOptions(
        threads or default_threads(), context, prepacked_cache, kernels, trace, adapters, mmap
    )
    if not isinstance(source, GgufFile):
        engine_ = _opener(name)(source, options)
        return Session(
            engine_,
            spec,
            _identity(source.sha256, adapters),
            partial(_text, source),
            context=context,
            read_file=lambda file: source.file(file).read_bytes(),
        )
    return replace(source, sha256=_identity(source.sha256, adapters)).session(spec, options)


def _adapters(given: object, engine: str) -> tuple[Adapter, ...]:
    """The adapters asked for. Raises: UsageError: not of this engine."""
    if given is None:
        return ()
    if engine != "gguf":
        raise UsageError(
            "this engine applies no adapters while it runs",
            expected="a GGUF model",
            found=f"engine {engine}",
            fix="merge it: edge-mmllm export SRC --lora DIR",
        )
    from edge_mmllm_runtime.adapters import adapters_of

    return adapters_of(given)  # type: ignore[arg-type]


def _identity(sha256: str, adapters: tuple[Adapter, ...]) -> str:
    if not adapters:
        return sha256
    from edge_mmllm_runtime.adapters import identity

    return identity(sha256, adapters)


def _text(bundle: Bundle) -> Text:
    """What turns text into ids. Raises: CorruptBundle."""
    from edge_mmllm.spec import TOKENIZER_FILES
    from edge_mmllm.text import Text

    file = TOKENIZER_FILES.get(bundle.spec.text.tokenizer)
    return Text(bundle.spec.text, bundle.file(file).read_bytes() if file else None)


def most_threads() -> int:
    """More threads than this only get in each other's way: a hundred thousand never start."""
    return max(64, 4 * (os.cpu_count() or 1))


def _whole(name: str, value: int | None) -> int | None:
    """`value` as an int, numpy's included. Raises: UsageError."""
    if value is None:
        return None
    try:
        return operator.index(value)
    except TypeError as error:
        raise UsageError(f"{name} must be a whole number", found=repr(value)[:80]) from error


def _engine_name(asked: str | None, named: str) -> str:
    if named not in ENGINES:
        raise UnsupportedBundle(
            "this release has no such engine", expected=", ".join(ENGINES), found=named
        )
    if asked is not None and asked != named:
        raise UsageError("the bundle is for another engine", expected=named, found=asked)
    return named


def _context(asked: int | None, longest: int | None, grows: bool) -> int | None:
    """The session's context in tokens, None for no limit."""
    if asked is None:
        if not grows:
            return longest
        return min(longest or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    if asked < 1 or (longest is not None and asked > longest):
        raise UsageError(
            "context does not fit the model",
            expected=f"1 to {longest}" if longest else "at least 1",
            found=str(asked),
        )
    return asked


def _opener(name: str) -> Callable[[Bundle, EngineOptions], Engine]:
    """The engine's `open_engine`, imported only now."""
    module, package, extra = ENGINES[name]
    if importlib.util.find_spec(package) is None:
        raise MissingDependency(package, extra)
    opener: Callable[[Bundle, EngineOptions], Engine] = importlib.import_module(module).open_engine
    return opener
