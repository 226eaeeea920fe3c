"""The output projector against torch, alone and as a stage of a composition."""

from __future__ import annotations

from dataclasses import replace

import family_files
import numpy as np
import onnxruntime as ort
import pytest
import references
from safetensors.numpy import load_file, save_file

from edge_mmllm_export.checkpoints import open_checkpoint
from edge_mmllm_export.checkpoints.view import Renames
from edge_mmllm_export.families.composite import Composite, Part, scoped
from edge_mmllm_export.models.mlp import Mlp, MlpConfig
from edge_mmllm_export.models.output_projector import TinyTransformer, TinyTransformerConfig
from edge_mmllm_export.ops.numpy import NumpyOps
from edge_mmllm_export.quantize.schemes import F32, QuantPlan
from edge_mmllm_export.weights import bind
from edge_mmllm_runtime.onnx import OnnxEngine

FOLDER = references.ROOT / "tests" / "goldens" / "output_projector"
CONFIG = TinyTransformerConfig(
    signal_width=24,
    output_width=20,
    queries=5,
    hidden_size=16,
    intermediate_size=24,
    heads=2,
    encoder_layers=2,
    decoder_layers=3,
)


@pytest.fixture
def golden():
    with np.load(FOLDER / "golden.npz") as data:
        return data["signals"], data["conditioning"]


def test_oracle_equals_torch(golden):
    signals, expected = golden
    mapper = TinyTransformer(CONFIG)
    checkpoint = open_checkpoint(FOLDER)
    weights = bind(checkpoint, mapper.parameters(), mapper.sources("hub", ""))
    assert mapper.tokens(6) == len(expected)
    found = mapper.project(NumpyOps({}), weights, signals)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


@pytest.fixture
def composed(tmp_path):
    """A LLaVA whose checkpoint also holds an output projector, under a prefix."""
    own = load_file(family_files.FOLDER / "llava" / "model.safetensors")
    mapper = load_file(FOLDER / "model.safetensors")
    save_file(
        own | {f"gen_text_hidden_fcs.0.{k}": v for k, v in mapper.items()},
        tmp_path / "model.safetensors",
    )
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((family_files.FOLDER / "llava" / name).read_bytes())
    whole = family_files.composite(references.load(family_files.FOLDER / "llava"))
    part = Part(TinyTransformer(CONFIG), "gen_text_hidden_fcs.0.")
    model = Composite(
        "llava",
        whole.backbone,
        Renames((("", "language_model."),)),
        whole.pathways,
        output={"output_projector": part},
    )
    checkpoint = open_checkpoint(tmp_path)

    def weights(plan):
        sources = model.sources("hub")
        return bind(
            checkpoint, model.parameters(), sources, ignored=model.ignored(), schemes=plan.of
        )

    return model, weights


def test_a_stage_of_its_own(composed, golden, tmp_path):
    model, weights = composed
    loaded = references.Loaded(model, weights(QuantPlan("f32")))
    out = tmp_path / "out"
    out.mkdir()
    exported = family_files.export(loaded, out)
    stage = exported.spec.stages["output_projector"]
    assert (stage.inputs, stage.outputs) == (("signals",), ("conditioning",))
    assert (out / "output_projector.bin").stat().st_size > 0
    slots = [c.slot for c in exported.spec.components]
    assert slots == ["encoder", "input_projector", "backbone", "output_projector"]
    session = ort.InferenceSession(out / "output_projector.onnx")
    signals, expected = golden
    found = session.run(None, {"signals": signals})[0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
    own = scoped(loaded.weights, "output.output_projector.")
    (definition,) = [d for d in model.stage_definitions() if d.name == "output_projector"]
    oracle = definition.run(NumpyOps({}), own, [signals])
    np.testing.assert_allclose(found, oracle, rtol=0, atol=2e-5)
    engine = OnnxEngine(exported.spec, lambda f: out / f, threads=1, context=32)
    np.testing.assert_array_equal(engine.run_stage("output_projector", {"signals": signals}), found)
    engine.close()


def test_its_scheme_is_a_projectors(composed):
    _, weights = composed
    found = weights(QuantPlan("int4"))["output.output_projector.in"]
    assert found.scheme == replace(F32, bits=16)


def test_the_other_kind_is_an_mlp():
    mapper = Mlp(MlpConfig((24, 32, 20), ("0", "2"), "gelu"))
    assert (mapper.width, mapper.hidden_size, mapper.tokens(4)) == (24, 20, 4)
    names = {s.name for s in mapper.sources("hub", "fcs.").values()}
    assert names == {"fcs.0.weight", "fcs.0.bias", "fcs.2.weight", "fcs.2.bias"}
