"""MLC map of LLaVA. Source: mlc-llm, `model/llava` and `model/vision/clip_vision.py`."""

from __future__ import annotations

from typing import Any

from edge_mmllm_export.families.composite import Composite
from edge_mmllm_export.mlc.maps import llama
from edge_mmllm_export.mlc.maps.base import MlcMap, MlcTensor, refuse
from edge_mmllm_export.models.clip import HUB_NAMES, Clip
from edge_mmllm_export.models.llama import Llama
from edge_mmllm_export.models.mlp import Mlp

_TOWER = "vision_tower.vision_model."
#: mlc-llm's name of a text config's class -> ours.
_TEXT = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
#: Of the published configs; mlc-llm asks for it and never reads it.
_PROJECTION = 768


def llava(model: Composite) -> MlcMap:
    """Raises: UnsupportedArchitecture."""
    (path,) = model.pathways
    tower, projector, text = path.encoder.component, path.projector, model.backbone
    mlp = projector.component if projector is not None else None
    if not isinstance(text, Llama) or text.name not in _TEXT:
        refuse(f"its language model is {text.name}", "llava", " | ".join(_TEXT))
    if not isinstance(tower, Clip) or tower.config.block.activation != "quick_gelu":
        refuse("its encoder is another", "llava", "CLIP with quick_gelu")
    c = tower.config
    if (c.feature_layers, c.select, c.channels) != ((-2,), "default", 3):
        refuse("it takes other features", "llava", "the last layer but one, no class token")
    if not isinstance(mlp, Mlp) or mlp.config.names != ("linear_1", "linear_2"):
        refuse("its projector is another", "llava", "two linear layers")
    if mlp.config.activation != "gelu" or not mlp.config.bias:
        refuse("its projector computes otherwise", "llava", "biases and an exact gelu")
    found = llama.mlc_map(text, "language_model.")
    tensors = [*_tower(tower, path.encoder.prefix), *_projector(), *found.tensors]
    return MlcMap("llava", _config(path.modality.token_id, tower, found), tensors, True,
                  found.context_length, found.remarks)  # fmt: skip


def _tower(tower: Clip, prefix: str) -> list[MlcTensor]:
    """The encoder's weights, by the hub's own names; nothing of it is ever quantized. Layers after
    the one that is asked for are in mlc-llm's model all the same: those are copied."""
    out = [
        MlcTensor(source.name, (f"image.encoder.{name}",), shape=source.stored)
        for name, source in tower.sources("hub", _TOWER).items()
    ]
    c, h = tower.config, tower.config.block.hidden_size
    sizes = {"mlp.fc1": (c.block.intermediate_size, h), "mlp.fc2": (h, c.block.intermediate_size)}
    for i in range(_used(tower), c.layers):
        for name in HUB_NAMES.values():
            shape = (h,) if name.startswith("layer_norm") else sizes.get(name, (h, h))
            out += _copied(prefix, f"encoder.layers.{i}.{name}", shape)
    return out + _copied(prefix, "post_layernorm", (h,))


def _used(tower: Clip) -> int:
    layers = [p.name.split(".")[1] for p in tower.parameters() if p.name.startswith("layers.")]
    return max(map(int, layers), default=-1) + 1


def _copied(prefix: str, name: str, shape: tuple[int, ...]) -> list[MlcTensor]:
    return [
        MlcTensor(f"{_TOWER}{name}.{part}", shape=s, copied=f"{prefix}{name}.{part}")
        for part, s in (("weight", shape), ("bias", shape[:1]))
    ]


def _projector() -> list[MlcTensor]:
    out = []
    for i in (0, 1):
        name, ours = f"multi_modal_projector.linear_{i + 1}", f"image.projector.{i}"
        out.append(MlcTensor(f"{name}.weight", (ours,), "matrix"))
        out.append(MlcTensor(f"{name}.bias", (f"{ours}.bias",)))
    return out


def _config(token_id: int, tower: Clip, text: MlcMap) -> dict[str, Any]:
    c = tower.config
    shared = ("vocab_size", "context_window_size", "prefill_chunk_size")
    return {
        "image_token_index": token_id,
        "text_config": text.config,
        "vision_config": {
            "hidden_size": c.block.hidden_size,
            "image_size": c.image_size,
            "intermediate_size": c.block.intermediate_size,
            "num_attention_heads": c.block.heads,
            "num_hidden_layers": c.layers,
            "patch_size": c.patch_size,
            "projection_dim": _PROJECTION,
            "vocab_size": text.config["vocab_size"],
            "num_channels": c.channels,
            "layer_norm_eps": c.block.norm_eps,
        },
        **{name: text.config[name] for name in shared},
        "sliding_window_size": text.config.get("sliding_window_size", -1),
        "tensor_parallel_shards": 1,
        "max_batch_size": 1,
        "text_architecture": _TEXT[text.model_type],
    }
