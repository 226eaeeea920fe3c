"""TIR kernels over rows: norms, and what is computed for each number alone.

All take `(seq, width)`. With `one`, seq is 1 at compile time: loops over tokens go, and with them
the thread pool. Otherwise tokens are shared out over the threads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from tvm import tirx

from edge_mmllm_export.ops import relax_math
from edge_mmllm_export.ops.relax_build import (
    Expr,
    add_to,
    arg,
    build,
    fill,
    lanes,
    lanes_of,
    length,
    local,
    parallel,
    put,
    serial,
    total,
)
from edge_mmllm_runtime.mlc.packing import ROWS, Packing


@cache
def norm(
    width: int,
    groups: int,
    eps: float,
    *,
    one: bool,
    weight: bool = True,
    bias: bool = False,
    delta: bool = False,
    shared: bool = False,
) -> Any:
    """RMS norm of each of `groups` equal parts of a row; with `bias` a layer norm.

    With `shared`, the weight is that of one part.

    x, with `delta` what is added to it first, both `(seq, width)`, weight and bias `(width,)` ->
    with `delta` the sum; the norm.
    """

    def body() -> None:
        seq, part = length(one), width // groups
        wide = lanes_of(part)
        x = arg("x", (seq, width))
        more = arg("delta", (seq, width)) if delta else None
        scale_of = arg("weight", (part if shared else width,)) if weight else None
        shift = arg("bias", (width,)) if bias else None
        summed = arg("sum", (seq, width)) if delta else None
        output = arg("output", (seq, width))
        with parallel(seq) as t, serial(groups) as g:
            acc, mean, scale = local(wide), local(1), local(1)
            source = x if summed is None else summed

            def each(store: Callable[[Expr, Expr], None]) -> None:
                with serial(part // wide) as j, lanes(wide) as v:
                    store(g * part + j * wide + v, v)

            def first(c: Expr, v: Expr) -> None:
                value = x[t, c] if more is None else x[t, c] + more[t, c]
                if summed is not None:
                    put(summed, (t, c), value)
                add_to(acc, (v,), value if bias else value * value)

            fill(acc, wide, relax_math.f32(0))
            each(first)
            put(mean, (0,), total(acc, wide) / relax_math.f32(part))
            if bias:
                fill(acc, wide, relax_math.f32(0))
                each(
                    lambda c, v: add_to(
                        acc, (v,), (source[t, c] - mean[0]) * (source[t, c] - mean[0])
                    )
                )
                put(scale, (0,), total(acc, wide) / relax_math.f32(part))
            square = scale[0] if bias else mean[0]
            root = tirx.sqrt(square + relax_math.f32(eps))
            put(scale, (0,), relax_math.f32(1) / root)

            def last(c: Expr, v: Expr) -> None:
                y = source[t, c] * scale[0]
                if shift is not None:
                    y = (source[t, c] - mean[0]) * scale[0]
                if scale_of is not None:
                    y = y * scale_of[c - g * part if shared else c]
                put(output, (t, c), y if shift is None else y + shift[c])

            each(last)

    return build("norm", body)


#: What one number of the output is: of those of the inputs at its place, `(t, c)`.
Formula = Callable[..., Expr]


def pointwise(
    name: str,
    width: int,
    kinds: str,
    formulas: tuple[Formula, ...],
    *,
    one: bool,
) -> Any:
    """Numbers at the same place of several inputs -> one for each formula.

    Args:
        kinds: of each input: `r` rows `(seq, width)`, `v` a vector `(width,)`, `b` one row
            `(1, width)`.
        formulas: of the inputs' numbers, as many as there are outputs `(seq, width)`.
    """

    def body() -> None:
        seq, wide = length(one), lanes_of(width)
        shapes = {"r": (seq, width), "v": (width,), "b": (1, width)}
        inputs = [arg(f"x{i}", shapes[kind]) for i, kind in enumerate(kinds)]
        outputs = [arg(f"y{i}", (seq, width)) for i in range(len(formulas))]
        with parallel(seq) as t, serial(width // wide) as j, lanes(wide) as v:
            c = j * wide + v
            places = {"r": (t, c), "v": (c,), "b": (0, c)}
            values = [x[places[kind]] for x, kind in zip(inputs, kinds, strict=True)]
            for output, formula in zip(outputs, formulas, strict=True):
                put(output, (t, c), formula(*values))

    return build(name, body)


@cache
def split(sizes: tuple[int, ...], *, one: bool) -> Any:
    """`(seq, sum of sizes)` -> `(seq, size)` for each."""

    def body() -> None:
        seq = length(one)
        x = arg("x", (seq, sum(sizes)))
        outputs = [arg(f"y{i}", (seq, size)) for i, size in enumerate(sizes)]
        with parallel(seq) as t:
            start = 0
            for output, size in zip(outputs, sizes, strict=True):
                wide = lanes_of(size)
                with serial(size // wide) as j, lanes(wide) as v:
                    put(output, (t, j * wide + v), x[t, start + j * wide + v])
                start += size

    return build("split", body)


@cache
def head_scale(heads: int, width: int, *, one: bool) -> Any:
    """x `(seq, heads * d)`, weight `(heads,)`, more `(seq, heads * d)` -> `x * weight + more`."""

    def body() -> None:
        seq, d = length(one), width // heads
        wide = lanes_of(d)
        x, weight = arg("x", (seq, width)), arg("weight", (heads,))
        output = arg("y", (seq, width))
        with parallel(seq) as t, serial(heads) as h, serial(d // wide) as j, lanes(wide) as v:
            c = h * d + j * wide + v
            put(output, (t, c), x[t, c] * weight[h])

    return build("head_scale", body)


@cache
def take(rows: int | None, width: int, *, one: bool) -> Any:
    """Rows of a table `(rows, width)`, or of activations `(seq, width)` where rows is None, by
    index int64 `(n,)`. An index outside gives NaN: nothing reads wild memory."""

    def body() -> None:
        count = length(one)
        limit = tirx.Var("rows", "int64") if rows is None else rows
        wide = lanes_of(width)
        table, index = arg("table", (limit, width)), arg("index", (count,), "int64")
        output = arg("output", (count, width))
        with parallel(count) as t, serial(width // wide) as j, lanes(wide) as v:
            inside = tirx.all(index[t] >= 0, index[t] < limit)
            value = table[index[t], j * wide + v]
            nan = relax_math.f32(float("nan"))
            put(output, (t, j * wide + v), tirx.if_then_else(inside, value, nan))

    return build("take", body)


def _half(bits: Expr) -> Expr:
    """float16 (uint32, its bits) as float32, without the CPU's help; finite numbers only."""
    sign = (bits & 0x8000) << 16
    size = tirx.reinterpret("float32", (bits & 0x7FFF) << 13) * relax_math.f32(2.0**112)
    return tirx.reinterpret("float32", tirx.reinterpret("uint32", size) | sign)


def _number(data: Any, at: Expr, kind: str) -> Expr:
    """A little-endian number of a byte buffer, as float32."""
    count = 4 if kind == "f32" else 2
    bits = data[at].astype("uint32")
    for i in range(1, count):
        bits = bits | (data[at + i].astype("uint32") << (8 * i))
    if kind == "f16":
        return _half(bits)
    return tirx.reinterpret("float32", bits if kind == "f32" else bits << 16)


def _stored(packing: Packing, data: Any, row: Expr, k: Expr) -> Expr:
    """One number of a packed matrix, as float32."""
    group, lane = row // ROWS, row % ROWS
    if packing.kind != "q4":
        size = 2 if packing.kind == "f16" else 4
        return _number(data, ((group * packing.columns + k) * ROWS + lane) * size, packing.kind)
    block, inside = k // packing.block, k % packing.block
    start = (group * packing.blocks + block) * packing.block_bytes
    scale = _number(data, start + lane * (packing.scale_bytes // ROWS), packing.scale)
    byte = (inside // 8 * ROWS + lane) * 4 + inside % 4
    code = data[start + packing.scale_bytes + byte].astype("int32")
    nibble = (code >> (inside % 8 // 4 * 4).astype("int32")) & 15
    return (nibble - packing.zero).astype("float32") * scale


@cache
def take_packed(packing: Packing, *, one: bool) -> Any:
    """Rows of a packed matrix, float32 `(n, K)`, by index int64 `(n,)`; see `take`."""

    def body() -> None:
        count = length(one)
        data = arg("data", (packing.size_bytes,), "uint8")
        index = arg("index", (count,), "int64")
        output = arg("output", (count, packing.columns))
        with parallel(count) as t, serial(packing.columns) as k:
            row = index[t]
            inside = tirx.all(row >= 0, row < packing.rows)
            nan = relax_math.f32(float("nan"))
            value = tirx.if_then_else(inside, _stored(packing, data, row, k), nan)
            put(output, (t, k), value)

    return build("take_packed", body)


@cache
def positions(packing: Packing, offset: int, *, one: bool, still: bool) -> Any:
    """Rows of a packed table from position int64 `(1,)` on, counted from `offset`; `still`:
    there is no position, the first row is 0."""

    def body() -> None:
        count = length(one)
        data = arg("data", (packing.size_bytes,), "uint8")
        position = None if still else arg("position", (1,), "int64")
        output = arg("output", (count, packing.columns))
        with parallel(count) as t, serial(packing.columns) as k:
            row = t + offset if position is None else position[0] + t + offset
            inside = row < packing.rows
            nan = relax_math.f32(float("nan"))
            value = tirx.if_then_else(inside, _stored(packing, data, row, k), nan)
            put(output, (t, k), value)

    return build("positions", body)
