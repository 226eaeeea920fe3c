"""Products with packed matrices (`edge_mmllm_runtime.mlc.packing`), for one token and for many.

Activations are quantized to 8 bits, each block along K by its own largest value, and multiplied in
integers (`exact` keeps them float32). A tile is 16 rows of W against some rows of x: each unpacked
weight serves them all. Threads share W's rows, so that each reads its part of W once for every
tile of x. Several matrices on one input are one launch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T
from tvm.tirx import Var

from edge_mmllm_export.ops.tir import vector
from edge_mmllm_export.ops.tir.isa import Expr, Isa, block_sum
from edge_mmllm_runtime.mlc.packing import ROWS, Packing

#: Packed bytes below which another thread costs more than it does.
_PARALLEL_BYTES = 160 << 10
#: Groups of rows that a thread takes at a time where there are many tokens: they stay in its
#: cache while all tiles of x pass.
_CHUNK = 8


#: Sums in registers: of each row of x, some to be added in the end.
_Totals = list[list[Expr]]


@dataclass(frozen=True)
class Product:
    """One kernel: x `(seq, K)` with matrices of the same K.

    Attributes:
        packings: of the matrices, all of one kind, block, zero and type of scales.
        biases: which of them have a bias.
        activations: what is applied to each result, by name; None = nothing.
        seq: the number of tokens; None: any.
        exact: float32 activations.
    """

    packings: tuple[Packing, ...]
    biases: tuple[bool, ...]
    activations: tuple[str | None, ...]
    isa: Isa
    seq: int | None = None
    exact: bool = False

    @property
    def many(self) -> bool:
        """Whether there may be more than one token."""
        return self.seq != 1

    @property
    def first(self) -> Packing:
        return self.packings[0]

    @property
    def quantized(self) -> bool:
        return self.first.kind == "q4" and not self.exact


@dataclass(frozen=True)
class _Input:
    """Buffers that a tile reads: x itself, or its codes (as int32 words), scales and sums."""

    x: Expr
    words: Expr = None
    scales: Expr = None
    sums: Expr = None


@cache
def kernel(product: Product) -> Any:
    """The PrimFunc: x `(seq, K)`, each matrix uint8 `(bytes,)`, each bias `(N,)` there is, then
    each result `(seq, N)`."""
    p = product
    with IRBuilder() as builder, T.prim_func(is_private=True):
        T.func_attr({"tirx.noalias": True})
        seq: Expr = Var("seq", "int64") if p.seq is None else p.seq
        x = T.arg("x", T.buffer((seq, p.first.columns), "float32"))
        matrices = [
            T.arg(f"w{i}", T.buffer((m.size_bytes,), "uint8")) for i, m in enumerate(p.packings)
        ]
        biases = [
            T.arg(f"b{i}", T.buffer((m.rows,), "float32")) if own else None
            for i, (m, own) in enumerate(zip(p.packings, p.biases, strict=True))
        ]
        results = [
            T.arg(f"y{i}", T.buffer((seq, m.rows), "float32")) for i, m in enumerate(p.packings)
        ]
        parts = zip(p.packings, matrices, biases, p.activations, results, strict=True)
        given = _quantized(p, x, seq) if p.quantized else _Input(x)
        _over_chunks(p, given, seq, [_Matrix(*part) for part in parts])
    return builder.get()


def _loop(p: Product, extent: Expr, parallel: bool) -> Any:
    return T.parallel(extent) if parallel and p.isa.threads else T.serial(extent)


# -- activations ---------------------------------------------------------------------------


def _quantized(p: Product, x: Expr, seq: Expr) -> _Input:
    """x as 8-bit codes in the matrices' blocks, with each block's scale and sum of codes."""
    block, blocks = p.first.block, p.first.blocks
    words = T.alloc_buffer((seq, blocks * block // 4), "int32")
    scales = T.alloc_buffer((seq, blocks), "float32")
    sums = T.alloc_buffer((seq, blocks), "int32")
    whole, rest = divmod(p.first.columns, block)
    with _loop(p, seq, p.many) as t:
        with T.serial(whole) as b:
            _quantize(
                p, lambda i: vector.load(x, t, b * block + i, n=_LANES), t, b, words, scales, sums
            )
        if rest:
            padded = T.alloc_buffer((block,), "float32")
            with T.serial(block) as i:
                inside = T.if_then_else(i < rest, x[t, whole * block + T.min(i, rest - 1)], 0.0)
                T.buffer_store(padded, inside, [i])
            _quantize(p, lambda i: vector.load(padded, i, n=_LANES), t, whole, words, scales, sums)
    return _Input(x, words, scales, sums)


#: Activations quantized at a time: blocks are multiples of 8.
_LANES = 8


def _quantize(
    p: Product, read: Callable[[int], Expr], t: Expr, b: Expr, words: Expr, scales: Expr, sums: Expr
) -> None:
    n, block = _LANES, p.first.block
    values = [T.bind(read(i)) for i in range(0, block, n)]
    top = vector.magnitude(values[0], n)
    for value in values[1:]:
        top = T.max(top, vector.magnitude(value, n))
    size = T.bind(vector.largest(top, n))
    T.buffer_store(scales, size * T.float32(1 / 127), [t, b])
    inverse = T.bind(T.if_then_else(size > T.float32(0), T.float32(127) / size, T.float32(0)))
    total = None
    for j, value in enumerate(values):
        code = T.bind(vector.rounded(value * vector.splat(inverse, n), n))
        total = code if total is None else total + code
        narrow = T.reinterpret("int32x2", T.cast(code, "int8x8"))
        vector.store(words, narrow, t, (b * block + j * n) // 4, n=2)
    name = f"llvm.vector.reduce.add.v{n}i32"
    T.buffer_store(sums, T.call_llvm_pure_intrin("int32", name, total), [t, b])


# -- loops over rows of W and of x ---------------------------------------------------------


@dataclass(frozen=True)
class _Matrix:
    """One matrix of a product and where its results go."""

    packing: Packing
    data: Expr
    bias: Expr
    activation: str | None
    result: Expr


def _over_chunks(p: Product, given: _Input, seq: Expr, matrices: Sequence[_Matrix]) -> None:
    size = sum(m.size_bytes for m in p.packings)
    chunk = _CHUNK if p.many else 1
    counts = [-(-m.groups // chunk) for m in p.packings]
    with _loop(p, sum(counts), p.many or size > _PARALLEL_BYTES) as c:

        def one(i: int, first: int) -> None:
            m = matrices[i]
            if not p.many:
                _tile(p, m, given, c - first, 0, 1)
                return
            tile = p.isa.tile

            def rows_from(count: Expr, start: Callable[[Expr], Expr], rows: int) -> None:
                with T.serial(count) as i, T.serial(chunk) as g:
                    group = (c - first) * chunk + g
                    with _when(group < m.packing.groups if m.packing.groups % chunk else None):
                        _tile(p, m, given, group, start(i), rows)

            def tiles() -> None:  # the last one may repeat rows of the one before
                count = (seq + tile - 1) // tile
                rows_from(count, lambda i: T.min(i * tile, seq - tile), tile)

            if p.seq is not None:
                tiles() if p.seq >= tile else rows_from(seq, lambda i: i, 1)
                return
            with T.If(seq >= tile):
                with T.Then():
                    tiles()
                with T.Else():
                    rows_from(seq, lambda i: i, 1)

        _choose(c, counts, one)


def _choose(
    c: Expr, counts: Sequence[int], one: Callable[[int, int], None], i: int = 0, first: int = 0
) -> None:
    """The matrix that chunk `c` belongs to."""
    if i == len(counts) - 1:
        one(i, first)
        return
    with T.If(c < first + counts[i]):
        with T.Then():
            one(i, first)
        with T.Else():
            _choose(c, counts, one, i + 1, first + counts[i])


@contextmanager
def _when(condition: Expr | None) -> Iterator[None]:
    """What is inside happens where the condition holds, or always."""
    if condition is None:
        yield
        return
    with T.If(condition), T.Then():
        yield


# -- tiles: 16 rows of W against some rows of x --------------------------------------------


def _tile(p: Product, m: _Matrix, given: _Input, group: Expr, row: Expr, rows: int) -> None:
    # One vector of W's 16 rows after another: the group stays in the first cache meanwhile.
    with T.serial(p.isa.parts) as part:
        _tile_part(p, m, given, group, part, row, rows)


def _tile_part(
    p: Product, m: _Matrix, given: _Input, group: Expr, part: Expr, row: Expr, rows: int
) -> None:
    n = p.isa.lanes
    # One row of floats leaves the adders waiting for each other: four sums hide their latency.
    sums = 4 if rows == 1 and p.first.kind != "q4" else 1
    totals = [[vector.local(n) for _ in range(sums)] for _ in range(rows)]
    for total in (total for of_row in totals for total in of_row):
        vector.store(total, vector.splat(0.0, n), 0, n=n)
    if p.first.kind != "q4":
        _float_sums(p, m, given, group, part, row, totals)
    elif p.exact:
        whole, rest = divmod(p.first.columns, p.first.block)
        with T.serial(whole) as b:
            _exact_sums(p, m, given, group, part, row, totals, b, p.first.block)
        if rest:
            _exact_sums(p, m, given, group, part, row, totals, whole, rest)
    else:
        with T.serial(p.first.blocks) as b:
            _integer_sums(p, m, given, group, part, row, totals, b)
    for t, of_row in enumerate(totals):
        value = vector.load(of_row[0], 0, n=n)
        for more in of_row[1:]:
            value = value + vector.load(more, 0, n=n)
        _finish(m, group, row + t, part * n, value, n)


def _finish(m: _Matrix, group: Expr, row: Expr, at: Expr, value: Expr, n: int) -> None:
    """Add the bias, apply the activation, store the rows that there are."""
    column, rows = group * ROWS + at, m.packing.rows

    def done(value: Expr, column: Expr, n: int) -> Expr:
        if m.bias is not None:
            value = value + vector.load(m.bias, column, n=n)
        return value if m.activation is None else vector.activated(value, m.activation, n)

    if rows % ROWS == 0:
        vector.store(m.result, done(value, column, n), row, column, n=n)
        return
    kept = vector.local(n)
    vector.store(kept, value, 0, n=n)
    with T.If(column + n <= rows):
        with T.Then():
            vector.store(m.result, done(vector.load(kept, 0, n=n), column, n), row, column, n=n)
        with T.Else(), T.serial(n) as i, _when(column + i < rows):
            vector.store(m.result, done(kept[i], column + i, 1), row, column + i, n=1)


def _integer_sums(
    p: Product, m: _Matrix, given: _Input, group: Expr, part: Expr, row: Expr, totals: _Totals,
    b: Expr,
) -> None:  # fmt: skip
    n, block = p.isa.lanes, p.first.block
    base = (group * p.first.blocks + b) * p.first.block_bytes
    scale = T.bind(_scale(p, m, base, part))
    codes = []
    for j in range(block // 8):
        at = base + p.first.scale_bytes + j * 4 * ROWS + part * (4 * n)
        both = T.bind(vector.load(m.data, at, n=4 * n))
        low = T.broadcast(T.uint8(15), 4 * n)
        pairs = T.reinterpret(f"uint16x{2 * n}", both)
        high = T.shift_right(pairs, T.broadcast(T.uint16(4), 2 * n))
        codes += [T.bind(both & low), T.bind(T.reinterpret(f"uint8x{4 * n}", high) & low)]
    for t, (total,) in enumerate(totals):
        start = T.broadcast(given.sums[row + t, b] * T.int32(-p.first.zero), n)
        words = [given.words[row + t, b * (block // 4) + i] for i in range(block // 4)]
        products = T.cast(block_sum(p.isa, start, codes, words), f"float32x{n}")
        factor = scale * vector.splat(given.scales[row + t, b], n)
        vector.store(total, vector.load(total, 0, n=n) + products * factor, 0, n=n)


def _exact_sums(
    p: Product, m: _Matrix, given: _Input, group: Expr, part: Expr, row: Expr, totals: _Totals,
    b: Expr, count: int,
) -> None:  # fmt: skip
    """The first `count` weights of a block against float32 activations."""
    n, block = p.isa.lanes, p.first.block
    base = (group * p.first.blocks + b) * p.first.block_bytes
    scale = T.bind(_scale(p, m, base, part))

    def eight(j: Expr, count: int) -> None:
        at = base + p.first.scale_bytes + j * (4 * ROWS) + part * (4 * n)
        word = T.bind(T.reinterpret(f"uint32x{n}", vector.load(m.data, at, n=4 * n)))
        for k in range(count):
            shift = T.broadcast(T.uint32(8 * (k % 4) + 4 * (k // 4)), n)
            code = T.shift_right(word, shift) & T.broadcast(T.uint32(15), n)
            value = T.cast(T.reinterpret(f"int32x{n}", code), f"float32x{n}")
            weight = T.bind((value - vector.splat(float(p.first.zero), n)) * scale)
            for t, (total,) in enumerate(totals):
                more = weight * vector.splat(given.x[row + t, b * block + j * 8 + k], n)
                vector.store(total, vector.load(total, 0, n=n) + more, 0, n=n)

    with T.serial(count // 8) as j:
        eight(j, 8)
    if count % 8:
        eight(count // 8, count % 8)


def _float_sums(
    p: Product, m: _Matrix, given: _Input, group: Expr, part: Expr, row: Expr, totals: _Totals
) -> None:
    n, columns, sums = p.isa.lanes, p.first.columns, len(totals[0])
    size = 2 if p.first.kind == "f16" else 4

    def add(k: Expr, s: int) -> None:
        at = (group * columns + k) * (ROWS * size) + part * (n * size)
        weight = T.bind(_floats(p.isa, vector.load(m.data, at, n=n * size), p.first.kind))
        for t, of_row in enumerate(totals):
            more = weight * vector.splat(given.x[row + t, k], n)
            vector.store(of_row[s], vector.load(of_row[s], 0, n=n) + more, 0, n=n)

    with T.serial(columns // sums) as k:
        for s in range(sums):
            add(k * sums + s, s)
    for k in range(columns // sums * sums, columns):
        add(k, 0)


def _scale(p: Product, m: _Matrix, base: Expr, part: Expr) -> Expr:
    size = p.first.scale_bytes // ROWS * p.isa.lanes
    return _floats(p.isa, vector.load(m.data, base + part * size, n=size), p.first.scale)


def _floats(isa: Isa, stored: Expr, kind: str) -> Expr:
    """Bytes as they are stored -> float32."""
    n = isa.lanes
    floats, words = vector.kind("float32", n), vector.kind("uint32", n)
    if kind == "f32":
        return T.reinterpret(floats, stored)
    if kind == "f16" and isa.half:
        return T.cast(T.reinterpret(vector.kind("float16", n), stored), floats)
    bits = T.bind(T.cast(T.reinterpret(vector.kind("uint16", n), stored), words))

    def c(value: int) -> Expr:
        return T.broadcast(T.uint32(value), n) if n > 1 else T.uint32(value)

    if kind == "bf16":
        return T.reinterpret(floats, T.shift_left(bits, c(16)))
    # The exponent moves into place, a product moves its bias; subnormal numbers come right.
    size = T.reinterpret(floats, T.shift_left(bits & c(0x7FFF), c(13))) * vector.splat(2.0**112, n)
    sign = T.shift_left(bits & c(0x8000), c(16))
    return T.reinterpret(floats, T.reinterpret(words, size) | sign)
