"""Quantization: the numbers, their packing as onnxruntime unpacks it, and the plan."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from memory import weight

from edge_mmllm.errors import UsageError
from edge_mmllm_export.onnx import Value
from edge_mmllm_export.ops.onnx import OnnxOps
from edge_mmllm_export.ops.onnx_graph import GraphBuilder, TensorFile
from edge_mmllm_export.quantize.blocks import dequantize, pack_nibbles, quantize
from edge_mmllm_export.quantize.schemes import F16, F32, QuantPlan, Scheme, parse_override
from edge_mmllm_export.weights import Parameter, as_stored

RNG = np.random.default_rng(3)
SCHEMES = [
    Scheme(bits, size, zero)
    for size in (16, 32, 64, 128, 256)
    for bits, zero in ((4, "none"), (4, "int"), (4, "float"), (8, "none"))
]


def _id(scheme):
    return scheme.name


def _random(rows, k, kind):
    """The same for the same arguments, whichever tests run."""
    rng = np.random.default_rng([rows, k])
    if kind == "normal":
        w = rng.standard_normal((rows, k))
    elif kind == "outliers":
        w = rng.standard_t(2, (rows, k))
    elif kind == "one-sided":
        w = 3 + rng.random((rows, k))
    else:
        w = rng.uniform(-1, 1, (rows, k)) * 10.0 ** rng.integers(-6, 3, (rows, 1))
    return w.astype(np.float32)


def _stored(w, scheme):
    return dequantize(quantize(w, scheme), scheme, w.shape[1])


def _errors(w, stored, size):
    """Squared error of each block, `(rows, blocks)`."""
    pad = -w.shape[1] % size
    squares = np.pad((stored.astype(np.float64) - w) ** 2, ((0, 0), (0, pad)))
    return squares.reshape(len(w), -1, size).sum(-1)


def _half(scale):
    return scale.astype(np.float16).astype(np.float64)


def _plain(w, scheme):
    """Round to nearest with the plain scale of each format (Q4_0, Q4_1, Q8_0; min..max), held as
    float16 where the format does so, in float64 and without a search."""
    size, top = scheme.block_size, 2**scheme.bits - 1
    padded = np.pad(w.astype(np.float64), ((0, 0), (0, -w.shape[1] % size)))
    blocks = padded.reshape(len(w), -1, size)
    high, low = blocks.max(-1, keepdims=True), blocks.min(-1, keepdims=True)
    if scheme.zero == "none":
        peak = np.where(high > -low, high, low)
        scale = _half(peak / -8 if scheme.bits == 4 else np.abs(peak) / 127)
        least, most = (-8, 7) if scheme.bits == 4 else (-127, 127)
        out = np.clip(np.rint(blocks / np.where(scale == 0, 1, scale)), least, most) * scale
    else:
        if scheme.zero == "int":
            high, low = np.maximum(high, 0), np.minimum(low, 0)
        scale = np.where(high > low, (high - low) / top, 1)
        scale = _half(scale) if scheme.zero == "int" else scale
        zero = -low / scale if scheme.zero == "float" else np.rint(-low / scale)
        out = (np.clip(np.rint(blocks / scale + zero), 0, top) - zero) * scale
    return out.reshape(len(w), -1)[:, : w.shape[1]]


@pytest.mark.parametrize("scheme", SCHEMES, ids=_id)
@pytest.mark.parametrize("kind", ["normal", "outliers", "one-sided", "scales"])
def test_never_worse_than_plain_rounding(kind, scheme):
    w = _random(33, 300, kind)
    found = _errors(w, _stored(w, scheme), scheme.block_size)
    plain = _errors(w, _plain(w, scheme), scheme.block_size)
    # Float32 sums decide between candidates: equal to about 1e-5 of the block's energy.
    slack = 1e-4 * plain + 1e-11 * _errors(w, np.zeros_like(w), scheme.block_size)
    if scheme.zero != "float":  # among float16's subnormal scales, rounding decides
        pad = np.pad(w, ((0, 0), (0, -w.shape[1] % scheme.block_size)))
        peak = np.abs(pad.reshape(len(w), -1, scheme.block_size)).max(-1)
        found = np.where(peak / 2**scheme.bits >= 2.0**-14, found, 0)
    if scheme.zero == "float":  # the search sees a short block's values several times
        assert found[:, -1].sum() <= 1.1 * plain[:, -1].sum()
        found, plain, slack = found[:, :-1], plain[:, :-1], slack[:, :-1]
    assert (found <= plain + slack).all()


@pytest.mark.parametrize("zero", ["none", "int", "float"])
def test_the_search_pays(zero):
    scheme = Scheme(4, 32, zero)
    w = _random(64, 512, "normal")
    ratio = _errors(w, _stored(w, scheme), 32).sum() / _errors(w, _plain(w, scheme), 32).sum()
    assert ratio < 0.97


def test_symmetric_is_exact_on_its_own_grid():
    """Data that came from Q4_0: the code -8 is met in each block, in either sign."""
    q = RNG.integers(-8, 8, (8, 5, 32))
    q[..., 3] = -8
    scale = RNG.choice([-1, 1], (8, 5, 1)) * RNG.uniform(0.01, 1, (8, 5, 1)).astype(np.float16)
    w = (q * scale).astype(np.float32).reshape(8, 160)
    np.testing.assert_allclose(_stored(w, Scheme(4, 32)), w, rtol=1e-6, atol=1e-7)


def test_float_minimum_is_exact_on_q4_1():
    """Data that came from GGUF's Q4_1 (`d * q + m`, d and m float16)."""
    q = RNG.integers(0, 16, (8, 5, 32))
    q[..., 4], q[..., 9] = 0, 15
    d = RNG.uniform(0.001, 1, (8, 5, 1)).astype(np.float16).astype(np.float32)
    m = RNG.uniform(-9, 3, (8, 5, 1)).astype(np.float16).astype(np.float32)
    w = (d * q + m).astype(np.float32).reshape(8, 160)
    np.testing.assert_allclose(_stored(w, Scheme(4, 32, "float")), w, rtol=0, atol=4e-6)


def test_integer_zero_is_exact_on_its_own_grid():
    q = RNG.integers(0, 16, (8, 5, 32))
    q[..., 4], q[..., 9] = 0, 15
    zero = RNG.integers(0, 16, (8, 5, 1))
    scale = RNG.uniform(0.01, 1, (8, 5, 1)).astype(np.float16).astype(np.float32)
    w = ((q - zero) * scale).astype(np.float32).reshape(8, 160)
    np.testing.assert_allclose(_stored(w, Scheme(4, 32, "int")), w, rtol=1e-6, atol=1e-6)


def test_zero_stays_zero():
    """A pruned weight must not come back (the float minimum is the one that may move it)."""
    w = _random(16, 128, "normal")
    w[:, ::3] = 0
    for zero in ("none", "int"):
        assert (_stored(w, Scheme(4, 32, zero))[:, ::3] == 0).all()
    assert (_stored(w, Scheme(8, 32))[:, ::3] == 0).all()


@pytest.mark.parametrize("scheme", SCHEMES[:4], ids=_id)
@pytest.mark.parametrize("value", [0.0, 2.5, -2.5, 1e-30, -1e-38, 1e-42, 1e15])
def test_blocks_of_one_value(value, scheme):
    """Constant blocks, subnormal ones included, neither warn nor blow up."""
    w = np.full((3, 40), value, np.float32)
    stored = _stored(w, scheme)
    assert np.isfinite(stored).all()
    bound = 1e-30 if abs(value) <= 1e-30 else 0.07 * abs(value)
    np.testing.assert_allclose(stored, w, rtol=0, atol=bound)


@pytest.mark.parametrize("scheme", SCHEMES, ids=_id)
def test_rows_can_be_cut_anywhere(scheme):
    """Tiles of any height give the same codes (numpy sums a lone block in another order, so
    that its scale may differ in the last bit)."""
    w = _random(9, 200, "normal")
    whole = quantize(w, scheme)
    parts = [quantize(w[a:b], scheme) for a, b in ((0, 1), (1, 6), (6, 9))]
    np.testing.assert_array_equal(whole.q, np.concatenate([p.q for p in parts]))
    np.testing.assert_allclose(whole.scale, np.concatenate([p.scale for p in parts]), rtol=3e-7)
    if scheme.zero != "none":
        zero = np.concatenate([p.zero for p in parts])
        np.testing.assert_allclose(whole.zero, zero, rtol=3e-7)


def test_half_precision_clips_what_it_cannot_hold():
    w = np.array([[1.0, 1e6, -1e6, 1 / 3]], np.float32)
    np.testing.assert_array_equal(
        _stored(w, F16), np.array([[1, 65504, -65504, 1 / 3]]).astype(np.float16)
    )
    assert _stored(w, F32) is w


def test_nibbles():
    np.testing.assert_array_equal(pack_nibbles(np.array([[1, 2, 15, 0]], np.uint8)), [[0x21, 0x0F]])


# -- packing, judged by onnxruntime ---------------------------------------------------------


def _graph(folder, build):
    """A graph with input `x` float32 `(1, seq, K)` and `ids`, run by onnxruntime."""
    data = TensorFile(folder / "weights.bin")
    graph = GraphBuilder("test", data)
    op = OnnxOps(graph)
    output = build(graph, op)
    op.finish()
    graph.node("Identity", [output], ["y"])
    graph.output("y", "float32", ["batch", "seq", "n"])
    graph.save(folder / "test.onnx", {})
    data.close()
    return ort.InferenceSession(folder / "test.onnx")


def _linear(folder, weights, bias=()):
    """`identity @ w.T` for weights stacked along N: their values as onnxruntime unpacks them."""
    k = weights[0].shape[1]

    def build(graph, op):
        graph.input("x", "float32", [1, "seq", k])
        outputs = [op._use(v) for v in op.linear(Value("x", k), *weights, bias=bias)]
        return graph.node("Concat", outputs, axis=-1)[0]

    session = _graph(folder, build)
    return session.run(None, {"x": np.eye(k, dtype=np.float32)[None]})[0][0].T


@pytest.mark.parametrize("k", [32, 48, 100, 256])
@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.block_size <= 128], ids=_id)
def test_matmul_unpacks_what_was_packed(scheme, k, tmp_path):
    """A one-hot row is exact in int8 too, so this sees the weights themselves."""
    w = weight(_random(23, k, "normal"), scheme)
    expected = _stored(w.rows(), scheme)
    np.testing.assert_allclose(_linear(tmp_path, [w]), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scheme", [*SCHEMES[4:8], F16, F32], ids=_id)
def test_stacked_projections_keep_their_rows_and_biases(scheme, tmp_path):
    """q, k and v in one kernel; written in several tiles by several calls."""
    ws = [weight(_random(n, 96, "normal"), scheme, name=f"w{n}") for n in (40, 7, 16)]
    bs = [
        weight(RNG.standard_normal(w.shape[0]).astype(np.float32), F32, "vector", f"{w.name}.b")
        for w in ws
    ]
    rows = [_stored(w.rows(), scheme) for w in ws]
    expected = np.concatenate(rows) + np.concatenate([b.values for b in bs])[:, None]
    found = _linear(tmp_path, ws, tuple(bs))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6)


def test_mixed_schemes_are_not_stacked(tmp_path):
    schemes = (Scheme(4, 32), Scheme(8, 32), F16)
    ws = [weight(_random(8, 64, "normal"), s, name=s.name) for s in schemes]
    expected = np.concatenate([_stored(w.rows(), w.scheme) for w in ws])
    np.testing.assert_allclose(_linear(tmp_path, ws), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    "scheme",
    [Scheme(4, 16), Scheme(4, 32), Scheme(4, 32, "int"), Scheme(8, 64), Scheme(8, 16), F16, F32],
    ids=_id,
)
def test_embedding_and_head_share_their_bytes(scheme, tmp_path):
    """Tied weights: GatherBlockQuantized and MatMulNBits read one copy."""
    k = 192
    table = weight(_random(29, k, "normal"), scheme, "embedding")
    ids = np.array([0, 28, 5, 5, 17])

    def build(graph, op):
        graph.input("ids", "int64", ["seq"])
        rows = op.rows(table, Value("ids", 1))
        logits = op.linear(rows, table)[0]
        return graph.node("Concat", [op._use(rows), op._use(logits)], axis=-1)[0]

    session = _graph(tmp_path, build)
    found = session.run(None, {"ids": ids})[0][0]
    (stored,) = as_stored({"t": table}).values()
    expected = stored.rows()[ids]
    np.testing.assert_array_equal(found[:, :k], expected)
    # Activations are int8 in the head; its rows stay in order all the same.
    np.testing.assert_allclose(found[:, k:], expected @ stored.rows().T, atol=1.0)

    model = onnx.load(tmp_path / "test.onnx", load_external_data=False)
    regions = {t.name: {e.key: e.value for e in t.external_data} for t in model.graph.initializer}
    offsets = {r["offset"] for r in regions.values() if r}
    used = sum({r["offset"]: int(r["length"]) for r in regions.values() if r}.values())
    if scheme.quantized:
        assert regions["w.rows"]["offset"] == regions["w.q"]["offset"]
        assert len(offsets) == (3 if scheme.zero == "int" else 2)
        assert used == table.size * scheme.bits_per_weight() / 8
    else:
        assert used == table.size * scheme.bits // 8


# -- the plan -------------------------------------------------------------------------------

MATRIX = Parameter("layers.0.mlp.up", (64, 96))
EMBED = Parameter("embed", (100, 96), "embedding")
HEAD = Parameter("head", (100, 96), "head")
NORM = Parameter("norm", (96,), "vector")


@pytest.mark.parametrize(
    ("plan", "matrix", "embedding"),
    [
        (QuantPlan(), "int4-b32", "int8-b32"),
        (QuantPlan("f32"), "f32", "f32"),
        (QuantPlan("f16"), "f16", "f16"),
        (QuantPlan("int8"), "int8-b32", "int8-b32"),
        (QuantPlan("int8", zero="int"), "int8-b32", "int8-b32"),
        (QuantPlan("int4", 64, "int"), "int4-b64-asym", "int8-b32"),
        (QuantPlan("int4", 128, "float"), "int4-b128-min", "int8-b32"),
        (QuantPlan("int4", embedding="f16"), "int4-b32", "f16"),
        (QuantPlan("int4", embedding="int4"), "int4-b32", "int4-b32"),
    ],
)
def test_plan(plan, matrix, embedding):
    assert plan.of(MATRIX).name == matrix
    assert plan.of(EMBED).name == plan.of(HEAD).name == embedding
    assert plan.of(NORM) is F32


def test_an_embedding_never_has_a_float_minimum():
    """GatherBlockQuantized takes integer zero points only: such a graph does not load."""
    plan = QuantPlan("int4", zero="float", embedding="int4")
    assert plan.of(EMBED).name == "int4-b32-asym"
    assert plan.of(HEAD).name == plan.of(MATRIX).name == "int4-b32-min"
    for override in ("*=int4-min", "emb*=int4-b64-min"):
        with pytest.raises(UsageError, match="float minimum"):
            QuantPlan(overrides=(parse_override(override),)).of(EMBED)


def test_embedding_blocks_divide_the_row():
    plan = QuantPlan("int8", 128)
    for k, name in ((256, "int8-b128"), (192, "int8-b64"), (48, "int8-b16"), (40, "f16")):
        assert plan.of(Parameter("embed", (9, k), "embedding")).name == name
    assert plan.of(Parameter("w", (9, 40))).name == "int8-b64"  # none is twice as long as the row


def test_the_last_override_that_matches_wins():
    rules = ("layers.*=f16", "*.up=int8-b64", "norm=int4")
    plan = QuantPlan(overrides=tuple(map(parse_override, rules)))
    assert plan.of(MATRIX).name == "int8-b64"
    assert plan.of(Parameter("layers.0.mlp.down", (8, 64))).name == "f16"
    assert plan.of(NORM) is F32  # never quantized, whatever is asked for
    assert plan.of(EMBED).name == "int8-b32"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("*=f32", "f32"),
        ("a=f16", "f16"),
        ("a=int8-b128", "int8-b128"),
        ("a=int4-b64-asym", "int4-b64-asym"),
        ("a=int4-min", "int4-b32-min"),
    ],
)
def test_parse_override(text, name):
    pattern, scheme = parse_override(text)
    assert (pattern, scheme.name) == (text[0], name)


@pytest.mark.parametrize(
    "text", ["", "a", "=int4", "a=", "a=int3", "a=int4-b33", "a=int4-x", "a=b32", "a=int8-min"]
)
def test_a_malformed_override_is_refused(text):
    with pytest.raises(UsageError, match="cannot read the override"):
        parse_override(text)


@pytest.mark.parametrize(
    "arguments", [{"name": "int3"}, {"embedding": "q8"}, {"block_size": 48}, {"block_size": 0}]
)
def test_an_impossible_plan_is_refused(arguments):
    with pytest.raises(UsageError, match=r"un(known|supported)"):
        QuantPlan(**arguments)


def test_bits_per_weight():
    assert Scheme(4, 32).bits_per_weight() == 4.5
    assert Scheme(4, 128).bits_per_weight() == 4.125
    assert Scheme(4, 32, "float").bits_per_weight() == 6
    assert Scheme(8, 32).bits_per_weight() == 8.5
    assert F16.bits_per_weight() == 16
