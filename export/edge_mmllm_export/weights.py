"""Logical weights: what a model asks for, where a checkpoint keeps it, and how it is stored.

A model file declares `Parameter`s (our name, shape, role) and, for each checkpoint layout, a
`Source` for every name. `bind` joins the two over an open checkpoint, or lists everything that
does not fit in one error. The result is a dict of `Weight`s, read as float32 rows on demand.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edge_mmllm.errors import NonFiniteWeights, TensorMismatch
from edge_mmllm_export.checkpoints.base import Checkpoint, Float32
from edge_mmllm_export.quantize.blocks import dequantize, quantize
from edge_mmllm_export.quantize.schemes import F32, Scheme

#: `table` is a small constant that no matrix product reads, worth halving (Mamba's A).
Role = Literal["matrix", "embedding", "head", "vector", "table"]

#: What checkpoint layouts call a language model's head.
_HEADS = ("lm_head.weight", "output.weight", "head.weight")

#: float32 bytes in one tile; peak memory of an export is a few of these for each worker.
TILE_BYTES = 8 << 20


@dataclass(frozen=True)
class Parameter:
    """A weight as the model sees it.

    Attributes:
        name: our name, e.g. `layers.3.attn.q`.
        shape: `(N, K)` for a matrix `y = x @ W.T`, `(vocab, hidden)` for an embedding.
        role: only `matrix`, `embedding` and `head` are ever quantized; `vector` (norms, biases,
            decays, conv kernels) stays float32.
    """

    name: str
    shape: tuple[int, ...]
    role: Role = "matrix"


@dataclass(frozen=True)
class Source:
    """Where a parameter lives in a checkpoint layout.

    Attributes:
        name: the checkpoint's name for the tensor.
        rows: take only rows `[start, stop)` of the first axis (fused projections).
        order: row permutation: our row i is their row `order[i]` (after `rows`).
        apply: elementwise function (e.g. `A_log -> -exp(A_log)`).
        whole: makes our tensor of all of theirs (a transpose, one branch of several); for small
            tensors, since each tile reads all of it.
        stored: their shape, where `whole` is given and theirs is not ours but for axes of one.
        more: tensors whose rows follow (a vocabulary that was extended, kept apart).
    """

    name: str
    rows: tuple[int, int] | None = None
    order: NDArray[np.int64] | None = field(default=None, compare=False)
    apply: Callable[[Float32], Float32] | None = None
    whole: Callable[[Float32], Float32] | None = field(default=None, compare=False)
    stored: tuple[int, ...] | None = None
    more: tuple[str, ...] = ()


@dataclass(frozen=True)
class Weight:
    """A bound weight: `(N, K)` for matrices, quantized in blocks along K by its scheme."""

    name: str
    shape: tuple[int, ...]
    role: Role
    checkpoint: Checkpoint = field(repr=False)
    source: Source = field(repr=False)
    scheme: Scheme = F32
    as_stored: bool = False

    def rows(self, start: int = 0, stop: int | None = None) -> Float32:
        """Rows `[start, stop)` as float32, checked to be finite.

        With `as_stored`, the values a device will see: quantized by the scheme and back.
        """
        stop = self.shape[0] if stop is None else stop
        source = self.source
        base = source.rows[0] if source.rows else 0
        if source.whole is not None:
            theirs = self.checkpoint.read(source.name)
            tile = np.ascontiguousarray(source.whole(theirs).reshape(self.shape)[start:stop])
        elif source.order is None:
            tile = self._read(base + start, base + stop)
        else:
            wanted = source.order[start:stop]
            low, high = int(wanted.min()), int(wanted.max()) + 1
            tile = self._read(base + low, base + high)[wanted - low]
        tile = tile.reshape((stop - start, *self.shape[1:]))
        if source.apply is not None:
            tile = np.ascontiguousarray(source.apply(tile), dtype=np.float32)
        self._check_finite(tile, start)
        if self.as_stored and self.role != "vector":
            tile = dequantize(quantize(tile, self.scheme), self.scheme, tile.shape[1])
        return tile

    def _read(self, start: int, stop: int) -> Float32:
        """Rows of the checkpoint's tensor, and of those that follow it."""
        if not self.source.more:
            return self.checkpoint.read(self.source.name, start, stop)
        parts = []
        for name in (self.source.name, *self.source.more):
            count = self.checkpoint.tensors[name].shape[0]
            if start < min(stop, count):
                parts.append(self.checkpoint.read(name, start, min(stop, count)))
            start, stop = max(0, start - count), max(0, stop - count)
        return np.concatenate(parts)

    def _check_finite(self, tile: Float32, start: int) -> None:
        # A sum is finite unless a value is not (or it overflows, which the slow path settles).
        with np.errstate(over="ignore", invalid="ignore"):
            total = tile.sum(dtype=np.float32)
        if not np.isfinite(total):
            bad = ~np.isfinite(tile)
            if bad.any():
                at = tuple(int(i) for i in np.argwhere(bad)[0])
                raise NonFiniteWeights(
                    f"{int(bad.sum())} values of a weight are NaN or infinite",
                    where=f"tensor {self.source.name}, "
                    f"first at {(self._stored_row(start + at[0]), *at[1:])}",
                    expected="finite numbers",
                    found=str(tile[at]),
                    fix="download the checkpoint again, or repair it where it was trained",
                )

    def _stored_row(self, row: int) -> int:
        """Our row's number in the checkpoint's tensor."""
        source = self.source
        base = source.rows[0] if source.rows else 0
        return base + (row if source.order is None else int(source.order[row]))

    def tile_rows(self) -> int:
        """How many rows make one tile of about `TILE_BYTES`."""
        width = int(np.prod(self.shape[1:], dtype=np.int64)) or 1
        return max(1, min(self.shape[0], TILE_BYTES // (4 * width)))

    def tiles(self) -> Iterator[tuple[int, int, Float32]]:
        """`(start, stop, rows)` over the whole weight, streamed."""
        step = self.tile_rows()
        for start in range(0, self.shape[0], step):
            stop = min(start + step, self.shape[0])
            yield start, stop, self.rows(start, stop)

    @cached_property
    def values(self) -> Float32:
        """The whole weight (vectors and other small ones only)."""
        return self.rows()

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))


def bind(
    checkpoint: Checkpoint,
    parameters: Sequence[Parameter],
    sources: Mapping[str, Source],
    *,
    ignored: Sequence[str] = (),
    schemes: Callable[[Parameter], Scheme] = lambda _: F32,
) -> dict[str, Weight]:
    """Join parameters and checkpoint.

    Args:
        ignored: `fnmatch` patterns of checkpoint tensors that the model does not need.
        schemes: the storage scheme of each parameter.

    Raises:
        TensorMismatch: lists every missing, unexpected and misshapen tensor.
    """
    tensors = checkpoint.tensors
    used = {name for s in sources.values() for name in (s.name, *s.more)}
    unexpected = [
        name
        for name in tensors
        if name not in used and not any(fnmatch.fnmatchcase(name, i) for i in ignored)
    ]
    missing: dict[str, tuple[int, ...]] = {}
    misshapen: dict[str, str] = {}
    bound: dict[str, Weight] = {}
    rows: dict[str, int] = {}  # of fused tensors: how many the model takes
    for source in sources.values():
        if source.rows is not None:
            rows[source.name] = max(rows.get(source.name, 0), source.rows[1])
    for p in parameters:
        source = sources[p.name]
        info = tensors.get(source.name)
        absent = [name for name in source.more if name not in tensors]
        missing |= dict.fromkeys(absent, p.shape)
        if info is None:
            shape = (rows[source.name], *p.shape[1:]) if source.rows is not None else p.shape
            missing[source.name] = source.stored or shape
            continue
        stored = info.shape
        if source.more and not absent:
            stored = (sum(tensors[n].shape[0] for n in (source.name, *source.more)), *stored[1:])
        elif absent:
            continue
        if source.rows is not None:
            if not stored or stored[0] != rows[source.name]:
                misshapen[source.name] = f"expected {rows[source.name]} rows, found {stored}"
                continue
            stored = (source.rows[1] - source.rows[0], *stored[1:])
        if not _same_layout(stored, source.stored or p.shape):
            wanted = source.stored or p.shape
            misshapen[source.name] = f"expected {wanted}, found {info.shape}"
            continue
        bound[p.name] = Weight(p.name, p.shape, p.role, checkpoint, source, schemes(p))
    if missing or unexpected or misshapen:
        few = unexpected if len(missing) * len(unexpected) <= 10_000 else []
        lines = [f"missing: {n} {shape}{_near(n, few)}" for n, shape in missing.items()]
        lines += [f"unexpected: {n} {tensors[n].shape}" for n in unexpected]
        lines += [f"wrong shape: {n}: {why}" for n, why in misshapen.items()]
        raise TensorMismatch(
            f"the checkpoint does not fit its config: {len(missing)} tensors missing, "
            f"{len(unexpected)} unexpected, {len(misshapen)} of the wrong shape",
            where=str(checkpoint.source),
            found="\n    " + "\n    ".join(lines),
            fix="check config.json against the weights, or export from the original checkpoint",
        )
    _check_tied(checkpoint, bound)
    return bound


def _near(missing: str, unexpected: Sequence[str]) -> str:
    """A hint at a misspelt name, of the same layer."""
    numbers = re.findall(r"\d+", missing)
    same_layer = [n for n in unexpected if re.findall(r"\d+", n) == numbers]
    near = difflib.get_close_matches(missing, same_layer, n=1, cutoff=0.9)
    return f" (there is: {near[0]})" if near else ""


def _check_tied(checkpoint: Checkpoint, bound: Mapping[str, Weight]) -> None:
    """A head that a tied model leaves out must be the embedding, bit for bit.

    Raises:
        TensorMismatch: the config says tied, the weights say otherwise.
    """
    embed = bound.get("embed")
    if embed is None or "head" in bound:
        return
    for name in _HEADS:
        info = checkpoint.tensors.get(name)
        if info is None:
            continue
        if info.shape == embed.shape and all(
            np.array_equal(checkpoint.read(name, start, stop), tile)
            for start, stop, tile in embed.tiles()
        ):
            continue
        raise TensorMismatch(
            "the config ties head and embedding, but the checkpoint has another head",
            where=f"{checkpoint.source}, tensor {name}",
            expected=f"the values of {embed.source.name}",
            found="other values" if info.shape == embed.shape else f"shape {info.shape}",
            fix='set "tie_word_embeddings": false in config.json if the head is its own',
        )


def _same_layout(stored: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Equal but for axes of length one (conv kernels are stored `(channels, 1, width)`)."""
    return [d for d in stored if d != 1] == [d for d in wanted if d != 1]


def as_stored(weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """The same weights as the device will see them: tells a packing bug from quantization loss."""
    return {name: replace(w, as_stored=True) for name, w in weights.items()}
