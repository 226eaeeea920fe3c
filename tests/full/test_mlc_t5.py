"""T5 and Flan-T5 as compiled libraries: encoder, memories, distances; a bundle, a session."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_mmllm_export.checkpoints import open_checkpoint
from edge_mmllm_export.models import build
from edge_mmllm_export.oracle import Oracle
from edge_mmllm_export.planning import ExportOptions
from edge_mmllm_export.weights import bind
from edge_mmllm_runtime import load
from edge_mmllm_runtime.mlc.weights import QUANTIZATIONS

pytestmark = pytest.mark.full
pytest.importorskip("tvm", reason="apache-tvm is not installed: pip install 'edge-mmllm[mlc]'")

from edge_mmllm_export.exporter import export  # noqa: E402
from edge_mmllm_export.mlc import layout as mlc  # noqa: E402

FOLDER = Path(__file__).resolve().parents[1] / "goldens/encoder_decoders"
TOLERANCE = 2e-3
CHUNK_TOLERANCE = 2e-5


@pytest.mark.parametrize("name", ["t5", "flan-t5"])
def test_answers_are_the_oracles_on_the_stored_weights(name: str, tmp_path: Path) -> None:
    options = ExportOptions(format="mlc", mlc_quant="q0f32", tokenizer="none", gate=False)
    bundle = export(FOLDER / name, tmp_path / "bundle", options)
    assert set(bundle.spec.stages) == {"encode_text", "decoder"}
    checkpoint = open_checkpoint(FOLDER / name)
    model = build(checkpoint)
    sources = model.sources(checkpoint.layout)
    weights = bind(checkpoint, model.parameters(), sources, ignored=model.ignored())
    files = mlc.layout(model, weights, QUANTIZATIONS["q0f32"])
    oracle = Oracle(model, mlc.as_stored(files, weights), keep_weights=True)
    random = np.random.default_rng(2)
    # Longer than the distances that have a bias of their own.
    prompt, ids = (random.integers(0, model.vocab_size, n) for n in (40, 150))
    oracle.start(prompt)
    expected = oracle.forward(ids)
    limit = CHUNK_TOLERANCE * np.abs(expected).max()
    with load(tmp_path / "bundle", context=160) as session:
        session.start(prompt)
        whole = session.prefill(ids, logits="all")
        assert np.abs(whole - expected).max() <= TOLERANCE
        session.start(prompt)
        session.prefill(ids[:20])
        snapshot = session.snapshot()
        steps = np.stack([session.decode(int(t)).copy() for t in ids[20:]])
        assert np.abs(steps - whole[20:]).max() <= 2 * limit
        session.start(prompt[::-1].copy())
        session.restore(snapshot)
        assert np.abs(session.decode(int(ids[20])) - whole[20]).max() <= 2 * limit
