"""Architectures by the name a checkpoint gives itself, imported when used."""

from __future__ import annotations

import difflib
import importlib

from edge_mmllm.errors import CheckpointError, UnsupportedArchitecture
from edge_mmllm_export.checkpoints.base import Checkpoint
from edge_mmllm_export.families import FAMILIES, build_family
from edge_mmllm_export.models import rwkv, state_spaces
from edge_mmllm_export.ops.base import Architecture

#: `model_type` of config.json, or `general.architecture` of GGUF -> module:class.
ARCHITECTURES = {
    "llama": "llama:Llama",
    "mistral": "llama:Llama",
    "qwen2": "llama:Llama",
    "qwen3": "llama:Llama",
    "olmo2": "llama:Llama",
    "opt": "opt:Opt",
    "t5": "t5:T5",
    "mamba": "mamba:Mamba",
    "mamba2": "mamba2:Mamba2",
    "falcon_mamba": "falcon_mamba:FalconMamba",
    "rwkv": "rwkv4:Rwkv4",
    "rwkv4": "rwkv4:Rwkv4",
    "rwkv5": "rwkv5:Rwkv5",
    "rwkv6": "rwkv6:Rwkv6",
    "rwkv7": "rwkv7:Rwkv7",
}


def architecture_name(checkpoint: Checkpoint) -> str:
    """What the checkpoint calls itself. Raises: CheckpointError."""
    config = checkpoint.config
    name = config.get("general.architecture" if checkpoint.layout == "gguf" else "model_type")
    name = name or state_spaces.architecture(config) or rwkv.version(checkpoint.tensors)
    if not isinstance(name, str):
        raise CheckpointError(
            "the checkpoint does not say what architecture it is",
            where=str(checkpoint.source),
            expected="config.json with a model_type, a GGUF file, or BlinkDL's .pth of an RWKV",
            fix="put the config.json of the original release beside the weights",
        )
    return name


def build(checkpoint: Checkpoint, context: int | None = None) -> Architecture:
    """The definition of a checkpoint's architecture, with its config read; of a multimodal
    family a `Composite`.

    Raises:
        UnsupportedArchitecture: no definition; names the nearest supported one.
        CheckpointError: a config that cannot be used.
    """
    name = architecture_name(checkpoint)
    if name in FAMILIES and checkpoint.layout == "hub":
        return build_family(name, checkpoint, context)
    if name not in ARCHITECTURES:
        known = [*ARCHITECTURES, *FAMILIES]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        raise UnsupportedArchitecture(
            f"there is no definition of {name!r}",
            where=str(checkpoint.source),
            expected=" | ".join(known),
            found=name,
            fix=f"the nearest supported architecture is {near[0]!r}, but it is another model",
        )
    module, _, cls = ARCHITECTURES[name].partition(":")
    definition = getattr(importlib.import_module(f"{__name__}.{module}"), cls)
    built: Architecture = definition.from_checkpoint(checkpoint, context)
    return built
