"""GGUF: one file for llama.cpp, and a second one for what stands before a multimodal backbone."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from edge_mmllm.bundle import BundleWriter, QuantGroup
from edge_mmllm.bundle.manifest import Engine
from edge_mmllm.errors import UsageError
from edge_mmllm.spec import Stage, StateSpec
from edge_mmllm_export.families.composite import Composite
from edge_mmllm_export.formats.base import Advance, Job, Written
from edge_mmllm_export.gguf import imatrix_collect
from edge_mmllm_export.gguf import mixes as gguf_mixes
from edge_mmllm_export.gguf import mmproj as gguf_mmproj
from edge_mmllm_export.gguf import write as gguf
from edge_mmllm_export.gguf.imatrix import read as read_imatrix
from edge_mmllm_export.gguf.imatrix_collect import Calibration, collect
from edge_mmllm_export.gguf.layout import GgufFile, Wanted, layout_of
from edge_mmllm_export.gguf.stored import as_stored, as_stored_of
from edge_mmllm_export.gguf.types import BITS, MIXES, GgufWord
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
    """The files (see `gguf.layout`).

    Attributes:
        importance: for what llama.cpp quantizes.
        beside: encoders and projectors, of a multimodal model (`gguf.mmproj`).
    """

    job: Job
    file: GgufFile
    importance: gguf.Importance | None = None
    beside: GgufFile | None = None

    @cached_property
    def groups(self) -> tuple[QuantGroup, ...]:
        more = self.beside.groups() if self.beside else ()
        return (*self.file.groups(), *(replace(g, group=f"mmproj {g.group}") for g in more))

    @property
    def size_bytes(self) -> int:
        vocabulary = len(self.job.text.tokenizer_json or b"")
        text = _VOCABULARY_SHARE * vocabulary * (2 if self.file.word else 1)
        beside = self.beside.size_bytes if self.beside else 0
        return self.file.size_bytes + self.file.draft_bytes + beside + text + _BESIDE_BYTES

    @property
    def child_ram_bytes(self) -> int:
        if not self.file.word:
            return 0
        needs = gguf_mixes.ram_bytes(max(t.written_bytes for t in self.file.tensors))
        if self.importance is not None:
            needs = max(needs, imatrix_collect.ram_bytes(self.job.model, self.job.weights))
        return needs

    @property
    def context_length(self) -> int | None:
        return self.file.map.context_length

    @property
    def states(self) -> tuple[StateSpec, ...]:
        return ()  # llama.cpp owns its states

    @property
    def details(self) -> dict[str, Any]:
        said: dict[str, Any] = {"file_type": self.file.file_type}
        if isinstance(self.job.model, Composite):
            said["activations"] = gguf_mmproj.activations(self.job.model)
        return {"gguf": said}

    def write(self, writer: BundleWriter, progress: Advance) -> Written:
        job, path = self.job, writer.path(gguf.FILE)
        stage = gguf.write(
            self.file, job.text, job.checkpoint, path,
            importance=self.importance, workers=job.workers, progress=progress,
        )  # fmt: skip
        said = {"architecture": self.file.map.architecture}
        if getattr(job.model, "decoder_start_id", None) is not None:
            reader = Stage(gguf.FILE, ("input_ids",), ())
            return Written({"decoder": stage, "encode_text": reader}, said)
        if self.beside is None or not isinstance(job.model, Composite):
            return Written({"decoder": stage}, said)
        path = writer.path(gguf_mmproj.FILE)
        gguf.write(self.beside, None, job.checkpoint, path, workers=job.workers, progress=progress)
        stages = {**gguf_mmproj.stages(job.model), "decoder": stage}
        return Written(stages, said, gguf_mmproj.modalities(job.model))


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
        wanted = Wanted(options.plan, options.gguf_type, options.gguf_overrides)
        importance, beside = _importance(job, options), None
        if isinstance(job.model, Composite):
            beside = layout_of(gguf_mmproj.mmproj_map(job.model), job.weights, wanted)
        file = gguf.layout(_backbone(job.model), job.weights, wanted, job.checkpoint, importance)
        return GgufArtefact(job, file, importance, beside)

    def as_stored(
        self,
        model: Architecture,
        weights: Mapping[str, Weight],
        plan: QuantPlan,
        word: str | None,
        folder: Path,
    ) -> dict[str, Weight]:
        wanted = Wanted(plan, cast("GgufWord | None", word))
        out = as_stored(_backbone(model), weights, wanted, folder / gguf.FILE)
        if isinstance(model, Composite):
            path = folder / gguf_mmproj.FILE
            out = as_stored_of(gguf_mmproj.mmproj_map(model), out, wanted, path)
        return out

    def judged_as(self, options: ExportOptions) -> str:
        kinds = [kind for _, kind in options.gguf_overrides]
        bits = [BITS[kind] for kind in kinds]
        if options.gguf_type in MIXES:
            bits.append(int(options.gguf_type.lstrip("I")[1]))
        if bits and min(bits) < 4:
            return f"int{min(bits)}"
        scheme = plan_scheme(options.plan)
        if bits and min(bits) < 8:
            return "int4"
        return "bf16" if scheme == "f16" and "BF16" in (options.gguf_type, *kinds) else scheme

    def unjudged(self, options: ExportOptions) -> str | None:
        if importlib.util.find_spec("llama_cpp") is not None:
            return None
        return "llama.cpp is not installed: pip install 'edge-mmllm[gguf]', then edge-mmllm check"


def _backbone(model: Architecture) -> Architecture:
    """The part that reads tokens."""
    return model.backbone if isinstance(model, Composite) else model


def _importance(job: Job, options: ExportOptions) -> gguf.Importance | None:
    """The matrix that was asked for: read now, or computed when it is needed."""
    if options.imatrix is not None:
        return read_imatrix(Path(options.imatrix))
    if options.imatrix_text is None:
        return None
    calibration = Calibration(options.imatrix_text, options.imatrix_chunks)
    calibration.check(job.text)
    return partial(collect, _backbone(job.model), job.weights, job.text, calibration)


GGUF = GgufFormat()
