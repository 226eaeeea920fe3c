"""`mlc-chat-config.json` and its conversation template."""

from __future__ import annotations

import json
import struct

import pytest
from references import DATA, FOLDER, load
from tokenizers import Tokenizer, models

from edge_mmllm.spec import TextSpec
from edge_mmllm.text import Text
from edge_mmllm_export.checkpoints import open_checkpoint
from edge_mmllm_export.checkpoints.base import TextAssets
from edge_mmllm_export.mlc.config import chat_config, world_file
from edge_mmllm_export.mlc.conversation import conversation, prompt
from edge_mmllm_export.mlc.maps import mlc_map
from edge_mmllm_runtime.mlc.weights import QUANTIZATIONS

#: Fields of mlc-llm's `MLCChatConfig`.
FIELDS = {
    "version", "model_type", "quantization", "model_config", "vocab_size", "context_window_size",
    "sliding_window_size", "prefill_chunk_size", "attention_sink_size", "tensor_parallel_shards",
    "pipeline_parallel_stages", "active_vocab_size", "temperature", "presence_penalty",
    "frequency_penalty", "repetition_penalty", "top_p", "tokenizer_files", "tokenizer_info",
    "conv_template", "pad_token_id", "bos_token_id", "eos_token_id", "model_task",
    "embedding_metadata",
}  # fmt: skip
#: The config classes of mlc-llm's models (79d603a); all but these are optional.
MODEL = {
    "llama": {
        "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers",
        "rms_norm_eps", "vocab_size", "tie_word_embeddings", "position_embedding_base",
        "rope_scaling", "context_window_size", "prefill_chunk_size", "num_key_value_heads",
        "head_dim", "tensor_parallel_shards", "pipeline_parallel_stages", "max_batch_size",
        "disaggregation",
    },
    "mistral-window": {
        "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers",
        "rms_norm_eps", "vocab_size", "position_embedding_base", "num_key_value_heads", "head_dim",
        "context_window_size", "sliding_window_size", "prefill_chunk_size", "attention_sink_size",
        "tensor_parallel_shards", "max_batch_size",
    },
    "qwen2": {
        "hidden_act", "hidden_size", "intermediate_size", "num_attention_heads",
        "num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "rope_theta", "vocab_size",
        "tie_word_embeddings", "context_window_size", "prefill_chunk_size",
        "tensor_parallel_shards", "head_dim", "dtype", "max_batch_size",
    },
    "olmo2": {
        "vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim",
        "position_embedding_base", "rope_scaling", "intermediate_size", "hidden_act",
        "num_hidden_layers", "rms_norm_eps", "tie_word_embeddings", "context_window_size",
        "prefill_chunk_size", "tensor_parallel_shards", "pipeline_parallel_stages",
        "max_batch_size",
    },
}  # fmt: skip
MODEL["qwen3"] = MODEL["qwen2"] | {"attention_bias", "weight_block_size"}
MODEL["llama-tied-llama3"] = MODEL["llama"]


def config_of(name, text=None):
    checkpoint = open_checkpoint(FOLDER / name)
    found = mlc_map(load(FOLDER / name).model)
    return chat_config(found, QUANTIZATIONS["q4f16_1"], text or checkpoint.text(), checkpoint)


@pytest.mark.parametrize("name", MODEL)
def test_the_config_of_mlc_llms_models(name):
    config = json.loads(json.dumps(config_of(name), allow_nan=False))
    published = json.loads((FOLDER / name / "config.json").read_text())
    assert set(config) == FIELDS
    assert (config["version"], config["quantization"]) == ("0.1.0", "q4f16_1")
    assert config["model_type"] == published["model_type"]
    model = config["model_config"]
    assert set(model) == MODEL[name]
    for key in set(model) & set(published) - {"rope_scaling", "dtype"}:
        assert model[key] == published[key], key
    if "window" not in name:
        assert config["context_window_size"] == published["max_position_embeddings"]


def test_llama3_scaling_is_said():
    scaling = config_of("llama-tied-llama3")["model_config"]["rope_scaling"]
    published = json.loads((FOLDER / "llama-tied-llama3" / "config.json").read_text())
    rope = published.get("rope_parameters") or published["rope_scaling"]
    assert scaling["rope_type"] == "llama3"
    for key in ("factor", "low_freq_factor", "high_freq_factor"):
        assert scaling[key] == rope[key]


def test_windows():
    """mistral slides, without the four tokens that mlc-llm would always show; qwen2 does not."""
    config = config_of("mistral-window")
    window = json.loads((FOLDER / "mistral-window" / "config.json").read_text())["sliding_window"]
    assert (config["sliding_window_size"], config["attention_sink_size"]) == (window, 0)
    assert config["context_window_size"] == -1
    found = mlc_map(load(FOLDER / "qwen2-window").model)
    assert found.config["context_window_size"] == found.context_length < 128
    assert "no sliding window" in found.remarks[0]


def test_a_published_generation_config(tmp_path):
    import shutil

    shutil.copytree(FOLDER / "llama", tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").write_text(
        '{"temperature": 0.6, "top_p": "0.9", "eos_token_id": 2}'
    )
    checkpoint = open_checkpoint(tmp_path / "m")
    found = mlc_map(load(tmp_path / "m").model)
    config = chat_config(found, QUANTIZATIONS["q0f32"], checkpoint.text(), checkpoint)
    assert (config["temperature"], config["top_p"]) == (0.6, 1.0)


def tokenizer_json(decoder, normalizer=None):
    made = json.loads(Tokenizer(models.BPE({"a": 0, "b": 1}, [])).to_str())
    made["decoder"], made["normalizer"] = decoder, normalizer
    return json.dumps(made).encode()


@pytest.mark.parametrize(
    ("decoder", "normalizer", "expected"),
    [
        ({"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
         None, ("byte_level", False, False)),
        ({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
         {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}]},
         ("byte_fallback", True, True)),
        (None, {"type": "Lowercase"}, ("byte_fallback", False, False)),
    ],
)  # fmt: skip
def test_how_tokens_become_text(decoder, normalizer, expected):
    text = TextAssets(TextSpec("tokenizers"), tokenizer_json(decoder, normalizer))
    config = config_of("llama", text)
    assert tuple(config["tokenizer_info"].values()) == expected
    assert config["tokenizer_files"] == ["tokenizer.json"]
    assert config["active_vocab_size"] == 2


CHATML = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "a system prompt of its own": "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{% endif %}" + CHATML,
    "llama 2": "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}{% else %}"
    "{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    "llama 3": "{% for m in messages %}{% set c = '<|start_header_id|>' + m['role'] + "
    "'<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set c = bos_token + c %}{% endif %}{{ c }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}",
    "vicuna": "{% for m in messages %}{% if m['role'] == 'user' %}USER: {{ m['content'] }} "
    "{% elif m['role'] == 'assistant' %}ASSISTANT: {{ m['content'] }}</s>{% endif %}"
    "{% endfor %}ASSISTANT:",
}
DIALOG = (("user", "Hello?"), ("assistant", "Hi."), ("user", "Two\nlines"))


def spec_of(template):
    marks = {"bos_token": "<s>", "eos_token": "</s>"}
    return TextSpec("bytes", bos_id=1, eos_ids=(2,), chat_template=template, **marks)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_is_what_the_template_writes(name):
    spec = spec_of(TEMPLATES[name])
    found = conversation(TextAssets(spec))
    assert found["name"] == "custom"
    messages = [{"role": role, "content": content} for role, content in DIALOG]
    for count in (1, 3):
        written = Text(spec).apply_chat_template(messages[:count])
        begins = "<s>" if found.get("system_prefix_token_ids") == [1] else ""
        assert begins + prompt(found, DIALOG[:count]) == written
    assert begins == ("<s>" if "bos_token" in TEMPLATES[name] else "")
    assert found["stop_token_ids"] == [2]


def test_a_system_prompt_has_its_place():
    spec = spec_of(TEMPLATES["a system prompt of its own"])
    found = conversation(TextAssets(spec))
    assert found["system_message"] == "Be kind"
    found["system_message"] = "Be brief"
    messages = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hello?"}]
    assert prompt(found, DIALOG[:1]) == Text(spec).apply_chat_template(messages)


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{{ raise_exception('no') }}",
        "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}",
        "{{ messages[-1]['content'] }}",
        "{% for m in messages %}{{ loop.index }}: {{ m['content'] }}{% endfor %}",
    ],
)
def test_what_strings_cannot_say_is_plain_completion(template):
    found = conversation(TextAssets(spec_of(template)))
    assert found["name"] == "LM"
    assert prompt(found, DIALOG[:1]) == "Hello?"


def test_a_world_vocabulary_in_message_pack():
    lines = [f"{i + 1} {bytes([i])!r} 1" for i in range(256)] + ["300 'ab' 2"]
    data = world_file("\n".join(lines).encode())
    kind, count = struct.unpack_from(">BI", data)
    assert (kind, count) == (0xDF, 257)
    at, found = 5, {}
    for _ in range(count):
        a, i, b, size = struct.unpack_from(">BIBI", data, at)
        assert (a, b) == (0xCE, 0xC6)
        found[i] = data[at + 10 : at + 10 + size]
        at += 10 + size
    assert at == len(data)
    assert (found[300], found[1], found[256]) == (b"ab", b"\0", b"\xff")


@pytest.mark.skipif(not (DATA / "zoo").is_dir(), reason="the zoo is not there: EDGE_MMLLM_DATA")
def test_an_rwkv_names_its_tokenizer():
    path = DATA / "zoo" / "tiny-rwkv7" / "tiny-rwkv7.pth"
    checkpoint, found = open_checkpoint(path), mlc_map(load(path).model)
    config = chat_config(found, QUANTIZATIONS["q4f16_1"], checkpoint.text(), checkpoint)
    assert config["tokenizer_files"] == ["tokenizer_model"]
    assert config["context_window_size"] == -1
