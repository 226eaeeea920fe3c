"""The perceiver resampler against transformers 5, and its ONNX stage against the oracle."""

from __future__ import annotations

import numpy as np
import projectors
import pytest

from edge_mmllm.errors import CheckpointError, TensorMismatch
from edge_mmllm_export.models.perceiver import Perceiver, PerceiverConfig

NAMES = ["perceiver", "perceiver-norms"]


def component(golden: projectors.Golden, **changes) -> Perceiver:
    return Perceiver(PerceiverConfig.from_json(golden.config | changes, "test", width=40))


def project(model):
    return lambda op, w, x: model.project(op, w, x["features"])


@pytest.mark.parametrize("name", NAMES)
def test_oracle_equals_transformers(name):
    golden = projectors.Golden(name)
    model = component(golden)
    y = projectors.oracle(project(model), golden.bind(model), golden.inputs)
    assert y.shape == (model.tokens(99), model.hidden_size) == (6, 40)
    assert golden.output.std() > 0.5
    np.testing.assert_allclose(y, golden.output, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_onnx_equals_transformers(name, tmp_path):
    golden = projectors.Golden(name)
    model = component(golden)
    y = projectors.onnx(project(model), golden.bind(model), golden.inputs, tmp_path)
    np.testing.assert_allclose(y, golden.output, rtol=0, atol=1e-5)


def test_head_norms_that_the_config_denies_are_reported():
    golden = projectors.Golden("perceiver-norms")
    with pytest.raises(TensorMismatch, match=r"unexpected: blocks\.0\.0\.q_layer_norm\.weight"):
        golden.bind(component(golden, qk_layer_norms_perceiver=False))


def test_a_damaged_config_is_refused():
    with pytest.raises(CheckpointError, match="resampler_n_latents"):
        component(projectors.Golden("perceiver"), resampler_n_latents=0)
