"""Vectors in TIR: loads and stores, sums, elementary functions of a few units in the last place.

A function takes and gives float32 expressions of `n` lanes. Values used more than once are bound
to names, or the code would grow with every use.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm.script.ir_builder import tirx as T

from edge_mmllm_export.ops.tir.isa import Expr, Isa


def splat(value: Expr, n: int) -> Expr:
    value = T.float32(value) if isinstance(value, (int, float)) else value
    return T.broadcast(value, n) if n > 1 else value


def integer(value: int, n: int) -> Expr:
    return T.broadcast(T.int32(value), n) if n > 1 else T.int32(value)


def kind(dtype: str, n: int) -> str:
    """The name of a vector's type."""
    return f"{dtype}x{n}" if n > 1 else dtype


def load(buffer: Expr, *index: Expr, n: int) -> Expr:
    """`n` values from `index` on along the last axis."""
    return buffer[(*index[:-1], _span(index[-1], n))]


def store(buffer: Expr, value: Expr, *index: Expr, n: int) -> None:
    T.buffer_store(buffer, value, [*index[:-1], _span(index[-1], n)])


def _span(start: Expr, n: int) -> Expr:
    return T.ramp(start, 1, n) if n > 1 else start


def local(n: int, dtype: str = "float32") -> Expr:
    """Room for `n` values that the compiler may keep in registers."""
    return T.alloc_buffer((n,), dtype)


def reduced(x: Expr, n: int, join: Callable[[Expr, Expr], Expr]) -> Expr:
    """The lanes of a float32 vector joined by halves: a scalar."""
    while n > 2:
        x, n = T.bind(x), n // 2
        half = kind("float32", n)
        x = join(T.vectorlow(half, x), T.vectorhigh(half, x))
    return _two(x, join) if n == 2 else x


def _two(x: Expr, join: Callable[[Expr, Expr], Expr]) -> Expr:
    pair = local(2)
    store(pair, x, 0, n=2)
    return join(pair[0], pair[1])


def total(x: Expr, n: int) -> Expr:
    return reduced(x, n, lambda a, b: a + b)


def largest(x: Expr, n: int) -> Expr:
    return reduced(x, n, T.max)


def magnitude(x: Expr, n: int) -> Expr:
    """|x|, by clearing the sign."""
    bits = T.reinterpret(kind("int32", n), x) & integer(0x7FFFFFFF, n)
    return T.reinterpret(kind("float32", n), bits)


def rounded(x: Expr, n: int) -> Expr:
    """To the nearest integer, ties to even, as int32; |x| < 2^22.

    Adding 1.5 * 2^23 rounds, and leaves the integer in the lowest bits.
    """
    bits = T.reinterpret(kind("int32", n), x + splat(12582912.0, n))
    return bits - integer(0x4B400000, n)


def exp(x: Expr, n: int) -> Expr:
    """e^x; at most e^88, at least e^-87."""

    def c(value: float) -> Expr:
        return splat(value, n)

    x = T.bind(T.min(T.max(x, c(-87.0)), c(88.0)))
    power = T.bind(rounded(x * c(1.44269504088896341), n))
    whole = T.bind(T.cast(power, kind("float32", n)))
    r = T.bind(x - whole * c(0.693359375) + whole * c(2.12194440e-4))
    p = c(1.9875691500e-4)
    for term in (
        1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1,
    ):  # fmt: skip
        p = p * r + c(term)
    p = p * r * r + r + c(1.0)
    bits = T.shift_left(power + integer(127, n), integer(23, n))
    return p * T.reinterpret(kind("float32", n), bits)


#: 2^r for |r| <= 1/2, relative error 7.5e-8: the polynomial of degree 5 whose largest is least.
_EXP2 = (1.0000000716545654, 0.693146967061033, 0.24022119724229, 0.05550713279585625,
         0.009675541318831546, 0.0013276470024919333)  # fmt: skip


def exp2(x: Expr, n: int, isa: Isa) -> Expr:
    """2^x for x of at most 0."""
    x = T.bind(x)
    scaled = isa.dot == "vnni512" and n == 16
    if scaled:
        whole = T.bind(T.nearbyint(x))
        r = T.bind(x - whole)
    else:
        x = T.bind(T.max(x, splat(-126.0, n)))
        power = T.bind(rounded(x, n))
        r = T.bind(x - T.cast(power, kind("float32", n)))
    p = splat(_EXP2[-1], n)
    for term in _EXP2[-2::-1]:
        p = p * r + splat(term, n)
    if scaled:  # p * 2^whole in one instruction; what is too small becomes 0
        return T.call_llvm_pure_intrin(
            "float32x16", "llvm.x86.avx512.mask.scalef.ps.512",
            p, whole, splat(0.0, n), T.int16(-1), T.int32(4),
        )  # fmt: skip
    bits = T.reinterpret(kind("int32", n), p) + T.shift_left(power, integer(23, n))
    return T.reinterpret(kind("float32", n), bits)


def sigmoid(x: Expr, n: int) -> Expr:
    return splat(1.0, n) / (splat(1.0, n) + exp(splat(0.0, n) - x, n))


def silu(x: Expr, n: int) -> Expr:
    x = T.bind(x)
    return x / (splat(1.0, n) + exp(splat(0.0, n) - x, n))


def tanh(x: Expr, n: int) -> Expr:
    """Small ones by a series, since `1 - 2 / (e + 1)` would cancel."""

    def c(value: float) -> Expr:
        return splat(value, n)

    x = T.bind(x)
    size, square = T.bind(magnitude(x, n)), T.bind(x * x)
    series = x + x * square * (
        c(-0.333333333) + square * (c(0.133333333) - square * c(0.053968254))
    )
    large = T.bind(c(1.0) - c(2.0) / (exp(size + size, n) + c(1.0)))
    signed = T.Select(x < c(0.0), c(0.0) - large, large)
    return T.Select(size < c(0.08), series, signed)


def softplus(x: Expr, n: int) -> Expr:
    """log(1 + e^x) as `max(x, 0) + log1p(e^-|x|)`, where `log1p(u) = 2 atanh(u / (2 + u))`, whose
    series ends early since that quotient is at most 1/3."""

    def c(value: float) -> Expr:
        return splat(value, n)

    x = T.bind(x)
    u = T.bind(exp(c(0.0) - magnitude(x, n), n))
    s = T.bind(u / (c(2.0) + u))
    z = T.bind(s * s)
    p = c(2 / 15)
    for k in (13, 11, 9, 7, 5, 3, 1):
        p = p * z + c(2 / k)
    return T.max(x, c(0.0)) + p * s


def erf(x: Expr, n: int) -> Expr:
    """Source: Abramowitz and Stegun 7.1.26, absolute error 1.5e-7."""

    def c(value: float) -> Expr:
        return splat(value, n)

    x = T.bind(x)
    size = T.bind(magnitude(x, n))
    t = T.bind(c(1.0) / (c(1.0) + c(0.3275911) * size))
    p = c(1.061405429)
    for term in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        p = p * t + c(term)
    y = T.bind(c(1.0) - p * t * exp(c(0.0) - size * size, n))
    return T.Select(x < c(0.0), c(0.0) - y, y)


def activated(x: Expr, name: str, n: int) -> Expr:
    """An `Activation` of `ops.base`. Raises: KeyError."""

    def relu(x: Expr, n: int) -> Expr:
        return T.max(x, splat(0.0, n))

    def relu2(x: Expr, n: int) -> Expr:
        y = T.bind(relu(x, n))
        return y * y

    def gelu(x: Expr, n: int) -> Expr:
        x = T.bind(x)
        return splat(0.5, n) * x * (splat(1.0, n) + erf(x * splat(0.70710678118654752, n), n))

    def gelu_tanh(x: Expr, n: int) -> Expr:
        x = T.bind(x)
        inner = splat(0.79788456080286536, n) * (x + splat(0.044715, n) * x * x * x)
        return splat(0.5, n) * x * (splat(1.0, n) + tanh(inner, n))

    def quick_gelu(x: Expr, n: int) -> Expr:
        x = T.bind(x)
        return x * sigmoid(x * splat(1.702, n), n)

    def minus_exp(x: Expr, n: int) -> Expr:
        return splat(0.0, n) - exp(x, n)

    functions: dict[str, Callable[[Expr, int], Expr]] = {
        "silu": silu,
        "sigmoid": sigmoid,
        "tanh": tanh,
        "relu": relu,
        "relu2": relu2,
        "gelu": gelu,
        "gelu_tanh": gelu_tanh,
        "quick_gelu": quick_gelu,
        "minus_exp": minus_exp,
        "softplus": softplus,
    }
    return functions[name](x, n)
