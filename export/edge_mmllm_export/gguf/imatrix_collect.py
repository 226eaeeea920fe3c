"""Importance matrices computed by the oracle: it reads a text, layer after layer, and adds up the
squares of what goes into each linear layer. Weights are streamed, so memory is that of a forward.

As llama.cpp's tool does it: pieces of `CHUNK` tokens, each from an empty state, the first token of
each the one that begins a text where the tokenizer has one; not for embedding and head.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_mmllm.errors import UsageError
from edge_mmllm.text import Text
from edge_mmllm_export.checkpoints import open_checkpoint
from edge_mmllm_export.checkpoints.base import TextAssets
from edge_mmllm_export.gguf import imatrix
from edge_mmllm_export.gguf.imatrix import Entry, Imatrix
from edge_mmllm_export.gguf.maps import gguf_map
from edge_mmllm_export.models import build
from edge_mmllm_export.ops.base import Architecture
from edge_mmllm_export.ops.numpy import Array, NumpyOps
from edge_mmllm_export.oracle import Oracle
from edge_mmllm_export.weights import TILE_BYTES, Weight, bind

#: Tokens in a piece; at most so many pieces by default: 10,000 tokens.
CHUNK, CHUNKS = 512, 20
#: RSS of the process before the first piece.
_BASE_RAM = 110 << 20
#: Characters read of a text for each token wanted: more than any tokenizer makes one of.
_CHARACTERS = 16

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Calibration:
    """A text to compute a matrix from.

    Attributes:
        text: a file in UTF-8.
        chunks: pieces of it to read at most.
    """

    text: str
    chunks: int = CHUNKS

    def check(self, text: TextAssets) -> None:
        """Raises: UsageError, as `collect`, before anything is computed."""
        _ids(text, self)


class CollectingOps(NumpyOps):
    """The oracle's ops, adding up.

    Args:
        sums: sums of squares of the inputs of each weight that is wanted `(K,)`, by its name.
        counts: tokens seen.
        states, position, logit_rows, cache: see `NumpyOps`.
    """

    def __init__(
        self,
        sums: dict[str, NDArray[np.float64]],
        counts: dict[str, int],
        states: dict[str, Array],
        position: int = 0,
        logit_rows: NDArray[np.int64] | None = None,
        cache: dict[str, Array] | None = None,
    ) -> None:
        super().__init__(states, position, logit_rows, cache)
        self.sums, self.counts = sums, counts

    def linear(
        self, x: Array, *w: Weight, bias: tuple[Weight | None, ...] = ()
    ) -> tuple[Array, ...]:
        if not len(x):  # the head, where no logits are wanted
            return tuple(np.empty((0, weight.shape[0]), np.float32) for weight in w)
        squares = np.einsum("tk,tk->k", x, x, dtype=np.float64)
        for weight in w:
            if weight.name in self.counts:
                self.sums[weight.name] += squares
                self.counts[weight.name] += x.shape[0]
        return super().linear(x, *w, bias=bias)


def ram_bytes(model: Architecture, weights: Mapping[str, Weight]) -> int:
    """What `collect` takes at most: a piece's activations, a tile of weights and its product."""
    widest = max((max(w.shape) for w in weights.values() if w.role == "matrix"), default=0)
    chunk = min(CHUNK, model.context_length or CHUNK)
    return _BASE_RAM + 10 * 4 * chunk * (widest + model.hidden_size) + 4 * TILE_BYTES


def collect(
    model: Architecture,
    weights: Mapping[str, Weight],
    text: TextAssets,
    calibration: Calibration,
    progress: Progress = lambda *_: None,
) -> Imatrix:
    """The matrix of a model that is bound.

    Args:
        progress: called with pieces done, pieces.

    Raises:
        UsageError: no tokenizer, or a text that is unreadable or too short.
        UnsupportedArchitecture: llama.cpp has no name for its tensors.
    """
    found = gguf_map(model)
    names = {
        t.name: part
        for t in found.tensors
        for part in t.parts[:1]  # parts that are stored as one tensor have one input
        if weights[part].role == "matrix"
    }
    ids = _ids(text, calibration)
    size = min(CHUNK, found.context_length or CHUNK)
    pieces = [ids[i : i + size] for i in range(0, len(ids) - size + 1, size)] or [ids]
    pieces = pieces[: calibration.chunks]
    sums = {part: np.zeros(weights[part].shape[-1], np.float64) for part in names.values()}
    counts = dict.fromkeys(sums, 0)

    oracle = Oracle(model, weights, ops=partial(CollectingOps, sums, counts))
    nothing = np.empty(0, np.int64)
    for done, piece in enumerate(pieces, 1):
        if text.spec.add_bos and text.spec.bos_id is not None:
            piece = np.concatenate([[text.spec.bos_id], piece[1:]])
        oracle.start(piece)
        oracle.forward(piece, nothing)
        progress(done, len(pieces))
    entries = {
        name: Entry(sums[part].astype(np.float32)[None], np.array([counts[part]], np.float32))
        for name, part in names.items()
    }
    return Imatrix(entries, len(pieces), size, (Path(calibration.text).name,))


def _ids(text: TextAssets, calibration: Calibration) -> NDArray[np.int64]:
    """The text's tokens, as many as are wanted."""
    if text.tokenizer_json is None and text.spec.tokenizer != "bytes":
        raise UsageError(
            "a text needs a tokenizer to be read with", expected="a checkpoint with a tokenizer",
            found="none", fix="--tokenizer FILE, or --imatrix FILE made where there is one",
        )  # fmt: skip
    wanted = CHUNK * calibration.chunks
    try:
        with Path(calibration.text).open(encoding="utf-8", newline="") as file:
            content = file.read(_CHARACTERS * wanted)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            "the calibration text cannot be read",
            where=calibration.text,
            expected="a text file in UTF-8",
            found=str(error),
        ) from error
    ids = np.asarray(Text(text.spec, text.tokenizer_json).encode(content)[:wanted], np.int64)
    if len(ids) < CHUNK // 4:
        raise UsageError(
            "the calibration text is too short",
            where=calibration.text,
            expected=f"{CHUNK // 4} tokens; {wanted} are better",
            found=f"{len(ids)} tokens",
        )
    return ids


def compute_imatrix(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    calibration: Calibration,
    *,
    lora: str | None = None,
    force: bool = False,
    progress: Progress = lambda *_: None,
) -> Imatrix:
    """Compute the importance matrix of a checkpoint and write it to `out`, as a whole or not.

    Raises:
        CheckpointError, UsageError: see `edge_mmllm.errors`. OutputExists: without `force`.
    """
    from edge_mmllm.bundle.staging import Staging

    checkpoint = open_checkpoint(Path(source) if isinstance(source, os.PathLike) else source, lora)
    model = build(checkpoint, None)
    sources, ignored = model.sources(checkpoint.layout), model.ignored()
    weights = bind(checkpoint, model.parameters(), sources, ignored=ignored)
    staging = Staging(Path(out), force=force, replaceable=_is_matrix)
    try:
        matrix = collect(model, weights, checkpoint.text(), calibration, progress)
        imatrix.write(matrix, staging.part)
        staging.publish()
    finally:
        staging.close()
    return matrix


def _is_matrix(path: Path) -> bool:
    """Whether a file is one that may be replaced."""
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"
