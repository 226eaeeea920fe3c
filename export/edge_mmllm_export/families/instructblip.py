"""InstructBLIP: BLIP-2 whose Q-Former reads the instruction as well, through its own tokenizer.

Source: InstructBLIP (arXiv 2305.06500); `processing_instructblip.py` of transformers 5.23.
"""

from __future__ import annotations

from edge_mmllm.errors import CheckpointError
from edge_mmllm_export.checkpoints.base import Checkpoint
from edge_mmllm_export.checkpoints.text import load_tokenizer
from edge_mmllm_export.families.blip2 import blip2
from edge_mmllm_export.families.composite import Composite


def instructblip(checkpoint: Checkpoint, context: int | None) -> Composite:
    """The model of an InstructBLIP config. Raises: CheckpointError."""
    path = checkpoint.files[0].parent / "qformer_tokenizer" / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(
            "the checkpoint does not say how its Q-Former reads the instruction",
            where=str(checkpoint.source),
            expected="qformer_tokenizer/tokenizer.json",
            fix="copy it from the checkpoint's original release",
        )
    content = path.read_bytes()
    load_tokenizer(content, str(path))
    return blip2(checkpoint, context, content)
