"""Encoders, projectors and decoders that take embeddings, in one compiled model library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_mmllm.spec import ModelSpec, Stage, TextSpec
from edge_mmllm_export.checkpoints import open_checkpoint
from edge_mmllm_export.families.composite import Composite, scoped
from edge_mmllm_export.models import build
from edge_mmllm_export.oracle import Oracle
from edge_mmllm_export.weights import bind
from edge_mmllm_runtime.mlc.weights import QUANTIZATIONS, WeightFiles

pytestmark = pytest.mark.full
pytest.importorskip("tvm", reason="apache-tvm is not installed: pip install 'edge-mmllm[mlc]'")

from edge_mmllm_export.mlc import layout as mlc  # noqa: E402
from edge_mmllm_export.mlc import write as mlc_write  # noqa: E402
from edge_mmllm_export.mlc.library import compile_library  # noqa: E402
from edge_mmllm_export.mlc.targets import target_of  # noqa: E402
from edge_mmllm_export.ops.relax_params import layouts_of  # noqa: E402
from edge_mmllm_runtime.mlc.engine import MlcEngine  # noqa: E402

FAMILIES = Path(__file__).parents[2] / "tests/goldens/families"
TOLERANCE = 2e-3
LIBRARY = "lib/native.so"


def spec_of(model: Composite) -> ModelSpec:
    stages = {
        d.name: Stage(LIBRARY, tuple(p.name for p in d.ports), (d.output,))
        for d in model.stage_definitions()
    }
    stages["embed"] = Stage(LIBRARY, ("input_ids",), ("inputs_embeds",))
    stages["decoder"] = Stage(LIBRARY, ("inputs_embeds", "position", "logit_rows"), ("logits",))
    return ModelSpec(
        architecture=model.name,
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        layers=model.layers,
        parameters=0,
        context_length=model.context_length,
        states=model.states(),
        stages=stages,
        text=TextSpec("none"),
        modalities=model.modalities(),
    )


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("llava", "q0f32"),
        ("llava-siglip", "q4f32_1"),
        ("llava-next", "q0f16"),
        ("idefics3", "q0f32"),
        ("smolvlm", "q0f32"),
        ("blip2-opt", "q0f32"),
    ],
)
def test_a_picture_passes_the_library_as_it_does_the_oracle(
    name: str, word: str, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(FAMILIES / name)
    model: Any = build(checkpoint)
    sources = model.sources(checkpoint.layout)
    weights = bind(checkpoint, model.parameters(), sources, ignored=model.ignored())
    quant = QUANTIZATIONS[word]
    files = mlc.layout(model, weights, quant)
    mlc_write.write(files, checkpoint, tmp_path)
    layouts = layouts_of(weights, files.kinds, half=quant.half)
    path, native = tmp_path / LIBRARY, target_of("native")
    compile_library(model, weights, layouts, word, native, path, exact=True)
    with WeightFiles(tmp_path, views=files.views) as stored_files:
        engine = MlcEngine(spec_of(model), path, stored_files, threads=2, context=64)
    stored = mlc.as_stored(files, weights)
    oracle = Oracle(model, stored, keep_weights=True)
    random = np.random.default_rng(5)
    encode, project = model.stage_definitions()
    pixels = random.standard_normal(encode.ports[0].shape).astype(np.float32)
    features = run(engine, oracle, stored, encode, pixels)
    rows = run(engine, oracle, stored, project, features)
    ids = random.integers(0, model.vocab_size, 9)
    x = np.concatenate([engine.embed(ids), rows])
    assert engine.accepts_embeddings
    logits = engine.forward(x, 0, np.arange(len(x)))
    assert np.abs(logits - oracle.forward_embeddings(x)).max() <= TOLERANCE
    last = oracle.forward(ids[:1])[0]
    assert np.abs(engine.step(int(ids[0]), len(x)) - last).max() <= TOLERANCE
    engine.close()


def run(
    engine: MlcEngine, oracle: Oracle, stored: Any, stage: Any, x: NDArray[np.float32]
) -> NDArray[np.float32]:
    """A stage's result, which is the oracle's."""
    expected = stage.run(oracle.ops(), scoped(stored, stage.scope), [x])
    found = engine.run_stage(stage.name, {stage.ports[0].name: x})
    assert found.shape == expected.shape
    assert np.abs(expected).max() > 1
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()
    return found
