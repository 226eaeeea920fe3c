"""What the family functions share: reading the parts of a published multimodal checkpoint."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from edge_mmllm.audio.settings import read_audio_settings
from edge_mmllm.errors import CheckpointError, UnsupportedArchitecture
from edge_mmllm.image.published import read_image_settings
from edge_mmllm.video.settings import read_video_settings
from edge_mmllm_export.checkpoints.base import Checkpoint
from edge_mmllm_export.checkpoints.files import read_json
from edge_mmllm_export.checkpoints.view import CheckpointView, Renames
from edge_mmllm_export.models.config import Fields
from edge_mmllm_export.ops.base import Architecture

#: `model_type` of a vision config -> module:class of `models`, with
#: `from_config(Fields, feature_layers=, select=)`.
ENCODERS = {
    "clip_vision_model": "clip:Clip",
    "siglip_vision_model": "siglip:Siglip",
}

#: What published `text_config`s leave out: the defaults of transformers' config classes, which
#: the release of a composed checkpoint relies on (llava-1.5's names only its vocabulary).
#: Source: configuration_{llama,mistral,opt,t5,qwen2}.py of transformers 5.23, equal in 4.x.
_LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TEXT_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA
    | {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    },
    "opt": {
        "vocab_size": 50272,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "ffn_dim": 3072,
        "num_attention_heads": 12,
    },
    "t5": {"vocab_size": 32128},
    "qwen2": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    },
}

_VIDEO_PROCESSORS = (
    "video_preprocessor_config.json",
    "processor_config.json",
    "preprocessor_config.json",
)


def side_file(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """A JSON file beside the weights, `{}` where there is none. Raises: CorruptCheckpoint."""
    path = checkpoint.files[0].parent / name
    return read_json(path) if path.is_file() else {}


def part(
    checkpoint: Checkpoint, key: str, defaults: Mapping[str, Mapping[str, Any]], absent: str
) -> dict[str, Any]:
    """The config of one part, e.g. `text_config`, with what its release leaves to defaults.

    Args:
        defaults: by `model_type`.
        absent: the `model_type` of a config that names none.

    Raises:
        CheckpointError: there is no such part.
    """
    found = checkpoint.config.get(key)
    if not isinstance(found, dict):
        raise CheckpointError(
            f"the config has no {key}",
            where=f"{checkpoint.source}, config.json",
            expected="an object",
            found=type(found).__name__,
            fix="take config.json from the checkpoint's original release",
        )
    kind = Fields(found, f"{checkpoint.source}, {key}").text("model_type", absent)
    return {**defaults.get(kind, {}), **found, "model_type": kind}


def prefix(checkpoint: Checkpoint, *candidates: str) -> str:
    """The first candidate that tensors' names begin with; else the first of all, so that what is
    missing is listed under it."""
    for candidate in candidates:
        if any(name.startswith(candidate) for name in checkpoint.tensors):
            return candidate
    return candidates[0]


def backbone(
    checkpoint: Checkpoint,
    context: int | None,
    layouts: Sequence[Renames],
    absent: str = "llama",
) -> tuple[Architecture, Renames]:
    """The language model of `text_config`, and how the checkpoint writes its names.

    Args:
        layouts: of the releases; the first whose last pair's prefix is there counts.
        absent: the `model_type` of a config that names none.

    Raises:
        CheckpointError: see `models.build`.
    """
    from edge_mmllm_export.models import ARCHITECTURES, build

    config = part(checkpoint, "text_config", TEXT_DEFAULTS, absent)
    if checkpoint.config.get("tie_word_embeddings") is True:  # transformers 5 says it there only
        config["tie_word_embeddings"] = True
    kind = config["model_type"]
    if kind not in ARCHITECTURES:
        raise UnsupportedArchitecture(
            f"the backbone {kind!r} has no definition here",
            where=f"{checkpoint.source}, text_config",
            expected=" | ".join(ARCHITECTURES),
            found=str(kind),
        )
    fitting = renames(checkpoint, layouts)
    return build(CheckpointView(checkpoint, config, fitting), context), fitting


def renames(checkpoint: Checkpoint, layouts: Sequence[Renames]) -> Renames:
    """How the checkpoint writes the language model's names: the first that fits, else the first
    of all."""
    names = checkpoint.tensors
    fitting = [r for r in layouts if any(n.startswith(r.pairs[0][1]) for n in names)]
    return (fitting or list(layouts))[0]


def vision_encoder(
    checkpoint: Checkpoint, feature_layers: tuple[int, ...], select: str, absent: str
) -> Any:
    """The encoder of `vision_config`.

    Args:
        feature_layers: the hidden states handed on, see `Clip`.
        select: `default` leaves the class token out, `full` does not.
        absent: the `model_type` of a config that names none.

    Raises:
        CheckpointError: no such config, or an encoder without a definition.
    """
    config = part(checkpoint, "vision_config", {}, absent)
    kind, where = config["model_type"], f"{checkpoint.source}, vision_config"
    if kind not in ENCODERS:
        raise UnsupportedArchitecture(
            f"the encoder {kind!r} has no definition here",
            where=where,
            expected=" | ".join(ENCODERS),
            found=str(kind),
        )
    module, _, name = ENCODERS[kind].partition(":")
    cls = getattr(importlib.import_module(f"edge_mmllm_export.models.{module}"), name)
    return cls.from_config(Fields(config, where), feature_layers=feature_layers, select=select)


def image_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """Preprocessing as the manifest stores it, from the checkpoint's processor.

    Raises:
        CheckpointError: no processor, or one without a definition.
    """
    for name in ("preprocessor_config.json", "processor_config.json"):
        config = side_file(checkpoint, name)
        if (name.startswith("pre") or "image_processor" in config) and config:
            return read_image_settings(config, name).to_json()
    raise CheckpointError(
        "the checkpoint does not say how pictures are prepared",
        where=str(checkpoint.source),
        expected="preprocessor_config.json or processor_config.json",
        fix="copy it from the checkpoint's original release",
    )


def video_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """As `image_settings`, for videos. Raises: CheckpointError."""
    for name in _VIDEO_PROCESSORS:
        config = side_file(checkpoint, name)
        if (not name.startswith("processor") or "video_processor" in config) and config:
            return read_video_settings(config, name).to_json()
    raise CheckpointError(
        "the checkpoint does not say how videos are prepared",
        where=str(checkpoint.source),
        expected=" or ".join(_VIDEO_PROCESSORS),
        fix="copy it from the checkpoint's original release",
    )


def audio_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """As `image_settings`, for sounds. Raises: CheckpointError."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        config = side_file(checkpoint, name)
        if (name.startswith("pre") or "feature_extractor" in config) and config:
            return read_audio_settings(config, name).to_json()
    raise CheckpointError(
        "the checkpoint does not say how sounds are prepared",
        where=str(checkpoint.source),
        expected="preprocessor_config.json or processor_config.json",
        fix="copy it from the checkpoint's original release",
    )


def token_id(checkpoint: Checkpoint, text: str) -> int:
    """The id of a special token, where the config does not say it.

    Raises:
        CheckpointError: the tokenizer has no such token.
    """
    tokens = side_file(checkpoint, "tokenizer.json").get("added_tokens")
    for token in tokens if isinstance(tokens, list) else []:
        if isinstance(token, dict) and token.get("content") == text:
            return Fields(token, f"{checkpoint.source}, tokenizer.json").size("id", least=0)
    raise CheckpointError(
        f"the tokenizer has no token {text}",
        where=str(checkpoint.source),
        expected=f"tokenizer.json with {text} among its added_tokens",
        fix="copy it from the checkpoint's original release",
    )


def placeholder(checkpoint: Checkpoint, token_id: int, key: str = "image_token") -> str:
    """The text of a placeholder's id: as the processor names it, or as the tokenizer does.

    Raises:
        CheckpointError: nobody says.
    """
    for name in ("processor_config.json", "tokenizer_config.json"):
        text = side_file(checkpoint, name).get(key)
        if isinstance(text, dict):
            text = text.get("content")
        if isinstance(text, str) and text:
            return text
    settings = side_file(checkpoint, "tokenizer.json").get("added_tokens")
    for token in settings if isinstance(settings, list) else []:
        if isinstance(token, dict) and token.get("id") == token_id:
            return str(token.get("content"))
    return "<image>" if key == "image_token" else f"<{key.removesuffix('_token')}>"
