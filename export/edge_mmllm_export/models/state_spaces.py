"""The names of a Mamba's tensors, and the layout that state-spaces publishes its own in.

That layout's `config.json` has no `model_type`: it holds the arguments of `MambaConfig`, of which
`ssm_cfg` are those of the mixer's constructor. Tensors are named as on the hub, but for the
embedding.
Source: github.com/state-spaces/mamba, `models/config_mamba.py` and `modules/mamba{_simple,2}.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edge_mmllm.errors import UnsupportedArchitecture
from edge_mmllm_export.checkpoints.base import Float32
from edge_mmllm_export.models.config import Fields
from edge_mmllm_export.weights import Source

#: The checkpoint's names of the embedding.
HUB_EMBEDDING, ORIGINAL_EMBEDDING = "backbone.embeddings.weight", "backbone.embedding.weight"
#: Of every norm; not in the config.
NORM_EPS = 1e-5

#: What the layers of every version have, ours to the checkpoint's.
_LAYER = {
    "norm": "norm.weight",
    "conv": "mixer.conv1d.weight",
    "conv_bias": "mixer.conv1d.bias",
    "D": "mixer.D",
    "out": "mixer.out_proj.weight",
    "out_bias": "mixer.out_proj.bias",
}

_MIXERS = {"Mamba1": "mamba", "Mamba2": "mamba2", "Mamba3": "mamba3"}


def architecture(config: dict[str, Any]) -> str | None:
    """The architecture of a config in this layout; None for any other config."""
    if "model_type" in config or not {"d_model", "n_layer", "vocab_size"} <= config.keys():
        return None
    ssm = config.get("ssm_cfg") or {}
    layer = ssm.get("layer", "Mamba1") if isinstance(ssm, dict) else None
    return _MIXERS.get(str(layer), str(layer))


def fields(config: dict[str, Any], where: str) -> tuple[Fields, Fields]:
    """The model's settings and the mixer's, without those that change what is computed.

    Raises:
        UnsupportedArchitecture: attention layers, MLPs, or a norm that is not RMS.
    """
    model = Fields(config, where)
    mixer = Fields(model.table("ssm_cfg"), f"{where}, ssm_cfg")
    refuse(
        where,
        attn_layer_idx=(model.get("attn_layer_idx", []), []),
        d_intermediate=(model.get("d_intermediate", 0), 0),
        rms_norm=(model.get("rms_norm", True), True),
    )
    return model, mixer


def refuse(where: str, **settings: tuple[object, object]) -> None:
    """Each setting is (found, the only one that there is a definition for).

    Raises: UnsupportedArchitecture, which names every other one.
    """
    other = {name: pair for name, pair in settings.items() if pair[0] != pair[1]}
    if other:
        raise UnsupportedArchitecture(
            "a variant of Mamba that there is no definition for",
            where=where,
            expected=", ".join(f"{name} {wanted}" for name, (_, wanted) in other.items()),
            found=", ".join(f"{name} {found}" for name, (found, _) in other.items()),
        )


def vocab_size(model: Fields) -> int:
    """Rows of the embedding: `vocab_size`, rounded up. Raises: CheckpointError."""
    multiple = model.size("pad_vocab_size_multiple", 8)
    return -(-model.size("vocab_size") // multiple) * multiple


def frame_sources(embedding: str) -> dict[str, Source]:
    """What comes before the layers, and after."""
    return {
        "embed": Source(embedding),
        "norm": Source("backbone.norm_f.weight"),
        "head": Source("lm_head.weight"),
    }


def layer_sources(i: int) -> dict[str, Source]:
    """What layer `i` has in every version: the names of `_LAYER`, and A."""
    ours, theirs = f"layers.{i}", f"backbone.layers.{i}"
    out = {f"{ours}.{our}": Source(f"{theirs}.{their}") for our, their in _LAYER.items()}
    out[f"{ours}.A"] = Source(f"{theirs}.mixer.A_log", apply=_minus_exp)
    return out


def _minus_exp(a_log: Float32) -> Float32:
    """A, which is negative, from its logarithm."""
    return np.asarray(-np.exp(a_log), np.float32)
