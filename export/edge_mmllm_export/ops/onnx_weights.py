"""The weights of an ONNX graph: packed tile by tile into the data file, each under one name.

Quantized layouts are those of onnxruntime's MatMulNBits and GatherBlockQuantized.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, wait

import numpy as np
from numpy.typing import NDArray

from edge_mmllm.errors import NonFiniteWeights
from edge_mmllm_export.ops.base import Rope
from edge_mmllm_export.ops.onnx_graph import GraphBuilder
from edge_mmllm_export.quantize.blocks import pack_nibbles, quantize
from edge_mmllm_export.weights import Weight


class WeightStore:
    """Gives each weight its initializer in a graph, packing it on first use.

    Args:
        graph: whose initializers and data file take the weights.
        workers: run the quantization of tiles; None packs in the calling thread.
        stored: tensors already in the data file (shared by the stages of a bundle): name ->
            offsets of its regions.
        progress: called with the number of weights (elements) packed.
    """

    def __init__(
        self,
        graph: GraphBuilder,
        workers: Executor | None,
        stored: dict[str, tuple[int, ...]],
        progress: Callable[[int], None] | None,
    ) -> None:
        self.graph, self._workers, self._stored = graph, workers, stored
        self._progress = progress or (lambda _: None)
        self._pending: list[Future[None]] = []
        self._tables: dict[tuple[int, float], tuple[str, str]] = {}

    def finish(self) -> None:
        """Wait until every weight is on disk; the first failure is raised."""
        pending, self._pending = self._pending, []
        try:
            for future in pending:
                future.result()
        except BaseException:
            for future in pending:
                future.cancel()
            wait(pending)
            raise

    def _each_tile(self, w: Weight, task: Callable[[int, int], None]) -> None:
        """Run `task(start, stop)` over the rows of a weight, side by side where there are
        workers; at most a few tiles are in flight, so memory stays bounded."""
        step = w.tile_rows()
        for start in range(0, w.shape[0], step):
            stop = min(start + step, w.shape[0])
            width = w.size // w.shape[0]
            if self._workers is None:
                task(start, stop)
            else:
                self._pending.append(self._workers.submit(task, start, stop))
            self._progress((stop - start) * width)

    def vector(self, w: Weight, stem: str | None = None) -> str:
        """A float32 parameter, whole."""
        name = stem or w.name
        if not self.graph.has(name):
            known = self._stored.get(name)
            offset = self.graph.external(name, "float32", w.shape, known[0] if known else None)
            if known is None:
                self.graph.data.write(offset, w.values)
                self._stored[name] = (offset,)
                self._progress(w.size)
        return name

    def floats(self, w: Weight) -> str:
        """A whole `(N, K)` matrix as float16 or float32 rows."""
        if not self.graph.has(w.name):
            dtype = "float16" if w.scheme.bits == 16 else "float32"
            known = self._stored.get(w.name)
            offset = self.graph.external(w.name, dtype, w.shape, known[0] if known else None)
            if known is None:
                self._stored[w.name] = (offset,)
                row_bytes = w.shape[1] * np.dtype(dtype).itemsize

                def task(start: int, stop: int) -> None:
                    tile = quantize(_within(w, w.rows(start, stop)), w.scheme).scale
                    self.graph.data.write(offset + start * row_bytes, tile.astype(dtype))

                self._each_tile(w, task)
        return w.name

    def blocks(self, ws: Sequence[Weight], as_rows: bool = False) -> list[str]:
        """Quantized weights, stacked along N, packed as MatMulNBits reads them.

        `B` uint8 `(N, blocks, block_size * bits / 8)`, scales float16 `(N, blocks)` (float32
        beside float zero points), zero points uint8 `(N, ceil(blocks * bits / 8))` or float32
        `(N, blocks)`. The same bytes serve GatherBlockQuantized (`as_rows`) as
        `(N, K * bits / 8)`: tied weights are stored once.
        """
        scheme, k = ws[0].scheme, ws[0].shape[1]
        size, bits = scheme.block_size, scheme.bits
        n, blocks = sum(w.shape[0] for w in ws), -(-k // size)
        blob = size * bits // 8
        stem = "+".join(w.name for w in ws)
        zero_width, zero_type = 0, "uint8"
        if scheme.zero == "int":
            zero_width = -(-blocks * bits // 8)
        elif scheme.zero == "float":
            zero_width, zero_type = blocks, "float32"
        shapes = [
            (
                "rows" if as_rows else "q",
                "uint8",
                (n, k * bits // 8) if as_rows else (n, blocks, blob),
            ),
            ("scale", f"float{scheme.scale_bits}", (n, blocks)),
            ("zero", zero_type, (n, zero_width)),
        ]
        if not zero_width:
            shapes.pop()
        names = [f"{stem}.{suffix}" for suffix, _, _ in shapes]
        if self.graph.has(names[0]):
            return names
        known = self._stored.get(stem)
        offsets = []
        for i, (name, (_, dtype, shape)) in enumerate(zip(names, shapes, strict=True)):
            if self.graph.has(name):
                offsets.append(known[i] if known else 0)
            else:
                offsets.append(self.graph.external(name, dtype, shape, known[i] if known else None))
        if known is None:
            self._stored[stem] = tuple(offsets)
            first = 0
            for w in ws:
                self._each_tile(w, self._packer(w, first, offsets, (blocks * blob, blocks)))
                first += w.shape[0]
        return names

    def _packer(
        self, w: Weight, first: int, offsets: list[int], widths: tuple[int, int]
    ) -> Callable[[int, int], None]:
        scheme, data = w.scheme, self.graph.data
        row_bytes, blocks = widths

        def task(start: int, stop: int) -> None:
            tile = quantize(w.rows(start, stop), scheme)
            q = pack_nibbles(tile.q) if scheme.bits == 4 else tile.q
            data.write(offsets[0] + (first + start) * row_bytes, q)
            place = offsets[1] + (first + start) * blocks * scheme.scale_bits // 8
            if scheme.scale_bits == 32:
                data.write(place, tile.scale)
            else:
                data.write(place, _in_half(w, tile.scale).astype(np.float16))
            if tile.zero is None:
                return
            if scheme.zero == "float":
                data.write(offsets[2] + (first + start) * blocks * 4, tile.zero)
                return
            zero: NDArray[np.uint8] = tile.zero.astype(np.uint8)
            if scheme.bits == 4:
                zero = pack_nibbles(np.pad(zero, ((0, 0), (0, blocks % 2))))
            data.write(offsets[2] + (first + start) * zero.shape[1], zero)

        return task

    def joined(self, bias: Sequence[Weight | None], w: Sequence[Weight]) -> str:
        """The biases of several matrices, one after another, as one initializer."""
        if len(bias) == 1 and bias[0] is not None:
            return self.vector(bias[0])
        name = "+".join(f"{v.name}.bias" for v in w)
        if not self.graph.has(name):
            parts = [
                np.zeros(v.shape[0], np.float32) if own is None else own.values
                for own, v in zip(bias, w, strict=True)
            ]
            self.graph.fixed(name, np.concatenate(parts))
            self._progress(sum(own.size for own in bias if own is not None))
        return name

    def fixed(self, w: Weight, suffix: str, values: NDArray[np.float32]) -> str:
        """A constant made of a small weight, in the weight's type, which is counted as packed."""
        if not self.graph.has(w.name + suffix):
            half = w.scheme.bits == 16
            self.graph.fixed(w.name + suffix, _within(w, values).astype("f2" if half else "f4"))
            self._progress(w.size)
        return w.name + suffix

    def ones(self, width: int) -> str:
        return self.graph.fixed(f"ones.{width}", np.ones(width, np.float32))

    def rope(self, rope: Rope, scale: float) -> tuple[str, str]:
        """cos and sin `(length, head_dim / 2)` with the square root of the attention scale
        multiplied in: q and k both carry it, so that a kernel multiplies by 1, for which it may
        have a faster product."""
        key = id(rope.inv_freq), scale
        if key not in self._tables:
            cos, sin = (table * np.float32(scale**0.5) for table in rope.tables())
            stem = f"rope.{len(self._tables)}"
            self._tables[key] = (
                self.graph.fixed(f"{stem}.cos", cos),
                self.graph.fixed(f"{stem}.sin", sin),
            )
        return self._tables[key]


def _within(w: Weight, tile: NDArray[np.float32]) -> NDArray[np.float32]:
    """The tile, if its type can hold it: float16 ends at 65504.

    Raises:
        NonFiniteWeights: a value would become infinite.
    """
    return _in_half(w, tile) if w.scheme.bits == 16 else tile


def _in_half(w: Weight, values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The values, if float16 can hold them. Raises: NonFiniteWeights."""
    largest = np.abs(values).max(initial=0.0)
    if largest > np.finfo(np.float16).max:
        raise NonFiniteWeights(
            "a weight or a scale is too large for float16",
            where=f"tensor {w.source.name} ({w.name})",
            expected="magnitudes up to 65504",
            found=str(largest),
            fix=f"--override '{w.name}=f32'",
        )
    return values
