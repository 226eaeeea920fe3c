"""Functions of one float32, as expressions that LLVM turns into vector instructions.

Called while a kernel is built (`relax_build`): each names what it uses more than once, so that
kernels stay as short as they look.

The C library's `expf` and `tanhf` take one number at a time, and a loop that calls them stays
scalar; these are additions and multiplications alone, on every instruction set. Relative error
below 3e-7 but for `tanh` near 0, `erf` and what builds on them (1.5e-7 absolute).
"""

from __future__ import annotations

import math
from typing import Any

from tvm import te, tirx
from tvm.script.ir_builder import tirx as T

from edge_mmllm_export.ops.base import Activation

#: A float32 expression.
Expr = Any

#: ln 2 in two parts: the first has few enough bits that `k * _LN2_HIGH` is exact.
#: Source: Cephes, `expf.c`.
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
#: Beyond it exp is a denormal or infinite.
_EXP_LIMIT = 87.3


def f32(value: float) -> Expr:
    """A constant."""
    return tirx.const(value, "float32")


def let(value: Expr) -> Expr:
    """The value of an expression here and now, computed once."""
    return T.bind(value)


def exp(x: Expr) -> Expr:
    """`e^x = 2^k e^r`, r within ln 2 / 2 of 0, by a Taylor polynomial; x is clipped to +-87.3."""
    x = let(te.min(te.max(x, f32(-_EXP_LIMIT)), f32(_EXP_LIMIT)))
    scaled = let(x * f32(math.log2(math.e)))
    k = let((scaled + tirx.Select(scaled < f32(0), f32(-0.5), f32(0.5))).astype("int32"))
    whole = let(k.astype("float32"))
    r = let(x - whole * f32(_LN2_HIGH) - whole * f32(_LN2_LOW))
    p = f32(1 / math.factorial(7))
    for n in range(6, -1, -1):
        p = p * r + f32(1 / math.factorial(n))
    return let(p * tirx.reinterpret("float32", (k + 127) << 23))


def sigmoid(x: Expr) -> Expr:
    return f32(1) / (f32(1) + exp(-x))


def tanh(x: Expr) -> Expr:
    return f32(1) - f32(2) / (exp(x * f32(2)) + f32(1))


def softplus(x: Expr) -> Expr:
    """`max(x, 0) + log(1 + exp(-|x|))`, the logarithm as `2 atanh(u / (2 + u))`."""
    x = let(x)
    u = exp(-te.abs(x))
    s = let(u / (f32(2) + u))
    square = let(s * s)
    p = f32(1 / 13)
    for n in (11, 9, 7, 5, 3, 1):
        p = p * square + f32(1 / n)
    return te.max(x, f32(0)) + f32(2) * s * p


def clamp(x: Expr, limit: tuple[float, float]) -> Expr:
    """x between two numbers, of which the second may be infinite."""
    x = te.max(x, f32(limit[0]))
    return te.min(x, f32(limit[1])) if math.isfinite(limit[1]) else x


def erf(x: Expr) -> Expr:
    """Source: Abramowitz and Stegun, 7.1.26 (absolute error 1.5e-7)."""
    x = let(x)
    size = let(te.abs(x))
    t = let(f32(1) / (f32(1) + f32(0.3275911) * size))
    p = f32(1.061405429)
    for a in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        p = p * t + f32(a)
    y = f32(1) - p * t * exp(-size * size)
    return tirx.Select(x < f32(0), -y, y)


def activation(x: Expr, kind: Activation) -> Expr:
    """One of the op set's."""
    x = let(x)
    if kind == "silu":
        return x * sigmoid(x)
    if kind == "quick_gelu":
        return x * sigmoid(x * f32(1.702))
    if kind == "gelu":
        return x * f32(0.5) * (f32(1) + erf(x * f32(math.sqrt(0.5))))
    if kind == "gelu_tanh":
        inner = f32(math.sqrt(2 / math.pi)) * (x + f32(0.044715) * x * x * x)
        return x * f32(0.5) * (f32(1) + tanh(inner))
    if kind == "relu":
        return te.max(x, f32(0))
    if kind == "relu2":
        return te.max(x, f32(0)) * te.max(x, f32(0))
    if kind == "sigmoid":
        return sigmoid(x)
    if kind == "tanh":
        return tanh(x)
    return -exp(x)
