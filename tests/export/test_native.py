"""The native kernels, compiled here for several machines, against the oracle and stock ONNX."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from references import NAMES, golden, oracle_logits

from edge_mmllm.errors import SessionError
from edge_mmllm.spec import NATIVE_DECODER
from edge_mmllm_export.quantize.schemes import QuantPlan
from edge_mmllm_export.weights import as_stored
from edge_mmllm_runtime import native
from edge_mmllm_runtime.divergence import divergence
from edge_mmllm_runtime.onnx import OnnxEngine

pytestmark = pytest.mark.full

#: f32 over f32: what summing in another order may change, of the largest logit.
EXACT = 2e-5
MACHINES = ("native", "x86-64-v4", "x86-64-v3", "x86-64-v2")


def _runs_here(machine):
    """Whether this CPU has what `machine` asks for."""
    flags = Path("/proc/cpuinfo").read_text("utf-8") if sys.platform == "linux" else ""
    needs = {"x86-64-v4": "avx512bw", "x86-64-v3": "avx2", "x86-64-v2": "sse4_2"}
    return machine == "native" or needs[machine] in flags


@pytest.fixture(scope="module", params=MACHINES)
def kernels(request, tmp_path_factory):
    if native.compiler() is None:
        pytest.skip("no C++ compiler")
    if not _runs_here(request.param):
        pytest.skip(f"this CPU is no {request.param}")
    place = tmp_path_factory.mktemp(request.param) / "lib.so"
    return native.build(place=place, machine=request.param)


def _engine(exported, kernels, context=128):
    return OnnxEngine(
        exported.spec, lambda path: exported.folder / path, threads=2, context=context,
        kernels=kernels,
    )  # fmt: skip


def _logits(engine, ids, chunks):
    engine.clear()
    found, position = [], 0
    for size in chunks:
        chunk = np.asarray(ids[position : position + size], np.int64)
        found.append(engine.forward(chunk, position, np.arange(size)).copy())
        position += size
    return np.concatenate(found)


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_oracle(name, kernels, exports):
    ids, _ = golden(name)
    expected = oracle_logits(name)
    _, exported = exports(name, QuantPlan("f32"))
    engine = _engine(exported, kernels)
    slack = EXACT * np.abs(expected).max()
    for chunks in ([len(ids)], [1] * len(ids), [3, 1, 2, len(ids) - 6]):
        found = _logits(engine, ids, chunks)
        np.testing.assert_allclose(found, expected, rtol=0, atol=slack)


PLANS = {
    "f16": QuantPlan("f16"),
    "int8": QuantPlan("int8"),
    "int4": QuantPlan("int4"),
    "int4-asym": QuantPlan("int4", zero="int"),
    "int4-min-b64": QuantPlan("int4", 64, "float"),
    "int4-b16": QuantPlan("int4", 16),
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", ["llama", "qwen2", "mamba", "mamba2", "rwkv"])
def test_quantized(name, plan, kernels, exports):
    """Against the oracle on the stored weights: what is left is what int8 activations cost."""
    ids, _ = golden(name)
    loaded, exported = exports(name, PLANS[plan])
    expected = loaded.oracle(as_stored(loaded.weights)).forward(ids)
    found = _logits(_engine(exported, kernels), ids, [5, len(ids) - 5])
    factor = 10 if name == "mamba" else 1
    assert divergence(expected, found).kl_mean <= 4e-3 * factor


def test_states_move_between_both_graphs(kernels, exports):
    """A snapshot of either goes on in the other."""
    ids, _ = golden("llama")
    _, exported = exports("llama", QuantPlan("f32"))
    ours, stock = _engine(exported, kernels), _engine(exported, None)
    expected = _logits(stock, ids, [10, len(ids) - 10])
    _logits(ours, ids, [10])
    states = ours.save(10)
    stock.clear()
    stock.load(states, 10)
    rest = np.asarray(ids[10:], np.int64)
    found = stock.forward(rest, 10, np.arange(len(rest)))
    np.testing.assert_allclose(found, expected[10:], rtol=0, atol=EXACT * np.abs(expected).max())


def test_bad_calls_are_refused(kernels, exports):
    _, exported = exports("llama", QuantPlan("f32"))
    engine = _engine(exported, kernels, context=16)
    for ids, position, rows in (([10**6], 0, [0]), ([-1], 0, [0]), ([1], 16, [0]), ([1], 0, [1])):
        with pytest.raises(SessionError, match=r"edge_mmllm\.Program"):
            engine.forward(np.asarray(ids, np.int64), position, np.asarray(rows, np.int64))
        engine.clear()


@pytest.mark.parametrize("name", ["llama", "mamba", "mamba2", "rwkv", "opt"])
def test_no_program_harms_the_process(name, kernels, exports, tmp_path):
    """Any word of a program changed: refused when it is loaded, or run without a crash."""
    _, exported = exports(name, QuantPlan("int4"))
    source = exported.folder / exported.spec.stages[NATIVE_DECODER].file
    script = textwrap.dedent(
        """
        import sys, numpy as np, onnx, onnxruntime as ort
        source, library, seed = sys.argv[1], sys.argv[2], int(sys.argv[3])
        model = onnx.load(source, load_external_data=False)
        words = model.graph.node[0].attribute[0].ints
        random, kept, refused = np.random.default_rng(seed), list(words), 0
        for _ in range(400):
            at = int(random.integers(len(kept)))
            values = [-1, 0, 1, kept[at] + 1, kept[at] - 1, 2**31, 2**62, int(random.integers(99))]
            words[at] = int(random.choice(values))
            options = ort.SessionOptions()
            options.log_severity_level = 4
            options.register_custom_ops_library(library)
            open(source + ".bad", "wb").write(model.SerializeToString())
            words[at] = kept[at]
            try:
                session = ort.InferenceSession(source + ".bad", options)
                feed = {}
                for i in session.get_inputs():
                    shape = [8 if isinstance(d, str) else d for d in i.shape]
                    if i.name.startswith("state."):
                        feed[i.name] = np.zeros(shape, np.float32)
                    else:
                        n = {"position": 1, "logit_rows": 1}.get(i.name, 5)
                        feed[i.name] = np.zeros(n, np.int64)
                session.run(None, feed)
            except Exception:
                refused += 1
        print(refused)
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(source), str(kernels), "7"],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 100


def test_the_program_is_one_node(exports):
    _, exported = exports("llama", QuantPlan("int4"))
    path = exported.folder / exported.spec.stages[NATIVE_DECODER].file
    assert len(onnx.load(path, load_external_data=False).graph.node) == 1


def test_an_engine_says_which_kernels_run(kernels, exports):
    _, exported = exports("llama", QuantPlan("int4"))
    assert "native" in _engine(exported, kernels).version
    without = {n: s for n, s in exported.spec.stages.items() if n != NATIVE_DECODER}
    plain = replace(exported, spec=replace(exported.spec, stages=without))
    assert "native" not in _engine(plain, None).version
