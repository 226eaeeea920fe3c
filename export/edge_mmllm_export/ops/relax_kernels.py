"""TIR kernels of convolutions and state spaces, each written for any sequence length.

A kernel reads and writes its state in the buffer the caller owns, so a forward allocates nothing
of a state's size. Arguments come as `call_tir_inplace` passes them: inputs, states, outputs.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from tvm import tirx

from edge_mmllm_export.ops.relax_build import (
    add_to,
    arg,
    build,
    lanes,
    lanes_of,
    length,
    local,
    parallel,
    put,
    serial,
    unrolled,
)
from edge_mmllm_export.ops.relax_math import exp, f32, sigmoid


@cache
def causal_conv(channels: int, width: int, *, one: bool, bias: bool, silu: bool) -> Any:
    """Depthwise causal convolution.

    x `(seq, C)`, weight `(C, width)`, bias `(C,)` where there is one, state `(1, width - 1, C)`
    (the last inputs, oldest first), output `(seq, C)`.
    """

    def body() -> None:
        seq, wide = length(one), lanes_of(channels)
        x, weight = arg("x", (seq, channels)), arg("weight", (channels, width))
        shift = arg("bias", (channels,)) if bias else None
        state, output = arg("state", (1, width - 1, channels)), arg("output", (seq, channels))

        def result(t: Any, c: Any, inputs: list[Any]) -> None:
            y = inputs[0] * weight[c, 0]
            for i in range(1, width):
                y = y + inputs[i] * weight[c, i]
            if shift is not None:
                y = y + shift[c]
            put(output, (t, c), y * sigmoid(y) if silu else y)

        if one:
            with serial(channels // wide) as j:
                with lanes(wide) as v:
                    c = j * wide + v
                    result(0, c, [*(state[0, i, c] for i in range(width - 1)), x[0, c]])
                for i in range(width - 1):
                    with lanes(wide) as v:
                        c = j * wide + v
                        put(state, (0, i, c), state[0, i + 1, c] if i < width - 2 else x[0, c])
            return
        with parallel(seq) as t, serial(channels // wide) as j, lanes(wide) as v:
            c = j * wide + v
            # Input number t + i counts from the oldest of the state.
            inputs = [
                tirx.if_then_else(t + i < width - 1, state[0, t + i, c], x[t + i - (width - 1), c])
                for i in range(width)
            ]
            result(t, c, inputs)
        # The state moves by seq; rows are read before they are overwritten, since seq >= 1.
        for i in range(width - 1):
            with serial(channels // wide) as j, lanes(wide) as v:
                c = j * wide + v
                moved = tirx.if_then_else(
                    seq + i < width - 1, state[0, seq + i, c], x[seq + i - (width - 1), c]
                )
                put(state, (0, i, c), moved)

    return build("causal_conv", body)


@cache
def gated_linear_attention(heads: int, groups: int, d_k: int, d_v: int, *, one: bool) -> Any:
    """The recurrence of `Ops.gated_linear_attention`, one token after another.

    q and k `(seq, groups * d_k)`, v `(seq, heads * d_v)`, dt `(seq, heads)`, decay `(heads,)`,
    state `(1, heads, d_k, d_v)`, output `(seq, heads * d_v)`.
    """
    share = heads // groups

    def body() -> None:
        seq, wide = length(one), lanes_of(d_v)
        q, k = arg("q", (seq, groups * d_k)), arg("k", (seq, groups * d_k))
        v, dt = arg("v", (seq, heads * d_v)), arg("dt", (seq, heads))
        decay, state = arg("decay", (heads,)), arg("state", (1, heads, d_k, d_v))
        output = arg("output", (seq, heads * d_v))
        with parallel(heads) as h, serial(seq) as t:
            acc, written, gate = local(d_v), local(d_v), local(1)
            put(gate, (0,), exp(dt[t, h] * decay[h]))
            with serial(d_v // wide) as j, lanes(wide) as lane:
                p = j * wide + lane
                put(acc, (p,), f32(0))
                put(written, (p,), dt[t, h] * v[t, h * d_v + p])
            with serial(d_k) as n, unrolled(d_v // wide) as j, lanes(wide) as lane:
                p, c = j * wide + lane, h // share * d_k + n
                put(state, (0, h, n, p), state[0, h, n, p] * gate[0] + k[t, c] * written[p])
                add_to(acc, (p,), q[t, c] * state[0, h, n, p])
            with serial(d_v // wide) as j, lanes(wide) as lane:
                put(output, (t, h * d_v + j * wide + lane), acc[j * wide + lane])

    return build("gated_linear_attention", body)


@cache
def selective_scan(d_inner: int, d_state: int, *, one: bool) -> Any:
    """The recurrence of `Ops.selective_scan`, one token after another.

    x and dt `(seq, d_inner)`, b and c `(seq, d_state)`, decay `(d_inner, d_state)`, skip
    `(d_inner,)`, state `(1, d_state, d_inner)`, output `(seq, d_inner)`.
    """

    def body() -> None:
        seq, wide = length(one), lanes_of(d_inner)
        x, dt = arg("x", (seq, d_inner)), arg("dt", (seq, d_inner))
        b, c = arg("b", (seq, d_state)), arg("c", (seq, d_state))
        decay, skip = arg("decay", (d_inner, d_state)), arg("skip", (d_inner,))
        state, output = arg("state", (1, d_state, d_inner)), arg("output", (seq, d_inner))
        with parallel(d_inner // wide) as j:
            rates = local(d_state * wide)
            with serial(d_state) as n, lanes(wide) as v:
                put(rates, (n * wide + v,), decay[j * wide + v, n])
            with serial(seq) as t:
                acc, written = local(wide), local(wide)
                with lanes(wide) as v:
                    put(acc, (v,), skip[j * wide + v] * x[t, j * wide + v])
                with lanes(wide) as v:
                    put(written, (v,), dt[t, j * wide + v] * x[t, j * wide + v])
                with serial(d_state) as n, lanes(wide) as v:
                    i = j * wide + v
                    kept = state[0, n, i] * exp(dt[t, i] * rates[n * wide + v])
                    put(state, (0, n, i), kept + b[t, n] * written[v])
                    add_to(acc, (v,), c[t, n] * state[0, n, i])
                with lanes(wide) as v:
                    put(output, (t, j * wide + v), acc[v])

    return build("selective_scan", body)
