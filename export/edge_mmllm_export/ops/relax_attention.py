"""TIR kernels of attention over kv states.

Keys are turned as they are written, so that a state holds what scores need. Heads that share keys
are computed together, so that each key is read once for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from tvm import te, tirx
from tvm.script.ir_builder import tirx as T

from edge_mmllm_export.ops.relax_build import (
    Buffer,
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
    unrolled,
)
from edge_mmllm_export.ops.relax_math import exp, f32, let, tanh

#: Scores that can never win: finite, so that no NaN comes of their difference.
_NEVER = -1e30


@dataclass(frozen=True)
class Shape:
    """The constants of a kernel; see `base.Attention`.

    Attributes:
        turned: whether tables of cosines and sines come with it.
        distances: entries of a bias by distance (T5); 0: none.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None
    turned: bool = False
    distances: int = 0

    @property
    def share(self) -> int:
        return self.heads // self.kv_heads


@cache
def rope_tables(half: int, scale: float, *, one: bool) -> Any:
    """position int64 `(1,)`, inv_freq `(d / 2,)` -> cosines and sines `(seq, d / 2)` of the new
    tokens, times `scale`. Angles in float32, as trained."""

    def body() -> None:
        seq = length(one)
        position, inv_freq = arg("position", (1,), "int64"), arg("inv_freq", (half,))
        cosines, sines = arg("cos", (seq, half)), arg("sin", (seq, half))
        with parallel(seq) as t, serial(half) as j:
            angle = (position[0] + t).astype("float32") * inv_freq[j]
            put(cosines, (t, j), tirx.cos(angle) * f32(scale))
            put(sines, (t, j), tirx.sin(angle) * f32(scale))

    return build("rope_tables", body)


@dataclass
class _Arguments:
    """Buffers of a kernel, in the order of its arguments."""

    seq: Expr
    capacity: Expr
    q: Buffer
    k: Buffer
    v: Buffer
    position: Buffer
    cos: Buffer | None
    sin: Buffer | None
    bias: Buffer | None
    keys: Buffer
    values: Buffer
    output: Buffer


def _arguments(s: Shape, *, one: bool) -> _Arguments:
    seq, d = length(one), s.head_dim
    capacity = tirx.Var("capacity", "int64")
    q = arg("q", (seq, s.heads * d))
    k, v = arg("k", (seq, s.kv_heads * d)), arg("v", (seq, s.kv_heads * d))
    position = arg("position", (1,), "int64")
    cos = arg("cos", (seq, d // 2)) if s.turned else None
    sin = arg("sin", (seq, d // 2)) if s.turned else None
    bias = arg("bias", (s.heads, s.distances)) if s.distances else None
    cache = (1, s.kv_heads, capacity, d)
    keys, values = arg("keys", cache), arg("values", cache)
    output = arg("output", (seq, s.heads * d))
    return _Arguments(seq, capacity, q, k, v, position, cos, sin, bias, keys, values, output)


def _turned(a: _Arguments, x: Buffer, t: Expr, first: Expr, d: int, store: Any) -> None:
    """Stores a head of a row of x, which begins at column `first`, turned where it is."""
    half = d // 2
    wide = lanes_of(half if a.cos is not None else d)
    if a.cos is None or a.sin is None:
        with serial(d // wide) as j, lanes(wide) as v:
            store(j * wide + v, x[t, first + j * wide + v])
        return
    cos, sin = a.cos, a.sin
    with serial(half // wide) as j, lanes(wide) as v:
        i = j * wide + v
        store(i, x[t, first + i] * cos[t, i] - x[t, first + half + i] * sin[t, i])
    with serial(half // wide) as j, lanes(wide) as v:
        i = j * wide + v
        store(half + i, x[t, first + half + i] * cos[t, i] + x[t, first + i] * sin[t, i])


def _append(a: _Arguments, s: Shape, t: Expr, h: Expr) -> None:
    """Writes one head of one new token to the states."""
    d, at = s.head_dim, a.position[0] + t
    _turned(a, a.k, t, h * d, d, lambda i, x: put(a.keys, (0, h, at, i), x))
    wide = lanes_of(d)
    with serial(d // wide) as j, lanes(wide) as v:
        i = j * wide + v
        put(a.values, (0, h, at, i), a.v[t, h * d + i])


def _check(a: _Arguments) -> None:
    """Fails where the states would overflow, whoever calls."""
    with T.Assert(a.position[0] + a.seq <= a.capacity, "the kv state is full"):
        pass


def _score(s: Shape, a: _Arguments, x: Expr, head: Expr, behind: Expr) -> Expr:
    """A score, from the product of a query (already scaled) and a key that lies so far behind."""
    if a.bias is not None:
        far = te.min(behind, tirx.const(s.distances - 1, behind.dtype))
        x = x + a.bias[head, s.distances - 1 - far]
    return f32(s.softcap) * tanh(x / f32(s.softcap)) if s.softcap is not None else x


@cache
def step(s: Shape) -> Any:
    """Attention of one token: see `Ops.attention`. The keys are read once, in runs of 16, with a
    running maximum and sum. Source: FlashAttention, arXiv 2205.14135, algorithm 1."""

    def body() -> None:
        a, d, share = _arguments(s, one=True), s.head_dim, s.share
        wide = lanes_of(d)
        parts = d // wide
        _check(a)
        with parallel(s.kv_heads) as h:
            _append(a, s, 0, h)
            query, acc = local(share * d), local(share * d)
            scores, largest, weight = local(share * 16), local(share), local(share)
            change, lane_sum = local(1), local(16)
            for g in range(share):

                def store(i: Expr, x: Expr, g: int = g) -> None:
                    put(query, (g * d + i,), x * f32(s.scale))

                _turned(a, a.q, 0, (h * share + g) * d, d, store)
                with serial(parts) as j, lanes(wide) as v:
                    put(acc, (g * d + j * wide + v,), f32(0))
                put(largest, (g,), f32(_NEVER))
                put(weight, (g,), f32(0))
            end = a.position[0] + 1
            start = 0 if s.window is None else te.max(end - s.window, tirx.const(0, "int64"))
            with serial((end - start + 15) // 16) as run:
                first = start + run * 16
                with serial(16) as n:
                    at = te.min(first + n, end - 1)
                    for g in range(share):
                        dot = local(wide)
                        fill(dot, wide, f32(0))
                        for j in range(parts):
                            with lanes(wide) as v:
                                i = j * wide + v
                                add_to(dot, (v,), query[g * d + i] * a.keys[0, h, at, i])
                        x = _score(s, a, total(dot, wide), h * share + g, a.position[0] - at)
                        put(
                            scores,
                            (g * 16 + n,),
                            tirx.Select(first + n < end, x, f32(_NEVER)),
                        )
                for g in range(share):
                    peak = local(16)
                    with lanes(16) as v:
                        put(peak, (v,), scores[g * 16 + v])
                    for half in (8, 4, 2, 1):
                        with lanes(half) as v:
                            put(peak, (v,), te.max(peak[v], peak[v + half]))
                    put(peak, (0,), te.max(peak[0], largest[g]))
                    put(change, (0,), exp(largest[g] - peak[0]))
                    put(largest, (g,), peak[0])
                    with lanes(16) as v:
                        put(scores, (g * 16 + v,), exp(scores[g * 16 + v] - largest[g]))
                    with lanes(16) as v:
                        # exp is clipped, so that what is never seen must be left out.
                        seen = first + v < end
                        put(
                            scores,
                            (g * 16 + v,),
                            tirx.Select(seen, scores[g * 16 + v], f32(0)),
                        )
                    with lanes(16) as v:
                        put(lane_sum, (v,), scores[g * 16 + v])
                    put(weight, (g,), weight[g] * change[0] + total(lane_sum, 16))
                    with serial(parts) as j, lanes(wide) as v:
                        i = g * d + j * wide + v
                        put(acc, (i,), acc[i] * change[0])
                with serial(te.min(tirx.const(16, "int64"), end - first)) as n:
                    for g in range(share):
                        with unrolled(parts) as j, lanes(wide) as v:
                            i = j * wide + v
                            value = a.values[0, h, first + n, i]
                            add_to(acc, (g * d + i,), scores[g * 16 + n] * value)
            for g in range(share):
                with serial(parts) as j, lanes(wide) as v:
                    i = j * wide + v
                    put(a.output, (0, (h * share + g) * d + i), acc[g * d + i] / weight[g])

    return build("attention_step", body)


#: Keys that are computed together, the lanes of the widest vectors; and queries, whose scores
#: stay in registers.
_KEYS, _ROWS = 16, 4


@cache
def chunk(s: Shape) -> Any:
    """Attention of any number of tokens: see `Ops.attention`. As `step`, for some queries of a
    head at a time. The keys are turned on their side first, 16 by 16, so that a score needs no sum
    over lanes."""

    def body() -> None:
        a, d, rows = _arguments(s, one=False), s.head_dim, _ROWS
        wide = lanes_of(d)
        _check(a)
        with parallel(a.seq) as t, serial(s.kv_heads) as h:
            _append(a, s, t, h)
        # Room for all that the states may hold: what is never written takes no memory.
        sides = T.alloc_buffer(((a.capacity // _KEYS + 1) * s.kv_heads * d * _KEYS,), "float32")
        stop = let(a.position[0] + a.seq)
        runs = let((stop + _KEYS - 1) // _KEYS)
        with parallel(runs * s.kv_heads) as task:
            first, h = task // s.kv_heads * _KEYS, task % s.kv_heads
            with serial(d) as i, lanes(_KEYS) as v:
                at = te.min(first + v, stop - 1)
                put(sides, ((task * d + i) * _KEYS + v,), a.keys[0, h, at, i])
        blocks = (a.seq + rows - 1) // rows
        # The last blocks see most keys: they come first, and heads vary fastest.
        with parallel(blocks * s.heads) as task:
            head = task % s.heads
            h, block = head // s.share, blocks - 1 - task // s.heads
            query, acc = local(rows * d), local(rows * d)
            scores, largest, weight = local(rows * _KEYS), local(rows), local(rows)
            peak, change = local(_KEYS), local(rows)
            for r in range(rows):
                t = te.min(block * rows + r, a.seq - 1)

                def store(i: Expr, x: Expr, r: int = r) -> None:
                    put(query, (r * d + i,), x * f32(s.scale))

                _turned(a, a.q, t, head * d, d, store)
                with serial(d // wide) as j, lanes(wide) as v:
                    put(acc, (r * d + j * wide + v,), f32(0))
                put(largest, (r,), f32(_NEVER))
                put(weight, (r,), f32(0))
            own = let(a.position[0] + block * rows)
            end = te.min(own + rows, stop)
            start = 0 if s.window is None else te.max(own + 1 - s.window, tirx.const(0, "int64"))
            start = let(start // _KEYS) if s.window is not None else 0
            with serial((end + _KEYS - 1) // _KEYS - start) as run:
                first = let((start + run) * _KEYS)
                side = let(((start + run) * s.kv_heads + h) * d * _KEYS)
                dot = local(rows * _KEYS)
                for r in range(rows):
                    with lanes(_KEYS) as v:
                        put(dot, (r * _KEYS + v,), f32(0))
                with serial(d) as i:
                    for r in range(rows):
                        with lanes(_KEYS) as v:
                            x = query[r * d + i] * sides[side + i * _KEYS + v]
                            add_to(dot, (r * _KEYS + v,), x)
                for r in range(rows):

                    def seen(v: Expr, at_row: Expr = own + r) -> Expr:
                        inside = first + v <= at_row
                        if s.window is None:
                            return inside
                        return tirx.all(inside, first + v > at_row - s.window)

                    with lanes(_KEYS) as v:
                        behind = te.max(own + r - first - v, tirx.const(0, "int64"))
                        x = _score(s, a, dot[r * _KEYS + v], head, behind)
                        put(scores, (r * _KEYS + v,), tirx.Select(seen(v), x, f32(_NEVER)))
                    with lanes(_KEYS) as v:
                        put(peak, (v,), scores[r * _KEYS + v])
                    for half in (8, 4, 2, 1):
                        with lanes(half) as v:
                            put(peak, (v,), te.max(peak[v], peak[v + half]))
                    put(peak, (0,), te.max(peak[0], largest[r]))
                    put(change, (r,), exp(largest[r] - peak[0]))
                    put(largest, (r,), peak[0])
                    with lanes(_KEYS) as v:
                        x = exp(scores[r * _KEYS + v] - largest[r])
                        # exp is clipped, so that what is never seen must be left out.
                        put(scores, (r * _KEYS + v,), tirx.Select(seen(v), x, f32(0)))
                    with lanes(_KEYS) as v:
                        put(peak, (v,), scores[r * _KEYS + v])
                    put(weight, (r,), weight[r] * change[r] + total(peak, _KEYS))
                count = te.min(tirx.const(_KEYS, "int64"), end - first)
                with serial(d // wide) as j:
                    part = local(rows * wide)
                    for r in range(rows):
                        with lanes(wide) as v:
                            i = r * d + j * wide + v
                            put(part, (r * wide + v,), acc[i] * change[r])
                    with serial(count) as n:
                        for r in range(rows):
                            with lanes(wide) as v:
                                value = a.values[0, h, first + n, j * wide + v]
                                add_to(part, (r * wide + v,), scores[r * _KEYS + n] * value)
                    for r in range(rows):
                        with lanes(wide) as v:
                            put(acc, (r * d + j * wide + v,), part[r * wide + v])
            for r in range(rows):
                t = block * rows + r
                loops = serial(d // wide), lanes(wide)
                with T.If(t < a.seq), T.Then(), loops[0] as j, loops[1] as v:
                    i = j * wide + v
                    put(a.output, (t, head * d + i), acc[r * d + i] / weight[r])

    return build("attention", body)
