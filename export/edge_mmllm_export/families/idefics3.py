"""Idefics3 and SmolVLM: tiles of a picture through SigLIP, pixel shuffle, any backbone.

Source: Idefics3 (arXiv 2408.12637), SmolVLM (2504.05299); `modeling_idefics3.py` and
`modeling_smolvlm.py` of transformers 5.23, which compute the same.
"""

from __future__ import annotations

from edge_mmllm.modality import Modality
from edge_mmllm_export.checkpoints.base import Checkpoint
from edge_mmllm_export.checkpoints.view import Renames
from edge_mmllm_export.families import hub
from edge_mmllm_export.families.composite import Composite, Part, Pathway
from edge_mmllm_export.models.config import Fields
from edge_mmllm_export.models.pixel_shuffle import PixelShuffle, PixelShuffleConfig
from edge_mmllm_export.models.siglip import Siglip

_BACKBONES = (Renames((("model.", "model.text_model."), ("", ""))),)
#: What the vision configs of the releases call themselves.
_TOWERS = ("idefics3_vision", "idefics3", "smolvlm_vision", "smolvlm")
#: The words around a picture's tokens, the same in every release. Source: `processing_idefics3.py`.
_LAYOUT = {
    "kind": "tiles",
    "fence": "<fake_token_around_image>",
    "whole": "<global-img>",
    "tile": "<row_{row}_col_{column}>",
}


def idefics3(checkpoint: Checkpoint, context: int | None) -> Composite:
    """The model of an Idefics3 or SmolVLM config. Raises: CheckpointError."""
    where = f"{checkpoint.source}, config.json"
    f = Fields(checkpoint.config, where)
    language, renames = hub.backbone(checkpoint, context, _BACKBONES)
    vision = Fields(
        hub.part(checkpoint, "vision_config", {}, _TOWERS[0]), f"{where}, vision_config"
    )
    vision.one_of("model_type", _TOWERS)
    tower = Siglip.from_idefics3(vision)
    factor = f.size("scale_factor", 2)
    config = PixelShuffleConfig(tower.side, factor, tower.width, language.hidden_size)
    connector = PixelShuffle(config, where)
    token_id = f.size("image_token_id", 128257, least=0)
    image = Modality(
        stages=(),
        placeholder=hub.placeholder(checkpoint, token_id),
        token_id=token_id,
        tokens=connector.tokens(tower.tokens),
        layout=_LAYOUT,
        settings=hub.image_settings(checkpoint),
    )
    path = Pathway(
        name="image",
        encoder=Part(tower, "model.vision_model."),
        projector=Part(connector, "model.connector."),
        modality=image,
    )
    return Composite(f.get("model_type"), language, renames, [path])
