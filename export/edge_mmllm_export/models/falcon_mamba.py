"""Falcon Mamba: Mamba-1 with RMS norms, without weights, on dt, B and C.

Source: Falcon Mamba (arXiv 2410.05355) section 2.2, and `modeling_falcon_mamba.py` of
transformers 5.23.
"""

from __future__ import annotations

from typing import TypeVar

from edge_mmllm_export.checkpoints.base import Checkpoint
from edge_mmllm_export.models.config import Fields
from edge_mmllm_export.models.mamba import Mamba, MambaConfig, config_file, hub_config
from edge_mmllm_export.ops.base import Ops

T = TypeVar("T")


class FalconMamba(Mamba):
    """Mamba-1 whose time step and input and output matrices have unit mean square.

    Args:
        selection_eps: of those norms (`mixer_rms_eps`).
    """

    name = "falcon_mamba"

    def __init__(self, config: MambaConfig, selection_eps: float) -> None:
        super().__init__(config)
        self.selection_eps = selection_eps

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, context: int | None = None) -> FalconMamba:
        """Read the hub config. Raises: CheckpointError."""
        f = Fields(checkpoint.config, config_file(checkpoint, cls.name))
        return cls(hub_config(f), f.number("mixer_rms_eps", 1e-6))

    def _selection(self, op: Ops[T], dt: T, b: T, c: T) -> tuple[T, T, T]:
        eps = self.selection_eps
        return op.unit_rms(dt, eps=eps), op.unit_rms(b, eps=eps), op.unit_rms(c, eps=eps)
