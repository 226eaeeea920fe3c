"""The ops over images and recordings: numpy against first principles, ONNX against numpy."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest

from edge_mmllm_export.checkpoints.base import TensorInfo
from edge_mmllm_export.ops.numpy import NumpyOps
from edge_mmllm_export.ops.onnx import OnnxOps, Value
from edge_mmllm_export.ops.onnx_graph import GraphBuilder, TensorFile
from edge_mmllm_export.weights import Parameter, Source, bind

RNG = np.random.default_rng(3)


def _random(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


class _Arrays:
    """A checkpoint in memory."""

    layout, source, config = "hub", "memory", {}

    def __init__(self, **arrays):
        self.arrays = arrays
        self.tensors = {n: TensorInfo(n, a.shape, "F32", a.nbytes) for n, a in arrays.items()}

    def read(self, name, start=0, stop=None):
        return self.arrays[name][start:stop]


def _weights(**arrays):
    parameters = [Parameter(n, a.shape, "vector") for n, a in arrays.items()]
    return bind(_Arrays(**arrays), parameters, {n: Source(n) for n in arrays})


@pytest.fixture
def both(tmp_path):
    """`both(forward, *inputs)`: what numpy and ONNX give for `forward(op, *inputs)`.

    float32 inputs of two axes are activations, the rest graph inputs as they are.
    """

    def run(forward, *inputs, raw=()):
        expected = forward(NumpyOps({}), *inputs)
        data = TensorFile(tmp_path / "weights.bin")
        graph = GraphBuilder("test", data)
        op, values = OnnxOps(graph), []
        for i, x in enumerate(inputs):
            graph.input(f"x{i}", x.dtype.name, [f"s{i}.{j}" for j in range(x.ndim)])
            value = Value(f"x{i}", x.shape[-1])
            if x.ndim == 2 and x.dtype == np.float32 and i not in raw:
                value = op.input_rows(value, x.shape[-1])
            values.append(value)
        y = forward(op, *values)
        graph.node("Identity", [op._use(y)], ["y"])
        graph.output("y", "float32", ["b", "seq", y.width])
        op.finish()
        graph.save(tmp_path / "test.onnx", {})
        data.close()
        session = onnxruntime.InferenceSession(tmp_path / "test.onnx")
        actual = session.run(None, {f"x{i}": x for i, x in enumerate(inputs)})[0]
        return expected, actual.reshape(-1, y.width)

    return run


def _same(pair, atol=0.0):
    np.testing.assert_allclose(pair[1], pair[0], rtol=0, atol=atol)
    return pair[0]


def test_patches_are_what_a_strided_convolution_sees(both):
    """The edge that fills no square is dropped, as SigLIP's 384 pixels in squares of 14 want."""
    pixels, kernel = _random(3, 17, 13), _random(5, 3, 4, 4)
    rows = _same(both(lambda op, x: op.patches(x, (3, 17, 13), 4), pixels))
    expected = np.array(
        [
            [(pixels[:, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4] * k).sum() for k in kernel]
            for y in range(4)
            for x in range(3)
        ]
    )
    np.testing.assert_allclose(rows @ kernel.reshape(5, -1).T, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("width", "stride", "padding", "frames"),
    [(3, 1, 1, 9), (3, 2, 1, 9), (3, 2, 1, 8), (2, 2, 0, 7)],
)
def test_windows_make_a_convolution_linear(width, stride, padding, frames, both):
    mel, kernel = _random(5, frames), _random(4, 5, width)

    def forward(op, x):
        return op.windows(
            op.input_rows(x, 5, transposed=True), width, stride=stride, padding=padding
        )

    rows = _same(both(forward, mel, raw=(0,)))
    padded = np.pad(mel, ((0, 0), (padding, padding)))
    count = (padded.shape[1] - width) // stride + 1
    expected = [
        [(padded[:, i * stride : i * stride + width] * k).sum() for k in kernel]
        for i in range(count)
    ]
    np.testing.assert_allclose(rows @ kernel.reshape(4, -1).T, expected, atol=1e-5)


def test_rows_joined_and_cut(both):
    w = _weights(cls=_random(6), places=_random(8, 6))

    def forward(op, x):
        y = op.add(op.concat_rows(op.table(w["cls"]), x), op.table(w["places"]))
        return op.concat(op.take_rows(y, 1), op.take_rows(y, -7))

    x = _random(7, 6)
    y = _same(both(forward, x))
    np.testing.assert_array_equal(y, np.tile(x + w["places"].values[1:], 2))


@pytest.mark.parametrize(("count", "stride", "rows"), [(5, 1, 5), (5, 2, 3), (6, 2, 3), (9, 2, 4)])
def test_first_rows_of_a_run(count, stride, rows, both):
    x = _random(4 if stride == 2 else 7, 3)
    y = _same(both(lambda op, x, n: op.first_rows(x, n, stride), x, np.array([count])))
    np.testing.assert_array_equal(y, x[:rows])


def test_rows_folded_and_averaged(both):
    x = _random(13, 5)
    np.testing.assert_allclose(
        _same(both(lambda op, x: op.average_rows(x, 4), x), atol=1e-6)[2],
        x[8:12].mean(axis=0),
        atol=1e-6,
    )
    x = x[:12]
    folded = _same(both(lambda op, x: op.fold_rows(x, 4), x))
    np.testing.assert_array_equal(folded[1, 10:15], x[6])
    mean = _same(both(lambda op, x: op.average_rows(x, 2), x), atol=1e-6)
    np.testing.assert_allclose(mean[3], (x[6] + x[7]) / 2, atol=1e-6)


def test_pixel_shuffle_puts_each_square_side_by_side(both):
    x = np.arange(24, dtype=np.float32)[:, None] * np.ones(2, np.float32)
    y = _same(both(lambda op, x: op.pixel_shuffle(x, (4, 6), 2), x))
    np.testing.assert_array_equal(y[1], [2, 2, 3, 3, 8, 8, 9, 9])
    np.testing.assert_array_equal(y[3, ::2], [12, 13, 18, 19])


def _attention(q, k, v, scale, bias=0.0):
    scores = np.exp(q @ k.T * scale + bias)
    return scores / scores.sum(axis=-1, keepdims=True) @ v


def test_full_attention_over_other_rows_with_shared_heads(both):
    q, k, v = _random(5, 4 * 8), _random(9, 2 * 8), _random(9, 2 * 8)

    def forward(op, q, k, v):
        return op.full_attention(q, k, v, heads=4, kv_heads=2, scale=0.4)

    y = _same(both(forward, q, k, v), atol=1e-5)
    expected = _attention(q[:, 16:24], k[:, 8:], v[:, 8:], 0.4)
    np.testing.assert_allclose(y[:, 16:24], expected, atol=1e-5)


def test_full_attention_with_bias(both):
    q, k, v, bias = _random(5, 24), _random(6, 24), _random(6, 24), _random(3, 5, 6)

    def forward(op, q, k, v, bias):
        if isinstance(bias, Value):
            name = op.graph.node("Unsqueeze", [bias.name, op.graph.ints(0)])[0]
            bias = Value(name, bias.width)
        return op.full_attention(q, k, v, heads=3, scale=0.5, bias=bias)

    y = _same(both(forward, q, k, v, bias), atol=1e-5)
    np.testing.assert_allclose(
        y[:, 8:16], _attention(q[:, 8:16], k[:, 8:16], v[:, 8:16], 0.5, bias[1]), atol=1e-5
    )


def test_frames_do_not_see_each_other(both):
    x, grid = _random(12, 16), np.array([3, 2, 2])

    def forward(op, x, grid):
        return op.full_attention(x, x, x, heads=2, scale=0.3, frames=grid)

    y = _same(both(forward, x, grid), atol=1e-5)
    middle = x[4:8, 8:]
    np.testing.assert_allclose(y[4:8, 8:], _attention(middle, middle, middle, 0.3), atol=1e-5)


def test_rotary_over_a_grid_in_squares(both):
    """The tokens of a 4 x 6 grid come in squares of 2 x 2, each frame alike."""
    x, grid, inv_freq = _random(48, 2 * 16), np.array([2, 4, 6]), np.array([1, 0.5, 0.2, 0.1])
    inv_freq = inv_freq.astype(np.float32)

    def forward(op, x, grid):
        return op.rotary(x, op.grid_angles(grid, inv_freq, 2), 2)

    y = _same(both(forward, x, grid), atol=1e-5)
    token = 24 + 4 * 3 + 4 + 1  # frame 1, square (1, 1), upper right
    row, column = 2, 3
    angle = np.concatenate([row * inv_freq, column * inv_freq])
    turned = (x[token, 16:24] + 1j * x[token, 24:32]) * np.exp(1j * angle)
    np.testing.assert_allclose(y[token, 16:24], turned.real, atol=1e-5)
    np.testing.assert_allclose(y[token, 24:32], turned.imag, atol=1e-5)


def test_rows_of_tiles(both):
    """Cut at a number known at run time, unfolded, repeated and filled up."""
    x = _random(6, 4)

    def forward(op, x, count):
        first, rest = op.split_rows(x, count, 2)
        return op.concat_rows(op.unfold_rows(rest, 2), op.repeat_rows(op.unfold_rows(first, 2), 3))

    y = _same(both(forward, x, np.array([2])))
    np.testing.assert_array_equal(y[:4], x[4:].reshape(4, 2))
    np.testing.assert_array_equal(y[4:7], np.tile(x[0, :2], (3, 1)))
    zeros = _same(both(lambda op, x: op.concat_rows(x, op.zeros(2, 4)), x))
    np.testing.assert_array_equal(zeros[6:], np.zeros((2, 4)))
