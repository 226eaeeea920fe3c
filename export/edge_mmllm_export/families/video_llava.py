"""Video-LLaVA: pictures and frames of videos through towers of their own, one projector.

Source: Video-LLaVA (arXiv 2311.10122); `modeling_video_llava.py` of transformers 5.23.
"""

from __future__ import annotations

from edge_mmllm.modality import Modality
from edge_mmllm_export.checkpoints.base import Checkpoint
from edge_mmllm_export.families import hub
from edge_mmllm_export.families.composite import Composite, Part, Pathway
from edge_mmllm_export.families.llava import BACKBONES, PROJECTORS, TOWERS, mlp_of, tower_of
from edge_mmllm_export.models.config import Fields
from edge_mmllm_export.models.mlp import Mlp


def video_llava(checkpoint: Checkpoint, context: int | None) -> Composite:
    """The model of a Video-LLaVA config. Raises: CheckpointError."""
    f = Fields(checkpoint.config, f"{checkpoint.source}, config.json")
    language, renames = hub.backbone(checkpoint, context, BACKBONES)
    # Frames keep the class token, whatever the config says of pictures.
    image, video = tower_of(checkpoint, f), tower_of(checkpoint, f, "full")
    mlp = Mlp(mlp_of(f, image.width, language.hidden_size))
    projector = Part(mlp, hub.prefix(checkpoint, *PROJECTORS))

    def modality(name: str, tokens: int, default: int) -> Modality:
        token_id = f.size(f"{name}_token_id", f.get(f"{name}_token_index", default), least=0)
        read = hub.image_settings if name == "image" else hub.video_settings
        return Modality(
            stages=(),
            placeholder=hub.placeholder(checkpoint, token_id, f"{name}_token"),
            token_id=token_id,
            tokens=tokens,
            layout={"kind": "plain"},
            settings=read(checkpoint),
        )

    def tower(name: str) -> str:
        own = [prefix.replace("vision_tower", f"{name}_tower") for prefix in TOWERS]
        return hub.prefix(checkpoint, *own)

    paths = [
        Pathway(
            "image", Part(image, tower("image")), projector, modality("image", image.tokens, 32000)
        ),
        Pathway(
            "video",
            Part(video, tower("video")),
            projector,
            modality("video", video.tokens, 32001),
            projector_of="image",
        ),
    ]
    return Composite("video_llava", language, renames, paths)
