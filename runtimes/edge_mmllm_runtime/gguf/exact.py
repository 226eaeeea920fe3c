"""llama.cpp's graph looked into between two steps, and its rounded tables of GELUs put right.

ggml computes GELUs from a table in float16: 5e-4 of a value, in every layer. Where a model is kept
in float32 that is most of its error, so there (and in encoders of pictures, which run once) they
are computed here. The functions are ggml's public ones; no layout of a structure is relied on.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from edge_mmllm.errors import SessionError
from edge_mmllm_runtime.engine import Float32

#: Steps that only look at a result in another way.
VIEWS = (b"RESHAPE", b"VIEW", b"PERMUTE", b"TRANSPOSE", b"CONT")
#: How far the table's values may lie from exact ones, as a share of the largest.
NEAR_TABLE = 3e-3


class GgufParams(ctypes.Structure):
    """`struct gguf_init_params`."""

    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


@cache
def ggml() -> Any:
    """The tensor library, with the functions used here declared."""
    from llama_cpp._ggml import libggml

    size, pointer = ctypes.c_size_t, ctypes.c_void_p
    declared: dict[str, tuple[list[Any], Any]] = {
        "ggml_op_desc": ([pointer], ctypes.c_char_p),
        "ggml_nbytes": ([pointer], size),
        "ggml_backend_tensor_get": ([pointer, pointer, size, size], None),
        "ggml_backend_tensor_set": ([pointer, pointer, size, size], None),
        "gguf_init_from_file": ([ctypes.c_char_p, GgufParams], pointer),
        "gguf_find_tensor": ([pointer, ctypes.c_char_p], ctypes.c_int64),
        "gguf_get_tensor_type": ([pointer, ctypes.c_int64], ctypes.c_int),
        "gguf_get_tensor_size": ([pointer, ctypes.c_int64], size),
        "gguf_get_tensor_offset": ([pointer, ctypes.c_int64], size),
        "gguf_get_data_offset": ([pointer], size),
        "gguf_free": ([pointer], None),
        "gguf_find_key": ([pointer, ctypes.c_char_p], ctypes.c_int64),
        "gguf_get_val_u32": ([pointer, ctypes.c_int64], ctypes.c_uint32),
    }
    for name, (arguments, result) in declared.items():
        function = getattr(libggml, name)
        function.argtypes, function.restype = arguments, result
    return libggml


def description(tensor: int) -> bytes:
    """What a step computes, e.g. `MUL_MAT`, `GELU`."""
    return bytes(ggml().ggml_op_desc(tensor))


def tensor_values(tensor: int) -> Float32:
    """A float32 tensor between two steps, flat."""
    out = np.empty(ggml().ggml_nbytes(tensor) // 4, np.float32)
    ggml().ggml_backend_tensor_get(tensor, out.ctypes.data, 0, out.nbytes)
    return out


def set_tensor(tensor: int, values: Float32) -> None:
    """Puts other values in its place."""
    given = np.ascontiguousarray(values, np.float32)
    ggml().ggml_backend_tensor_set(tensor, given.ctypes.data, 0, given.nbytes)


def put(tensor: int, exact: Float32 | None, name: str, share: float = NEAR_TABLE) -> None:
    """Puts what is computed in float32 in the place of what is rounded.

    Raises:
        SessionError: that is not nearly the same.
    """
    found = tensor_values(tensor)
    if exact is not None and exact.size == found.size:
        near = share * max(1.0, float(np.abs(exact).max()))
        if np.abs(exact.reshape(-1) - found).max() < near:
            set_tensor(tensor, exact)
            return
    raise SessionError(
        "llama.cpp computes something else than the bundle says",
        expected=name,
        found=description(tensor).decode(),
    )


class GatedGelus:
    """The exact `gelu(gate(x)) * up(x)` of a whole graph, by its callback.

    Attributes:
        failure: what went wrong between two steps; an exception cannot pass through C.
    """

    def __init__(self, callback_type: Callable[[Any], Any]) -> None:
        self.callback = callback_type(self._called)
        self.failure: Exception | None = None
        self._products: deque[Float32] = deque(maxlen=2)

    def _called(self, tensor: int, ask: bool, _: object) -> bool:
        step = description(tensor)
        if ask:
            return step in (b"MUL_MAT", b"GEGLU")
        try:
            if step == b"MUL_MAT":
                self._products.append(tensor_values(tensor))
            else:
                gate, up = self._products
                put(tensor, gelu_tanh(gate) * up, "gated gelu")
        except Exception as error:  # noqa: BLE001 - the engine raises it again
            self.failure = error
            return False
        return True


def gelu(x: Float32) -> Float32:
    """0.5 x (1 + erf(x / sqrt 2)). Source of erf: Abramowitz and Stegun 7.1.26, within 1.5e-7."""
    z = np.abs(x) * np.float32(0.5**0.5)
    t = 1 / (1 + np.float32(0.3275911) * z)
    series = np.float32(1.061405429) * t - np.float32(1.453152027)
    for term in (1.421413741, -0.284496736, 0.254829592):
        series = series * t + np.float32(term)
    erf = np.copysign(1 - series * t * np.exp(-z * z), x)
    out: Float32 = np.float32(0.5) * x * (1 + erf)
    return out


def gelu_tanh(x: Float32) -> Float32:
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
    inner = np.float32((2 / np.pi) ** 0.5) * (x + np.float32(0.044715) * x * x * x)
    out: Float32 = np.float32(0.5) * x * (1 + np.tanh(inner))
    return out


def quick_gelu(x: Float32) -> Float32:
    """x sigmoid(1.702 x)."""
    with np.errstate(over="ignore"):  # of what is very negative: 0
        out: Float32 = x / (1 + np.exp(np.float32(-1.702) * x))
    return out


EXACT: dict[str, Callable[[Float32], Float32]] = {
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
}
