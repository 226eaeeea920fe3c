"""States that a graph may write over: one buffer, the same numbers, and a failure that is told."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from references import golden

from edge_mmllm.errors import SessionError
from edge_mmllm.spec import Stage
from edge_mmllm_runtime.onnx import OnnxEngine
from edge_mmllm_runtime.state import StateBuffers

NAMES = ["mamba", "mamba2-groups"]
LAST = np.array([0])


def _engine(exported, **changes):
    stages = {"decoder": replace(exported.spec.stages["decoder"], **changes)}
    spec = replace(exported.spec, stages=stages)
    return OnnxEngine(spec, lambda f: exported.folder / f, threads=1, context=None)


@pytest.mark.parametrize("name", NAMES)
def test_one_buffer_computes_what_two_do(name, exports):
    _, exported = exports(name)
    ssm = {s.name for s in exported.spec.states if s.kind == "recurrent"}
    assert set(exported.spec.stages["decoder"].in_place) == ssm
    one, two = _engine(exported), _engine(exported, in_place=())
    assert two.state_capacity_bytes - one.state_capacity_bytes == sum(
        s.size_bytes(0) for s in exported.spec.states if s.name in ssm
    )
    ids = golden(name)[0]
    for engine_ids in (ids[:1], ids[1:9], ids[9:10], ids[10:12], ids[12:13]):
        rows = np.arange(len(engine_ids))
        logits = [e.forward(engine_ids, 0, rows) for e in (one, two)]
        np.testing.assert_array_equal(*logits)
    for a, b in zip(one.save(0).values(), two.save(0).values(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_failure_is_not_passed_over(exports):
    _, exported = exports("mamba")
    engine = _engine(exported)
    mark = engine.mark(0)
    fresh = engine.step(5, 0).copy()
    saved = engine.save(1)
    for repair in (engine.clear, lambda: engine.rollback(mark), lambda: engine.load(saved, 1)):
        with pytest.raises(SessionError, match="failed to run"):
            engine.forward(np.array([10**6]), 1, LAST)
        with pytest.raises(SessionError, match="states were lost"):
            engine.step(5, 1)
        repair()
        again = engine.step(5, 0)
        if repair is engine.clear:
            np.testing.assert_array_equal(again, fresh)


def test_buffers():
    from edge_mmllm.spec import StateSpec

    specs = tuple(StateSpec(n, (1, 4), "float32", "recurrent") for n in "ab")
    buffers = StateBuffers(specs, None, ("a",))
    same = {name: even is odd for name, (even, odd) in buffers.pairs.items()}
    assert same == {"a": True, "b": False}
    assert buffers.size_bytes == 3 * 16


def test_a_bundle_may_not_say():
    from edge_mmllm._fields import Fields

    plain = {"file": "decoder.onnx", "inputs": ["input_ids"], "outputs": ["logits"]}
    assert Stage.from_json(Fields(plain, "stage")).in_place == ()
    assert Stage.from_json(Fields(plain | {"in_place": ["a"]}, "stage")).in_place == ("a",)
