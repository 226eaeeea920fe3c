"""`export`: from a published checkpoint to a judged bundle, in bounded memory.

read -> map -> validate -> quantize -> write -> verify, one tile of one tensor at a time.
"""

from __future__ import annotations

import hashlib
import importlib.util
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
from typing import TYPE_CHECKING, Any

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
from edge_mmllm.profiling.machine import default_threads
from edge_mmllm.profiling.memory import peak_rss_bytes
from edge_mmllm.spec import TOKENIZER_FILES, ModelSpec, Stage, TextSpec
from edge_mmllm_export import verify
from edge_mmllm_export.checkpoints import open_checkpoint
from edge_mmllm_export.checkpoints.base import Checkpoint, TextAssets
from edge_mmllm_export.checkpoints.text import load_tokenizer
from edge_mmllm_export.checkpoints.world import load_world
from edge_mmllm_export.families.composite import Composite
from edge_mmllm_export.models import build
from edge_mmllm_export.onnx import write_stages
from edge_mmllm_export.ops.base import Architecture
from edge_mmllm_export.planning import ExportOptions, ExportPlan, plan_of
from edge_mmllm_export.quantize.schemes import QuantPlan
from edge_mmllm_export.weights import Weight, bind

if TYPE_CHECKING:
    from edge_mmllm_export.gguf import GgufFile

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class _Job:
    """An opened checkpoint with its definition and weights; `gguf`: what that format makes of
    them."""

    checkpoint: Checkpoint
    model: Architecture
    weights: dict[str, Weight]
    text: TextAssets
    plan: ExportPlan
    workers: int
    gguf: GgufFile | None = None

    @property
    def context_length(self) -> int | None:
        return self.gguf.map.context_length if self.gguf else self.model.context_length


def plan_export(source: str | os.PathLike[str], options: ExportOptions) -> ExportPlan:
    """What the export would read, write and need; nothing is written.

    Raises: as `export`.
    """
    return _prepare(source, _resolved(options)).plan


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
    options = _resolved(options or ExportOptions())
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
        stages = _write(writer, job, options, advance)
        if job.text.tokenizer_json is not None:
            file = TOKENIZER_FILES[job.text.spec.tokenizer]
            writer.path(file).write_bytes(job.text.tokenizer_json)
        if isinstance(job.model, Composite):
            for file, content in job.model.files.items():
                writer.path(file).write_bytes(content)
        manifest = Manifest(
            engine="onnx" if job.gguf is None else "gguf",
            engine_format={"opset": 21, "data": "weights.bin"}
            if job.gguf is None
            else {"architecture": job.gguf.map.architecture},
            source=_source(job.checkpoint, hashes.result()),
            model=_spec(job, stages),
            quantization=Quantization(
                options.gguf_type or options.plan.name, job.plan.groups, job.plan.bits_per_weight
            ),
            gate=Gate("not judged", _unjudged(options)),
            export=ExportRecord(
                tool_versions=_versions(),
                wall_s=round(time.perf_counter() - started, 3),
                peak_rss_bytes=peak_rss_bytes(),
                created_utc=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
                command=options.command,
            ),
        )
        if options.gate and not manifest.gate.figures:
            report("judge", 0, 1)
            manifest = _judged(writer, manifest, job, options)
            report("judge", 1, 1)
        return writer.commit(manifest)


def _write(
    writer: BundleWriter, job: _Job, options: ExportOptions, advance: Callable[[int], None]
) -> dict[str, Stage]:
    """The format's own files."""
    if job.gguf is None:
        return write_stages(
            job.model,
            job.weights,
            writer.root,
            inputs=options.inputs,
            workers=job.workers,
            progress=advance,
        )
    from edge_mmllm_export import gguf

    path = writer.path(gguf.FILE)
    stage = gguf.write(
        job.gguf, job.text, job.checkpoint, path, workers=job.workers, progress=advance
    )
    return {"decoder": stage}


def _resolved(options: ExportOptions) -> ExportOptions:
    """With the plan that `gguf_type` asks for."""
    if options.gguf_type is None:
        return options
    from edge_mmllm_export import gguf

    return replace(options, plan=gguf.plan_for(options.gguf_type, options.plan))


def _unjudged(options: ExportOptions) -> dict[str, Any]:
    """Why nothing can judge the artefact here; empty where something can."""
    absent = importlib.util.find_spec("llama_cpp") is None
    if options.gate and options.format == "gguf" and absent:
        why = "llama.cpp is not installed: pip install 'edge-mmllm[gguf]', then edge-mmllm check"
        return {"reason": why}
    return {}


def _judged(
    writer: BundleWriter, manifest: Manifest, job: _Job, options: ExportOptions
) -> Manifest:
    figures = verify.judge(
        verify.Request(
            bundle=str(writer.draft(manifest)),
            source=str(job.checkpoint.source),
            plan=options.plan,
            context=job.context_length if job.gguf else options.context,
            text=options.gate_text,
            lora=options.lora,
            threads=job.workers,
            gguf=job.gguf is not None,
            gguf_type=options.gguf_type,
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


def _prepare(source: str | os.PathLike[str], options: ExportOptions) -> _Job:
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
    workers = options.workers or default_threads()
    plan = plan_of(model, weights, len(text.tokenizer_json or b""), workers)
    file = _gguf_file(model, weights, options) if options.format == "gguf" else None
    if file is not None:
        size = file.size_bytes + 3 * len(text.tokenizer_json or b"") + (4 << 20)
        plan = replace(plan, groups=file.groups(), disk_bytes=size)
    plan.check(options, workers)
    return _Job(checkpoint, model, weights, text, plan, workers, file)


def _gguf_file(model: Architecture, weights: dict[str, Weight], options: ExportOptions) -> GgufFile:
    from edge_mmllm_export import gguf

    if options.inputs != "ids":
        raise UsageError("--inputs embeds is for --format onnx", expected="--inputs ids")
    return gguf.layout(model, weights, options.plan, options.gguf_type)


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


def _spec(job: _Job, stages: dict[str, Any]) -> ModelSpec:
    return ModelSpec(
        architecture=job.model.name,
        vocab_size=job.model.vocab_size,
        hidden_size=job.model.hidden_size,
        layers=job.model.layers,
        parameters=job.plan.parameters,
        context_length=job.context_length,
        states=() if job.gguf else job.model.states(),  # llama.cpp owns its states
        details={"gguf": {"file_type": job.gguf.file_type}} if job.gguf else {},
        stages=stages,
        text=job.text.spec,
        components=job.model.components() if isinstance(job.model, Composite) else (),
        modalities=job.model.modalities() if isinstance(job.model, Composite) else {},
        decoder_start_id=getattr(
            getattr(job.model, "backbone", job.model), "decoder_start_id", None
        ),
        extra_ids=getattr(getattr(job.model, "backbone", job.model), "extra_ids", 0),
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
    for package in ("edge-mmllm", "numpy", "onnx", "onnxruntime", "gguf", "llama-cpp-python"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
