"""Qwen2-VL's language model: qwen2 whose rotary embedding knows three streams of positions.

Each frequency turns by one stream: frame, row or column of a picture's row. For text the three
are equal, and it computes what qwen2 does. The first free position is a state, since a picture
takes fewer positions than tokens.

Source: Qwen2-VL (arXiv 2409.12191) section 2.1; `Qwen2VLTextModel` of transformers 5.23.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np

from edge_mmllm.errors import CheckpointError
from edge_mmllm.spec import StateSpec
from edge_mmllm_export.checkpoints.base import Checkpoint
from edge_mmllm_export.checkpoints.view import CheckpointView, Renames
from edge_mmllm_export.models.config import Fields
from edge_mmllm_export.models.llama import Llama, LlamaConfig
from edge_mmllm_export.ops.base import Ops, Rope

T = TypeVar("T")

PLACE = StateSpec("place", (1,), "int64", "place")
#: Frequencies of each stream where a config does not say. Source: transformers 5.23.
_SECTIONS = [16, 24, 24]


class Qwen2Vl(Llama):
    """See the module.

    Args:
        sections: how many frequencies turn by frame, row and column.

    Raises:
        CheckpointError: they do not add up to the head's.
    """

    def __init__(self, config: LlamaConfig, sections: list[int], where: str = "") -> None:
        super().__init__(config)
        self.name = "qwen2_vl_text"
        if sum(sections) != len(config.inv_freq):
            raise CheckpointError(
                "mrope_section does not fit the head size",
                where=where,
                expected=f"numbers that add up to {len(config.inv_freq)}",
                found=str(sections),
            )
        self.sections = tuple(sections)
        self._streams = np.repeat(np.arange(len(sections)) % 3, sections)

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, config: dict[str, Any], renames: Renames, context: int | None
    ) -> Qwen2Vl:
        """The model of a `text_config`, or of a flat config. Raises: CheckpointError."""
        f = Fields(config, f"{checkpoint.source}, config.json")
        scaling = {**f.table("rope_scaling"), **f.table("rope_parameters")}
        sections = scaling.pop("mrope_section", _SECTIONS)
        if scaling.get("rope_type", scaling.get("type")) == "mrope":
            scaling |= {"rope_type": "default"}
        own = {
            "rope_theta": 1e6,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 32768,
            **config,
            "model_type": "qwen2",
            "rope_scaling": scaling,
            "rope_parameters": None,
        }
        where = f"{checkpoint.source}, rope_scaling"
        whole = isinstance(sections, list) and all(type(n) is int and n > 0 for n in sections)
        if not whole:
            raise CheckpointError("mrope_section cannot be used", where=where, found=str(sections))
        text = Llama.from_checkpoint(CheckpointView(checkpoint, own, renames), context)
        return cls(text.config, sections, where)

    def states(self) -> tuple[StateSpec, ...]:
        return (*super().states(), PLACE)

    def turns(self, op: Ops[T]) -> Rope | T:
        return op.stream_angles(PLACE, self.config.inv_freq, self._streams)
