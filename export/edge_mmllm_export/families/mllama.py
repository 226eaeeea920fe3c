"""Llama-3.2-Vision: pictures in tiles, beside the text, in the states of cross attention layers.

Source: `modeling_mllama.py` and `processing_mllama.py` of transformers 5.23.
"""

from __future__ import annotations

from edge_mmllm.modality import Modality
from edge_mmllm_export.checkpoints.base import Checkpoint
from edge_mmllm_export.checkpoints.view import CheckpointView
from edge_mmllm_export.families import hub
from edge_mmllm_export.families.composite import Composite, Part, Pathway
from edge_mmllm_export.families.llava import BACKBONES, PROJECTORS
from edge_mmllm_export.models.config import Fields
from edge_mmllm_export.models.mllama import Mllama
from edge_mmllm_export.models.mllama_vision import MllamaVision
from edge_mmllm_export.models.mlp import Mlp, MlpConfig


def mllama(checkpoint: Checkpoint, context: int | None) -> Composite:
    """The model of a Llama-3.2-Vision config. Raises: CheckpointError."""
    where = f"{checkpoint.source}, config.json"
    f = Fields(checkpoint.config, where)
    renames = hub.renames(checkpoint, BACKBONES)
    config = hub.part(checkpoint, "text_config", {}, "mllama_text_model")
    language = Mllama.from_checkpoint(CheckpointView(checkpoint, config, renames), context)
    vision = hub.part(checkpoint, "vision_config", {}, "mllama_vision_model")
    tower = MllamaVision.from_config(Fields(vision, f"{where}, vision_config"))
    projector = Mlp(MlpConfig((tower.width, language.hidden_size), ("",)))
    token_id = f.size("image_token_index", f.get("image_token_id", 128256), least=0)
    layout = {"kind": "beside", "sees": "run", "tiles": tower.config.tiles}
    bos = checkpoint.text().spec.bos_token
    image = Modality(
        stages=(),
        placeholder=hub.placeholder(checkpoint, token_id),
        token_id=token_id,
        tokens=tower.tokens_per_tile,
        layout=layout if bos is None else layout | {"bos": bos},
        settings=hub.image_settings(checkpoint),
        target="states",
    )
    encoder = Part(tower, hub.prefix(checkpoint, "vision_model.", "model.vision_model."))
    projection = Part(projector, hub.prefix(checkpoint, *PROJECTORS))
    return Composite("mllama", language, renames, [Pathway("image", encoder, projection, image)])
