"""TIR kernels of attention over kv states.

Keys are turned as they are written, so that a state holds what scores need. Heads that share keys
are computed together, so that each key is read once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
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
        far = te.min(behind, tirx.const(s.distances - 1, "int64"))
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


@dataclass
class _Rows:
    """Some queries of one head on their way through the keys, 16 at a time: with a running maximum
    and sum for each. Source: FlashAttention, arXiv 2205.14135, algorithm 1.

    Attributes:
        d: numbers of a head.
        query, acc: `_ROWS` times d numbers: queries, already scaled, and weighted values.
        largest, weight: of each query.
    """

    d: int
    query: Buffer
    acc: Buffer
    largest: Buffer
    weight: Buffer

    @staticmethod
    def begin(d: int, load: Callable[[int, Callable[[Expr, Expr], None]], None]) -> _Rows:
        """`load(r, store)` stores the numbers of query r."""
        rows = _Rows(d, local(_ROWS * d), local(_ROWS * d), local(_ROWS), local(_ROWS))
        wide = lanes_of(d)
        for r in range(_ROWS):
            load(r, lambda i, x, r=r: put(rows.query, (r * d + i,), x))  # type: ignore[misc]
            with serial(d // wide) as j, lanes(wide) as v:
                put(rows.acc, (r * d + j * wide + v,), f32(0))
            put(rows.largest, (r,), f32(_NEVER))
            put(rows.weight, (r,), f32(0))
        return rows

    def read(
        self,
        side: Callable[[Expr, Expr], Expr],
        value: Callable[[Expr, Expr], Expr],
        count: Expr,
        seen: Callable[[int, Expr], Expr],
        score: Callable[[int, Expr, Expr], Expr],
    ) -> None:
        """Go through 16 keys.

        Args:
            side: (i, lane) -> number i of a key.
            value: (n, i) -> number i of a value.
            count: of the keys that there are.
            seen: (row, lane) -> whether a query sees a key.
            score: (row, lane, product) -> the score.
        """
        d, wide = self.d, lanes_of(self.d)
        dot, scores = local(_ROWS * _KEYS), local(_ROWS * _KEYS)
        peak, change = local(_KEYS), local(_ROWS)
        for r in range(_ROWS):
            with lanes(_KEYS) as v:
                put(dot, (r * _KEYS + v,), f32(0))
        with serial(d) as i:
            for r in range(_ROWS):
                with lanes(_KEYS) as v:
                    add_to(dot, (r * _KEYS + v,), self.query[r * d + i] * side(i, v))
        for r in range(_ROWS):
            with lanes(_KEYS) as v:
                x = score(r, v, dot[r * _KEYS + v])
                put(scores, (r * _KEYS + v,), tirx.Select(seen(r, v), x, f32(_NEVER)))
            with lanes(_KEYS) as v:
                put(peak, (v,), scores[r * _KEYS + v])
            for half in (8, 4, 2, 1):
                with lanes(half) as v:
                    put(peak, (v,), te.max(peak[v], peak[v + half]))
            put(peak, (0,), te.max(peak[0], self.largest[r]))
            put(change, (r,), exp(self.largest[r] - peak[0]))
            put(self.largest, (r,), peak[0])
            with lanes(_KEYS) as v:
                x = exp(scores[r * _KEYS + v] - self.largest[r])
                # exp is clipped, so that what is never seen must be left out.
                put(scores, (r * _KEYS + v,), tirx.Select(seen(r, v), x, f32(0)))
            with lanes(_KEYS) as v:
                put(peak, (v,), scores[r * _KEYS + v])
            put(self.weight, (r,), self.weight[r] * change[r] + total(peak, _KEYS))
        with serial(d // wide) as j:
            part = local(_ROWS * wide)
            for r in range(_ROWS):
                with lanes(wide) as v:
                    put(part, (r * wide + v,), self.acc[r * d + j * wide + v] * change[r])
            with serial(count) as n:
                for r in range(_ROWS):
                    with lanes(wide) as v:
                        x = scores[r * _KEYS + n] * value(n, j * wide + v)
                        add_to(part, (r * wide + v,), x)
            for r in range(_ROWS):
                with lanes(wide) as v:
                    put(self.acc, (r * d + j * wide + v,), part[r * wide + v])

    def end(self, output: Buffer, first: Expr, seq: Expr, column: Expr) -> None:
        """Stores the results at rows `first`, ... of the output, as far as there are any."""
        d, wide = self.d, lanes_of(self.d)
        for r in range(_ROWS):
            loops = serial(d // wide), lanes(wide)
            with T.If(first + r < seq), T.Then(), loops[0] as j, loops[1] as v:
                i = j * wide + v
                # The weight is 0 where there was nothing to see, else at least 1.
                whole = te.max(self.weight[r], f32(0.5))
                put(output, (first + r, column + i), self.acc[r * d + i] / whole)


@cache
def chunk(s: Shape) -> Any:
    """Attention of any number of tokens: see `Ops.attention`. The keys are turned on their side
    first, 16 by 16, so that a score needs no sum over lanes."""

    def body() -> None:
        a, d = _arguments(s, one=False), s.head_dim
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
        blocks = (a.seq + _ROWS - 1) // _ROWS
        # The last blocks see most keys: they come first, and heads vary fastest.
        with parallel(blocks * s.heads) as task:
            head = task % s.heads
            h, block = head // s.share, blocks - 1 - task // s.heads

            def load(r: int, store: Callable[[Expr, Expr], None]) -> None:
                t = te.min(block * _ROWS + r, a.seq - 1)
                _turned(a, a.q, t, head * d, d, lambda i, x: store(i, x * f32(s.scale)))

            rows = _Rows.begin(d, load)
            own = let(a.position[0] + block * _ROWS)
            end = te.min(own + _ROWS, stop)
            zero = tirx.const(0, "int64")
            start = zero if s.window is None else let(te.max(own + 1 - s.window, zero) // _KEYS)
            with serial((end + _KEYS - 1) // _KEYS - start) as run:
                first = let((start + run) * _KEYS)
                side = let(((start + run) * s.kv_heads + h) * d * _KEYS)

                def seen(r: int, v: Expr) -> Expr:
                    inside = first + v <= own + r
                    if s.window is None:
                        return inside
                    return tirx.all(inside, first + v > own + r - s.window)

                rows.read(
                    lambda i, v: sides[side + i * _KEYS + v],
                    lambda n, i: a.values[0, h, first + n, i],
                    te.min(tirx.const(_KEYS, "int64"), end - first),
                    seen,
                    lambda r, v, x: _score(s, a, x, head, te.max(own + r - first - v, zero)),
                )
            rows.end(a.output, block * _ROWS, a.seq, head * d)

    return build("attention", body)


@cache
def full(
    heads: int, kv_heads: int, d: int, scale: float, *, bias: bool, stored: bool = False
) -> Any:
    """See `full_attention` of the op set, without frames: q `(seq, heads * d)`, k and v
    `(keys, kv_heads * d)` or, `stored`, `(1, kv_heads, keys, d)`, with `bias` `(heads, seq, keys)`,
    output. Of no keys: zeros."""

    def body() -> None:
        seq, count = tirx.Var("seq", "int64"), tirx.Var("count", "int64")
        q = arg("q", (seq, heads * d))
        form = (1, kv_heads, count, d) if stored else (count, kv_heads * d)
        k, v_ = arg("k", form), arg("v", form)

        def of(x: Buffer, h: Expr, n: Expr, i: Expr) -> Expr:
            return x[0, h, n, i] if stored else x[n, h * d + i]

        added = arg("bias", (heads, seq, count)) if bias else None
        output = arg("output", (seq, heads * d))
        runs = (count + _KEYS - 1) // _KEYS
        sides = T.alloc_buffer((runs * kv_heads * d * _KEYS,), "float32")
        with parallel(runs * kv_heads) as task:
            first, h = task // kv_heads * _KEYS, task % kv_heads
            with serial(d) as i, lanes(_KEYS) as v:
                at = te.min(first + v, count - 1)
                put(sides, ((task * d + i) * _KEYS + v,), of(k, h, at, i))
        blocks = (seq + _ROWS - 1) // _ROWS
        with parallel(blocks * heads) as task:
            head, block = task % heads, task // heads
            h = head // (heads // kv_heads)

            def load(r: int, store: Callable[[Expr, Expr], None]) -> None:
                wide, t = lanes_of(d), te.min(block * _ROWS + r, seq - 1)
                with serial(d // wide) as j, lanes(wide) as v:
                    i = j * wide + v
                    store(i, q[t, head * d + i] * f32(scale))

            def score(r: int, v: Expr, x: Expr, first: Expr) -> Expr:
                if added is None:
                    return x
                t = te.min(block * _ROWS + r, seq - 1)
                return x + added[head, t, te.min(first + v, count - 1)]

            rows = _Rows.begin(d, load)
            with serial(runs) as run:
                first = let(run * _KEYS)
                side = let((run * kv_heads + h) * d * _KEYS)
                rows.read(
                    lambda i, v: sides[side + i * _KEYS + v],
                    lambda n, i: of(v_, h, first + n, i),
                    te.min(tirx.const(_KEYS, "int64"), count - first),
                    lambda _, v: first + v < count,
                    lambda r, v, x: score(r, v, x, first),
                )
            rows.end(output, block * _ROWS, seq, head * d)

    return build("full_attention", body)
