"""TIR kernels of RWKV's recurrences, one token after another; states are written in place.

A head's state fits the cache, and heads know nothing of each other: they are shared out over the
threads where there are many tokens.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from tvm import te, tirx

from edge_mmllm_export.ops.relax_build import (
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
from edge_mmllm_export.ops.relax_math import exp, f32, let

#: exp(-1/2): how far one token may decay the state at most, in nats (RWKV-7).
_DECAY_NATS = math.exp(-0.5)


@cache
def token_shift(width: int, *, one: bool) -> Any:
    """x `(seq, C)`, state `(1, 1, C)`, output `(seq, C)`: the row before each."""

    def body() -> None:
        seq, wide = length(one), lanes_of(width)
        x, state = arg("x", (seq, width)), arg("state", (1, 1, width))
        output = arg("output", (seq, width))
        with serial(width // wide) as j, lanes(wide) as v:
            put(output, (0, j * wide + v), state[0, 0, j * wide + v])
        if not one:
            with parallel(seq - 1) as t, serial(width // wide) as j, lanes(wide) as v:
                put(output, (t + 1, j * wide + v), x[t, j * wide + v])
        with serial(width // wide) as j, lanes(wide) as v:
            put(state, (0, 0, j * wide + v), x[seq - 1, j * wide + v])

    return build("token_shift", body)


@cache
def wkv4(width: int, *, one: bool) -> Any:
    """See `Ops.wkv4`: k, v `(seq, C)`, decay, bonus `(C,)`, state `(1, 3, C)`, output."""

    def body() -> None:
        seq, wide = length(one), lanes_of(width)
        k, v = arg("k", (seq, width)), arg("v", (seq, width))
        decay, bonus = arg("decay", (width,)), arg("bonus", (width,))
        state, output = arg("state", (1, 3, width)), arg("output", (seq, width))
        blocks = width // wide
        over = serial(blocks) if one else parallel(blocks)
        with over as j, serial(seq) as t, lanes(wide) as lane:
            c = j * wide + lane
            a, b = let(state[0, 0, c]), let(state[0, 1, c])
            # While nothing was seen the largest exponent is that of nothing.
            m = let(tirx.Select(b > f32(0), state[0, 2, c], f32(-1e38)))
            now = let(bonus[c] + k[t, c])
            top = let(te.max(m, now))
            old, new = exp(m - top), exp(now - top)
            put(output, (t, c), (old * a + new * v[t, c]) / (old * b + new))
            last = let(te.max(m + decay[c], k[t, c]))
            old, new = exp(m + decay[c] - last), exp(k[t, c] - last)
            put(state, (0, 0, c), old * a + new * v[t, c])
            put(state, (0, 1, c), old * b + new)
            put(state, (0, 2, c), last)

    return build("wkv4", body)


@cache
def wkv6(heads: int, d: int, *, one: bool, constant: bool) -> Any:
    """See `Ops.wkv6`: r, k, v `(seq, heads * d)`, log_decay the same or, `constant`, `(heads, d)`,
    bonus `(heads, d)`, state `(1, heads, d, d)`, output."""

    def body() -> None:
        seq, wide = length(one), lanes_of(d)
        r, k, v = (arg(n, (seq, heads * d)) for n in "rkv")
        decay = arg("decay", (heads, d) if constant else (seq, heads * d))
        bonus = arg("bonus", (heads, d))
        state, output = arg("state", (1, heads, d, d)), arg("output", (seq, heads * d))
        with parallel(heads) as h, serial(seq) as t:
            acc = local(d)
            with serial(d // wide) as j, lanes(wide) as lane:
                put(acc, (j * wide + lane,), f32(0))
            with serial(d) as i:
                c = h * d + i
                gate = local(1)
                put(gate, (0,), exp(decay[h, i] if constant else decay[t, c]))
                with serial(d // wide) as j, lanes(wide) as lane:
                    p = j * wide + lane
                    written = k[t, c] * v[t, h * d + p]
                    add_to(acc, (p,), r[t, c] * (state[0, h, i, p] + bonus[h, i] * written))
                    put(state, (0, h, i, p), state[0, h, i, p] * gate[0] + written)
            with serial(d // wide) as j, lanes(wide) as lane:
                put(output, (t, h * d + j * wide + lane), acc[j * wide + lane])

    return build("wkv6", body)


@cache
def wkv7(heads: int, d: int, *, one: bool) -> Any:
    """See `Ops.wkv7`: r, gate, k, v, rate `(seq, heads * d)`, k_k, k_a `(heads * d,)`, r_k
    `(heads, d)`, state `(1, heads, d, d)`, outputs y and bonus."""

    def body() -> None:
        seq, wide = length(one), lanes_of(d)
        r, gate, k, v, rate = (arg(n, (seq, heads * d)) for n in ("r", "gate", "k", "v", "rate"))
        k_k, k_a = arg("k_k", (heads * d,)), arg("k_a", (heads * d,))
        r_k, state = arg("r_k", (heads, d)), arg("state", (1, heads, d, d))
        y, bonus = arg("y", (seq, heads * d)), arg("bonus", (seq, heads * d))
        with parallel(heads) as h, serial(seq) as t:
            keys, removed, decay = local(d), local(d), local(d)
            old, out, acc, scale = local(d), local(d), local(wide), local(2)

            def each(store: Any) -> None:
                with serial(d // wide) as j, lanes(wide) as lane:
                    store(j * wide + lane, h * d + j * wide + lane, lane)

            def prepare(p: Any, c: Any, lane: Any) -> None:
                put(keys, (p,), k[t, c] * (f32(1) + (rate[t, c] - f32(1)) * k_a[c]))
                put(removed, (p,), k[t, c] * k_k[c])
                put(decay, (p,), exp(f32(-_DECAY_NATS) * gate[t, c]))
                put(old, (p,), f32(0))
                put(out, (p,), f32(0))
                add_to(acc, (lane,), removed[p] * removed[p])

            fill(acc, wide, f32(0))
            each(prepare)
            size = te.max(tirx.sqrt(total(acc, wide)), f32(1e-12))
            put(scale, (0,), f32(1) / size)
            each(lambda p, c, _: put(removed, (p,), removed[p] * scale[0]))
            fill(acc, wide, f32(0))
            each(lambda p, c, lane: add_to(acc, (lane,), r[t, c] * keys[p] * r_k[h, p]))
            put(scale, (1,), total(acc, wide))
            each(lambda p, c, _: put(bonus, (t, c), scale[1] * v[t, c]))
            with serial(d) as i:
                each(lambda p, c, _: add_to(old, (p,), removed[i] * state[0, h, i, p]))
            with serial(d) as i:

                def update(p: Any, c: Any, _: Any, i: Any = i) -> None:
                    write = removed[i] * rate[t, h * d + i]
                    new = state[0, h, i, p] * decay[i] - write * old[p] + keys[i] * v[t, c]
                    put(state, (0, h, i, p), new)
                    add_to(out, (p,), r[t, h * d + i] * state[0, h, i, p])

                each(update)
            each(lambda p, c, _: put(y, (t, c), out[p]))

    return build("wkv7", body)
