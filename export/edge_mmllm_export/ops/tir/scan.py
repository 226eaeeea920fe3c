"""What runs along the tokens channel by channel: Mamba's scan, and the short convolution.

A thread takes some channels through all tokens, their state in registers meanwhile. Weights come
packed as `f32` (`edge_mmllm_runtime.mlc.packing`): 16 channels side by side.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Var

from edge_mmllm_export.ops.tir import vector
from edge_mmllm_export.ops.tir.isa import Expr, Isa
from edge_mmllm_runtime.mlc.packing import ROWS, Packing

#: States of a channel that are kept in registers and unrolled; more are looped over.
_UNROLLED = 16
#: Numbers of a state below which one token is over before another thread has begun.
_PARALLEL_STATE = 8192


def lanes_of(isa: Isa, width: int) -> int:
    """The most lanes that divide a width."""
    n = isa.lanes
    while width % n:
        n //= 2
    return n


def packed_vector(data: Expr, packing: Packing, row: Expr, k: Expr, n: int) -> Expr:
    """`n` neighbouring rows' value `k` of a matrix packed as `f32`."""
    place = (T.floordiv(row, ROWS) * packing.columns + k) * ROWS + T.floormod(row, ROWS)
    stored = vector.load(data, place * 4, n=4 * n)
    return T.reinterpret(vector.kind("float32", n), stored)


@cache
def selective_scan(d_inner: int, d_state: int, isa: Isa, *, seq: int | None) -> Any:
    """The recurrence of `Ops.selective_scan`.

    x and dt `(seq, d_inner)`, b and c `(seq, d_state)`, decay `(d_inner, d_state)` packed, skip
    `(d_inner,)`, state `(1, d_state, d_inner)`, output `(seq, d_inner)`. dt * decay is at most 0.
    """
    n = lanes_of(isa, d_inner)
    packing = Packing("f32", d_inner, d_state)
    with IRBuilder() as builder, T.prim_func(is_private=True):
        T.func_attr({"tirx.noalias": True})
        count: Expr = Var("seq", "int64") if seq is None else seq
        x, dt = (T.arg(name, T.buffer((count, d_inner), "float32")) for name in ("x", "dt"))
        b, c = (T.arg(name, T.buffer((count, d_state), "float32")) for name in "bc")
        decay = T.arg("decay", T.buffer((packing.size_bytes,), "uint8"))
        skip = T.arg("skip", T.buffer((d_inner,), "float32"))
        state = T.arg("state", T.buffer((1, d_state, d_inner), "float32"))
        output = T.arg("output", T.buffer((count, d_inner), "float32"))
        parallel = isa.threads and (seq is None or d_inner * d_state >= _PARALLEL_STATE)
        with (T.parallel if parallel else T.serial)(d_inner // n) as tile:
            at = tile * n
            if d_state > _UNROLLED:
                _scan_many(x, dt, b, c, decay, skip, state, output, packing, at, n, isa, count)
            else:
                _scan(x, dt, b, c, decay, skip, state, output, packing, at, n, isa, count)
    return builder.get()


def _rate(decay: Expr, packing: Packing, at: Expr, k: Expr, n: int) -> Expr:
    """The exponent of 2 that one unit of dt makes."""
    return packed_vector(decay, packing, at, k, n) * vector.splat(math.log2(math.e), n)


def _scan(
    x: Expr, dt: Expr, b: Expr, c: Expr, decay: Expr, skip: Expr, state: Expr, output: Expr,
    packing: Packing, at: Expr, n: int, isa: Isa, count: Expr,
) -> None:  # fmt: skip
    size = packing.columns
    rates = [T.bind(_rate(decay, packing, at, k, n)) for k in range(size)]
    kept = [vector.local(n) for _ in range(size)]
    for k in range(size):
        vector.store(kept[k], vector.load(state, 0, k, at, n=n), 0, n=n)
    share = T.bind(vector.load(skip, at, n=n))
    with T.serial(count) as t:
        step = T.bind(vector.load(dt, t, at, n=n))
        value = T.bind(vector.load(x, t, at, n=n))
        given = T.bind(step * value)
        # Two sums, so that additions do not wait for each other.
        sums = [share * value, vector.splat(0.0, n)]
        for k in range(size):
            left = vector.load(kept[k], 0, n=n) * vector.exp2(step * rates[k], n, isa)
            now = T.bind(left + given * vector.splat(b[t, k], n))
            vector.store(kept[k], now, 0, n=n)
            sums[k % 2] = T.bind(sums[k % 2] + now * vector.splat(c[t, k], n))
        vector.store(output, sums[0] + sums[1], t, at, n=n)
    for k in range(size):
        vector.store(state, vector.load(kept[k], 0, n=n), 0, k, at, n=n)


def _scan_many(
    x: Expr, dt: Expr, b: Expr, c: Expr, decay: Expr, skip: Expr, state: Expr, output: Expr,
    packing: Packing, at: Expr, n: int, isa: Isa, count: Expr,
) -> None:  # fmt: skip
    """As `_scan`, with the state where it lies."""
    with T.serial(count) as t:
        step = T.bind(vector.load(dt, t, at, n=n))
        value = T.bind(vector.load(x, t, at, n=n))
        total = vector.local(n)
        vector.store(total, vector.load(skip, at, n=n) * value, 0, n=n)
        with T.serial(packing.columns) as k:
            fade = vector.exp2(step * _rate(decay, packing, at, k, n), n, isa)
            left = vector.load(state, 0, k, at, n=n) * fade
            now = T.bind(left + step * value * vector.splat(b[t, k], n))
            vector.store(state, now, 0, k, at, n=n)
            more = now * vector.splat(c[t, k], n)
            vector.store(total, vector.load(total, 0, n=n) + more, 0, n=n)
        vector.store(output, vector.load(total, 0, n=n), t, at, n=n)


@cache
def causal_conv(
    channels: int, width: int, isa: Isa, *, seq: int | None, bias: bool, silu: bool
) -> Any:
    """Depthwise causal convolution.

    x `(seq, C)`, weight `(C, width)` packed, bias `(C,)` where there is one, state
    `(1, width - 1, C)` (the last inputs, oldest first), output `(seq, C)`.
    """
    n = lanes_of(isa, channels)
    packing = Packing("f32", channels, width)
    with IRBuilder() as builder, T.prim_func(is_private=True):
        T.func_attr({"tirx.noalias": True})
        count: Expr = Var("seq", "int64") if seq is None else seq
        x = T.arg("x", T.buffer((count, channels), "float32"))
        weight = T.arg("weight", T.buffer((packing.size_bytes,), "uint8"))
        shift = T.arg("bias", T.buffer((channels,), "float32")) if bias else None
        state = T.arg("state", T.buffer((1, width - 1, channels), "float32"))
        output = T.arg("output", T.buffer((count, channels), "float32"))
        # One token is over before another thread has begun.
        parallel = isa.threads and seq is None
        with (T.parallel if parallel else T.serial)(channels // n) as tile:
            at = tile * n
            taps = [T.bind(packed_vector(weight, packing, at, k, n)) for k in range(width)]
            past = [vector.local(n) for _ in range(width - 1)]
            for k, kept in enumerate(past):
                vector.store(kept, vector.load(state, 0, k, at, n=n), 0, n=n)
            with T.serial(count) as t:
                now = T.bind(vector.load(x, t, at, n=n))
                inputs = [T.bind(vector.load(kept, 0, n=n)) for kept in past] + [now]
                y = inputs[0] * taps[0]
                for value, tap in zip(inputs[1:], taps[1:], strict=True):
                    y = y + value * tap
                if shift is not None:
                    y = y + vector.load(shift, at, n=n)
                vector.store(output, vector.silu(y, n) if silu else y, t, at, n=n)
                for kept, value in zip(past, inputs[1:], strict=True):
                    vector.store(kept, value, 0, n=n)
            for k, kept in enumerate(past):
                vector.store(state, vector.load(kept, 0, n=n), 0, k, at, n=n)
    return builder.get()
