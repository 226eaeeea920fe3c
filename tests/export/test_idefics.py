"""Idefics' backbone against transformers 5, with two pictures; its ONNX stages too."""

from __future__ import annotations

import numpy as np
import projectors
import pytest
import references

from edge_mmllm.errors import TensorMismatch
from edge_mmllm_export.models.idefics import Idefics
from edge_mmllm_export.quantize.schemes import QuantPlan
from edge_mmllm_export.weights import bind

NAMES = ["idefics", "idefics-float"]
#: On logits of about +-5.
TOLERANCE = 1e-4


def loaded(golden: projectors.Golden) -> references.Loaded:
    checkpoint = golden.checkpoint
    checkpoint.config = golden.config
    model = Idefics.from_checkpoint(checkpoint)
    ignored, schemes = model.ignored(), QuantPlan("f32").of
    weights = bind(
        checkpoint, model.parameters(), model.sources("hub"), ignored=ignored, schemes=schemes
    )
    return references.Loaded(model, weights)


@pytest.mark.parametrize("chunk", [1, 7, 40])
@pytest.mark.parametrize("name", NAMES)
def test_oracle_equals_transformers(name, chunk):
    golden = projectors.Golden(name)
    oracle = loaded(golden).oracle()
    for features, span in zip(golden.inputs["features"], golden.inputs["spans"], strict=True):
        oracle.look(features, tuple(span))
    ids = golden.inputs["ids"]
    parts = [oracle.forward(ids[i : i + chunk]) for i in range(0, len(ids), chunk)]
    assert golden.output.std() > 1
    np.testing.assert_allclose(np.concatenate(parts), golden.output, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_onnx_equals_transformers_whole_chunked_and_stepwise(name, tmp_path):
    golden = projectors.Golden(name)
    exported = references.export(loaded(golden), tmp_path, "embeds")
    ids = golden.inputs["ids"]
    with exported.session(chunk=7) as session:
        look(session, golden)
        found = session.prefill(ids, logits="all")
        np.testing.assert_allclose(found, golden.output, rtol=0, atol=TOLERANCE)
        session.reset()
        assert session.engine.memory_rows == 0
        look(session, golden)
        steps = np.stack([session.decode(int(i)) for i in ids])
        np.testing.assert_allclose(steps, golden.output, rtol=0, atol=TOLERANCE)


def test_a_snapshot_carries_the_pictures(tmp_path):
    golden = projectors.Golden("idefics")
    exported = references.export(loaded(golden), tmp_path, "embeds")
    ids = golden.inputs["ids"]
    with exported.session() as session, exported.session() as other:
        look(session, golden)
        session.prefill(ids[:20])
        session.snapshot().save(tmp_path / "x.state")
        session.reset()
        session.prefill(ids[:4])
        other.load_state(tmp_path / "x.state")
        assert other.engine.memory_rows == 12
        found = other.prefill(ids[20:], logits="all")
        np.testing.assert_allclose(found, golden.output[20:], rtol=0, atol=TOLERANCE)


def test_without_a_picture_it_is_text_alone(tmp_path):
    """The attention gives nothing, its MLP something: as transformers with nothing to see."""
    golden = projectors.Golden("idefics-float")
    model = loaded(golden)
    expected = model.oracle().forward(golden.inputs["ids"])
    np.testing.assert_allclose(expected[:3], golden.output[:3], rtol=0, atol=TOLERANCE)
    assert np.abs(expected[3:] - golden.output[3:]).max() > 0.1
    with references.export(model, tmp_path, "embeds").session() as session:
        found = session.prefill(golden.inputs["ids"], logits="all")
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


def test_norms_that_the_config_denies_are_reported():
    golden = projectors.Golden("idefics")
    golden.config["qk_layer_norms"] = False
    with pytest.raises(TensorMismatch, match=r"unexpected: .*cross_attn\.k_layer_norm\.weight"):
        loaded(golden)


def look(session, golden):
    for features, span in zip(golden.inputs["features"], golden.inputs["spans"], strict=True):
        given = {"features": features, "span": span}
        session.engine.remember("remember_image", given, append=True)
