"""ONNX: graphs for onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_mmllm.bundle import BundleWriter, QuantGroup
from edge_mmllm.bundle.manifest import Engine
from edge_mmllm.spec import StateSpec
from edge_mmllm_export import weights as bound
from edge_mmllm_export.formats.base import Advance, Inputs, Job, Written
from edge_mmllm_export.onnx import write_stages
from edge_mmllm_export.ops.base import Architecture
from edge_mmllm_export.planning import quant_groups
from edge_mmllm_export.quantize.schemes import QuantPlan
from edge_mmllm_export.verify import plan_scheme
from edge_mmllm_export.weights import Weight

if TYPE_CHECKING:
    from edge_mmllm_export.planning import ExportOptions

#: The graphs, their tables and the manifest.
_BESIDE_BYTES = 4 << 20


@dataclass(frozen=True)
class OnnxArtefact:
    """Graphs over one file of weights (see `onnx.write_stages`)."""

    job: Job
    inputs: Inputs

    @cached_property
    def groups(self) -> tuple[QuantGroup, ...]:
        return quant_groups(self.job.weights)

    @property
    def size_bytes(self) -> int:
        return sum(g.size_bytes for g in self.groups) + _BESIDE_BYTES

    @property
    def child_ram_bytes(self) -> int:
        return 0

    @property
    def context_length(self) -> int | None:
        return self.job.model.context_length

    @property
    def states(self) -> tuple[StateSpec, ...]:
        return self.job.model.states()

    @property
    def details(self) -> dict[str, Any]:
        return {}

    def write(self, writer: BundleWriter, progress: Advance) -> Written:
        job = self.job
        stages = write_stages(
            job.model,
            job.weights,
            writer.root,
            inputs=self.inputs,
            workers=job.workers,
            progress=progress,
        )
        return Written(stages, {"opset": 21, "data": "weights.bin"})


class OnnxFormat:
    """`--format onnx`."""

    engine: Engine = "onnx"
    packages = ("onnx", "onnxruntime")

    def variant(self, options: ExportOptions) -> str | None:
        return None

    def resolved(self, options: ExportOptions) -> ExportOptions:
        return options

    def layout(self, job: Job, options: ExportOptions) -> OnnxArtefact:
        return OnnxArtefact(job, options.inputs)

    def as_stored(
        self,
        model: Architecture,
        weights: Mapping[str, Weight],
        plan: QuantPlan,
        word: str | None,
        folder: Path,
    ) -> dict[str, Weight]:
        return bound.as_stored(weights)

    def judged_as(self, options: ExportOptions) -> str:
        return plan_scheme(options.plan)

    def unjudged(self, options: ExportOptions) -> str | None:
        return None


ONNX = OnnxFormat()
