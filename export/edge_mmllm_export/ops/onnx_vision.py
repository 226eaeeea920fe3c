"""How the ops over images and recordings become ONNX. See `vision.VisionOps` for what they do.

Measured with onnxruntime 1.32, two cores of a Zen 4, 16 heads of 64: MultiHeadAttention takes
1.6, 9.0 and 49 ms for 257, 577 and 1500 tokens, ONNX's own Attention 1.7, 9.7 and 56, transposes
with MatMul and Softmax 1.8, 9.4 and 57. The first also keeps no scores of all tokens in memory.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edge_mmllm_export.ops.onnx_graph import GraphBuilder
from edge_mmllm_export.ops.onnx_values import Value
from edge_mmllm_export.ops.onnx_weights import WeightStore
from edge_mmllm_export.weights import Weight

#: The end of an axis, for Slice.
_END = np.iinfo(np.int64).max
_FLOAT = 1


class _Builder(Protocol):
    """What these ops need of `OnnxOps`."""

    graph: GraphBuilder
    weights: WeightStore

    def _use(self, x: Value) -> str: ...


class OnnxVision:
    """The part of `OnnxOps` that encoders and projectors use."""

    def patches(self: _Builder, pixels: Value, shape: tuple[int, ...], size: int) -> Value:
        g, (channels, height, width) = self.graph, shape[-3:]
        rows, columns, x = height // size, width // size, pixels.name
        if height % size or width % size:
            ends = g.ints(rows * size, columns * size)
            x = g.node("Slice", [x, g.ints(0, 0), ends, g.ints(-2, -1)])[0]
        tiles = shape[0] if len(shape) > 3 else 1
        squares = g.node("Reshape", [x, g.ints(tiles, channels, rows, size, columns, size)])[0]
        squares = g.node("Transpose", [squares], perm=[0, 2, 4, 1, 3, 5])[0]
        flat = channels * size * size
        return Value(g.node("Reshape", [squares, g.ints(1, -1, flat)])[0], flat)

    def input_rows(self: _Builder, x: Value, width: int, *, transposed: bool = False) -> Value:
        g, name = self.graph, x.name
        if transposed:
            name = g.node("Transpose", [name], perm=[1, 0])[0]
        return Value(g.node("Unsqueeze", [name, g.ints(0)])[0], width)

    def windows(
        self: _Builder, x: Value, width: int, *, stride: int = 1, padding: int = 0
    ) -> Value:
        g, name = self.graph, self._use(x)
        if padding:
            name = g.node("Pad", [name, g.ints(padding, padding), "", g.ints(1)])[0]
        parts = []
        for i in range(width):
            end = i - (width - 1) or _END
            ranges = [g.ints(i), g.ints(end), g.ints(1), g.ints(stride)]
            part = g.node("Slice", [name, *ranges])[0]
            parts.append(g.node("Unsqueeze", [part, g.ints(3)])[0])
        side = g.node("Concat", parts, axis=3)[0]
        flat = x.width * width
        return Value(g.node("Reshape", [side, g.ints(1, -1, flat)])[0], flat)

    def table(self: _Builder, weight: Weight) -> Value:
        rows = weight.values.reshape(1, -1, weight.shape[-1])
        return Value(self.weights.fixed(weight, ".rows", rows), weight.shape[-1])

    def concat_rows(self: _Builder, *x: Value) -> Value:
        names = [self._use(v) for v in x]
        return Value(self.graph.node("Concat", names, axis=1)[0], x[0].width)

    def take_rows(self: _Builder, x: Value, start: int, stop: int | None = None) -> Value:
        g = self.graph
        ends = g.ints(_END if stop is None else stop)
        name = g.node("Slice", [self._use(x), g.ints(start), ends, g.ints(1)])[0]
        return Value(name, x.width)

    def first_rows(self: _Builder, x: Value, count: Value, stride: int = 1) -> Value:
        g, end = self.graph, count.name
        if stride > 1:
            end = g.node("Add", [end, g.ints(stride - 1)])[0]
            end = g.node("Div", [end, g.ints(stride)])[0]
        return Value(g.node("Slice", [self._use(x), g.ints(0), end, g.ints(1)])[0], x.width)

    def split_rows(self: _Builder, x: Value, count: Value, each: int) -> tuple[Value, Value]:
        g, name = self.graph, self._use(x)
        at = g.node("Mul", [count.name, g.ints(each)])[0]
        first = g.node("Slice", [name, g.ints(0), at, g.ints(1)])[0]
        rest = g.node("Slice", [name, at, g.ints(_END), g.ints(1)])[0]
        return Value(first, x.width), Value(rest, x.width)

    def repeat_rows(self: _Builder, x: Value, times: int) -> Value:
        g = self.graph
        apart = g.node("Reshape", [self._use(x), g.ints(-1, 1, x.width)])[0]
        copies = g.node("Expand", [apart, g.ints(1, times, 1)])[0]
        return Value(g.node("Reshape", [copies, g.ints(1, -1, x.width)])[0], x.width)

    def zeros(self: _Builder, rows: int, width: int) -> Value:
        g = self.graph
        return Value(g.node("ConstantOfShape", [g.ints(1, rows, width)])[0], width)

    def concat(self: _Builder, *x: Value) -> Value:
        names = [self._use(v) for v in x]
        return Value(self.graph.node("Concat", names, axis=2)[0], sum(v.width for v in x))

    def fold_rows(self: _Builder, x: Value, count: int) -> Value:
        g, flat = self.graph, x.width * count
        return Value(g.node("Reshape", [self._use(x), g.ints(1, -1, flat)])[0], flat)

    def unfold_rows(self: _Builder, x: Value, count: int) -> Value:
        g, width = self.graph, x.width // count
        return Value(g.node("Reshape", [self._use(x), g.ints(1, -1, width)])[0], width)

    def average_rows(self: _Builder, x: Value, count: int) -> Value:
        g, name = self.graph, self._use(x)
        length = g.node("Shape", [name], start=1, end=2)[0]
        rest = g.node("Mod", [length, g.ints(count)])[0]
        whole = g.node("Sub", [length, rest])[0]
        name = g.node("Slice", [name, g.ints(0), whole, g.ints(1)])[0]
        runs = g.node("Reshape", [name, g.ints(1, -1, count, x.width)])[0]
        return Value(g.node("ReduceMean", [runs, g.ints(2)], keepdims=0)[0], x.width)

    def pixel_shuffle(self: _Builder, x: Value, grid: tuple[int, int], factor: int) -> Value:
        g, rows, columns = self.graph, grid[0] // factor, grid[1] // factor
        cut = g.ints(rows, factor, columns, factor, x.width)
        squares = g.node("Reshape", [self._use(x), cut])[0]
        squares = g.node("Transpose", [squares], perm=[0, 2, 1, 3, 4])[0]
        flat = factor * factor * x.width
        return Value(g.node("Reshape", [squares, g.ints(1, rows * columns, flat)])[0], flat)

    def full_attention(
        self: _Builder,
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
        """MultiHeadAttention; its batch axis takes the frames."""
        g, names = self.graph, [self._use(q), self._use(k), self._use(v)]
        if kv_heads is not None and kv_heads != heads:
            for i, x in ((1, k), (2, v)):
                names[i] = _repeat_heads(g, names[i], x.width, kv_heads, heads // kv_heads)
        if frames is not None:
            count = g.node("Slice", [frames.name, g.ints(0), g.ints(1)])[0]
            for i, x in enumerate((q, k, v)):
                shape = g.node("Concat", [count, g.ints(-1, x.width)], axis=0)[0]
                names[i] = g.node("Reshape", [names[i], shape])[0]
        if bias is not None:
            names += ["", "", self._use(bias)]
        y = g.microsoft("MultiHeadAttention", names, num_heads=heads, scale=float(scale))[0]
        if frames is not None:
            y = g.node("Reshape", [y, g.ints(1, -1, q.width)])[0]
        return Value(y, q.width)

    def grid_angles(
        self: _Builder, grid: Value, inv_freq: NDArray[np.float32], merge: int
    ) -> Value:
        """The value is `(seq, 2 * n)`, without a batch axis, as `rotary` wants its tables."""
        g = self.graph
        zero, one = (g.constant("scalar", np.asarray(i, np.int64)) for i in (0, 1))
        step = g.constant("scalar", np.asarray(merge, np.int64))
        axes = []
        for axis in (0, 1):  # rows (Y, 1, dy, 1), then columns (1, X, 1, dx)
            size = g.node("Gather", [grid.name, g.constant("scalar", np.asarray(axis + 1))])[0]
            first = g.node("Range", [zero, size, step])[0]
            outer, inner = [1, 1, 1, 1], [1, 1, 1, 1]
            outer[axis], inner[axis + 2] = -1, merge
            first = g.node("Reshape", [first, g.ints(*outer)])[0]
            offsets = g.node("Reshape", [g.node("Range", [zero, step, one])[0], g.ints(*inner)])[0]
            axes.append(g.node("Add", [first, offsets])[0])
        n = g.fixed(f"inv_freq.{len(inv_freq)}", inv_freq)
        angles = []
        for own, other in (axes, axes[::-1]):
            nothing = g.node("Mul", [other, zero])[0]
            place = g.node("Reshape", [g.node("Add", [own, nothing])[0], g.ints(-1, 1)])[0]
            angles.append(g.node("Mul", [g.node("Cast", [place], to=_FLOAT)[0], n])[0])
        frame = g.node("Concat", angles, axis=1)[0]
        count = g.node("Slice", [grid.name, g.ints(0), g.ints(1)])[0]
        repeats = g.node("Concat", [count, g.ints(1)], axis=0)[0]
        return Value(g.node("Tile", [frame, repeats])[0], 2 * len(inv_freq))

    def rotary(self: _Builder, x: Value, angles: Value, heads: int) -> Value:
        """RotaryEmbedding over tables made for this grid; equal nodes are merged at load."""
        g = self.graph
        tables = [g.node(f, [angles.name])[0] for f in ("Cos", "Sin")]
        inputs = [self._use(x), g.ints(0), *tables]
        return Value(g.microsoft("RotaryEmbedding", inputs, num_heads=heads)[0], x.width)


def _repeat_heads(g: GraphBuilder, name: str, width: int, heads: int, times: int) -> str:
    """Each head of `(1, seq, width)`, so many times in a row."""
    apart = g.node("Reshape", [name, g.ints(0, 0, heads, 1, width // heads)])[0]
    wide = g.node("Expand", [apart, g.ints(1, 1, 1, times, 1)])[0]
    return g.node("Reshape", [wide, g.ints(0, 0, width * times)])[0]
