"""LLaVA and LLaVA-1.5, with any encoder and any backbone that has a definition.

Source: LLaVA-1.5 (arXiv 2310.03744); `modeling_llava.py` of transformers 5.23.
"""

from __future__ import annotations

from typing import Any

from edge_mmllm.modality import Modality
from edge_mmllm_export.checkpoints.base import Checkpoint
from edge_mmllm_export.checkpoints.view import Renames
from edge_mmllm_export.families import hub
from edge_mmllm_export.families.composite import Composite, Part, Pathway
from edge_mmllm_export.models.config import MAX_LAYERS, Fields
from edge_mmllm_export.models.mlp import ACTIVATIONS, Mlp, MlpConfig

#: Names of the language model: as transformers 5 has them in memory, as 4 and `save_pretrained` do.
BACKBONES = (
    Renames((("model.", "model.language_model."), ("", ""))),
    Renames((("", "language_model."),)),
)
TOWERS = (
    "vision_tower.vision_model.",
    "model.vision_tower.vision_model.",
    "model.vision_tower.",
    "vision_tower.",
)
PROJECTORS = ("multi_modal_projector.", "model.multi_modal_projector.")


def tower_of(checkpoint: Checkpoint, f: Fields, select: str | None = None) -> Any:
    """The encoder that the config wants; `select` goes before the config's. Raises:
    CheckpointError."""
    layers = f.numbers("vision_feature_layer", (-2,), least=-MAX_LAYERS, most=MAX_LAYERS)
    own = f.one_of("vision_feature_select_strategy", ("default", "full"), "default")
    return hub.vision_encoder(checkpoint, layers, select or own, "clip_vision_model")


def mlp_of(f: Fields, width: int, hidden_size: int) -> MlpConfig:
    """The projector's sizes. Raises: CheckpointError."""
    return MlpConfig(
        widths=(width, hidden_size, hidden_size),
        names=("linear_1", "linear_2"),
        activation=ACTIVATIONS[f.one_of("projector_hidden_act", tuple(ACTIVATIONS), "gelu")],
        bias=f.flag("multimodal_projector_bias", True),
    )


def llava(checkpoint: Checkpoint, context: int | None) -> Composite:
    """The model of a LLaVA config. Raises: CheckpointError."""
    f = Fields(checkpoint.config, f"{checkpoint.source}, config.json")
    language, renames = hub.backbone(checkpoint, context, BACKBONES)
    tower = tower_of(checkpoint, f)
    mlp = Mlp(mlp_of(f, tower.width, language.hidden_size))
    token_id = f.size("image_token_id", f.get("image_token_index", 32000), least=0)
    image = Modality(
        stages=(),
        placeholder=hub.placeholder(checkpoint, token_id),
        token_id=token_id,
        tokens=tower.tokens,
        layout={"kind": "plain"},
        settings=hub.image_settings(checkpoint),
    )
    path = Pathway(
        name="image",
        encoder=Part(tower, hub.prefix(checkpoint, *TOWERS)),
        projector=Part(mlp, hub.prefix(checkpoint, *PROJECTORS)),
        modality=image,
    )
    return Composite(f.get("model_type"), language, renames, [path])
