"""T5 and Flan-T5 against transformers 5, and their ONNX stages against the oracle."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import references

from edge_mmllm.errors import TensorMismatch, UnsupportedArchitecture
from edge_mmllm_export.ops.memory import RelativeBias
from edge_mmllm_export.weights import Source, Weight

FOLDER = Path(__file__).resolve().parents[1] / "goldens" / "encoder_decoders"
NAMES = ["t5", "flan-t5"]
#: On logits of about +-15; 6e-5 was seen.
TOLERANCE = 2e-4
#: Relative to the largest logit.
CHUNK_TOLERANCE = 2e-5


@cache
def golden(name):
    """Prompt `(seq,)`, answer `(n,)` and transformers' logits `(n, vocab)`."""
    with np.load(FOLDER / name / "golden.npz") as data:
        return data["prompt"], data["answer"], data["logits"]


@pytest.mark.parametrize("name", NAMES)
def test_oracle_equals_transformers(name):
    prompt, answer, expected = golden(name)
    oracle = references.load(FOLDER / name).oracle()
    oracle.encode(prompt)
    assert expected.std() > 2
    np.testing.assert_allclose(oracle.forward(answer), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("chunk", [1, 7])
@pytest.mark.parametrize("name", NAMES)
def test_oracle_whole_equals_chunked(name, chunk):
    prompt, answer, expected = golden(name)
    oracle = references.load(FOLDER / name).oracle()
    oracle.encode(prompt)
    parts = [oracle.forward(answer[i : i + chunk]) for i in range(0, len(answer), chunk)]
    np.testing.assert_allclose(np.concatenate(parts), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("both_ways", [True, False])
def test_buckets_of_the_published_sizes(both_ways):
    """32 buckets up to distance 128: transformers' bucket of each distance from -300 to 300."""
    with np.load(FOLDER / "buckets.npz") as data:
        expected = data["both_ways" if both_ways else "behind"]
    table = Weight("bias", (32, 1), "vector", _Numbers(), Source("bias"))
    found = RelativeBias(table, 128, both_ways).by_distance()[0]
    last = 256 if both_ways else 128
    index = np.clip(np.arange(-300, 301), -128, 128 if both_ways else 0) + 128
    assert len(found) == last + 1
    np.testing.assert_array_equal(found[index], expected)


class _Numbers:
    """A checkpoint of one table, whose row i holds i."""

    def read(self, name, start=0, stop=None):
        return np.arange(32, dtype=np.float32)[start:stop, None]


def test_a_head_that_is_a_copy_of_the_embedding_is_stored_once(tmp_path):
    """transformers 5 writes `tie_word_embeddings: true` for every T5: the tensors tell."""
    model = references.load(_changed(tmp_path, "flan-t5", tie_word_embeddings=True)).model
    assert not model.config.tied
    assert model.config.scaled  # what the key means without `scale_decoder_outputs`
    shutil.rmtree(tmp_path)
    given = {"tie_word_embeddings": True, "scale_decoder_outputs": False}
    model = references.load(_changed(tmp_path, "flan-t5", **given)).model
    assert (model.config.tied, model.config.scaled) == (False, False)


def test_an_untied_config_without_a_head_is_refused(tmp_path):
    with pytest.raises(TensorMismatch, match=r"missing: lm_head\.weight"):
        references.load(_changed(tmp_path, "t5", tie_word_embeddings=False))


def test_an_unknown_feed_forward_is_refused(tmp_path):
    with pytest.raises(UnsupportedArchitecture, match="gated-tanh"):
        references.load(_changed(tmp_path, "t5", feed_forward_proj="gated-tanh"))


def _changed(folder, name, **changes):
    """A reference with another config."""
    folder.mkdir(exist_ok=True)
    shutil.copy(FOLDER / name / "model.safetensors", folder)
    config = json.loads((FOLDER / name / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder
