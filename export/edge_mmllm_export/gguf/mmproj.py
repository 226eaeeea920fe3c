"""The second GGUF file of a multimodal model, `mmproj.gguf`: encoder and projector as llama.cpp's
mtmd library reads them.

One function a projector says which of our weights make each tensor, and the metadata that mtmd
builds its graph and its own preprocessing from. The encoder's last layers that the model does not
hear are left out, and the file says so (`feature_layer`).

Source: llama.cpp tools/mtmd/clip.cpp, clip-impl.h (of llama-cpp-python 0.3.36) and its converter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from edge_mmllm.modality import Modality
from edge_mmllm.spec import Stage
from edge_mmllm_export.families.composite import Composite, Pathway
from edge_mmllm_export.gguf.maps.base import GgufMap, GgufTensor, Hold, Value, refuse
from edge_mmllm_export.models.vit import Block

FILE = "mmproj.gguf"

#: Rows of mtmd's spectrum, 30 seconds always.
_POSITIONS = 1500
#: Names within a layer, after `v.blk.N.` or `a.blk.N.`.
_LAYER = {
    "norm_attn": "ln1",
    "attn.q": "attn_q",
    "attn.k": "attn_k",
    "attn.v": "attn_v",
    "attn.o": "attn_out",
    "norm_mlp": "ln2",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
}
#: Our activations in an encoder's layers -> the switches that mtmd knows. Its `gelu` is the one
#: by tanh, from a table in float16: 3e-4 beside the exact one.
_SWITCHES: dict[str, dict[str, Value]] = {
    "gelu": {"use_gelu": True},
    "gelu_tanh": {"use_gelu": True},
    "quick_gelu": {"use_gelu": False},
    "silu": {"use_gelu": False, "use_silu": True},
}


def mmproj_map(model: Composite) -> GgufMap:
    """How llama.cpp holds the stages before the backbone.

    Raises:
        UnsupportedArchitecture: mtmd has no graph for one of them.
    """
    own = [path for path in model.pathways if path.encoder_of is None]
    metadata: dict[str, Value] = {}
    tensors: list[GgufTensor] = []
    for path in own:
        names = (path.encoder.component.name, path.projector and path.projector.component.name)
        found = _KINDS.get(names)  # type: ignore[arg-type]
        if found is None or path.modality.target != "embeddings" or len(own) > 1:
            kinds = "; ".join(f"{e} with {p}" for e, p in _KINDS)
            refuse(f"its {path.name} stages are {names[0]} with {names[1]}", model.name, kinds)
        more = found(path, model)
        metadata |= {f"has_{_KIND[path.name]}_encoder": True} | more[0]
        tensors += more[1]
    return GgufMap("clip", metadata, tensors, None)


def modalities(model: Composite) -> dict[str, Modality]:
    """What the manifest says of them: one stage takes an item to the backbone."""
    found = model.modalities()
    return {name: replace(modality, stages=modality.stages[:1]) for name, modality in found.items()}


def stages(model: Composite) -> dict[str, Stage]:
    """The stages that the file holds."""
    out = {}
    for definition in model.stage_definitions():
        if definition.name.startswith("encode_"):
            inputs = tuple(port.name for port in definition.ports)
            out[definition.name] = Stage(FILE, inputs, ("inputs_embeds",))
    return out


def activations(model: Composite) -> list[str]:
    """The activations of encoder and projector, in the order that they are computed in; for those
    that mtmd has rounded tables for."""
    out: list[str] = []
    for path in model.pathways:
        if path.encoder_of is not None:
            continue
        c, projector = path.encoder.component.config, path.projector
        kept = [n if n >= 0 else c.layers + 1 + n for n in getattr(c, "feature_layers", ())]
        own = c.block.activation
        if path.name != "audio" and own != "silu":
            out += [own] * (max(kept) if kept else c.layers)
        last = projector.component.name if projector is not None else ""
        if last in ("mlp", "linear", "patch_merger") and path.name != "audio":
            out.append("gelu")
    return out


Found = tuple[dict[str, Value], list[GgufTensor]]

_KIND = {"image": "vision", "video": "vision", "audio": "audio"}


def _llava(path: Pathway, model: Composite) -> Found:
    """CLIP or SigLIP and an MLP: LLaVA; with a row that ends lines: LLaVA-NeXT."""
    encoder, projector = path.encoder.component, path.projector.component  # type: ignore[union-attr]
    c, mlp, clip = encoder.config, projector.config, encoder.name == "clip"
    name, block = model.name, c.block
    if mlp.activation != "gelu" or not mlp.bias or len(mlp.names) > 2:
        refuse("its projector is another MLP", name, "at most two layers with biases, gelu")
    if c.select != ("default" if clip else "full"):
        what = "drops no class token" if clip else "drops the first patch"
        refuse(f"it {what}", name, "vision_feature_select_strategy of its encoder")
    kept = _feature_layers(c, name)
    metadata = _vision(path, model, block, max(kept)) | {
        "projector_type": "mlp",
        "vision.feature_layer": kept,
        "vision.projection_dim": projector.hidden_size,
    }
    tensors = _layers("v", f"{path.name}.encoder.", block, max(kept))
    tensors += _patches(path, c, ("class",) if clip else ("patch_bias",))
    if clip:
        tensors += _pair("v.pre_ln", f"{path.name}.encoder.norm_pre")
    for i in range(len(mlp.names)):
        tensors += _pair(f"mm.{2 * i}", f"{path.name}.projector.{i}", ".bias")
    if model.name == "llava_next":
        tensors.append(_vector("v.image_newline", f"{path.name}.projector.newline"))
        grids = path.modality.settings["layout"]["grids"]
        metadata["vision.mm_patch_merge_type"] = "spatial_unpad"
        # llama.cpp has width and height, the hub height and width.
        metadata["vision.image_grid_pinpoints"] = [n for h, w in grids for n in (w, h)]
    return metadata, tensors


def _idefics3(path: Pathway, model: Composite) -> Found:
    """SigLIP and a connector: Idefics3, SmolVLM."""
    encoder, projector = path.encoder.component, path.projector.component  # type: ignore[union-attr]
    c = encoder.config
    metadata = _vision(path, model, c.block, c.layers) | {
        "projector_type": "idefics3",
        "vision.projection_dim": projector.hidden_size,
        "vision.projector.scale_factor": projector.config.factor,
    }
    longest = path.modality.settings.get("layout", {}).get("longest_edge")
    if isinstance(longest, int):
        metadata["vision.preproc_image_size"] = longest
    scope = f"{path.name}.encoder."
    tensors = _layers("v", scope, c.block, c.layers)
    tensors += _patches(path, c, ("patch_bias",))
    tensors += _pair("v.post_ln", f"{scope}norm")
    tensors.append(GgufTensor("mm.model.fc.weight", (f"{path.name}.projector.proj",), hold="byte"))
    return metadata, tensors


def _qwen2_vl(path: Pathway, model: Composite) -> Found:
    """Qwen2-VL's tower and merger."""
    encoder = path.encoder.component
    c = encoder.config
    if c.temporal != 2 or c.merge != 2 or c.theta != 10000.0:
        found = f"{c.temporal} frames a patch, squares of {c.merge}, theta {c.theta:g}"
        refuse(f"its tower has {found}", model.name, "2, 2, 10000")
    metadata = _vision(path, model, c.block, c.layers) | {
        "projector_type": "qwen2vl_merger",
        "vision.projection_dim": c.output_size,
        "vision.spatial_merge_size": c.merge,
        "vision.image_size": 40 * c.patch_size,  # of a warm-up alone: pictures keep their size
        "vision.patch_size": c.patch_size,
    }
    scope, half = f"{path.name}.encoder.", c.patch_size**2
    tensors = _layers("v", scope, c.block, c.layers)
    for frame, suffix in enumerate(("weight", "weight.1")):
        columns = np.arange(encoder.patch_width).reshape(c.channels, c.temporal, half)
        tensors.append(
            GgufTensor(
                f"v.patch_embd.{suffix}",
                (f"{scope}patch",),
                (c.block.hidden_size, c.channels, c.patch_size, c.patch_size),
                hold="float32",
                columns=np.ascontiguousarray(columns[:, frame]).reshape(-1),
            )
        )
    tensors += _pair("v.post_ln", f"{path.name}.projector.norm")
    tensors += _pair("mm.0", f"{path.name}.projector.up")
    tensors += _pair("mm.2", f"{path.name}.projector.down")
    return metadata, tensors


def _qwen2_audio(path: Pathway, model: Composite) -> Found:
    """Whisper's encoder, pooled, and one linear layer: Qwen2-Audio."""
    c, projector = path.encoder.component.config, path.projector.component  # type: ignore[union-attr]
    block, scope = c.block, f"{path.name}.encoder."
    if c.positions != _POSITIONS or block.activation != "gelu":
        what = f"its encoder has {c.positions} rows of sound, {block.activation}"
        refuse(what, model.name, f"{_POSITIONS}, gelu")
    metadata = _sizes("audio", block, c.layers) | {
        "projector_type": "qwen2a",
        "audio.projection_dim": projector.hidden_size,
        "audio.num_mel_bins": c.mels,
    }
    tensors = _layers("a", scope, block, c.layers)
    for i, width in ((1, c.mels), (2, block.hidden_size)):
        shape = (block.hidden_size, width, 3)
        tensors += [
            GgufTensor(f"a.conv1d.{i}.weight", (f"{scope}conv{i}",), shape, hold="float16"),
            # added to (frames, width): a column
            GgufTensor(f"a.conv1d.{i}.bias", (f"{scope}conv{i}_bias",), (block.hidden_size, 1)),
        ]
    tensors.append(_vector("a.position_embd.weight", f"{scope}position"))
    tensors += _pair("a.post_ln", f"{scope}norm")
    tensors += _pair("mm.a.fc", f"{path.name}.projector.0", ".bias")
    return metadata, tensors


#: Names of an encoder's and a projector's definition -> what says them in mtmd's words.
_KINDS: dict[tuple[str, str], Callable[[Pathway, Composite], Found]] = {
    ("clip", "mlp"): _llava,
    ("clip", "linear"): _llava,
    ("siglip", "mlp"): _llava,
    ("siglip", "linear"): _llava,
    ("idefics3_vision", "pixel_shuffle"): _idefics3,
    ("qwen2_vl_vision", "patch_merger"): _qwen2_vl,
    ("qwen2_audio_encoder", "linear"): _qwen2_audio,
}


def _vision(path: Pathway, model: Composite, block: Block, layers: int) -> dict[str, Value]:
    """Metadata that every vision tower has."""
    c, settings = path.encoder.component.config, path.modality.settings
    mean, deviation = settings.get("mean"), settings.get("std")
    if not mean or not deviation or c.channels != 3:
        refuse("its pictures are not normalized in three colours", model.name, "mean and std")
    if block.activation not in _SWITCHES or block.gated or block.scaled:
        refuse(f"its encoder's layers have {block.activation}", model.name, " | ".join(_SWITCHES))
    return {
        **_sizes("vision", block, layers),
        **_SWITCHES[block.activation],
        "vision.image_size": getattr(c, "image_size", 0),
        "vision.patch_size": c.patch_size,
        "vision.image_mean": [float(m) for m in mean],
        "vision.image_std": [float(s) for s in deviation],
    }


def _sizes(kind: str, block: Block, layers: int) -> dict[str, Value]:
    return {
        f"{kind}.embedding_length": block.hidden_size,
        f"{kind}.feed_forward_length": block.intermediate_size,
        f"{kind}.block_count": layers,
        f"{kind}.attention.head_count": block.heads,
        f"{kind}.attention.layer_norm_epsilon": float(block.norm_eps),
    }


def _feature_layers(c: Any, name: str) -> list[int]:
    """The hidden states handed on, as mtmd counts them: 0 is what enters the first layer."""
    if not c.feature_layers:
        refuse("it reads the encoder behind its last norm", name, "a hidden state before it")
    kept = [n if n >= 0 else c.layers + 1 + n for n in c.feature_layers]
    if kept != sorted(set(kept)):
        refuse("its features are not in the order of the layers", name, "rising, each once")
    return kept


def _layers(prefix: str, scope: str, block: Block, layers: int) -> list[GgufTensor]:
    # mtmd takes `up` and `down` for one another where the second one's width is the hidden size,
    # as files of old have it. Where both widths are the same, that is always.
    turned = block.intermediate_size == block.hidden_size
    names = dict(_LAYER)
    if turned and prefix == "v":
        names |= {"mlp.up": "ffn_down", "mlp.down": "ffn_up"}
    out = []
    for i in range(layers):
        for p in block.parameters(""):
            stem, bias = p.name.removesuffix("_bias"), p.name.endswith("_bias")
            their = f"{prefix}.blk.{i}.{names[stem]}.{'bias' if bias else 'weight'}"
            hold: Hold = "byte" if p.role == "matrix" else "float32"
            out.append(GgufTensor(their, (f"{scope}layers.{i}.{p.name}",), hold=hold))
    return out


def _patches(path: Pathway, c: Any, more: tuple[str, ...]) -> list[GgufTensor]:
    """The convolution over patches, positions, and what stands beside them."""
    scope, names = (
        f"{path.name}.encoder.",
        {"class": "v.class_embd", "patch_bias": "v.patch_embd.bias"},
    )
    square = (c.block.hidden_size, c.channels, c.patch_size, c.patch_size)
    return [
        GgufTensor("v.patch_embd.weight", (f"{scope}patch",), square, hold="float32"),
        _vector("v.position_embd.weight", f"{scope}position"),
        *(_vector(names[name], scope + name) for name in more),
    ]


def _pair(name: str, ours: str, bias: str = "_bias") -> list[GgufTensor]:
    return [
        GgufTensor(f"{name}.weight", (ours,), hold="byte"),
        _vector(f"{name}.bias", ours + bias),
    ]


def _vector(name: str, ours: str) -> GgufTensor:
    return GgufTensor(name, (ours,), hold="float32")
