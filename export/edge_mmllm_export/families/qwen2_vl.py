"""Qwen2-VL: pictures and videos of any size, three streams of rotary positions.

Source: Qwen2-VL (arXiv 2409.12191); `modeling_qwen2_vl.py` of transformers 5.23.
"""

from __future__ import annotations

from typing import Any

from edge_mmllm.modality import Modality
from edge_mmllm_export.checkpoints.base import Checkpoint
from edge_mmllm_export.checkpoints.view import Renames
from edge_mmllm_export.families import hub
from edge_mmllm_export.families.composite import Composite, Part, Pathway
from edge_mmllm_export.models.config import Fields
from edge_mmllm_export.models.qwen2_vl import Qwen2Vl
from edge_mmllm_export.models.qwen2_vl_vision import (
    PatchMerger,
    Qwen2VlVision,
    Qwen2VlVisionConfig,
)

#: As transformers 5 has the names in memory, and as every release writes them.
_IN_MEMORY = Renames((("model.", "model.language_model."), ("", "")))
_RELEASED = Renames((("", ""),))


def qwen2_vl(checkpoint: Checkpoint, context: int | None) -> Composite:
    """The model of a Qwen2-VL config, whose text settings lie flat in the releases.

    Raises: CheckpointError.
    """
    where = f"{checkpoint.source}, config.json"
    f = Fields(checkpoint.config, where)
    nested = any(name.startswith(_IN_MEMORY.pairs[0][1]) for name in checkpoint.tensors)
    renames = _IN_MEMORY if nested else _RELEASED
    text: dict[str, Any] = {**f.config, **f.table("text_config")}
    text["tie_word_embeddings"] = any(t.get("tie_word_embeddings") for t in (text, f.config))
    language = Qwen2Vl.of(checkpoint, text, renames, context)
    config = Qwen2VlVisionConfig.from_config(Fields(f.table("vision_config"), where))
    prefix = hub.prefix(checkpoint, "visual.", "model.visual.")
    parts = Part(Qwen2VlVision(config), prefix), Part(PatchMerger(config), prefix)
    paths = []
    for name, default, settings in (
        ("image", 151655, hub.image_settings(checkpoint)),
        ("video", 151656, hub.video_settings(checkpoint)),
    ):
        token_id = f.size(f"{name}_token_id", default, least=0)
        modality = Modality(
            stages=(),
            placeholder=hub.placeholder(checkpoint, token_id, f"{name}_token"),
            token_id=token_id,
            tokens=0,
            layout={"kind": "grid", "merge": config.merge},
            settings=settings,
        )
        shared: Any = None if name == "image" else "image"
        paths.append(Pathway(name, *parts, modality, encoder_of=shared, projector_of=shared))  # type: ignore[arg-type]
    return Composite("qwen2_vl", language, renames, paths)
