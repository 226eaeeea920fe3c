"""The TIR kernels of `ops/tir` against numpy, compiled for several instruction sets.

Run by `make test-full` in the environment of `edge-mmllm[mlc]` (no torch, no onnx).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_mmllm.errors import UnsupportedBundle
from edge_mmllm_runtime.mlc.packing import Packing, pack_float, pack_q4, unpack

pytestmark = pytest.mark.full
tvm = pytest.importorskip(
    "tvm", reason="apache-tvm is not installed: pip install 'edge-mmllm[mlc]'"
)

from edge_mmllm_export.ops.tir import linear, scan, vector  # noqa: E402
from edge_mmllm_export.ops.tir.isa import Isa, runs_here  # noqa: E402

Float32 = NDArray[np.float32]

#: Machines to compile for; those that this one is not are skipped.
CPUS = ("x86-64", "x86-64-v3", "cascadelake", "native")
#: Sums of some hundred products in another order.
TOLERANCE = 2e-6


@pytest.fixture(scope="module", params=CPUS)
def target(request: pytest.FixtureRequest) -> Any:
    config: dict[str, Any] = {"kind": "llvm", "num-cores": 2}
    if request.param == "native":
        config["mcpu"] = str(tvm.target.codegen.llvm_get_system_cpu())
    elif tvm.target.codegen.llvm_get_system_x86_vendor() == "unknown":
        pytest.skip("no x86 machine")
    else:
        config["mcpu"] = request.param
    target = tvm.target.Target(config)
    if not runs_here(target):
        pytest.skip(f"this machine is no {request.param}")
    return target


def call(kernel: Any, target: Any, arrays: list[NDArray[Any]], shapes: list[Any]) -> list[Float32]:
    """Compile, call with inputs and fresh float32 outputs; the outputs."""
    module = tvm.IRModule({"main": kernel.with_attr("global_symbol", "main")})
    library = tvm.compile(module, target=target)
    outputs = [tvm.runtime.tensor(np.full(shape, np.nan, np.float32)) for shape in shapes]
    library["main"](*(tvm.runtime.tensor(a) for a in arrays), *outputs)
    return [y.numpy() for y in outputs]


# -- matrices --------------------------------------------------------------------------------


def codes_of(w: Float32, block: int, zero: int) -> tuple[NDArray[np.uint32], Float32]:
    """Codes `(N, blocks * block)` and bfloat16 scales, as MLC rounds."""
    n, k = w.shape
    padded = np.zeros((n, -(-k // block) * block), np.float32)
    padded[:, :k] = w
    parts = padded.reshape(n, -1, block)
    scale = np.abs(parts).max(axis=-1) / np.float32(zero)
    scale = (scale.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    codes = np.rint(parts / np.where(scale == 0, 1, scale)[..., None] + zero)
    return np.clip(codes, 0, 2 * zero).astype(np.uint32).reshape(n, -1), scale


def words_of(codes: NDArray[np.uint32], bits: int) -> NDArray[np.uint32]:
    """As many codes a word as fit, lowest K in the lowest bits."""
    each = 32 // bits
    parts = codes.reshape(len(codes), -1, each)
    words = np.zeros(parts.shape[:2], np.uint32)
    for i in range(each):
        words |= parts[:, :, i] << np.uint32(bits * i)
    return words


def matrix(random: np.random.Generator, scheme: str, n: int, k: int) -> tuple[Any, ...]:
    """Packing, packed bytes and the float32 matrix that they stand for."""
    w = random.standard_normal((n, k)).astype(np.float32)
    packing = Packing.of_scheme(scheme, n, k)
    if packing.kind != "q4":
        stored = w.astype(np.float16) if packing.kind == "f16" else w
        return packing, pack_float(packing, stored), stored.astype(np.float32)
    codes, scale = codes_of(w, packing.block, packing.zero)
    if packing.scale == "f16":
        scale = scale.astype(np.float16)
    data = pack_q4(packing, words_of(codes, int(scheme[1])), scale)
    exact = (codes.astype(np.float32) - packing.zero).reshape(n, -1, packing.block)
    exact = exact * scale.astype(np.float32)[..., None]
    return packing, data, exact.reshape(n, -1)[:, :k]


def rounded(x: Float32, block: int) -> Float32:
    """Activations as the kernels see them: 8 bits, by blocks."""
    t, k = x.shape
    padded = np.zeros((t, -(-k // block) * block), np.float32)
    padded[:, :k] = x
    parts = padded.reshape(t, -1, block)
    top = np.abs(parts).max(axis=-1, keepdims=True)
    inverse = np.where(top > 0, np.float32(127) / np.where(top > 0, top, 1), 0)
    codes = np.rint(parts * inverse.astype(np.float32))
    return (codes * (top * np.float32(1 / 127))).reshape(t, -1)[:, :k]


@pytest.mark.parametrize("scheme", ["q4f16_1", "q4f32_1", "q3f16_1", "q0f16", "q0f32"])
@pytest.mark.parametrize(("n", "k"), [(32, 64), (37, 50), (5, 8), (1030, 96)])
def test_packing_keeps_every_weight(scheme: str, n: int, k: int) -> None:
    packing, data, exact = matrix(np.random.default_rng(n), scheme, n, k)
    assert data.nbytes == packing.size_bytes
    assert Packing.of(packing.id, n, k) == packing
    np.testing.assert_array_equal(unpack(packing, data), exact)


def test_packing_refuses_what_it_cannot_hold() -> None:
    packing = Packing.of_scheme("q4f32_1", 16, 32)
    words = np.zeros((16, 4), np.uint32)
    with pytest.raises(UnsupportedBundle, match="bfloat16"):
        pack_q4(packing, words, np.full((16, 1), 0.1, np.float32))
    with pytest.raises(UnsupportedBundle, match="another shape"):
        pack_q4(packing, words[:, :3], np.zeros((16, 1), np.float32))
    for name in ("q5-b32-z7-f16", "q4-b33-z7-f16", "q4-b32-z7", "q4-bx-z7-f16"):
        with pytest.raises(UnsupportedBundle, match="does not know"):
            Packing.of(name, 16, 32)
    with pytest.raises(UnsupportedBundle, match="without kernels"):
        Packing.of_scheme("q8f16_1", 16, 32)


@pytest.mark.parametrize(
    ("scheme", "seq", "exact"),
    [
        *itertools.product(
            ("q4f16_1", "q4f32_1", "q3f16_1", "q0f16", "q0f32"), (1, None), (False,)
        ),
        ("q4f32_1", 1, True),
        ("q3f16_1", None, True),
        ("q4f32_1", 3, False),
        ("q4f32_1", 19, False),
    ],
)
def test_products_are_numpys(target: Any, scheme: str, seq: int | None, exact: bool) -> None:
    random = np.random.default_rng(11)
    isa = Isa.of(target)
    # Whole groups and blocks; several of a width that is neither; a short one.
    for k, rows, tokens in ((64, (160,), 21), (90, (37, 150), 3)):
        matrices = [matrix(random, scheme, n, k) for n in rows]
        bias = random.standard_normal(rows[0]).astype(np.float32)
        product = linear.Product(
            tuple(p for p, _, _ in matrices), (True, *(False for _ in rows[1:])),
            ("silu", *(None for _ in rows[1:])), isa, seq, exact,
        )  # fmt: skip
        x = random.standard_normal((seq or tokens, k)).astype(np.float32)
        x[0, : min(k, 40)] = 0  # a block of zeros has no scale
        found = call(
            linear.kernel(product), target, [x, *(d for _, d, _ in matrices), bias],
            [(len(x), n) for n in rows],
        )  # fmt: skip
        packing = matrices[0][0]
        seen = rounded(x, packing.block) if packing.kind == "q4" and not exact else x
        for i, (y, (_, _, w)) in enumerate(zip(found, matrices, strict=True)):
            expected = seen.astype(np.float64) @ w.T.astype(np.float64)
            if i == 0:
                expected += bias
                expected /= 1 + np.exp(-expected)
            assert np.abs(y - expected).max() <= TOLERANCE * np.abs(expected).max()


def test_rounding_activations_costs_what_8_bits_cost() -> None:
    """The error against float activations: at most 1/254 of a block's largest for each weight."""
    random = np.random.default_rng(3)
    x = random.standard_normal((4, 96)).astype(np.float32)
    _, _, w = matrix(random, "q4f16_1", 24, 96)
    bound = np.repeat(np.abs(x.reshape(4, 3, 32)).max(axis=-1) / 253, 32, axis=1) @ np.abs(w).T
    assert (np.abs(rounded(x, 32) @ w.T - x @ w.T) <= bound).all()


def test_vnni_without_avx512() -> None:
    """Its 256-bit form runs where AVX-512 has it too; for a CPU with AVX-VNNI alone it builds."""
    random = np.random.default_rng(12)
    packing, data, w = matrix(random, "q4f32_1", 40, 64)
    x = random.standard_normal((9, 64)).astype(np.float32)
    alder = tvm.target.Target({"kind": "llvm", "mcpu": "alderlake"})
    assert Isa.of(alder) == Isa(8, "vnni256", True, 4)
    product = linear.Product((packing,), (False,), (None,), Isa.of(alder))
    kernel = linear.kernel(product)
    module = tvm.IRModule({"main": kernel.with_attr("global_symbol", "main")})
    assert "vpdpbusd" in tvm.compile(module, target=alder).mod.inspect_source("asm")
    native = tvm.target.Target(
        {"kind": "llvm", "mcpu": str(tvm.target.codegen.llvm_get_system_cpu())}
    )
    if Isa.of(native).dot != "vnni512":
        pytest.skip("this machine has no AVX-512 VNNI")
    (found,) = call(kernel, native, [x, data], [(9, 40)])
    expected = rounded(x, 32).astype(np.float64) @ w.T
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()


def test_an_activation_joins_the_product_that_it_follows() -> None:
    """One of three products is read with its activation, one without, one both ways."""
    from tvm import relax, tirx

    from edge_mmllm_export.ops.relax_linear import emitted
    from edge_mmllm_export.ops.relax_linear import linear as deferred

    random = np.random.default_rng(8)
    matrices = [matrix(random, "q0f32", n, 24) for n in (16, 20, 8)]
    packings = [p for p, _, _ in matrices]
    target = tvm.target.Target({"kind": "llvm"})
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((tirx.Var("seq", "int64"), 24), "float32"))
    w = [
        relax.Var(f"w{i}", relax.TensorType((p.size_bytes,), "uint8"))
        for i, p in enumerate(packings)
    ]
    with builder.function("main", [x, *w]):
        with builder.dataflow():
            a, b, c = deferred(builder, x, w, packings, Isa.of(target))
            active = a.activated("silu"), c.activated("tanh")
            assert None not in active
            assert a.activated("silu") is None
            values = [emitted(v) for v in (active[0], b, c, active[1])]
            assert c.activated("relu") is None  # too late
            result = builder.emit_output(relax.Tuple(values))
        builder.emit_func_output(result)
    module = builder.finalize()
    machine = relax.VirtualMachine(tvm.compile(module, target=target), tvm.cpu())
    given = random.standard_normal((5, 24)).astype(np.float32)
    found = machine["main"](*map(tvm.runtime.tensor, (given, *(d for _, d, _ in matrices))))
    first, second, third = (given @ w.T for _, _, w in matrices)
    for y, expected in zip(
        found, (first / (1 + np.exp(-first)), second, third, np.tanh(third)), strict=True
    ):
        np.testing.assert_allclose(y.numpy(), expected, rtol=1e-4, atol=1e-5)
    # Three at once, and the one that is read both ways once more.
    assert sum(isinstance(f, tirx.PrimFunc) for f in module.functions.values()) == 2


# -- functions -------------------------------------------------------------------------------


@pytest.mark.parametrize("lanes", [1, 4, 16])
@pytest.mark.parametrize(
    ("name", "exact", "tolerance"),
    [
        ("sigmoid", lambda x: 1 / (1 + np.exp(-x)), 2e-7),
        ("silu", lambda x: x / (1 + np.exp(-x)), 2e-6),
        ("tanh", np.tanh, 2e-7),
        ("softplus", lambda x: np.logaddexp(0, x), 2e-6),
        ("gelu", lambda x: x * np.vectorize(math.erfc)(-x * 0.5**0.5) / 2, 4e-6),
        ("relu2", lambda x: np.maximum(x, 0) ** 2, 1e-4),
        ("quick_gelu", lambda x: x / (1 + np.exp(-1.702 * x)), 2e-6),
        ("minus_exp", lambda x: -np.exp(np.minimum(x, 2)), None),
    ],
)
def test_functions(
    name: str, exact: Callable[[Any], Any], tolerance: float | None, lanes: int
) -> None:
    from tvm.script.ir_builder import IRBuilder
    from tvm.script.ir_builder import tirx as T

    x = np.linspace(-20, 2 if tolerance is None else 20, 1600).astype(np.float32)
    with IRBuilder() as builder, T.prim_func(is_private=True):
        source = T.arg("x", T.buffer((len(x),), "float32"))
        result = T.arg("y", T.buffer((len(x),), "float32"))
        with T.serial(len(x) // lanes) as i:
            value = vector.load(source, i * lanes, n=lanes)
            vector.store(result, vector.activated(value, name, lanes), i * lanes, n=lanes)
    target = tvm.target.Target({"kind": "llvm"})
    (found,) = call(builder.get(), target, [x], [x.shape])
    assert np.abs(found - exact(x.astype(np.float64))).max() <= (tolerance or 2e-6)


def test_narrow_targets_without_their_machine() -> None:
    """What runs nowhere here is at least built: Arm with and without the dot product."""
    random = np.random.default_rng(2)
    packing, _, _ = matrix(random, "q4f16_1", 40, 64)
    for triple, features, dot in (
        ("aarch64-linux-gnu", ["+neon"], "generic"),
        ("aarch64-linux-gnu", ["+neon", "+dotprod"], "sdot"),
        ("armv7a-linux-gnueabihf", ["+neon"], "generic"),
    ):
        target = tvm.target.Target({"kind": "llvm", "mtriple": triple, "mattr": features})
        isa = Isa.of(target)
        assert isa.dot == dot
        for seq, exact in itertools.product((1, None), (False, True)):
            product = linear.Product((packing,), (False,), (None,), isa, seq, exact)
            kernel = linear.kernel(product).with_attr("global_symbol", "main")
            text = tvm.compile(tvm.IRModule({"main": kernel}), target=target)
            assert ("sdot" in text.mod.inspect_source("asm")) == (dot == "sdot" and not exact)
        assert replace(isa, threads=False) != isa


# -- along the tokens ------------------------------------------------------------------------


def in_place(
    kernel: Any, target: Any, inputs: list[NDArray[Any]], state: Float32, shapes: list[Any]
) -> tuple[list[Float32], Float32]:
    """As `call`, for a kernel that writes a state; outputs and the state after."""
    module = tvm.IRModule({"main": kernel.with_attr("global_symbol", "main")})
    library = tvm.compile(module, target=target)
    kept = tvm.runtime.tensor(state)
    outputs = [tvm.runtime.tensor(np.full(shape, np.nan, np.float32)) for shape in shapes]
    library["main"](*(tvm.runtime.tensor(a) for a in inputs), kept, *outputs)
    return [y.numpy() for y in outputs], kept.numpy()


def packed_table(values: Float32) -> NDArray[np.uint8]:
    return pack_float(Packing("f32", *values.shape), values)


@pytest.mark.parametrize(("d_inner", "d_state"), [(48, 16), (36, 5), (16, 20)])
@pytest.mark.parametrize("seq", [1, None])
def test_selective_scan(target: Any, d_inner: int, d_state: int, seq: int | None) -> None:
    random = np.random.default_rng(4)
    tokens = seq or 11
    x = random.standard_normal((tokens, d_inner)).astype(np.float32)
    # From hardly any decay to one that leaves nothing.
    dt = np.exp(random.uniform(-6, 4, (tokens, d_inner))).astype(np.float32)
    b, c = random.standard_normal((2, tokens, d_state)).astype(np.float32)
    decay = -np.exp(random.standard_normal((d_inner, d_state))).astype(np.float32)
    skip = random.standard_normal(d_inner).astype(np.float32)
    state = random.standard_normal((1, d_state, d_inner)).astype(np.float32)
    kernel = scan.selective_scan(d_inner, d_state, Isa.of(target), seq=seq)
    inputs = [x, dt, b, c, packed_table(decay), skip]
    (found,), kept = in_place(kernel, target, inputs, state, [x.shape])
    s, expected = state[0].astype(np.float64), np.zeros(x.shape)
    for t in range(tokens):
        s = s * np.exp(dt[t].astype(np.float64) * decay.T) + b[t][:, None] * (dt[t] * x[t])
        expected[t] = c[t] @ s + skip * x[t]
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()
    assert np.abs(kept[0] - s).max() <= TOLERANCE * np.abs(s).max()


@pytest.mark.parametrize(
    ("channels", "width", "bias", "silu"), [(48, 4, True, True), (20, 2, False, False)]
)
@pytest.mark.parametrize("seq", [1, None])
def test_causal_conv(
    target: Any, channels: int, width: int, bias: bool, silu: bool, seq: int | None
) -> None:
    random = np.random.default_rng(6)
    for tokens in (seq,) if seq else (1, 2, 9):  # fewer than the state holds, and more
        x = random.standard_normal((tokens, channels)).astype(np.float32)
        weight = random.standard_normal((channels, width)).astype(np.float32)
        shift = random.standard_normal(channels).astype(np.float32)
        state = random.standard_normal((1, width - 1, channels)).astype(np.float32)
        kernel = scan.causal_conv(channels, width, Isa.of(target), seq=seq, bias=bias, silu=silu)
        inputs = [x, packed_table(weight), *([shift] if bias else [])]
        (found,), kept = in_place(kernel, target, inputs, state, [x.shape])
        whole = np.concatenate([state[0], x]).astype(np.float64)
        expected = sum(whole[i : i + tokens] * weight[:, i] for i in range(width))
        expected = expected + (shift if bias else 0)
        expected = expected / (1 + np.exp(-expected)) if silu else expected
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6)
        np.testing.assert_array_equal(kept[0], whole[tokens:].astype(np.float32))
