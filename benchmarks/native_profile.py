"""Where a native decoder's time goes, by kind of phase: `edge_mmllm_profile` of the library.

    void edge_mmllm_profile(int start, double seconds[100], int64_t runs[100])

`start` counts anew; without it, seconds and runs since are given by the opcode of a phase's first
op. Used by `engines.py` inside the child that has the engine.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from edge_mmllm.profiling.operators import NATIVE_PHASES
from edge_mmllm_runtime import native

_ENTRIES = 100
#: Kind of phase -> (phases a forward, microseconds a forward).
Figures = dict[str, tuple[int, float]]


def _function() -> Any:
    """The library's function; None where it has none. The engine has loaded the library already."""
    library = native.library()
    if library is None:
        return None
    return getattr(ctypes.CDLL(str(library)), "edge_mmllm_profile", None)


def profiled(forwards: int, call: Callable[[], object]) -> Figures | None:
    """Figures of `call`, which makes `forwards` forwards; None without the function."""
    function = _function()
    if function is None:
        return None
    seconds, runs = (ctypes.c_double * _ENTRIES)(), (ctypes.c_int64 * _ENTRIES)()
    function(1, None, None)
    call()
    function(0, seconds, runs)
    return {
        NATIVE_PHASES.get(i, f"op {i}"): (round(runs[i] / forwards), 1e6 * seconds[i] / forwards)
        for i in range(_ENTRIES)
        if runs[i]
    }
