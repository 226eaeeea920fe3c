"""What an export is asked to do, and what it will take: bytes on disk, memory, state."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import get_args

from edge_mmllm.bundle import QuantGroup
from edge_mmllm.errors import MemoryLimitExceeded, UsageError
from edge_mmllm_export import verify
from edge_mmllm_export.formats import FORMATS, Artefact, Inputs, Job
from edge_mmllm_export.gguf.types import WORDS, GgufWord, Kind
from edge_mmllm_export.quantize.schemes import QuantPlan, Scheme, component
from edge_mmllm_export.weights import TILE_BYTES, Weight

#: RSS of the process before the first tile: Python, numpy, onnx, tokenizers and their libraries.
_BASE_RAM = 110 << 20
#: Temporaries of one worker, in tiles: the stored rows, float32 rows, codes, packed codes.
_TILES_PER_WORKER = 4


@dataclass(frozen=True)
class ExportOptions:
    """What `edge-mmllm export` was asked to do.

    Attributes:
        plan: quantization.
        inputs: `ids` or `embeds` (see `onnx.write_stages`).
        context: longest context to support; None = the model's own, at most 32768.
        tokenizer: a `tokenizer.json`, an RWKV World vocabulary (`.txt`), `bytes`, `none`, or None
            for the checkpoint's own.
        lora: folder of a LoRA adapter in PEFT layout, merged in.
        gate: judge the artefact before it becomes a bundle.
        accept_quality_loss: keep a bundle that failed the gate, marked as such.
        max_ram: bytes the export may use; refused up front where it would not do.
        workers: threads; None = what affinity and quota allow.
        format: a key of `formats.FORMATS`.
        gguf_type: what GGUF stores matrices as, e.g. `Q4_K_M`; takes the place of the plan's name.
        gguf_overrides: (pattern over our names, GGUF's type) of some matrices, as `plan.overrides`
            in the format's own words; the last match wins.
        imatrix: a file with an importance matrix, for what llama.cpp quantizes.
        imatrix_text: a text to compute one from.
        imatrix_chunks: pieces of 512 tokens of that text to read at most.
        mlc_quant: one of mlc-llm's names, e.g. `q4f16_1`; takes the place of the plan's name.
        targets: what MLC's model libraries are compiled for; `none`: weights alone; empty: this
            machine.
        standalone: write a C library without a runtime for each target, beside.
    """

    plan: QuantPlan = field(default_factory=QuantPlan)
    inputs: Inputs = "ids"
    context: int | None = None
    tokenizer: str | None = None
    lora: str | None = None
    gate: bool = True
    gate_text: str | None = None
    accept_quality_loss: bool = False
    max_ram: int | None = None
    workers: int | None = None
    force: bool = False
    command: str = ""
    format: str = "onnx"
    gguf_type: GgufWord | None = None
    gguf_overrides: tuple[tuple[str, Kind], ...] = ()
    imatrix: str | None = None
    imatrix_text: str | None = None
    imatrix_chunks: int = 20
    mlc_quant: str | None = None
    targets: tuple[str, ...] = ()
    standalone: bool = False

    def __post_init__(self) -> None:
        for name in ("workers", "max_ram", "context", "imatrix_chunks"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise UsageError(f"{name} must be a whole number above 0", found=repr(value))
        if self.format not in FORMATS:
            raise UsageError("unknown format", expected=" | ".join(FORMATS), found=self.format)
        if self.gguf_type is not None and (self.format != "gguf" or self.gguf_type not in WORDS):
            raise UsageError(
                "gguf_type does not fit",
                expected=f"with format gguf: {' | '.join(WORDS)}",
                found=f"{self.gguf_type!r} with format {self.format}",
            )
        matrix = self.imatrix or self.imatrix_text
        if self.format != "gguf" and (matrix or self.gguf_overrides):
            raise UsageError(
                "importance matrices and GGUF's types are for --format gguf",
                found=matrix or f"{self.gguf_overrides[0][0]}={self.gguf_overrides[0][1]}",
            )
        if self.imatrix is not None and self.imatrix_text is not None:
            raise UsageError("--imatrix and --imatrix-text exclude each other", expected="one")
        if self.format != "mlc" and (self.mlc_quant is not None or self.targets):
            raise UsageError(
                "mlc_quant and targets are for --format mlc",
                found=self.mlc_quant or " ".join(self.targets),
            )
        if self.standalone and (self.format != "mlc" or self.targets == ("none",)):
            raise UsageError(
                "standalone libraries are for --format mlc with a target",
                found=f"--format {self.format} {' '.join(f'--target {t}' for t in self.targets)}",
            )
        if self.inputs not in get_args(Inputs):
            raise UsageError(
                "unknown inputs", expected=" | ".join(get_args(Inputs)), found=repr(self.inputs)
            )


@dataclass(frozen=True)
class ExportPlan:
    """What an export would do (`--dry-run`). Bytes are of the bundle's weights."""

    architecture: str
    parameters: int
    tensors: int
    groups: tuple[QuantGroup, ...]
    disk_bytes: int
    peak_ram_bytes: int
    gate_ram_bytes: int
    context_length: int | None
    state_bytes_per_token: int
    state_bytes_constant: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * sum(g.size_bytes for g in self.groups) / self.parameters

    def check(self, options: ExportOptions, workers: int) -> None:
        """`--max-ram` holds or the export is refused before it starts."""
        limit = options.max_ram
        if limit is None:
            return
        needs = {"the export": self.peak_ram_bytes}
        fix = "raise --max-ram" + (", or --threads 1" if workers > 1 else "")
        if options.gate:
            needs["the quality gate"] = self.gate_ram_bytes
            fix += ", or --gate off and `edge-mmllm check` on a larger machine"
        for what, size in needs.items():
            if size > limit:
                raise MemoryLimitExceeded(
                    f"{what} would not fit the memory allowed",
                    expected=f"at most {limit / 2**20:.0f} MiB (--max-ram)",
                    found=f"about {size / 2**20:.0f} MiB with {workers} workers",
                    fix=fix,
                )


def plan_of(job: Job, artefact: Artefact) -> ExportPlan:
    """What writing this artefact will take."""
    model, groups = job.model, artefact.groups
    states = model.states()
    ram = _BASE_RAM + job.workers * _TILES_PER_WORKER * TILE_BYTES
    ram += 3 * len(job.text.tokenizer_json or b"")
    return ExportPlan(
        architecture=model.name,
        parameters=sum(w.size for w in job.weights.values()),
        tensors=len(job.weights),
        groups=groups,
        disk_bytes=artefact.size_bytes,
        peak_ram_bytes=max(ram, artefact.child_ram_bytes),
        gate_ram_bytes=_gate_ram(groups, model.vocab_size, model.context_length),
        context_length=model.context_length,
        state_bytes_per_token=sum(s.size_bytes(1) for s in states if s.grows),
        state_bytes_constant=sum(s.size_bytes(0) for s in states if not s.grows),
    )


def _gate_ram(groups: tuple[QuantGroup, ...], vocab_size: int, context: int | None) -> int:
    """What the gate's child takes: the artefact as onnxruntime holds it (mapped, and packed
    anew), three sets of logits and a streamed oracle. An upper bound of what was seen."""
    tokens = min(verify.GATE_TOKENS, context or verify.GATE_TOKENS)
    artefact = sum(g.size_bytes for g in groups)
    return (160 << 20) + int(1.7 * artefact) + 3 * tokens * vocab_size * 4


def quant_groups(weights: Mapping[str, Weight]) -> tuple[QuantGroup, ...]:
    """Bytes by component, role and scheme, scales and zero points included."""
    found: dict[tuple[str, Scheme], list[Weight]] = {}
    for w in weights.values():
        part = component(w.name)
        group = w.role if part is None else f"{w.name.split('.')[0]} {part} {w.role}"
        found.setdefault((group, w.scheme), []).append(w)
    return tuple(
        QuantGroup(
            group=group,
            scheme=scheme.name,
            bits=float(scheme.bits),
            block_size=scheme.block_size if scheme.quantized else None,
            symmetric=scheme.zero == "none" if scheme.quantized else None,
            tensors=len(members),
            size_bytes=sum(_stored_bytes(w) for w in members),
        )
        for (group, scheme), members in found.items()
    )


def _stored_bytes(w: Weight) -> int:
    if not w.scheme.quantized:
        return w.size * w.scheme.bits // 8
    padded = w.shape[0] * math.ceil(w.shape[1] / w.scheme.block_size) * w.scheme.block_size
    return int(padded * w.scheme.bits_per_weight() / 8)
