"""edge-mmllm: export, run and profile multimodal LLMs, RWKV and Mamba on small devices.

    import edge_mmllm

    with edge_mmllm.load("model.int4") as session:
        for piece in session.generate("Once upon a time"):
            print(piece, end="", flush=True)

Importing this package imports nothing else: names are resolved when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_mmllm.bundle import Bundle, open_bundle
    from edge_mmllm.errors import EdgeError
    from edge_mmllm.profiling.bench import bench
    from edge_mmllm.profiling.profile import ProfileOptions, profile
    from edge_mmllm.profiling.profiler import Profiler
    from edge_mmllm.profiling.report_data import Report
    from edge_mmllm_runtime import load
    from edge_mmllm_runtime.check import check
    from edge_mmllm_runtime.session import Session
    from edge_mmllm_runtime.snapshot import Snapshot

    __version__: str

__all__ = [
    "Bundle",
    "EdgeError",
    "ProfileOptions",
    "Profiler",
    "Report",
    "Session",
    "Snapshot",
    "__version__",
    "bench",
    "check",
    "load",
    "open_bundle",
    "profile",
]

#: Public name -> the module it lives in.
_HOMES = {
    "Bundle": "edge_mmllm.bundle",
    "EdgeError": "edge_mmllm.errors",
    "ProfileOptions": "edge_mmllm.profiling.profile",
    "Profiler": "edge_mmllm.profiling.profiler",
    "Report": "edge_mmllm.profiling.report_data",
    "Session": "edge_mmllm_runtime.session",
    "Snapshot": "edge_mmllm_runtime.snapshot",
    "bench": "edge_mmllm.profiling.bench",
    "check": "edge_mmllm_runtime.check",
    "load": "edge_mmllm_runtime",
    "open_bundle": "edge_mmllm.bundle",
    "profile": "edge_mmllm.profiling.profile",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("edge-mmllm")
    elif name in _HOMES:
        from importlib import import_module

        value = getattr(import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
