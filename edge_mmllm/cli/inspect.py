"""`edge-mmllm inspect`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_mmllm.cli._options import json_option
from edge_mmllm.cli._output import emit, grid, size_text, table
from edge_mmllm.cli.export import gate_rows
from edge_mmllm.errors import UsageError
from edge_mmllm.modality import SLOTS, Component

if TYPE_CHECKING:
    from edge_mmllm.bundle.manifest import Manifest
    from edge_mmllm.inspection import BundleReport, StateReport
    from edge_mmllm.spec import ModelSpec, TextSpec
    from edge_mmllm_export.inspection import CheckpointReport, TensorRow  # noqa: TID251


@click.command("inspect")
@click.argument("path", metavar="SRC|BUNDLE")
@click.option("--tensors", is_flag=True, help="List every tensor.")
@json_option
def command(path: str, tensors: bool, as_json: bool) -> None:
    """Describe a checkpoint or a bundle.

    Architecture, tensors, bytes by group, the state it carries from token to token, and of a
    bundle the quality gate's verdict. Reads headers only: no weight, no hash.
    """
    if Path(path).suffix == ".edge" and Path(path).is_file():
        raise UsageError(
            "a packed bundle has to be unpacked first",
            where=path,
            fix=f"edge-mmllm unpack {Path(path).name} {Path(path).stem}",
        )
    if is_bundle(path):
        from edge_mmllm.inspection import inspect_bundle

        report = inspect_bundle(path)
        listed = _bundle_tensors(path) if tensors else None
        if as_json:
            emit(_with(report.to_json(), listed))
        else:
            _show_bundle(report, listed)
        return
    from edge_mmllm_export.inspection import inspect_checkpoint  # noqa: TID251

    found = inspect_checkpoint(path)
    if as_json:
        emit(_with(found.to_json(), found.tensors if tensors else None))
    else:
        _show_checkpoint(found, found.tensors if tensors else None)


def is_bundle(path: str) -> bool:
    """Whether `path` looks like a bundle, if perhaps a damaged one."""
    from edge_mmllm.bundle import MANIFEST_FILE

    return (Path(path) / MANIFEST_FILE).exists()


def _bundle_tensors(path: str) -> tuple[TensorRow, ...]:
    from edge_mmllm_export.inspection import bundle_tensors  # noqa: TID251

    return bundle_tensors(path)


def _with(document: dict[str, Any], tensors: tuple[TensorRow, ...] | None) -> dict[str, Any]:
    if tensors is not None:
        document["tensors"] = [row.to_json() for row in tensors]
    return document


def _show_tensors(tensors: tuple[TensorRow, ...] | None) -> None:
    if tensors is not None:
        rows = [
            (
                t.name,
                "x".join(map(str, t.shape)),
                t.dtype,
                size_text(t.size_bytes),
                t.role,
                ", ".join(t.parameters),
            )
            for t in tensors
        ]
        grid(("tensor", "shape", "type", "size", "role", "used as"), rows)


def _component_rows(components: Sequence[Component]) -> list[tuple[str, object]]:
    """Every slot of a multimodal model, filled or not."""
    if not components:
        return []
    rows: list[tuple[str, object]] = []
    for slot in SLOTS:
        filled = [
            f"{c.name}{f' ({c.modality})' if c.modality else ''}, {c.parameters:,} parameters"
            for c in components
            if c.slot == slot
        ]
        rows.append((slot.replace("_", " "), "; ".join(filled) or "none"))
    return rows


def _modality_rows(spec: ModelSpec) -> list[tuple[str, object]]:
    """How each modality stands in a prompt."""
    rows: list[tuple[str, object]] = []
    for name, m in spec.modalities.items():
        count = f"{m.tokens} tokens a tile" if m.tokens else "tokens by size"
        rows.append((name, f"{m.placeholder!r}: {count}, layout {m.layout.get('kind')}"))
    return rows


def _text_row(text: TextSpec) -> tuple[str, object]:
    template = "a chat template" if text.chat_template is not None else "no chat template"
    ends = ", ".join(map(str, text.eos_ids)) or "none"
    return "text", f"tokenizer: {text.tokenizer}; {template}; end tokens: {ends}"


def _state_rows(state: StateReport) -> list[tuple[str, object]]:
    kinds = ", ".join(f"{count} {kind}" for kind, count in state.kinds.items())
    return [
        ("state", kinds or "none"),
        ("  at 1k tokens", size_text(state.bytes_at_1k)),
        ("  at 8k tokens", size_text(state.bytes_at_8k)),
    ]


def _show_checkpoint(report: CheckpointReport, tensors: tuple[TensorRow, ...] | None) -> None:
    _show_tensors(tensors)
    rows = [(g.group, g.tensors, g.parameters, size_text(g.size_bytes)) for g in report.groups]
    grid(("weights", "tensors", "parameters", "size"), rows)
    shown: list[tuple[str, object]] = [
        ("architecture", report.architecture),
        ("supported", "yes" if report.problem is None else "no: " + report.problem),
        ("layout", f"{report.layout}, {len(report.files)} weight file(s)"),
        ("tensors", f"{len(report.tensors)}, {size_text(report.size_bytes)}"),
        ("stored as", ", ".join(f"{k}: {size_text(v)}" for k, v in report.bytes_by_dtype.items())),
        *_component_rows(report.components),
        ("parameters", f"{report.parameters:,}"),
    ]
    if report.sizes is not None:
        shown.append(("sizes", ", ".join(f"{k} {v}" for k, v in report.sizes.items())))
    if report.state is not None:
        shown += _state_rows(report.state)
    if report.text is not None:
        shown.append(_text_row(report.text))
    table(shown, f"checkpoint {report.name}")


def _mlc_rows(manifest: Manifest) -> list[tuple[str, object]]:
    """What an MLC bundle was compiled for, and whether mlc-llm itself can take it."""
    if manifest.engine != "mlc":
        return []
    libraries = manifest.engine_format.get("libraries")
    said = manifest.model.details.get("mlc")
    told = said if isinstance(said, dict) else {}
    remarks = told.get("remarks")
    because = "; ".join(map(str, remarks)) if isinstance(remarks, list) else ""
    stock = "yes" if told.get("stock") is True else "no"
    return [
        (
            "libraries",
            ", ".join(libraries) if isinstance(libraries, dict) and libraries else "none",
        ),
        ("mlc-llm can load it", f"{stock} ({because})" if because else stock),
    ]


def _show_bundle(report: BundleReport, tensors: tuple[TensorRow, ...] | None) -> None:
    _show_tensors(tensors)
    manifest = report.bundle.manifest
    model, quantization = manifest.model, manifest.quantization
    grid(
        ("weights", "scheme", "tensors", "size"),
        [(g.group, g.scheme, g.tensors, size_text(g.size_bytes)) for g in quantization.groups],
    )
    shown: list[tuple[str, object]] = [
        ("engine", manifest.engine),
        ("architecture", model.architecture),
        ("source", f"{manifest.source.name} ({manifest.source.layout})"),
        *_component_rows(model.components),
        *_modality_rows(model),
        ("parameters", f"{model.parameters:,}"),
        ("quantization", f"{quantization.scheme}, "
         f"{quantization.bits_per_weight:.2f} bits per weight"),
        ("sizes", f"vocab {model.vocab_size}, hidden {model.hidden_size}, layers {model.layers}"),
        ("context", model.context_length or "unbounded"),
        *_state_rows(report.state),
        _text_row(model.text),
        ("stages", ", ".join(model.stages)),
        *_mlc_rows(manifest),
        ("files", f"{len(manifest.files)}, {size_text(report.bundle.size_bytes)}"),
        *gate_rows(manifest.gate.verdict, manifest.gate.figures),
        ("exported", f"{manifest.export.created_utc}, {manifest.export.command or 'from Python'}"),
        ("sha256", report.bundle.sha256),
    ]  # fmt: skip
    table(shown, f"bundle {report.bundle.root.name}")
