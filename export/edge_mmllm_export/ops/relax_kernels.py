"""TIR kernel of Mamba-2's state space, written for any sequence length.

It reads and writes its state in the buffer the caller owns, so a forward allocates nothing of a
state's size. Arguments come as `call_tir_inplace` passes them: inputs, states, outputs.
"""

from __future__ import annotations

from functools import cache
from typing import Any

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
from edge_mmllm_export.ops.relax_math import exp, f32


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
