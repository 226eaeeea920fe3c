"""`mlc-chat-config.json`: what mlc-llm's engines read beside weights and library.

Source: mlc-llm, `protocol/mlc_chat_config.py` and `interface/gen_config.py`; for what a tokenizer
is asked, `cpp/tokenizers/tokenizers.cc`.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

from edge_mmllm.spec import TextSpec
from edge_mmllm.text.world import WorldTokenizer
from edge_mmllm_export.checkpoints.base import Checkpoint, TextAssets
from edge_mmllm_export.checkpoints.text import load_tokenizer
from edge_mmllm_export.mlc.conversation import conversation
from edge_mmllm_export.mlc.maps import MlcMap
from edge_mmllm_runtime.mlc.weights import Quantization

CONFIG = "mlc-chat-config.json"
#: An RWKV World vocabulary as tokenizers-cpp reads it: a MessagePack map, id -> bytes.
WORLD = "tokenizer_model"
VERSION = "0.1.0"
#: mlc-llm's own values where nobody says anything else.
_SAMPLING = {
    "temperature": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "top_p": 1.0,
}
_SPACE = "\u2581"


def chat_config(
    found: MlcMap, quant: Quantization, text: TextAssets, checkpoint: Checkpoint
) -> dict[str, Any]:
    """The document."""
    config, spec = found.config, text.spec
    tokenizer = _tokenizer(text)
    return {
        "version": VERSION,
        "model_type": found.model_type,
        "quantization": quant.name,
        "model_config": config,
        "vocab_size": _vocab(config),
        "context_window_size": config.get("context_window_size", -1),
        "sliding_window_size": config.get("sliding_window_size", -1),
        "prefill_chunk_size": config.get("prefill_chunk_size", -1),
        "attention_sink_size": config.get("attention_sink_size", -1),
        "tensor_parallel_shards": 1,
        "pipeline_parallel_stages": 1,
        "active_vocab_size": _active(text) or _vocab(config),
        **_SAMPLING,
        **_published(checkpoint),
        "tokenizer_files": [] if text.tokenizer_json is None else [_file(spec)],
        "tokenizer_info": _info(tokenizer),
        "conv_template": conversation(text),
        "pad_token_id": 0 if spec.pad_id is None else spec.pad_id,
        "bos_token_id": 1 if spec.bos_id is None else spec.bos_id,
        "eos_token_id": _one(spec.eos_ids),
        "model_task": "chat",
        "embedding_metadata": None,
    }


def _file(spec: TextSpec) -> str:
    return WORLD if spec.tokenizer == "rwkv-world" else "tokenizer.json"


def _one(ids: tuple[int, ...]) -> int | list[int]:
    return ids[0] if len(ids) == 1 else list(ids)


def _vocab(config: dict[str, Any]) -> int:
    return int(config.get("vocab_size") or config["text_config"]["vocab_size"])


def _tokenizer(text: TextAssets) -> dict[str, Any] | None:
    """`tokenizer.json`, parsed; None where the tokenizer is of another kind."""
    if text.tokenizer_json is None or text.spec.tokenizer != "tokenizers":
        return None
    parsed = json.loads(text.tokenizer_json)
    return parsed if isinstance(parsed, dict) else None


def _active(text: TextAssets) -> int | None:
    """Tokens that the tokenizer knows: logits beyond them are never to be drawn."""
    if text.tokenizer_json is None:
        return None
    if text.spec.tokenizer == "rwkv-world":
        return WorldTokenizer(text.tokenizer_json).size
    if text.spec.tokenizer != "tokenizers":
        return None
    return int(load_tokenizer(text.tokenizer_json, "tokenizer.json").get_vocab_size())


def _info(tokenizer: dict[str, Any] | None) -> dict[str, Any]:
    """How tokens become text, as mlc-llm's own detection says it."""
    decoders = _steps(tokenizer, "decoder", "decoders")
    normalizers = _steps(tokenizer, "normalizer", "normalizers")
    methods = {"ByteLevel": "byte_level", "ByteFallback": "byte_fallback"}
    said = [methods[d["type"]] for d in decoders if d.get("type") in methods]
    return {
        "token_postproc_method": said[-1] if said else "byte_fallback",
        "prepend_space_in_encode": any(
            n.get("type") == "Prepend" and n.get("prepend") == _SPACE for n in normalizers
        ),
        "strip_space_in_decode": any(
            (d.get("type"), d.get("content"), d.get("start"), d.get("stop")) == ("Strip", " ", 1, 0)
            for d in decoders
        ),
    }


def _steps(tokenizer: dict[str, Any] | None, name: str, parts: str) -> list[dict[str, Any]]:
    """A `Sequence`'s members, or the one there is."""
    step = (tokenizer or {}).get(name)
    if not isinstance(step, dict):
        return []
    members = step.get(parts) if step.get("type") == "Sequence" else [step]
    return [m for m in members if isinstance(m, dict)] if isinstance(members, list) else []


def _published(checkpoint: Checkpoint) -> dict[str, float]:
    """Sampling settings of a `generation_config.json` beside the weights."""
    path = Path(checkpoint.source) / "generation_config.json"
    try:
        settings = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    except (OSError, ValueError):
        return {}
    if not isinstance(settings, dict):
        return {}
    return {
        name: float(value)
        for name in _SAMPLING
        if isinstance(value := settings.get(name), (int, float))
        and not isinstance(value, bool)
        and math.isfinite(value)
    }


def world_file(vocabulary: bytes) -> bytes:
    """A World vocabulary as MessagePack: `map 32`, then for each token `uint 32` and `bin 32`.

    Source: the MessagePack specification; tokenizers-cpp, `rwkv_world_tokenizer.cc`.
    """
    tokenizer = WorldTokenizer(vocabulary)
    words = [(i, word) for i in range(tokenizer.size) if (word := tokenizer.token(i))]
    out = [struct.pack(">BI", 0xDF, len(words))]
    for i, word in words:
        out += [struct.pack(">BIBI", 0xCE, i, 0xC6, len(word)), word]
    return b"".join(out)
