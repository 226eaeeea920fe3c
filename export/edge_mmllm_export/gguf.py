"""The GGUF exporter: one file for llama.cpp, written tile by tile.

The header says where each tensor begins, and every type's rows have a known size, so that workers
write tiles at their places in any order. Memory stays at a few tiles a worker. The arithmetic is
`gguf_types`, the tensors are a definition's `gguf_maps`, the tokenizer is `gguf_vocab`.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_mmllm.bundle import QuantGroup
from edge_mmllm.errors import MissingDependency, UsageError
from edge_mmllm.spec import Stage
from edge_mmllm_export.checkpoints.base import Checkpoint, Float32, TextAssets
from edge_mmllm_export.gguf_maps import GgufMap, GgufTensor, gguf_map
from edge_mmllm_export.gguf_source import provenance
from edge_mmllm_export.gguf_types import BITS, BLOCK, GgufType, encode, row_bytes
from edge_mmllm_export.gguf_vocab import vocabulary
from edge_mmllm_export.ops.base import Architecture
from edge_mmllm_export.quantize.schemes import QuantPlan, Scheme
from edge_mmllm_export.weights import Weight

try:
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
    from gguf.quants import dequantize
except ImportError as error:
    raise MissingDependency("gguf", "export") from error

FILE = "model.gguf"
_HOLD_BITS = {"float32": 32, "float16": 16, "half": 16, "byte": 8, "none": 0}


@dataclass(frozen=True)
class Piece:
    """Rows of a stored tensor that come from one of our weights, `first` row on."""

    weight: Weight
    first: int
    width: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as it will lie in the file. `shape` in numpy order."""

    tensor: GgufTensor
    shape: tuple[int, ...]
    kind: GgufType
    role: str
    pieces: tuple[Piece, ...]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape[:-1]) * row_bytes(self.kind, self.shape[-1])


@dataclass(frozen=True)
class GgufFile:
    """What will be written: the definition's map, with a type for each tensor."""

    map: GgufMap
    tensors: Sequence[StoredTensor]

    @property
    def size_bytes(self) -> int:
        return sum(t.size_bytes for t in self.tensors)

    @property
    def file_type(self) -> str:
        """What most of the matrices' weights are stored as, e.g. `MOSTLY_Q4_0`."""
        sizes: dict[GgufType, int] = {}
        for t in self.tensors:
            if t.role == "matrix":
                sizes[t.kind] = sizes.get(t.kind, 0) + math.prod(t.shape)
        kind = max(sizes, key=lambda k: sizes[k], default="F32")
        return "ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"

    def groups(self) -> tuple[QuantGroup, ...]:
        """Bytes by role and type, for the manifest."""
        found: dict[tuple[str, GgufType], list[StoredTensor]] = {}
        for t in self.tensors:
            found.setdefault((t.role, t.kind), []).append(t)
        return tuple(
            QuantGroup(
                group=role,
                scheme=kind,
                bits=float(BITS[kind]),
                block_size=BLOCK if BITS[kind] <= 8 else None,
                symmetric=kind.endswith("_0") if BITS[kind] <= 8 else None,
                tensors=len(members),
                size_bytes=sum(t.size_bytes for t in members),
            )
            for (role, kind), members in found.items()
        )


def layout(
    model: Architecture, weights: Mapping[str, Weight], plan: QuantPlan, kind: GgufType | None
) -> GgufFile:
    """Decide what each tensor is stored as.

    Args:
        plan: `int8` means Q8_0, `int4` Q4_0 or, with a zero point, Q4_1.
        kind: what matrices are stored as, where the plan's own word is not the one meant.

    Raises:
        UnsupportedArchitecture: llama.cpp cannot run the model.
        UsageError: a block size that the format does not have.
    """
    if plan.block_size != BLOCK:
        raise UsageError(
            "GGUF's blocks have one size", expected=f"--block-size {BLOCK}",
            found=f"--block-size {plan.block_size}",
        )  # fmt: skip
    found = gguf_map(model)
    return GgufFile(found, [_stored(t, weights, kind) for t in found.tensors])


def as_stored(file: GgufFile, weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """The weights as the file's reader sees them."""
    out = dict(weights)
    for stored in file.tensors:
        if stored.tensor.columns is not None:
            continue  # of pictures' patches, which are held in float32
        for name in stored.tensor.parts:
            out[name] = _rounded(weights[name], stored)
    return out


def _rounded(w: Weight, stored: StoredTensor) -> Weight:
    kind, before = GGMLQuantizationType[stored.kind], w.source.apply
    width, scale = stored.shape[-1], np.float32(stored.tensor.scale)

    def apply(rows: Float32) -> Float32:
        rows = rows if before is None else before(rows)
        raw = encode((rows * scale).reshape(-1, width), stored.kind)
        values: Float32 = dequantize(raw, kind)
        return values.reshape(rows.shape) / scale

    return replace(w, as_stored=False, source=replace(w.source, apply=apply))


def plan_for(kind: GgufType, plan: QuantPlan) -> QuantPlan:
    """The plan whose matrices are of this type."""
    name = {32: "f32", 16: "f16", 8: "int8"}.get(BITS[kind], "int4")
    return replace(plan, name=name, zero="float" if kind.endswith("_1") else "none")


def _stored(t: GgufTensor, weights: Mapping[str, Weight], kind: GgufType | None) -> StoredTensor:
    if t.values is not None:
        return StoredTensor(t, t.values.shape, "F32", "vector", ())
    ours = [weights[name] for name in t.parts]
    first = ours[0]
    shape = t.shape
    if shape is None:
        shape = (sum(w.shape[0] for w in ours), *first.shape[1:])
    chosen = max((_type(w.scheme, kind) for w in ours), key=lambda k: BITS[k])
    if first.role in ("vector", "table") or len(shape) == 1:
        chosen = "F32"
    elif BITS[chosen] < _HOLD_BITS[t.hold]:
        chosen = {"float32": "F32", "float16": "F16", "half": "F16", "byte": "Q8_0"}[t.hold]  # type: ignore[assignment]
    if t.hold == "half":
        chosen = "F16"
    if BITS[chosen] <= 8 and shape[-1] % BLOCK:
        chosen = "F16"
    role = "vector" if chosen == "F32" and first.role != "embedding" else first.role
    return StoredTensor(t, shape, chosen, role, tuple(_pieces(t, ours, shape)))


def _type(scheme: Scheme, kind: GgufType | None) -> GgufType:
    """A scheme in the format's words; `kind` is the word for its own number of bits."""
    if not scheme.quantized:
        plain: GgufType = "F32" if scheme.bits == 32 else "F16"
        return "BF16" if kind == "BF16" and scheme.bits == 16 else plain
    if scheme.bits == 8:
        return "Q8_0"
    if kind is not None and BITS[kind] < 8:
        return kind
    return "Q4_0" if scheme.zero == "none" else "Q4_1"


def _pieces(t: GgufTensor, ours: Sequence[Weight], shape: tuple[int, ...]) -> Iterator[Piece]:
    """Each weight with the row of the flat tensor `(rows, K)` that it begins at."""
    width, done = shape[-1], 0
    for w in ours:
        if t.order is not None:
            order = w.source.order
            order = t.order if order is None else order[t.order]
            w = replace(w, source=replace(w.source, order=order))
        if t.columns is not None:
            w = _selected(w, t.columns)
        yield Piece(w, done, width)
        done += w.size // width


def _selected(w: Weight, columns: NDArray[np.int64]) -> Weight:
    """Some columns of a small matrix."""

    def whole(theirs: Float32) -> Float32:
        return theirs.reshape(len(theirs), -1)[:, columns]

    shape = (w.shape[0], len(columns))
    return replace(w, shape=shape, source=replace(w.source, whole=whole))


def write(
    file: GgufFile,
    text: TextAssets | None,
    checkpoint: Checkpoint,
    path: Path,
    *,
    workers: int = 1,
    progress: Callable[[int], None] | None = None,
) -> Stage:
    """Write the file.

    Args:
        text: the tokenizer; None: of a file without one.
        workers: threads that read, quantize and write tiles.
        progress: called with numbers of weights done.

    Raises:
        CheckpointError: a tokenizer that the format cannot say. ExportError, NonFiniteWeights.
    """
    begin = _write_header(file, text, checkpoint, path)
    with path.open("r+b") as handle:
        descriptor = handle.fileno()
        tiles, lock = _tiles(file, begin), threading.Lock()

        def work() -> None:
            while True:
                with lock:
                    tile = next(tiles, None)
                if tile is None:
                    return
                stored, piece, start, stop, place = tile
                rows = piece.weight.rows(start, stop) if piece else stored.tensor.values
                assert rows is not None  # noqa: S101 - for the type checker: one of the two is
                _pwrite(descriptor, _encoded(rows, stored), place)
                if progress is not None and piece is not None:
                    progress(rows.size)

        with ThreadPoolExecutor(workers) as pool:
            for future in [pool.submit(work) for _ in range(workers)]:
                future.result()
        os.fsync(descriptor)
    return Stage(FILE, ("input_ids", "position", "logit_rows"), ("logits",))


def _encoded(rows: Float32, stored: StoredTensor) -> memoryview:
    if stored.tensor.scale != 1.0:
        rows = rows * np.float32(stored.tensor.scale)
    return np.ascontiguousarray(encode(rows.reshape(-1, stored.shape[-1]), stored.kind)).data.cast(
        "B"
    )


def _pwrite(descriptor: int, data: memoryview, place: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, place)
        data, place = data[count:], place + count


def _tiles(
    file: GgufFile, begin: int
) -> Iterator[tuple[StoredTensor, Piece | None, int, int, int]]:
    """Tensor, piece, the piece's rows `[start, stop)`, and their place in the file."""
    place = begin
    for stored in file.tensors:
        wide = row_bytes(stored.kind, stored.shape[-1])
        if not stored.pieces:
            yield stored, None, 0, 0, place
        for piece in stored.pieces:
            w = piece.weight
            step = w.tile_rows()
            for start in range(0, w.shape[0], step):
                stop = min(start + step, w.shape[0])
                before = start * (w.size // w.shape[0]) // piece.width
                yield stored, piece, start, stop, place + (piece.first + before) * wide
        place = _aligned(place + stored.size_bytes)


def _aligned(size: int) -> int:
    return -(-size // 32) * 32


def _write_header(
    file: GgufFile, text: TextAssets | None, checkpoint: Checkpoint, path: Path
) -> int:
    """Metadata and the table of tensors. Returns where data begins; the file has its whole size."""
    name = file.map.architecture
    out = GGUFWriter(path, name)
    kind = {} if text is not None else {"general.type": "mmproj"}
    for key, value in (provenance(checkpoint) | kind).items():
        out.add_string(key, value)
    _add(out, {f"{name}.{key}": value for key, value in file.map.metadata.items()})
    out.add_quantization_version(2)
    out.add_file_type(LlamaFileType[file.file_type])
    if text is not None:
        _write_text(out, text, file)
    for stored in file.tensors:
        type_ = GGMLQuantizationType[stored.kind]
        out.add_tensor_info(
            stored.tensor.name, stored.shape, np.dtype(np.float32), stored.size_bytes, type_
        )
    try:
        out.write_header_to_file()
        out.write_kv_data_to_file()
        out.write_ti_data_to_file()
    finally:
        out.close()
    begin = place = _aligned(path.stat().st_size)
    for stored in file.tensors:
        place = _aligned(place + stored.size_bytes)
    os.truncate(path, place)
    return begin


def _write_text(out: GGUFWriter, text: TextAssets, file: GgufFile) -> None:
    """The tokenizer, and the chat template."""
    words = vocabulary(text, int(str(file.map.metadata["vocab_size"])))
    out.add_tokenizer_model(words.model)
    if words.tokens:
        out.add_token_list(words.tokens)
        out.add_token_types(words.types)
    if words.scores:
        out.add_token_scores(words.scores)
    if words.merges:
        out.add_token_merges(words.merges)
    _add(out, {f"tokenizer.ggml.{key}": value for key, value in words.settings.items()})
    if text.spec.chat_template is not None:
        out.add_chat_template(text.spec.chat_template)


def _add(out: GGUFWriter, pairs: Mapping[str, object]) -> None:
    for key, value in pairs.items():
        if isinstance(value, bool):
            out.add_bool(key, value)
        elif isinstance(value, int):
            out.add_uint32(key, value)
        elif isinstance(value, float):
            out.add_float32(key, value)
        elif isinstance(value, list):
            out.add_array(key, value)
        else:
            out.add_string(key, str(value))
