"""The GGUF exporter: one file for llama.cpp, written tile by tile.

The header says where each tensor begins, and every type's rows have a known size, so that workers
write tiles at their places in any order. Memory stays at a few tiles a worker. What goes into the
file is `gguf.layout`, the arithmetic is `gguf.types`, the tensors are a definition's `gguf.maps`,
the tokenizer is `gguf.vocab`; what llama.cpp quantizes is written for it first (`gguf.mixes`).
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from edge_mmllm.errors import ExportError, MissingDependency, UsageError
from edge_mmllm.spec import Stage, TextSpec
from edge_mmllm_export.checkpoints.base import Checkpoint, Float32, TextAssets
from edge_mmllm_export.gguf import imatrix
from edge_mmllm_export.gguf import mixes as gguf_mixes
from edge_mmllm_export.gguf.imatrix import Imatrix
from edge_mmllm_export.gguf.layout import GgufFile, Piece, StoredTensor, Wanted
from edge_mmllm_export.gguf.layout import layout as ours
from edge_mmllm_export.gguf.maps.base import Value
from edge_mmllm_export.gguf.source import provenance
from edge_mmllm_export.gguf.stored import kinds
from edge_mmllm_export.gguf.types import (
    BITS,
    KINDS_NEED_IMATRIX,
    MIXES,
    NEED_IMATRIX,
    PLAIN,
    GgufWord,
    Kind,
    encode,
    row_bytes,
)
from edge_mmllm_export.gguf.vocab import vocabulary
from edge_mmllm_export.ops.base import Architecture
from edge_mmllm_export.quantize.schemes import QuantPlan
from edge_mmllm_export.weights import Weight

try:
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
except ImportError as error:
    raise MissingDependency("gguf", "export") from error

FILE = "model.gguf"
#: Beside it while it is made.
_DRAFT, _IMATRIX = "draft.gguf", "imatrix.gguf"
#: An importance matrix, or what makes one.
Importance = Imatrix | Callable[[], Imatrix]


def layout(
    model: Architecture,
    weights: Mapping[str, Weight],
    wanted: Wanted,
    checkpoint: Checkpoint,
    importance: Importance | None = None,
) -> GgufFile:
    """Decide what each tensor is stored as; what llama.cpp chooses, it is asked.

    Raises:
        UnsupportedArchitecture: llama.cpp cannot run the model.
        UsageError: a block size or a type that the format does not have; an importance matrix
            that is missing, of another model, or of no use.
        MissingDependency: llama.cpp is not installed.
    """
    if wanted.word in NEED_IMATRIX and importance is None:
        raise _no_imatrix(wanted.word)
    file = ours(model, weights, wanted)
    if file.word is None:
        if importance is not None:
            raise UsageError(
                "an importance matrix is for the types that llama.cpp quantizes",
                expected=f"--gguf-type {' | '.join(MIXES)}",
                found=wanted.word or wanted.plan.name,
            )
        return file
    gguf_mixes.require()
    with tempfile.TemporaryDirectory() as folder:
        # A header and a hole: what llama.cpp would choose, it says without reading weights.
        path = Path(folder) / _DRAFT
        _write_header(file, TextAssets(TextSpec("none")), checkpoint, path, {})
        matrix = None if importance is None else ""
        if isinstance(importance, Imatrix):
            imatrix.write(importance, Path(matrix := str(Path(folder) / _IMATRIX)))
        file = file.with_kinds(
            gguf_mixes.chosen(gguf_mixes.Job(str(path), None, file.word, _fixed(file), matrix))
        )
    _check_importance(file, importance)
    return file


def _fixed(file: GgufFile) -> dict[str, Kind]:
    """What is not left to llama.cpp, by name. It has no say in vectors anyway."""
    return {t.tensor.name: t.kind for t in file.tensors if not t.open and len(t.shape) > 1}


def _check_importance(file: GgufFile, importance: Importance | None) -> None:
    """Raises: UsageError: types that need a matrix have none, or one of another model."""
    missing, misshapen = [], []
    for t in file.tensors:
        if t.draft is None or t.role in ("embedding", "head"):
            continue
        needs = t.kind in KINDS_NEED_IMATRIX or (t.kind == "Q2_K" and file.word == "Q2_K_S")
        if importance is None and needs:
            raise _no_imatrix(t.kind, t.tensor.name)
        if isinstance(importance, Imatrix):
            entry = importance.entries.get(t.tensor.name)
            if entry is None:
                missing += [t.tensor.name]
            elif entry.sums.size != t.shape[-1]:
                misshapen += [f"{t.tensor.name}: {entry.sums.size} for {t.shape[-1]}"]
    if missing or misshapen:
        few = [f"no entry: {name}" for name in missing] + misshapen
        raise UsageError(
            "the importance matrix is not of this model",
            expected="an entry for each tensor that llama.cpp quantizes, as wide as its rows",
            found="; ".join(few[:8]) + (f"; {len(few) - 8} more" if len(few) > 8 else ""),
            fix="edge-mmllm imatrix SRC --text FILE --out FILE makes one",
        )


def _no_imatrix(kind: str, where: str | None = None) -> UsageError:
    return UsageError(
        f"{kind} cannot be made without an importance matrix: its result would be garbage",
        where=where,
        fix="--imatrix FILE (edge-mmllm imatrix SRC --text FILE --out FILE makes one), "
        "or --imatrix-text FILE",
    )


def plan_for(kind: GgufWord, plan: QuantPlan) -> QuantPlan:
    """The plan whose matrices are of this type."""
    bits = BITS[kind] if kind in PLAIN else 4
    name = {32: "f32", 16: "f16", 8: "int8"}.get(bits, "int4")
    return replace(plan, name=name, zero="float" if kind.endswith("_1") else "none")


def write(
    file: GgufFile,
    text: TextAssets | None,
    checkpoint: Checkpoint,
    path: Path,
    *,
    importance: Importance | None = None,
    workers: int = 1,
    progress: Callable[[int], None] | None = None,
) -> Stage:
    """Write the file.

    Args:
        text: the tokenizer; None: of a file without one.
        importance: for what llama.cpp quantizes.
        workers: threads that read, quantize and write tiles.
        progress: called with numbers of weights done.

    Raises:
        CheckpointError: a tokenizer that the format cannot say. ExportError, NonFiniteWeights.
    """
    stage = Stage(FILE, ("input_ids", "position", "logit_rows"), ("logits",))
    if file.word is None:
        _write(file, text, checkpoint, path, {}, workers, progress)
        return stage
    draft, matrix = path.with_name(_DRAFT), path.with_name(_IMATRIX)
    said: dict[str, Value] = {}
    try:
        if importance is not None:
            found = importance if isinstance(importance, Imatrix) else importance()
            imatrix.write(found, matrix)
            said = _described(found)
        _write(file, text, checkpoint, draft, said, workers, progress)
        job = gguf_mixes.Job(
            str(draft), str(path), file.word, _fixed(file),
            str(matrix) if importance is not None else None, workers,
        )  # fmt: skip
        gguf_mixes.quantize(job, lambda *_: None)
    finally:
        draft.unlink(missing_ok=True)
        matrix.unlink(missing_ok=True)
    _check_written(file, path)
    return stage


def _described(matrix: Imatrix) -> dict[str, Value]:
    """What a file says of the matrix that it was quantized with, as llama.cpp's tool has it."""
    return {
        "quantize.imatrix.dataset": ", ".join(matrix.datasets),
        "quantize.imatrix.entries_count": len(matrix.entries),
        "quantize.imatrix.chunks_count": matrix.chunk_count,
    }


def _check_written(file: GgufFile, path: Path) -> None:
    """The file is whole, and holds what was said of it.

    Raises: ExportError.
    """
    found, expected = kinds(path), {t.tensor.name: t.kind for t in file.tensors}
    if found != expected:
        differ = [n for n in expected | found if found.get(n) != expected.get(n)]
        name = differ[0]
        raise ExportError(
            f"llama.cpp wrote {len(differ)} tensors otherwise than it said",
            where=name, expected=str(expected.get(name)), found=str(found.get(name)),
        )  # fmt: skip


def _write(
    file: GgufFile,
    text: TextAssets | None,
    checkpoint: Checkpoint,
    path: Path,
    said: Mapping[str, Value],
    workers: int,
    progress: Callable[[int], None] | None,
) -> None:
    """The tensors that we write, in the types that we write."""
    begin = _write_header(file, text, checkpoint, path, said)
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


def _encoded(rows: Float32, stored: StoredTensor) -> memoryview:
    if stored.tensor.scale != 1.0:
        rows = rows * np.float32(stored.tensor.scale)
    raw = encode(rows.reshape(-1, stored.shape[-1]), stored.written)
    return np.ascontiguousarray(raw).data.cast("B")


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
        wide = row_bytes(stored.written, stored.shape[-1])
        if not stored.pieces:
            yield stored, None, 0, 0, place
        for piece in stored.pieces:
            w = piece.weight
            step = w.tile_rows()
            for start in range(0, w.shape[0], step):
                stop = min(start + step, w.shape[0])
                before = start * (w.size // w.shape[0]) // piece.width
                yield stored, piece, start, stop, place + (piece.first + before) * wide
        place = _aligned(place + stored.written_bytes)


def _aligned(size: int) -> int:
    return -(-size // 32) * 32


def _write_header(
    file: GgufFile,
    text: TextAssets | None,
    checkpoint: Checkpoint,
    path: Path,
    said: Mapping[str, Value],
) -> int:
    """Metadata and the table of tensors. Returns where data begins; the file has its whole size."""
    name = file.map.architecture
    out = GGUFWriter(path, name)
    kind = {} if text is not None else {"general.type": "mmproj"}
    for key, value in (provenance(checkpoint) | kind).items():
        out.add_string(key, value)
    _add(out, {f"{name}.{key}": value for key, value in file.map.metadata.items()})
    out.add_quantization_version(2)
    out.add_file_type(LlamaFileType[file.written_type])
    _add(out, said)
    if text is not None:
        _write_text(out, text, file)
    for stored in file.tensors:
        type_ = GGMLQuantizationType[stored.written]
        size = stored.written_bytes
        out.add_tensor_info(stored.tensor.name, stored.shape, np.dtype(np.float32), size, type_)
    try:
        out.write_header_to_file()
        out.write_kv_data_to_file()
        out.write_ti_data_to_file()
    finally:
        out.close()
    begin = place = _aligned(path.stat().st_size)
    for stored in file.tensors:
        place = _aligned(place + stored.written_bytes)
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
        elif isinstance(value, (list, bytes)):
            out.add_array(key, value)
        else:
            out.add_string(key, str(value))
