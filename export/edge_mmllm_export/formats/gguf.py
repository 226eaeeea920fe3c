"""GGUF: one file for llama.cpp."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from edge_mmllm.bundle import BundleWriter, QuantGroup
from edge_mmllm.bundle.manifest import Engine
from edge_mmllm.errors import UsageError
from edge_mmllm.spec import StateSpec
from edge_mmllm_export import gguf
from edge_mmllm_export.formats.base import Advance, Job, Written
from edge_mmllm_export.gguf_types import GgufType
from edge_mmllm_export.ops.base import Architecture
from edge_mmllm_export.quantize.schemes import QuantPlan
from edge_mmllm_export.verify import plan_scheme
from edge_mmllm_export.weights import Weight

if TYPE_CHECKING:
    from edge_mmllm_export.planning import ExportOptions

#: Metadata but for the tokenizer, and the manifest.
_BESIDE_BYTES = 4 << 20
#: A vocabulary in GGUF's metadata, against its `tokenizer.json`, which stands beside it.
_VOCABULARY_SHARE = 3


@dataclass(frozen=True)
class GgufArtefact:
    """One file (see `gguf.layout`)."""

    job: Job
    file: gguf.GgufFile

    @cached_property
    def groups(self) -> tuple[QuantGroup, ...]:
        return self.file.groups()

    @property
    def size_bytes(self) -> int:
        vocabulary = len(self.job.text.tokenizer_json or b"")
        return self.file.size_bytes + _VOCABULARY_SHARE * vocabulary + _BESIDE_BYTES

    @property
    def context_length(self) -> int | None:
        return self.file.map.context_length

    @property
    def states(self) -> tuple[StateSpec, ...]:
        return ()  # llama.cpp owns its states

    @property
    def details(self) -> dict[str, Any]:
        return {"gguf": {"file_type": self.file.file_type}}

    def write(self, writer: BundleWriter, progress: Advance) -> Written:
        job, path = self.job, writer.path(gguf.FILE)
        stage = gguf.write(
            self.file, job.text, job.checkpoint, path, workers=job.workers, progress=progress
        )
        return Written({"decoder": stage}, {"architecture": self.file.map.architecture})


class GgufFormat:
    """`--format gguf`."""

    engine: Engine = "gguf"
    packages = ("gguf", "llama-cpp-python")

    def variant(self, options: ExportOptions) -> str | None:
        return options.gguf_type

    def resolved(self, options: ExportOptions) -> ExportOptions:
        if options.gguf_type is None:
            return options
        return replace(options, plan=gguf.plan_for(options.gguf_type, options.plan))

    def layout(self, job: Job, options: ExportOptions) -> GgufArtefact:
        if options.inputs != "ids":
            raise UsageError("--inputs embeds is for --format onnx", expected="--inputs ids")
        file = gguf.layout(job.model, job.weights, options.plan, options.gguf_type)
        return GgufArtefact(job, file)

    def as_stored(
        self, model: Architecture, weights: Mapping[str, Weight], plan: QuantPlan, word: str | None
    ) -> dict[str, Weight]:
        file = gguf.layout(model, weights, plan, cast("GgufType | None", word))
        return gguf.as_stored(file, weights)

    def judged_as(self, options: ExportOptions) -> str:
        return plan_scheme(options.plan)

    def unjudged(self, options: ExportOptions) -> str | None:
        if importlib.util.find_spec("llama_cpp") is not None:
            return None
        return "llama.cpp is not installed: pip install 'edge-mmllm[gguf]', then edge-mmllm check"


GGUF = GgufFormat()
