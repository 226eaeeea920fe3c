"""Llama-3.2-Vision: tokens that see no picture, prompts without any, and ids beyond the logits."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import references
from family_files import FOLDER, composite, golden
from safetensors import safe_open

from edge_mmllm.errors import CheckpointError, UsageError
from edge_mmllm_export.models.mllama import EXTRA_IDS
from edge_mmllm_export.oracle import Oracle


def test_without_a_picture_the_cross_attention_layers_do_nothing(families):
    """As transformers 5, which skips them."""
    loaded, exported = families("mllama")
    with np.load(FOLDER / "mllama" / "golden.npz") as data:
        ids, logits = data["plain_ids"], data["plain_logits"]
    oracle = Oracle(composite(loaded), loaded.weights).forward(ids)
    np.testing.assert_allclose(oracle, logits, rtol=0, atol=1e-4)
    with exported.session() as session:
        np.testing.assert_allclose(session.prefill(ids, logits="all"), logits, rtol=0, atol=1e-4)


def test_ids_beyond_the_vocabulary_are_read_and_never_predicted(families):
    _, exported = families("mllama")
    spec = exported.spec
    assert (spec.vocab_size, spec.extra_ids) == (96, EXTRA_IDS)
    assert spec.modalities["image"].token_id >= spec.vocab_size
    again = type(spec).from_json(json.loads(json.dumps(spec.to_json())))
    assert again == spec
    with exported.session() as session:
        assert session.prefill([5, spec.vocab_size + EXTRA_IDS - 1]).shape == (spec.vocab_size,)
        with pytest.raises(UsageError, match="outside the vocabulary"):
            session.prefill([spec.vocab_size + EXTRA_IDS])


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("w9", [1, 9]),
        ("<s> w9", [1, 9]),
        ("<|image|> w9", [96, 1, 9]),
        ("<|image|> <s> w9", [96, 1, 9]),
        ("<|image|><|image|><s>w9", [96, 96, 1, 9]),
        ("<s><|image|>w9", [1, 96, 9]),
        ("w9<|image|>", [1, 9, 96]),
    ],
)
def test_begin_of_text_stands_once_and_behind_leading_pictures(text, ids, families):
    """As `build_string_from_input` of transformers 5.23."""
    _, exported = families("mllama")
    pictures = golden("mllama").media["image"][:1] * text.count("<|image|>")
    with exported.session() as session:
        prompt = session.encode(text, {"image": pictures})
        assert prompt.tokens.tolist() == ids


def test_unused_tiles_are_kept_for_blind_tokens_only(families):
    """A picture of one tile of four: 5 rows each."""
    _, exported = families("mllama")
    picture = {"image": golden("mllama").media["image"][:1]}
    with exported.session() as session:
        first = session.encode("<|image|> w9", picture)
        assert [(look.start, len(look.rows())) for look in first.looks] == [(0, 5)]
        later = session.encode("w9 <|image|>", picture)
        found = [(look.start, look.end, len(look.rows())) for look in later.looks]
        assert found == [(2, 1 << 62, 5), (-1, -1, 15)]


@pytest.mark.parametrize("looking", [[9], "all", [0, 1, 2]])
def test_configs_that_cannot_be_used(looking, tmp_path):
    shutil.copytree(FOLDER / "mllama", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["cross_attention_layers"] = looking
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="cross_attention_layers"):
        references.load(tmp_path)


def test_the_spelling_of_transformers_in_memory(tmp_path):
    """Written as stored: the same tensors under other names, in a header of the same shape."""
    shutil.copytree(FOLDER / "mllama", tmp_path, dirs_exist_ok=True)
    path = tmp_path / "model.safetensors"
    with safe_open(path, "np") as file:
        assert "language_model.model.norm.weight" in file.keys()  # noqa: SIM118
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header = {_in_memory(name): entry for name, entry in header.items()}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
    assert set(references.load(tmp_path).weights) == set(references.load(FOLDER / "mllama").weights)


def _in_memory(name: str) -> str:
    if name.startswith("language_model.lm_head"):
        return name.removeprefix("language_model.")
    if name.startswith("language_model.model."):
        return "model.language_model." + name.removeprefix("language_model.model.")
    return name if name.startswith("__") else "model." + name
