"""Writes MLC's weight files, tile by tile, and their index.

Memory stays at a few tiles a worker, whatever the model's size. Little-endian throughout.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_mmllm_export.checkpoints.base import Checkpoint, Float32
from edge_mmllm_export.mlc.layout import Encoding, MlcFiles, Record, StoredTensor, changed
from edge_mmllm_export.mlc.quant import half, quantize, stored_scales
from edge_mmllm_export.weights import Weight
from edge_mmllm_runtime.mlc.weights import INDEX, OLD_INDEX, to_bfloat16

#: A tensor and one of its parts, the part's first row there, and the rows `[start, stop)` of the
#: part; a tensor that is written at once has no part.
_Tile = tuple[StoredTensor, Weight | None, int, int, int]


def write(
    files: MlcFiles,
    checkpoint: Checkpoint,
    folder: Path,
    *,
    workers: int = 1,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write `params_shard_N.bin`, `tensor-cache.json` and `ndarray-cache.json` into `folder`.

    Args:
        workers: threads that read, quantize and write tiles.
        progress: called with numbers of weights done.

    Raises:
        ExportError, NonFiniteWeights, CorruptCheckpoint, OutOfSpace.
    """
    paths = [folder / shard_file(i) for i in range(len(files.shards))]
    descriptors: list[int] = []
    try:
        for path, size in zip(paths, files.shards, strict=True):
            descriptors.append(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666))
            os.truncate(path, size)
        tiles, lock = _tiles(files), threading.Lock()

        def work() -> None:
            while True:
                with lock:
                    tile = next(tiles, None)
                if tile is None:
                    return
                count = _write_tile(files, checkpoint, descriptors, tile)
                if progress is not None:
                    progress(count)

        with ThreadPoolExecutor(workers) as pool:
            for future in [pool.submit(work) for _ in range(workers)]:
                future.result()
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    content = json.dumps(index(files, [_md5(path) for path in paths]), indent=4).encode()
    for name in (INDEX, OLD_INDEX):
        (folder / name).write_bytes(content)


def shard_file(number: int) -> str:
    """Name of a data file."""
    return f"params_shard_{number}.bin"


def index(files: MlcFiles, md5: list[str]) -> dict[str, Any]:
    """The document of `tensor-cache.json`.

    `ParamBytes` and `BitsPerParam` count a float32 as four bytes, as mlc-llm does, although the
    files hold it as bfloat16; parameters are counted as in the checkpoint, a tied head once.
    """
    records: list[list[Record]] = [[] for _ in files.shards]
    for t in files.tensors:
        for r in t.records:
            records[r.shard].append(r)
    size = float(sum(r.memory_bytes for shard in records for r in shard))
    names = {w.name: w.size for t in files.tensors for w in t.parts}
    names |= {t.tensor.name: math.prod(t.records[0].shape) for t in files.tensors if not t.parts}
    return {
        "metadata": {
            "ParamSize": sum(map(len, records)),
            "ParamBytes": size,
            "BitsPerParam": 8 * size / sum(names.values()),
        },
        "records": [
            {
                "dataPath": shard_file(i),
                "format": "raw-shard",
                "nbytes": files.shards[i],
                "records": [_entry(r) for r in sorted(shard, key=lambda r: r.offset)],
                "md5sum": md5[i],
            }
            for i, shard in enumerate(records)
        ],
    }


def _entry(r: Record) -> dict[str, Any]:
    return {
        "name": r.name,
        "shape": list(r.shape),
        "dtype": r.dtype,
        # What mlc-llm writes for every tensor, and reads for float32 alone.
        "format": "raw" if r.encoding == "float32" else "f32-to-bf16",
        "nbytes": r.size_bytes,
        "byteOffset": r.offset,
    }


def _tiles(files: MlcFiles) -> Iterator[_Tile]:
    for t in files.tensors:
        if t.tensor.shape is not None or t.tensor.change != "same":
            yield t, None, 0, 0, 0
            continue
        row = 0
        for w in t.parts:
            step = w.tile_rows()
            for start in range(0, w.shape[0], step):
                yield t, w, row, start, min(start + step, w.shape[0])
            row += w.shape[0]


def _write_tile(
    files: MlcFiles, checkpoint: Checkpoint, descriptors: list[int], tile: _Tile
) -> int:
    """Returns how many weights that were."""
    t, w, row, start, stop = tile
    if w is None:
        values = _whole(t, checkpoint)
        r = t.records[0]
        _pwrite(descriptors[r.shard], _encoded(values, r.encoding), r.offset)
        return values.size
    rows = w.rows(start, stop)
    if not t.quantized:
        r = t.records[0]
        wide = r.size_bytes // t.rows
        data = _encoded(rows, r.encoding)
        _pwrite(descriptors[r.shard], data, r.offset + (row + start) * wide)
        return rows.size
    words, scales = quantize(rows, files.quant, searched=t.searched)
    stored = stored_scales(scales, files.quant)
    both: tuple[NDArray[Any], ...] = (words, stored)
    for r, values in zip(t.records, both, strict=True):
        place = descriptors[r.shard]
        if t.transposed:
            _write_columns(place, r, values, row + start)
        else:
            wide = r.size_bytes // t.rows
            _pwrite(place, _encoded(values, r.encoding), r.offset + (row + start) * wide)
    return rows.size


def _write_columns(descriptor: int, r: Record, rows: NDArray[Any], first: int) -> None:
    """Rows `(n, width)` as the columns `[first, first + n)` of a record `(width, N)`."""
    size = r.size_bytes // (r.shape[0] * r.shape[1])
    for i, column in enumerate(np.ascontiguousarray(rows.T)):
        place = r.offset + (i * r.shape[1] + first) * size
        _pwrite(descriptor, _encoded(column, r.encoding), place)


def _whole(t: StoredTensor, checkpoint: Checkpoint) -> Float32:
    """The values of a small tensor, as they are stored."""
    shape, change = t.records[0].shape, t.tensor.change
    if t.tensor.copied is not None:
        return checkpoint.read(t.tensor.copied).reshape(shape)
    parts = [changed(w.rows(), change) for w in t.parts]
    if change == "transposed":
        return np.stack([part.T for part in parts]).reshape(shape)
    return np.concatenate(parts).reshape(shape)


def _encoded(values: NDArray[Any], encoding: Encoding) -> memoryview:
    out: NDArray[Any]
    if encoding == "float16":
        out = half(values).astype("<f2")
    elif encoding == "bfloat16":
        out = to_bfloat16(values).astype("<u2")
    else:
        out = values.astype("<u4" if encoding == "uint32" else "<f4", copy=False)
    return np.ascontiguousarray(out).reshape(-1).view(np.uint8).data


def _pwrite(descriptor: int, data: memoryview, place: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, place)
        data, place = data[count:], place + count


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
