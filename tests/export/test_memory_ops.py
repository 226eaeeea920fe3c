"""The ops over memories: ONNX against the oracle, heads shared or not, spans seen or not."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest

from edge_mmllm.spec import MEMORY, StateSpec
from edge_mmllm_export.ops.numpy import NumpyOps
from edge_mmllm_export.ops.onnx import OnnxOps, Value
from edge_mmllm_export.ops.onnx_graph import GraphBuilder, TensorFile

SPAN = StateSpec("span", (1, MEMORY, 2), "int64", "cross_kv")
RNG = np.random.default_rng(0)


def contract(heads, d):
    shape = (1, heads, MEMORY, d)
    return [StateSpec(n, shape, "float32", "cross_kv") for n in "kv"]


def forward(op, q, heads, d, kv_heads, span):
    k, v = contract(kv_heads, d)
    y = op.cross_attention(q, k, v, heads=heads, scale=0.3, span=SPAN if span else None)
    return op.concat(y, op.sees(q, SPAN)) if span else y


def onnx(folder, states, q, position, heads, d, kv_heads, span):
    data = TensorFile(folder / "weights.bin")
    graph = GraphBuilder("decoder", data)
    graph.input("inputs_embeds", "float32", ["seq", q.shape[1]])
    graph.input("position", "int64", [1])
    for s in [*contract(kv_heads, d), *([SPAN] if span else [])]:
        graph.input(f"state.{s.name}", s.dtype, ["memory" if n < 0 else n for n in s.shape])
    op = OnnxOps(graph)
    batched = graph.node("Unsqueeze", ["inputs_embeds", graph.ints(0)])[0]
    y = forward(op, Value(batched, q.shape[1]), heads, d, kv_heads, span)
    graph.node("Squeeze", [y.name, graph.ints(0)], ["y"])
    graph.output("y", "float32", ["seq", y.width])
    graph.save(folder / "decoder.onnx", {})
    data.close()
    session = ort.InferenceSession(folder / "decoder.onnx", providers=["CPUExecutionProvider"])
    feeds = {f"state.{n}": a for n, a in states.items()}
    given = {i.name for i in session.get_inputs()} & {"position"}
    feeds |= {"inputs_embeds": q, **{n: np.array([position]) for n in given}}
    return session.run(["y"], feeds)[0]


@pytest.mark.parametrize("rows", [0, 1, 6])
@pytest.mark.parametrize("kv_heads", [6, 2])
@pytest.mark.parametrize("span", [False, True])
def test_cross_attention(rows, kv_heads, span, tmp_path):
    heads, d, position = 6, 8, 3
    q = RNG.standard_normal((7, heads * d)).astype(np.float32)
    states = {n: RNG.standard_normal((1, kv_heads, rows, d)).astype(np.float32) for n in ("k", "v")}
    if span:  # tokens 3 to 9: rows seen from 5 on, until 8, both, never
        spans = [(5, 100), (0, 8), (4, 6), (50, 60), (5, 5), (6, 100)][:rows]
        states["span"] = np.array(spans, np.int64).reshape(1, rows, 2)
    expected = forward(NumpyOps(dict(states), position), q, heads, d, kv_heads, span)
    found = onnx(tmp_path, states, q, position, heads, d, kv_heads, span)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    if not rows:
        assert not found.any()


def test_a_token_that_sees_nothing_gets_zeros_and_others_only_what_they_see():
    """The oracle itself: hiding a row is as if it were not there."""
    q = RNG.standard_normal((3, 8)).astype(np.float32)
    states = {n: RNG.standard_normal((1, 1, 4, 8)).astype(np.float32) for n in ("k", "v")}
    states["span"] = np.array([[(1, 2), (1, 9), (2, 9), (5, 9)]], np.int64)
    y = forward(NumpyOps(dict(states), 0), q, 1, 8, 1, True)
    assert not y[0].any()
    assert y[1:, -1].tolist() == [1, 1]
    for token, rows in ((1, [0, 1]), (2, [1, 2])):
        some = {n: states[n][:, :, rows] for n in ("k", "v")}
        alone = forward(NumpyOps(some, token), q[token : token + 1], 1, 8, 1, False)
        np.testing.assert_allclose(y[token, :-1], alone[0], rtol=0, atol=1e-6)


def test_remember_fills_states_in_both_backends(tmp_path):
    x, span = RNG.standard_normal((5, 12)).astype(np.float32), np.array([4, 9])
    state = StateSpec("k", (1, 3, MEMORY, 4), "float32", "cross_kv")
    oracle = NumpyOps({})
    oracle.remember(x, state)
    oracle.remember_span(x, span, SPAN)
    data = TensorFile(tmp_path / "weights.bin")
    graph = GraphBuilder("remember", data)
    graph.input("features", "float32", ["rows", 12])
    op, given = OnnxOps(graph), Value(graph.input("span", "int64", [2]), 1)
    value = Value(graph.node("Unsqueeze", ["features", graph.ints(0)])[0], 12)
    op.remember(value, state)
    op.remember_span(value, given, SPAN)
    graph.output("next.k", "float32", [1, 3, "memory", 4])
    graph.output("next.span", "int64", [1, "memory", 2])
    graph.save(tmp_path / "remember.onnx", {})
    data.close()
    session = ort.InferenceSession(tmp_path / "remember.onnx", providers=["CPUExecutionProvider"])
    outputs = session.run(["next.k", "next.span"], {"features": x, "span": span})
    for found, name in zip(outputs, ("k", "span"), strict=True):
        np.testing.assert_array_equal(found, oracle.states[name])
