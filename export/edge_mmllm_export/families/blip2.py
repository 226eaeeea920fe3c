"""BLIP-2 with OPT, Flan-T5 or any other backbone that has a definition.

Source: BLIP-2 (arXiv 2301.12597); `modeling_blip_2.py` and `processing_blip_2.py` of transformers
5.23, which puts a picture's rows before the whole prompt, its BOS included.
"""

from __future__ import annotations

from edge_mmllm.modality import Modality
from edge_mmllm_export.checkpoints.base import Checkpoint
from edge_mmllm_export.checkpoints.view import Renames
from edge_mmllm_export.families import hub
from edge_mmllm_export.families.composite import Composite, Part, Pathway
from edge_mmllm_export.models.config import Fields
from edge_mmllm_export.models.eva import Eva
from edge_mmllm_export.models.qformer import QFormer, QFormerConfig

BACKBONES = (Renames((("", "language_model."),)),)


def blip2(checkpoint: Checkpoint, context: int | None, tokenizer: bytes | None = None) -> Composite:
    """The model of a BLIP-2 config; with the `tokenizer.json` of a Q-Former that reads the prompt
    too, of an InstructBLIP config. Raises: CheckpointError."""
    where = f"{checkpoint.source}, config.json"
    f = Fields(checkpoint.config, where)
    language, renames = hub.backbone(checkpoint, context, BACKBONES, absent="opt")
    tower = Eva.from_config(Fields(hub.part(checkpoint, "vision_config", {}, "eva"), where))
    qformer = hub.part(checkpoint, "qformer_config", {}, "qformer")
    config = QFormerConfig.from_json(
        qformer | {"encoder_hidden_size": tower.width},
        f"{where}, qformer_config",
        queries=f.size("num_query_tokens", 32),
        output_size=language.hidden_size,
        text=tokenizer is not None,
    )
    token_id = f.size("image_token_index", f.get("image_token_id"), least=0)
    file = None if tokenizer is None else "qformer_tokenizer.json"
    image = Modality(
        stages=(),
        placeholder=hub.placeholder(checkpoint, token_id),
        token_id=token_id,
        tokens=config.queries,
        layout={"kind": "plain"},
        settings=hub.image_settings(checkpoint),
        placement="front",
        text_tokenizer=file,
    )
    path = Pathway("image", Part(tower, "vision_model."), Part(QFormer(config), ""), image)
    files = {} if file is None or tokenizer is None else {file: tokenizer}
    return Composite(f.get("model_type"), language, renames, [path], files=files)
