"""The device runtime: loads a bundle, runs it, says what it costs.

Engines are imported when a bundle asks for them, so that a device needs only its own.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import TYPE_CHECKING

from edge_mmllm.errors import MissingDependency, UnsupportedBundle, UsageError

if TYPE_CHECKING:
    from edge_mmllm_runtime.session import Session

__all__ = ["ENGINES", "load"]

#: Engine name -> (module, class, package it needs, extra that installs it).
ENGINES = {
    "onnx": ("edge_mmllm_runtime.onnx", "OnnxEngine", "onnxruntime", "runtime-onnx"),
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
) -> Session:
    """Opens a bundle and makes it ready to run.

    Args:
        path: the bundle's folder.
        engine: None: the one the manifest names.
        threads: None: what the CPU affinity and the cgroup's quota allow.
        context: tokens to make room for. None: the model's own context length, at most
            `DEFAULT_CONTEXT` where the state grows; no limit where it is constant.

    Raises:
        BundleError: the bundle is damaged, unsafe or not for this release.
        MissingDependency: the engine's package is not installed.
        UsageError: `engine`, `threads` or `context` does not fit the bundle.
    """
    from edge_mmllm.profiling.machine import default_threads
    from edge_mmllm.text import Text

    from edge_mmllm.bundle import TOKENIZER_FILE, open_bundle
    from edge_mmllm_runtime.session import Session

    bundle = open_bundle(path)
    spec = bundle.spec
    name = _engine_name(engine, bundle.manifest.engine)
    context = _context(context, spec.context_length, any(s.grows for s in spec.states))
    if threads is not None and threads < 1:
        raise UsageError("threads must be at least 1", found=str(threads))
    make_engine = _engine_class(name)

    def make_text() -> Text:
        if spec.text.tokenizer != "tokenizers":
            return Text(spec.text, None)
        return Text(spec.text, bundle.file(TOKENIZER_FILE).read_bytes())

    return Session(
        make_engine(spec, bundle.file, threads=threads or default_threads(), context=context),
        spec,
        bundle.sha256,
        make_text,
        context=context,
    )


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


def _engine_class(name: str) -> type:
    module, attribute, package, extra = ENGINES[name]
    if importlib.util.find_spec(package) is None:
        raise MissingDependency(package, extra)
    return getattr(importlib.import_module(module), attribute)  # type: ignore[no-any-return]
