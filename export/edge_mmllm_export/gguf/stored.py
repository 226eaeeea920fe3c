"""A GGUF file's weights as its reader sees them: what the gate tells rounding from arithmetic by.

What we wrote is rounded again as it was written; what llama.cpp quantized is read from the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from edge_mmllm_export.checkpoints.base import Float32
from edge_mmllm_export.checkpoints.gguf import GgufCheckpoint
from edge_mmllm_export.gguf.layout import Piece, StoredTensor, Wanted, layout_of
from edge_mmllm_export.gguf.maps import GgufMap, gguf_map
from edge_mmllm_export.gguf.types import Kind, encode
from edge_mmllm_export.ops.base import Architecture
from edge_mmllm_export.weights import Source, Weight


def kinds(path: Path) -> dict[str, Kind]:
    """The types of a file's tensors."""
    checkpoint = GgufCheckpoint(path, path)
    try:
        return {name: cast("Kind", info.dtype) for name, info in checkpoint.tensors.items()}
    finally:
        checkpoint.close()


def as_stored(
    model: Architecture, weights: Mapping[str, Weight], wanted: Wanted, path: Path
) -> dict[str, Weight]:
    """The weights as a reader of the file at `path` sees them.

    Args:
        wanted: what was asked for, but for overrides: they show in the file.
    """
    return as_stored_of(gguf_map(model), weights, wanted, path)


def as_stored_of(
    found_map: GgufMap, weights: Mapping[str, Weight], wanted: Wanted, path: Path
) -> dict[str, Weight]:
    """As `as_stored`, of a map."""
    out, written = dict(weights), GgufCheckpoint(path, path)
    for stored in layout_of(found_map, weights, wanted).tensors:
        if stored.tensor.columns is not None:
            continue  # of pictures' patches, which are held in float32
        found = written.tensors[stored.tensor.name].dtype
        for name, piece in zip(stored.tensor.parts, stored.pieces, strict=True):
            if stored.draft or found != stored.kind:
                out[name] = _read_back(weights[name], stored, piece, written)
            else:
                out[name] = _rounded(weights[name], stored)
    return out


def _rounded(w: Weight, stored: StoredTensor) -> Weight:
    kind, before = GGMLQuantizationType[stored.kind], w.source.apply
    width, scale = stored.shape[-1], np.float32(stored.tensor.scale)

    def apply(rows: Float32) -> Float32:
        rows = rows if before is None else before(rows)
        raw = encode((rows * scale).reshape(-1, width), stored.written)
        values: Float32 = dequantize(raw, kind)
        return values.reshape(rows.shape) / scale

    return replace(w, as_stored=False, source=replace(w.source, apply=apply))


def _read_back(w: Weight, stored: StoredTensor, piece: Piece, written: GgufCheckpoint) -> Weight:
    """A weight as llama.cpp quantized it: rows of the file's tensor, in our order again."""
    order, scale = stored.tensor.order, np.float32(stored.tensor.scale)

    def apply(rows: Float32) -> Float32:
        return rows / scale

    source = Source(
        stored.tensor.name,
        rows=(piece.first, piece.first + w.shape[0]),
        order=None if order is None else np.argsort(order),
        apply=apply if scale != 1.0 else None,
    )
    return replace(w, as_stored=False, checkpoint=written, source=source)
