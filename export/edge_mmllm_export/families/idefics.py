"""Idefics, an open Flamingo: pictures stand beside the text, in the states of cross attention.

Source: OBELICS (arXiv 2306.16527); `modeling_idefics.py` and `processing_idefics.py` of
transformers 5.23.
"""

from __future__ import annotations

from edge_mmllm.modality import Modality
from edge_mmllm_export.checkpoints.base import Checkpoint
from edge_mmllm_export.checkpoints.view import Renames
from edge_mmllm_export.families import hub
from edge_mmllm_export.families.composite import Composite, Part, Pathway
from edge_mmllm_export.models.clip import Clip
from edge_mmllm_export.models.config import Fields
from edge_mmllm_export.models.idefics import Idefics
from edge_mmllm_export.models.perceiver import Perceiver, PerceiverConfig

#: Source: `IdeficsVisionConfig`.
TOWER = {
    "embed_dim": 768,
    "intermediate_size": 5120,
    "patch_size": 14,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
}


def idefics(checkpoint: Checkpoint, context: int | None) -> Composite:
    """The model of an Idefics config. Raises: CheckpointError."""
    where = f"{checkpoint.source}, config.json"
    f = Fields(checkpoint.config, where)
    vision = TOWER | f.table("vision_config")
    vision["hidden_size"] = vision["embed_dim"]
    tower = Clip.from_config(Fields(vision, where), feature_layers=(-1,), select="full")
    resampler = None
    if f.flag("use_resampler", False):
        sizes = PerceiverConfig.from_json(f.table("perceiver_config"), where, width=tower.width)
        resampler = Part(Perceiver(sizes), "model.perceiver_resampler.")
    fence = "<fake_token_around_image>"
    image = Modality(
        stages=(),
        placeholder="<image>",
        token_id=hub.token_id(checkpoint, "<image>"),
        tokens=tower.tokens if resampler is None else sizes.latents,
        layout={"kind": "beside", "sees": "latest", "fence": fence, "until": _until(f)},
        settings=hub.image_settings(checkpoint),
        target="states",
    )
    path = Pathway("image", Part(tower, "model.vision_model."), resampler, image)
    return Composite("idefics", Idefics.from_checkpoint(checkpoint, context), Renames(()), [path])


def _until(f: Fields) -> int | None:
    """The id that ends a document, and sight of its pictures with it."""
    return None if f.get("eos_token_id", 2) is None else f.size("eos_token_id", 2, least=0)
