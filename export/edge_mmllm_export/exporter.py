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
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from edge_mmllm.bundle import (
    GOLDEN_FILE,
    Bundle,
    BundleWriter,
    ExportRecord,
    Gate,
    GoldenMedia,
    Manifest,
    Quantization,
    SourceFile,
    check_free_space,
    source_hash,
)
from edge_mmllm.bundle import Source as SourceRecord
from edge_mmllm.errors import QualityGateFailed, UsageError
from edge_mmllm.modality import Modality
from edge_mmllm.profiling.machine import default_threads
from edge_mmllm.profiling.memory import peak_rss_bytes
from edge_mmllm.spec import TOKENIZER_FILES, ModelSpec, TextSpec
from edge_mmllm_export import verify
from edge_mmllm_export.checkpoints import open_checkpoint
from edge_mmllm_export.checkpoints.base import Checkpoint, TextAssets
from edge_mmllm_export.checkpoints.text import load_tokenizer
from edge_mmllm_export.checkpoints.world import load_world
from edge_mmllm_export.families.composite import Composite
from edge_mmllm_export.formats import Artefact, Format, Job, Written, output_format
from edge_mmllm_export.models import build
from edge_mmllm_export.ops.base import Architecture
from edge_mmllm_export.planning import ExportOptions, ExportPlan, plan_of
from edge_mmllm_export.quantize.schemes import QuantPlan
from edge_mmllm_export.weights import Weight, bind

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class _Prepared:
    """All that is decided before anything is written."""

    options: ExportOptions
    form: Format
    job: Job
    artefact: Artefact
    plan: ExportPlan


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
    """Export a checkpoint to a bundle at `out`.

    Args:
        source: a folder in hub layout, one `.safetensors`, `.pth` or `.gguf`, or a hub id.
        progress: called with (phase, done, total): `quantize` in weights, then `judge`.

    Raises:
        CheckpointError, ExportError, UsageError: see `edge_mmllm.errors`. Nothing is left behind.
    """
    report = progress or (lambda *_: None)
    started = time.perf_counter()
    prepared = _prepare(source, options or ExportOptions())
    options, job = prepared.options, prepared.job
    done = 0
    total = sum(w.size for w in job.weights.values())
    lock = threading.Lock()

    def advance(count: int) -> None:
        nonlocal done
        with lock:
            done = min(total, done + count)
            report("quantize", done, total)

    with BundleWriter(out, force=options.force) as writer:
        check_free_space(writer.root, prepared.plan.disk_bytes)
        hashes = _Hashes(job.checkpoint.files)
        written = prepared.artefact.write(writer, advance)
        if job.text.tokenizer_json is not None:
            file = TOKENIZER_FILES[job.text.spec.tokenizer]
            writer.path(file).write_bytes(job.text.tokenizer_json)
        if isinstance(job.model, Composite):
            for file, content in job.model.files.items():
                writer.path(file).write_bytes(content)
        unjudged = prepared.form.unjudged(options) if options.gate else None
        manifest = Manifest(
            engine=prepared.form.engine,
            engine_format=written.engine_format,
            source=_source(job.checkpoint, hashes.result()),
            model=_spec(prepared, written),
            quantization=Quantization(
                prepared.form.variant(options) or options.plan.name,
                prepared.plan.groups,
                prepared.plan.bits_per_weight,
            ),
            gate=Gate("not judged", {} if unjudged is None else {"reason": unjudged}),
            export=ExportRecord(
                tool_versions=_versions(prepared.form),
                wall_s=round(time.perf_counter() - started, 3),
                peak_rss_bytes=peak_rss_bytes(),
                created_utc=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
                command=options.command,
            ),
        )
        if options.gate and unjudged is None:
            report("judge", 0, 1)
            manifest = _judged(writer, manifest, prepared)
            report("judge", 1, 1)
        return writer.commit(manifest)


def _judged(writer: BundleWriter, manifest: Manifest, prepared: _Prepared) -> Manifest:
    options, job, artefact = prepared.options, prepared.job, prepared.artefact
    # What the model may read at most, where the format allows less than was asked for.
    own = artefact.context_length != job.model.context_length
    figures = verify.judge(
        verify.Request(
            bundle=str(writer.draft(manifest)),
            source=str(job.checkpoint.source),
            plan=options.plan,
            scheme=prepared.form.judged_as(options),
            context=artefact.context_length if own else options.context,
            text=options.gate_text,
            lora=options.lora,
            threads=job.workers,
            format=options.format,
            variant=prepared.form.variant(options),
        )
    )
    broken = figures["breaches"]
    media = tuple(GoldenMedia(**record) for record in figures.pop("golden_media"))
    if broken and not options.accept_quality_loss:
        raise QualityGateFailed(
            "the exported model disagrees with the checkpoint",
            expected=f"the thresholds of {figures['scheme']}",
            found="; ".join(broken) + _blame(figures),
            fix="more bits, a smaller --block-size, --override for what suffers, or "
            "--accept-quality-loss",
        )
    gate = Gate("failed-accepted" if broken else "passed", figures)
    return replace(manifest, gate=gate, golden=GOLDEN_FILE, golden_media=media)


def _blame(figures: dict[str, Any]) -> str:
    """Says whether the stored numbers or the engine's arithmetic made the difference."""
    stored, engine = figures["kl_mean_of_stored_weights"], figures["kl_mean_of_engine"]
    return (
        f" (of the mean divergence, rounding the weights alone gives {stored:.4g}, "
        f"the engine's arithmetic on them {engine:.4g})"
    )


def _prepare(source: str | os.PathLike[str], options: ExportOptions) -> _Prepared:
    form = output_format(options.format)
    options = form.resolved(options)
    checkpoint = open_checkpoint(
        Path(source) if isinstance(source, os.PathLike) else source, options.lora
    )
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
    job = Job(checkpoint, model, weights, text, options.workers or default_threads())
    artefact = form.layout(job, options)
    plan = plan_of(job, artefact)
    plan.check(options, job.workers)
    return _Prepared(options, form, job, artefact, plan)


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


def _modalities(model: Architecture, written: Written) -> dict[str, Modality]:
    if written.modalities is not None:
        return written.modalities
    return model.modalities() if isinstance(model, Composite) else {}


def _spec(prepared: _Prepared, written: Written) -> ModelSpec:
    model, artefact = prepared.job.model, prepared.artefact
    backbone = getattr(model, "backbone", model)
    return ModelSpec(
        architecture=model.name,
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        layers=model.layers,
        parameters=prepared.plan.parameters,
        context_length=artefact.context_length,
        states=artefact.states,
        details=artefact.details,
        stages=written.stages,
        text=prepared.job.text.spec,
        components=model.components() if isinstance(model, Composite) else (),
        modalities=_modalities(model, written),
        decoder_start_id=getattr(backbone, "decoder_start_id", None),
        extra_ids=getattr(backbone, "extra_ids", 0),
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


def _versions(form: Format) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("edge-mmllm", "numpy", *form.packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
