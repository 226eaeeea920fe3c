"""The Q-Former against transformers 5, and its ONNX stage against the oracle."""

from __future__ import annotations

import numpy as np
import projectors
import pytest

from edge_mmllm.errors import CheckpointError, TensorMismatch, UnsupportedArchitecture
from edge_mmllm_export.models.qformer import QFormer, QFormerConfig
from edge_mmllm_export.quantize.schemes import QuantPlan

NAMES = ["qformer", "qformer-text"]


def component(golden: projectors.Golden, **changes) -> QFormer:
    config = golden.config | changes
    text = "text_ids" in golden.inputs
    return QFormer(QFormerConfig.from_json(config, "test", queries=5, output_size=56, text=text))


def project(model):
    return lambda op, w, x: model.project(op, w, x["features"], x.get("text_ids"))


@pytest.mark.parametrize("name", NAMES)
def test_oracle_equals_transformers(name):
    golden = projectors.Golden(name)
    model = component(golden)
    y = projectors.oracle(project(model), golden.bind(model), golden.inputs)
    assert y.shape == (model.tokens(9), model.hidden_size) == (5, 56)
    assert golden.output.std() > 0.5
    np.testing.assert_allclose(y, golden.output, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_onnx_equals_transformers(name, tmp_path):
    golden = projectors.Golden(name)
    model = component(golden)
    y = projectors.onnx(project(model), golden.bind(model), golden.inputs, tmp_path)
    np.testing.assert_allclose(y, golden.output, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_float16_weights(name, tmp_path):
    golden = projectors.Golden(name)
    model = component(golden)
    weights = golden.bind(model, plan=QuantPlan("f16"))
    y = projectors.onnx(project(model), weights, golden.inputs, tmp_path)
    difference = np.abs(y - golden.output).max()
    assert 0 < difference < 1e-2


def test_the_instruction_matters():
    golden = projectors.Golden("qformer-text")
    model = component(golden)
    other = golden.inputs | {"text_ids": golden.inputs["text_ids"][::-1].copy()}
    y = projectors.oracle(project(model), golden.bind(model), other)
    assert np.abs(y - golden.output).max() > 0.1


def test_cross_attention_frequency_decides_which_tensors_there_are():
    golden = projectors.Golden("qformer")
    with pytest.raises(TensorMismatch, match=r"layer\.1\.crossattention"):
        golden.bind(component(golden, cross_attention_frequency=1))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"num_attention_heads": 5}, CheckpointError, "head count"),
        ({"hidden_act": "silu"}, UnsupportedArchitecture, "silu"),
        ({"position_embedding_type": "relative_key"}, UnsupportedArchitecture, "relative_key"),
        ({"use_qformer_text_input": True}, UnsupportedArchitecture, "text input"),
    ],
)
def test_a_config_without_a_definition_is_refused(changes, error, message):
    with pytest.raises(error, match=message):
        component(projectors.Golden("qformer"), **changes)
