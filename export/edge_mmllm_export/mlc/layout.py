"""The weights of MLC's format: what goes where, decided before anything is written.

A map (`mlc.maps`) names the parameters, a quantization (`mlc.quant`) says how each is stored. The
place of every byte follows from the shapes, so that workers can write tiles in any order
(`mlc.write`). The files are described in `edge_mmllm_runtime.mlc.weights`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from edge_mmllm.bundle import QuantGroup
from edge_mmllm.errors import UsageError
from edge_mmllm_export.checkpoints.base import Float32
from edge_mmllm_export.mlc.maps import MlcMap, MlcTensor, mlc_map
from edge_mmllm_export.mlc.maps.base import Change
from edge_mmllm_export.mlc.quant import brief, half, quantize, stored_scales
from edge_mmllm_export.ops.base import Architecture
from edge_mmllm_export.quantize.schemes import QuantPlan
from edge_mmllm_export.weights import Weight
from edge_mmllm_runtime.mlc.weights import QUANTIZATIONS, Quantization, Undo, View, dequantize

#: A shard is closed before it would grow to this. Source: tvm 0.27, `contrib/tvmjs.py`.
SHARD_BYTES = 32 << 20
#: How `--quant` is said in mlc-llm's words: computing in float32, which a CPU does.
DEFAULTS = {"f32": "q0f32", "f16": "q0f16", "int4": "q4f32_1"}

#: How values lie in a file: 4-byte words of codes, or floats; `bfloat16` goes by the name float32.
Encoding = Literal["uint32", "float16", "bfloat16", "float32"]
_BYTES = {"uint32": 4, "float16": 2, "bfloat16": 2, "float32": 4}
_UNDO: dict[Change, Undo] = {
    "same": "same",
    "transposed": "transposed",
    "exp": "log",
    "one_minus": "one_minus",
}


@dataclass(frozen=True)
class Record:
    """A tensor as the index lists it.

    Attributes:
        shard, offset: its place.
    """

    name: str
    shape: tuple[int, ...]
    encoding: Encoding
    shard: int
    offset: int

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * _BYTES[self.encoding]

    @property
    def dtype(self) -> str:
        """As the index says it."""
        return "float32" if self.encoding == "bfloat16" else self.encoding

    @property
    def memory_bytes(self) -> int:
        """Of its values, bfloat16 expanded: what mlc-llm counts."""
        return math.prod(self.shape) * (2 if self.encoding == "float16" else 4)


@dataclass(frozen=True)
class StoredTensor:
    """A parameter with its records: `(values,)`, or words and scales.

    Attributes:
        parts: the weights of ours that it is made of.
        quantized: in groups along K.
        transposed: K comes first.
        searched: its scales are (see `mlc.quant`).
    """

    tensor: MlcTensor
    parts: tuple[Weight, ...]
    records: tuple[Record, ...]
    quantized: bool = False
    transposed: bool = False
    searched: bool = False

    @property
    def rows(self) -> int:
        return sum(w.shape[0] for w in self.parts)

    @property
    def k(self) -> int:
        """Weights in a row of a matrix."""
        return self.parts[0].shape[1]


@dataclass(frozen=True)
class MlcFiles:
    """What will be written: the definition's map, with a place for each tensor.

    Attributes:
        shards: size of each file.
        views: how a reader finds our weights by our names, `NAME` or `NAME.q_weight` and
            `NAME.q_scale`, where they are stored under others.
        kinds: how each weight of ours is stored: `f32`, `bf16`, `f16`, `q4` or `q3`.
    """

    map: MlcMap
    quant: Quantization
    tensors: Sequence[StoredTensor]
    shards: tuple[int, ...]
    views: Mapping[str, View]
    kinds: Mapping[str, str]

    @property
    def size_bytes(self) -> int:
        return sum(self.shards)

    def groups(self) -> tuple[QuantGroup, ...]:
        """Bytes by role and encoding, for the manifest."""
        found: dict[tuple[str, str], list[StoredTensor]] = {}
        for t in self.tensors:
            if t.parts:
                first = t.parts[0]
                scheme = self.quant.name if t.quantized else t.records[0].encoding
                role = "vector" if first.role == "table" else first.role
                found.setdefault((role, scheme), []).append(t)
        return tuple(
            QuantGroup(
                group=role,
                scheme=scheme,
                bits=float(self.quant.bits if members[0].quantized else 8 * _BYTES[scheme]),
                block_size=self.quant.group if members[0].quantized else None,
                symmetric=True if members[0].quantized else None,
                tensors=sum(len(t.parts) for t in members),
                size_bytes=sum(r.size_bytes for t in members for r in t.records),
            )
            for (role, scheme), members in found.items()
        )


def quantization(plan: QuantPlan, name: str | None) -> Quantization:
    """The one asked for; where none is, what the plan's own word means.

    Raises:
        UsageError: the format has none like it.
    """
    if name is not None and name not in QUANTIZATIONS:
        raise UsageError(
            "unknown --mlc-quant", expected=" | ".join(QUANTIZATIONS), found=repr(name)
        )
    if name is None and plan.name not in DEFAULTS:
        raise UsageError(
            f"--quant {plan.name} has no word in MLC's format",
            expected="--quant " + " | ".join(DEFAULTS) + ", or --mlc-quant",
        )
    if name is not None and plan == plan_for(QUANTIZATIONS[name]):
        return QUANTIZATIONS[name]
    if plan.block_size != 32 or plan.zero != "none" or plan.overrides or plan.embedding:
        raise UsageError(
            "MLC's quantizations have no parts to choose",
            expected="no --block-size, --zero, --embedding-quant or --override",
            fix="--mlc-quant q4f16_2 leaves embedding and head as they are",
        )
    return QUANTIZATIONS[name or DEFAULTS[plan.name]]


def plan_for(quant: Quantization) -> QuantPlan:
    """The plan whose matrices are stored so."""
    return QuantPlan(name="int4" if quant.bits else "f16" if quant.half else "f32")


def layout(model: Architecture, weights: Mapping[str, Weight], quant: Quantization) -> MlcFiles:
    """Decide what each tensor is stored as, and where.

    Args:
        weights: all of the model's.
    """
    found = mlc_map(model)
    drafts = [_stored(t, tuple(weights[n] for n in t.parts), quant) for t in found.tensors]
    if not found.stock:
        drafts = [replace(d, searched=True) for d in drafts]
    spots, shards = shard([r.size_bytes for d in drafts for r in d.records])
    left = iter(spots)
    tensors = []
    views: dict[str, View] = {}
    kinds: dict[str, str] = {}
    for draft in drafts:
        records = []
        for record in draft.records:
            number, offset = next(left)
            records.append(replace(record, shard=number, offset=offset))
        tensors.append(replace(draft, records=tuple(records)))
        for w in tensors[-1].parts:
            kinds.setdefault(w.name, _kind(tensors[-1], quant))
        for name, view in _views(tensors[-1]):
            views.setdefault(name, view)
    return MlcFiles(found, quant, tensors, tuple(shards), views, kinds)


def shard(sizes: Sequence[int]) -> tuple[list[tuple[int, int]], list[int]]:
    """Places `(file, offset)` of tensors in order, and the files' sizes, by the rule of tvm's own
    writer: a tensor that would fill the open file goes into the next one, or, where it is at least
    half as large as a file, into one of its own, which is then numbered before the open one."""
    spots: list[tuple[int, int]] = []
    files: list[int] = []
    waiting: list[int] = []  # tensors of the open file
    size_open = 0

    def close() -> None:
        nonlocal size_open
        for i in waiting:
            spots[i] = (len(files), spots[i][1])
        if waiting:
            files.append(size_open)
        waiting.clear()
        size_open = 0

    for i, size in enumerate(sizes):
        if size_open + size >= SHARD_BYTES:
            if 2 * size >= SHARD_BYTES:
                spots.append((len(files), 0))
                files.append(size)
                continue
            close()
        spots.append((-1, size_open))
        waiting.append(i)
        size_open += size
    close()
    return spots, files


def _stored(t: MlcTensor, parts: tuple[Weight, ...], quant: Quantization) -> StoredTensor:
    rows = sum(w.shape[0] for w in parts)
    ends = t.kind in ("embedding", "head")
    if quant.bits and t.kind != "plain" and (quant.ends or not ends):
        k = parts[0].shape[1]
        shapes = [(rows, quant.words(k)), (rows, quant.groups(k))]
        transposed = quant.transposed and t.kind != "embedding"
        if transposed:
            shapes = [shape[::-1] for shape in shapes]
        scales: Encoding = "float16" if quant.half else "bfloat16"
        records = (
            Record(f"{t.stem}.q_weight", shapes[0], "uint32", -1, -1),
            Record(f"{t.stem}.q_scale", shapes[1], scales, -1, -1),
        )
        return StoredTensor(t, parts, records, quantized=True, transposed=transposed)
    shape = t.shape if t.shape is not None else (rows, *parts[0].shape[1:])
    record = Record(t.name, shape, _encoding(t, quant), -1, -1)
    return StoredTensor(t, parts, (record,))


def _encoding(t: MlcTensor, quant: Quantization) -> Encoding:
    own: Encoding = "float16" if quant.half else "bfloat16"
    if t.store == "float16":
        # Eleven bits, where bfloat16 has eight; all of them where nothing is quantized.
        return "float16" if quant.half or quant.bits else "float32"
    by_store: dict[str, Encoding] = {"model": own, "float32": "bfloat16", "exact": "float32"}
    return by_store[t.store]


def _kind(t: StoredTensor, quant: Quantization) -> str:
    if t.tensor.change in ("exp", "one_minus"):
        return "f32"  # what undoes them gives float32
    words = {"uint32": f"q{quant.bits}", "float16": "f16", "bfloat16": "bf16", "float32": "f32"}
    return words[t.records[0].encoding]


def _views(t: StoredTensor) -> Iterator[tuple[str, View]]:
    """How each part is found, where that is not under its own name, as it is."""
    suffixes = (".q_weight", ".q_scale") if t.quantized else ("",)
    undo = "transposed" if t.transposed else _UNDO[t.tensor.change]
    for suffix, record in zip(suffixes, t.records, strict=True):
        row = 0
        for w in t.parts:
            stop, shape = row + w.shape[0], w.shape
            if t.quantized:
                shape = (w.shape[0], record.shape[0 if t.transposed else 1])
            whole = undo != "transposed" and len(t.parts) == 1
            if (w.name + suffix, shape, undo) != (record.name, record.shape, "same"):
                begin, end = (0, record.shape[0]) if whole else (row, stop)
                yield w.name + suffix, View(record.name, begin, end, shape, undo)
            row = stop


def as_stored(files: MlcFiles, weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """The weights as a reader of the files sees them."""
    out = dict(weights)
    for t in files.tensors:
        for w in t.parts:
            out[w.name] = _rounded(weights[w.name], t, files.quant)
    return out


def _rounded(w: Weight, t: StoredTensor, quant: Quantization) -> Weight:
    before = w.source.apply

    def apply(rows: Float32) -> Float32:
        rows = rows if before is None else before(rows)
        return rounded(rows, t, quant)

    return replace(w, as_stored=False, source=replace(w.source, apply=apply))


def rounded(rows: Float32, t: StoredTensor, quant: Quantization) -> Float32:
    """Rows of a weight of ours as they come back from the files."""
    if t.quantized:
        words, scales = quantize(rows, quant, searched=t.searched)
        return dequantize(words, stored_scales(scales, quant), rows.shape[1], quant)
    encoding, change = t.records[0].encoding, t.tensor.change
    values = short(changed(rows, change), encoding)
    if change == "exp":
        return np.log(values)
    return changed(values, change)


def changed(values: Float32, change: Change) -> Float32:
    """Our values as they are stored, but for their order and rounding."""
    if change == "exp":
        return np.exp(values)
    return np.asarray(1 - values, np.float32) if change == "one_minus" else values


def short(values: Float32, encoding: Encoding) -> Float32:
    """Rounded to what an encoding holds. Raises: ExportError, beyond float16."""
    if encoding == "float16":
        return half(values)
    return brief(values) if encoding == "bfloat16" else values
