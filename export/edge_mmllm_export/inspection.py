"""`inspect` of a checkpoint, and the tensors of a bundle's graphs: headers only."""

from __future__ import annotations

import math
import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edge_mmllm.bundle import Bundle, open_bundle
from edge_mmllm.errors import CheckpointError, CorruptBundle
from edge_mmllm.inspection import StateReport
from edge_mmllm.modality import Component
from edge_mmllm.spec import TextSpec
from edge_mmllm_export.checkpoints import Checkpoint, open_checkpoint
from edge_mmllm_export.families.composite import Composite
from edge_mmllm_export.models import architecture_name, build
from edge_mmllm_export.ops.base import Architecture
from edge_mmllm_export.weights import Parameter, bind


@dataclass(frozen=True)
class TensorRow:
    """A stored tensor.

    Attributes:
        role: matrix, embedding, head, vector, or `-` where the model does not use it; in a
            bundle the stage that holds it.
        parameters: our names for what is made of it, as `--override` takes them.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    size_bytes: int
    role: str = "-"
    parameters: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class Group:
    """All tensors of one role."""

    group: str
    tensors: int
    parameters: int
    size_bytes: int


@dataclass(frozen=True)
class CheckpointReport:
    """What a checkpoint holds.

    Attributes:
        architecture: what it calls itself; None where it does not say.
        problem: why this release cannot export it; None where it can.
        bytes_by_dtype: stored type -> bytes.
        parameters: of the model, or of all tensors where the architecture is unknown.
        components: the filled slots of a multimodal model.
        sizes: vocab, hidden, layers and context, of a supported architecture.
    """

    name: str
    layout: str
    files: tuple[str, ...]
    architecture: str | None
    problem: str | None
    size_bytes: int
    parameters: int
    bytes_by_dtype: dict[str, int]
    groups: tuple[Group, ...]
    sizes: dict[str, int | None] | None
    state: StateReport | None
    text: TextSpec | None
    tensors: tuple[TensorRow, ...]
    components: tuple[Component, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; `tensors` is their number."""
        return {"kind": "checkpoint", **asdict(self), "tensors": len(self.tensors)}


def inspect_checkpoint(source: str | os.PathLike[str]) -> CheckpointReport:
    """Reads a checkpoint's headers. One that cannot be exported is described all the same.

    Raises:
        CheckpointError: there is no checkpoint, or not even its headers can be read.
    """
    checkpoint = open_checkpoint(source if isinstance(source, str) else Path(source))
    try:
        return _report(checkpoint)
    finally:
        checkpoint.close()


def _report(checkpoint: Checkpoint) -> CheckpointReport:
    name, model, problem = _model(checkpoint)
    uses = _uses(checkpoint, model)
    rows = tuple(
        TensorRow(
            name=t.name,
            shape=t.shape,
            dtype=t.dtype,
            size_bytes=t.size_bytes,
            role=uses[t.name][0].role if t.name in uses else "-",
            parameters=tuple(p.name for p in uses.get(t.name, ())),
        )
        for t in checkpoint.tensors.values()
    )
    parameters = 0 if model is None else sum(math.prod(p.shape) for p in model.parameters())
    by_dtype: Counter[str] = Counter()
    for row in rows:
        by_dtype[row.dtype] += row.size_bytes
    sizes, state = None, None
    if model is not None:
        state = StateReport.of(model.states())
        sizes = {
            "vocab": model.vocab_size,
            "hidden": model.hidden_size,
            "layers": model.layers,
            "context": model.context_length,
        }
    text, text_problem = _text(checkpoint)
    return CheckpointReport(
        name=checkpoint.source.resolve().name,
        layout=checkpoint.layout,
        files=tuple(path.name for path in checkpoint.files),
        architecture=name,
        problem=problem or text_problem,
        size_bytes=sum(row.size_bytes for row in rows),
        parameters=parameters or sum(math.prod(row.shape) for row in rows),
        bytes_by_dtype=dict(by_dtype),
        groups=_groups(rows),
        sizes=sizes,
        state=state,
        text=text,
        tensors=rows,
        components=model.components() if isinstance(model, Composite) else (),
    )


def _model(checkpoint: Checkpoint) -> tuple[str | None, Architecture | None, str | None]:
    """Name and definition of the architecture, or why there is none."""
    try:
        name = architecture_name(checkpoint)
    except CheckpointError as error:
        return None, None, error.what
    try:
        model = build(checkpoint)
        sources = model.sources(checkpoint.layout)
        bind(checkpoint, model.parameters(), sources, ignored=model.ignored())
    except CheckpointError as error:
        return name, None, error.what
    return name, model, None


def _uses(checkpoint: Checkpoint, model: Architecture | None) -> dict[str, list[Parameter]]:
    """Stored tensor -> what the model makes of it."""
    if model is None:
        return {}
    sources = model.sources(checkpoint.layout)
    uses: dict[str, list[Parameter]] = {}
    for parameter in model.parameters():
        uses.setdefault(sources[parameter.name].name, []).append(parameter)
    return uses


def _text(checkpoint: Checkpoint) -> tuple[TextSpec | None, str | None]:
    try:
        return checkpoint.text().spec, None
    except CheckpointError as error:
        return None, error.what


def _groups(rows: tuple[TensorRow, ...]) -> tuple[Group, ...]:
    found: dict[str, list[TensorRow]] = {}
    for row in rows:
        found.setdefault(row.role, []).append(row)
    return tuple(
        Group(
            group="unused" if role == "-" else role,
            tensors=len(members),
            parameters=sum(math.prod(row.shape) for row in members),
            size_bytes=sum(row.size_bytes for row in members),
        )
        for role, members in found.items()
    )


def bundle_tensors(path: str | os.PathLike[str]) -> tuple[TensorRow, ...]:
    """The stored tensors of a bundle's ONNX graphs, or of its MLC weight files, as packed: codes,
    scales, vectors; each under the first stage that uses it.

    Raises:
        BundleError: as `open_bundle`; CorruptBundle for a graph or an index that cannot be parsed.
    """
    bundle = open_bundle(path)
    if bundle.manifest.engine == "mlc":
        return _mlc_tensors(bundle)
    import onnx

    rows: list[TensorRow] = []
    places = set[tuple[str, str]]()
    for name, stage in bundle.spec.stages.items():
        file = bundle.file(stage.file)
        try:
            graph = onnx.load(str(file), load_external_data=False).graph
        except Exception as error:  # protobuf's DecodeError has no public base
            raise CorruptBundle(
                "a graph of the bundle cannot be parsed", where=str(file), found=str(error)
            ) from error
        for tensor in graph.initializer:
            if "=" in tensor.name:
                continue  # a constant of the graph, named after its value
            kind = onnx.TensorProto.DataType.Name(tensor.data_type)
            outside = {entry.key: entry.value for entry in tensor.external_data}
            place = outside.get("location", ""), outside.get("offset", tensor.name)
            if place in places:
                continue  # stages share their weights
            places.add(place)
            size = int(outside["length"]) if "length" in outside else tensor.ByteSize()
            rows.append(TensorRow(tensor.name, tuple(tensor.dims), kind, size, name))
    return tuple(rows)


def _mlc_tensors(bundle: Bundle) -> tuple[TensorRow, ...]:
    """Raises: CorruptBundle."""
    from edge_mmllm_runtime.mlc.weights import WeightFiles, read_views

    uses: dict[str, list[str]] = {}
    views = read_views(bundle.manifest.engine_format)
    with WeightFiles(bundle.file, views=views) as files:
        for name, view in sorted(views.items(), key=lambda item: item[1].start):
            uses.setdefault(view.tensor, []).append(name)
        return tuple(
            TensorRow(
                name=t.name,
                shape=t.shape,
                dtype="bfloat16" if t.encoded else t.dtype,
                size_bytes=t.size_bytes,
                role="decoder",
                parameters=tuple(uses.get(t.name, [t.name])),
            )
            for t in files.tensors.values()
        )
