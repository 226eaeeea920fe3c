"""The part of `RelaxOps` for whole images. See `vision.VisionOps` for what the ops compute.

The number of rows is known at compile time where a picture's size is; what it is not, is left to
run time, as in a decoder.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Generic, TypeVar

from tvm import relax, tirx

from edge_mmllm_export.ops import relax_attention
from edge_mmllm_export.ops.relax_build import arg, build, lanes, lanes_of, parallel, put, serial
from edge_mmllm_export.weights import Weight

#: A Relax variable, `(seq, width)` float32 (tvm ships no type hints).
Value = Any
T = TypeVar("T")


class RelaxVision(Generic[T]):
    """Needs `_call` and `_of` of `RelaxOps`."""

    def _call(self, kernel: Any, name: str, inputs: list[Value], types: list[Any]) -> list[Value]:
        raise NotImplementedError

    def _of(self, w: Weight, layout: str | None = None) -> Value:
        raise NotImplementedError

    def _new(self, kernel: Any, name: str, inputs: list[Value], rows: Any, width: int) -> Value:
        return self._call(kernel, name, inputs, [relax.TensorType((rows, width), "float32")])[0]

    def patches(self, pixels: Value, shape: tuple[int, ...], size: int) -> Value:
        channels, height, width = shape[-3:]
        tiles = 1
        for n in shape[:-3]:
            tiles *= n
        count = tiles * (height // size) * (width // size)
        kernel = patches(shape, size)
        return self._new(kernel, "patches", [pixels], count, channels * size * size)

    def input_rows(self, x: Value, width: int, *, transposed: bool = False) -> Value:
        if not transposed:
            return x
        return self._new(transpose(width), "transpose", [x], x.ty.shape[1], width)

    def table(self, weight: Weight) -> Value:
        x = self._of(weight)
        if len(weight.shape) == 2:
            return x
        width = weight.shape[0]
        return self._new(copy_rows(1, width, flat=True), "table", [x], 1, width)

    def concat_rows(self, *x: Value) -> Value:
        width = int(x[0].ty.shape[1])
        rows = [i.ty.shape[0] for i in x]
        total = rows[0]
        for more in rows[1:]:
            total = total + more
        fixed = tuple(_known(n) for n in rows)
        return self._new(concat_rows(fixed, width), "concat_rows", list(x), total, width)

    def concat(self, *x: Value) -> Value:
        widths = tuple(int(i.ty.shape[1]) for i in x)
        return self._new(concat(widths), "concat", list(x), x[0].ty.shape[0], sum(widths))

    def take_rows(self, x: Value, start: int, stop: int | None = None) -> Value:
        rows, width = x.ty.shape[0], int(x.ty.shape[1])
        known = _known(rows)
        if known is not None:
            first, last, _ = slice(start, stop).indices(known)
            count: Any = max(0, last - first)
        else:
            first = start
            count = rows - start if stop is None else stop - start if stop > 0 else rows + stop
        return self._new(copy_rows(first, width, flat=False), "take_rows", [x], count, width)

    def pixel_shuffle(self, x: Value, grid: tuple[int, int], factor: int) -> Value:
        width, rows, columns = int(x.ty.shape[1]), grid[0] // factor, grid[1] // factor
        kernel = pixel_shuffle(grid, factor, width)
        return self._new(kernel, "pixel_shuffle", [x], rows * columns, factor**2 * width)

    def full_attention(
        self,
        q: Value,
        k: Value,
        v: Value,
        *,
        heads: int,
        scale: float,
        kv_heads: int | None = None,
        bias: Value | None = None,
        frames: Value | None = None,
    ) -> Value:
        if frames is not None:
            from edge_mmllm_export.ops.relax_missing import missing

            missing("full_attention within frames")
        width = int(q.ty.shape[1])
        kernel = relax_attention.full(
            heads, kv_heads or heads, width // heads, scale, bias=bias is not None
        )
        inputs = [q, k, v, *([] if bias is None else [bias])]
        return self._new(kernel, "full_attention", inputs, q.ty.shape[0], width)


def _known(rows: Any) -> int | None:
    """A number of rows that is known at compile time."""
    if isinstance(rows, int):
        return rows
    value = getattr(rows, "value", None)
    return None if value is None else int(value)


@cache
def patches(shape: tuple[int, ...], size: int) -> Any:
    """See `VisionOps.patches`."""

    def body() -> None:
        channels, height, width = shape[-3:]
        rows, columns, tiles = height // size, width // size, 1
        for n in shape[:-3]:
            tiles *= n
        pixels = arg("pixels", shape)
        output = arg("output", (tiles * rows * columns, channels * size * size))
        with parallel(tiles * rows * columns) as t, serial(channels) as c:
            tile, place = t // (rows * columns), t % (rows * columns)
            at = [tile] if len(shape) == 4 else []
            with serial(size) as i, serial(size) as j:
                y, x = place // columns * size + i, place % columns * size + j
                put(output, (t, (c * size + i) * size + j), pixels[(*at, c, y, x)])

    return build("patches", body)


@cache
def transpose(width: int) -> Any:
    """x `(width, n)` -> `(n, width)`."""

    def body() -> None:
        count = tirx.Var("count", "int64")
        x, output = arg("x", (width, count)), arg("output", (count, width))
        with parallel(count) as t, serial(width) as c:
            put(output, (t, c), x[c, t])

    return build("transpose", body)


@cache
def copy_rows(first: int, width: int, *, flat: bool) -> Any:
    """Rows of x `(n, width)` from `first` on, as many as the output has; `flat`: x is `(width,)`,
    the one row there is."""

    def body() -> None:
        count, wide = tirx.Var("count", "int64"), lanes_of(width)
        x = arg("x", (width,) if flat else (tirx.Var("rows", "int64"), width))
        output = arg("output", (1 if flat else count, width))
        with parallel(1 if flat else count) as t, serial(width // wide) as j, lanes(wide) as v:
            c = j * wide + v
            put(output, (t, c), x[c] if flat else x[t + first, c])

    return build("copy_rows", body)


@cache
def concat_rows(rows: tuple[int | None, ...], width: int) -> Any:
    """Rows one under another; None: known at run time."""

    def body() -> None:
        counts = [tirx.Var(f"n{i}", "int64") if n is None else n for i, n in enumerate(rows)]
        total = counts[0]
        for more in counts[1:]:
            total = total + more
        inputs = [arg(f"x{i}", (n, width)) for i, n in enumerate(counts)]
        output, wide = arg("output", (total, width)), lanes_of(width)
        start: Any = 0
        for x, n in zip(inputs, counts, strict=True):
            with parallel(n) as t, serial(width // wide) as j, lanes(wide) as v:
                put(output, (start + t, j * wide + v), x[t, j * wide + v])
            start = start + n

    return build("concat_rows", body)


@cache
def concat(widths: tuple[int, ...]) -> Any:
    """Rows side by side."""

    def body() -> None:
        seq = tirx.Var("seq", "int64")
        inputs = [arg(f"x{i}", (seq, n)) for i, n in enumerate(widths)]
        output = arg("output", (seq, sum(widths)))
        with parallel(seq) as t:
            start = 0
            for x, n in zip(inputs, widths, strict=True):
                wide = lanes_of(n)
                with serial(n // wide) as j, lanes(wide) as v:
                    put(output, (t, start + j * wide + v), x[t, j * wide + v])
                start += n

    return build("concat", body)


@cache
def pixel_shuffle(grid: tuple[int, int], factor: int, width: int) -> Any:
    """See `VisionOps.pixel_shuffle`."""

    def body() -> None:
        rows, columns = grid[0] // factor, grid[1] // factor
        x = arg("x", (grid[0] * grid[1], width))
        output = arg("output", (rows * columns, factor**2 * width))
        with parallel(rows * columns) as t, serial(factor) as i, serial(factor) as j:
            row = (t // columns * factor + i) * grid[1] + t % columns * factor + j
            with serial(width) as c:
                put(output, (t, (i * factor + j) * width + c), x[row, c])

    return build("pixel_shuffle", body)
