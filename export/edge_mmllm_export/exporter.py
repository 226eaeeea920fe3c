"""`export`: from a published checkpoint to a judged bundle, in bounded memory.

read -> map -> validate -> quantize -> write -> verify, one tile of one tensor at a time.
"""

from __future__ import annotations

import hashlib
import math
import os
import platform
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_args

from edge_mmllm.bundle import (
    GOLDEN_FILE,
    Bundle,
    BundleWriter,
    ExportRecord,
    Gate,
    Manifest,
    QuantGroup,
    Quantization,
    SourceFile,
    check_free_space,
    source_hash,
)
from edge_mmllm.bundle import Source as SourceRecord
from edge_mmllm.errors import MemoryLimitExceeded, QualityGateFailed, UsageError
from edge_mmllm.profiling.machine import default_threads
from edge_mmllm.profiling.memory import peak_rss_bytes
from edge_mmllm.spec import TOKENIZER_FILES, ModelSpec, TextSpec
from edge_mmllm_export import verify
from edge_mmllm_export.checkpoints import open_checkpoint
from edge_mmllm_export.checkpoints.base import Checkpoint, TextAssets
from edge_mmllm_export.checkpoints.text import load_tokenizer
from edge_mmllm_export.checkpoints.world import load_world
from edge_mmllm_export.models import build
from edge_mmllm_export.onnx import Inputs, write_stages
from edge_mmllm_export.ops.base import Architecture
from edge_mmllm_export.quantize.schemes import QuantPlan, Scheme
from edge_mmllm_export.weights import TILE_BYTES, Weight, bind

Progress = Callable[[str, int, int], None]

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
        gate: judge the artefact before it becomes a bundle.
        accept_quality_loss: keep a bundle that failed the gate, marked as such.
        max_ram: bytes the export may use; refused up front where it would not do.
        workers: threads; None = what affinity and quota allow.
    """

    plan: QuantPlan = field(default_factory=QuantPlan)
    inputs: Inputs = "ids"
    context: int | None = None
    tokenizer: str | None = None
    gate: bool = True
    gate_text: str | None = None
    accept_quality_loss: bool = False
    max_ram: int | None = None
    workers: int | None = None
    force: bool = False
    command: str = ""

    def __post_init__(self) -> None:
        for name in ("workers", "max_ram", "context"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise UsageError(f"{name} must be a whole number above 0", found=repr(value))
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


@dataclass(frozen=True)
class _Job:
    """An opened checkpoint with its definition and weights."""

    checkpoint: Checkpoint
    model: Architecture
    weights: dict[str, Weight]
    text: TextAssets
    plan: ExportPlan
    workers: int


def plan_export(source: str | os.PathLike[str], options: ExportOptions) -> ExportPlan:
    """What the export would read, write and need; nothing is written.

    Raises: as `export`.
    """
    return _prepare(source, options).plan


def export(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: ExportOptions | None = None,
    *,
    progress: Progress | None = None,
) -> Bundle:
    """Export a checkpoint to an ONNX bundle at `out`.

    Args:
        source: a folder in hub layout, one `.safetensors`, `.pth` or `.gguf`, or a hub id.
        progress: called with (phase, done, total): `quantize` in weights, then `judge`.

    Raises:
        CheckpointError, ExportError, UsageError: see `edge_mmllm.errors`. Nothing is left behind.
    """
    options = options or ExportOptions()
    report = progress or (lambda *_: None)
    started = time.perf_counter()
    job = _prepare(source, options)
    done = 0
    total = sum(w.size for w in job.weights.values())
    lock = threading.Lock()

    def advance(count: int) -> None:
        nonlocal done
        with lock:
            done = min(total, done + count)
            report("quantize", done, total)

    with BundleWriter(out, force=options.force) as writer:
        check_free_space(writer.root, job.plan.disk_bytes)
        hashes = _Hashes(job.checkpoint.files)
        stages = write_stages(
            job.model,
            job.weights,
            writer.root,
            inputs=options.inputs,
            workers=job.workers,
            progress=advance,
        )
        if job.text.tokenizer_json is not None:
            file = TOKENIZER_FILES[job.text.spec.tokenizer]
            writer.path(file).write_bytes(job.text.tokenizer_json)
        manifest = Manifest(
            engine="onnx",
            engine_format={"opset": 21, "data": "weights.bin"},
            source=_source(job.checkpoint, hashes.result()),
            model=_spec(job, stages),
            quantization=Quantization(options.plan.name, job.plan.groups, job.plan.bits_per_weight),
            gate=Gate("not judged"),
            export=ExportRecord(
                tool_versions=_versions(),
                wall_s=round(time.perf_counter() - started, 3),
                peak_rss_bytes=peak_rss_bytes(),
                created_utc=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
                command=options.command,
            ),
        )
        if options.gate:
            report("judge", 0, 1)
            manifest = _judged(writer, manifest, job, options)
            report("judge", 1, 1)
        return writer.commit(manifest)


def _judged(
    writer: BundleWriter, manifest: Manifest, job: _Job, options: ExportOptions
) -> Manifest:
    figures = verify.judge(
        verify.Request(
            bundle=str(writer.draft(manifest)),
            source=str(job.checkpoint.source),
            plan=options.plan,
            context=options.context,
            text=options.gate_text,
            threads=job.workers,
        )
    )
    broken = figures["breaches"]
    if broken and not options.accept_quality_loss:
        raise QualityGateFailed(
            "the exported model disagrees with the checkpoint",
            expected=f"the thresholds of {figures['scheme']}",
            found="; ".join(broken) + _blame(figures),
            fix="more bits, a smaller --block-size, --override for what suffers, or "
            "--accept-quality-loss",
        )
    gate = Gate("failed-accepted" if broken else "passed", figures)
    return replace(manifest, gate=gate, golden=GOLDEN_FILE)


def _blame(figures: dict[str, Any]) -> str:
    """Says whether the stored numbers or the engine's arithmetic made the difference."""
    stored, engine = figures["kl_mean_of_stored_weights"], figures["kl_mean_of_engine"]
    return (
        f" (of the mean divergence, rounding the weights alone gives {stored:.4g}, "
        f"the engine's arithmetic on them {engine:.4g})"
    )


def _prepare(source: str | os.PathLike[str], options: ExportOptions) -> _Job:
    checkpoint = open_checkpoint(Path(source) if isinstance(source, os.PathLike) else source)
    model = build(checkpoint, options.context)
    if options.context is not None and (
        options.context < 1 or options.context > (model.context_length or options.context)
    ):
        raise UsageError(
            "--context does not fit the model",
            expected=f"1 to {model.context_length or 'any number'}",
            found=str(options.context),
        )
    weights = bind(
        checkpoint,
        model.parameters(),
        model.sources(checkpoint.layout),
        ignored=model.ignored(),
        schemes=options.plan.of,
    )
    _check_overrides(options.plan, weights)
    if options.gate:
        verify.gate_text(options.gate_text)
    text = _text(checkpoint, options.tokenizer, model.vocab_size)
    workers = options.workers or default_threads()
    groups = _groups(weights)
    states = model.states()
    ram = _BASE_RAM + workers * _TILES_PER_WORKER * TILE_BYTES
    ram += len(text.tokenizer_json or b"") * 3
    plan = ExportPlan(
        architecture=model.name,
        parameters=sum(w.size for w in weights.values()),
        tensors=len(weights),
        groups=groups,
        disk_bytes=sum(g.size_bytes for g in groups) + (4 << 20),
        peak_ram_bytes=ram,
        gate_ram_bytes=_gate_ram(groups, model.vocab_size, model.context_length),
        context_length=model.context_length,
        state_bytes_per_token=sum(s.size_bytes(1) for s in states if s.grows),
        state_bytes_constant=sum(s.size_bytes(0) for s in states if not s.grows),
    )
    _check_memory(plan, options, workers)
    return _Job(checkpoint, model, weights, text, plan, workers)


def _gate_ram(groups: tuple[QuantGroup, ...], vocab_size: int, context: int | None) -> int:
    """What the gate's child takes: the artefact as onnxruntime holds it (mapped, and packed
    anew), three sets of logits and a streamed oracle. An upper bound of what was seen."""
    tokens = min(verify.GATE_TOKENS, context or verify.GATE_TOKENS)
    artefact = sum(g.size_bytes for g in groups)
    return (160 << 20) + int(1.7 * artefact) + 3 * tokens * vocab_size * 4


def _check_memory(plan: ExportPlan, options: ExportOptions, workers: int) -> None:
    """`--max-ram` holds or the export is refused before it starts."""
    limit = options.max_ram
    if limit is None:
        return
    needs = {"the export": plan.peak_ram_bytes}
    fix = "raise --max-ram" + (", or --threads 1" if workers > 1 else "")
    if options.gate:
        needs["the quality gate"] = plan.gate_ram_bytes
        fix += ", or --gate off and `edge-mmllm check` on a larger machine"
    for what, size in needs.items():
        if size > limit:
            raise MemoryLimitExceeded(
                f"{what} would not fit the memory allowed",
                expected=f"at most {limit / 2**20:.0f} MiB (--max-ram)",
                found=f"about {size / 2**20:.0f} MiB with {workers} workers",
                fix=fix,
            )


def _text(checkpoint: Checkpoint, option: str | None, vocab_size: int) -> TextAssets:
    """The checkpoint's own text settings, or what `--tokenizer` puts in their place."""
    if option is None:
        return checkpoint.text()
    if option in ("bytes", "none"):
        return TextAssets(TextSpec(tokenizer="bytes" if option == "bytes" else "none"))
    path = Path(option)
    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(
            "--tokenizer cannot be read",
            where=str(path),
            expected="a tokenizer.json (or its folder) | an rwkv_vocab*.txt | bytes | none",
            found=error.strerror,
        ) from error
    if path.suffix == ".txt":
        world = load_world(content, str(path), vocab_size)
        assert world is not None  # noqa: S101 - for the type checker: strict raises
        return world
    load_tokenizer(content, str(path))
    spec = checkpoint.text().spec
    return TextAssets(replace(spec, tokenizer="tokenizers"), content)


def _check_overrides(plan: QuantPlan, weights: dict[str, Weight]) -> None:
    import fnmatch

    for pattern, _ in plan.overrides:
        if not any(fnmatch.fnmatchcase(n, pattern) for n, w in weights.items() if _quantizable(w)):
            raise UsageError(
                f"the override {pattern!r} matches no tensor that could be quantized",
                expected="a pattern over names as `edge-mmllm inspect` lists them",
            )


def _quantizable(w: Weight) -> bool:
    return w.role != "vector"


def _groups(weights: dict[str, Weight]) -> tuple[QuantGroup, ...]:
    """Bytes by role and scheme, scales and zero points included."""
    found: dict[tuple[str, Scheme], list[Weight]] = {}
    for w in weights.values():
        found.setdefault((w.role, w.scheme), []).append(w)
    return tuple(
        QuantGroup(
            group=role,
            scheme=scheme.name,
            bits=float(scheme.bits),
            block_size=scheme.block_size if scheme.quantized else None,
            symmetric=scheme.zero == "none" if scheme.quantized else None,
            tensors=len(members),
            size_bytes=sum(_stored_bytes(w) for w in members),
        )
        for (role, scheme), members in found.items()
    )


def _stored_bytes(w: Weight) -> int:
    if not w.scheme.quantized:
        return w.size * w.scheme.bits // 8
    padded = w.shape[0] * math.ceil(w.shape[1] / w.scheme.block_size) * w.scheme.block_size
    return int(padded * w.scheme.bits_per_weight() / 8)


def _spec(job: _Job, stages: dict[str, Any]) -> ModelSpec:
    return ModelSpec(
        architecture=job.model.name,
        vocab_size=job.model.vocab_size,
        hidden_size=job.model.hidden_size,
        layers=job.model.layers,
        parameters=job.plan.parameters,
        context_length=job.model.context_length,
        states=job.model.states(),
        stages=stages,
        text=job.text.spec,
    )


def _source(checkpoint: Checkpoint, hashes: tuple[SourceFile, ...]) -> SourceRecord:
    config = {} if checkpoint.layout == "gguf" else _finite(checkpoint.config)
    name = checkpoint.source.name
    return SourceRecord(name, checkpoint.layout, hashes, source_hash(hashes), config)


def _finite(value: Any) -> Any:
    """Strict JSON knows no Infinity (Mamba-2's time_step_limit): it becomes a string."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


class _Hashes:
    """sha256 of the weight files, computed beside the export."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files, self._found = files, list[SourceFile]()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for path in self._files:
                digest, size = hashlib.sha256(), 0
                with path.open("rb", buffering=0) as file:
                    while chunk := file.read(1 << 20):
                        digest.update(chunk)
                        size += len(chunk)
                self._found.append(SourceFile(path.name, size, digest.hexdigest()))
        except OSError as error:
            self._error = error

    def result(self) -> tuple[SourceFile, ...]:
        self._thread.join()
        if self._error is not None:
            raise self._error
        return tuple(self._found)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("edge-mmllm", "numpy", "onnx", "onnxruntime"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
