"""GGUF checkpoints: rows dequantized on demand, metadata as config, tokenizer rebuilt.

A row of a quantized tensor is a whole number of blocks, so any range of rows is one range of
bytes. The arithmetic of each block type is the `gguf` package's; its file reader is not used,
since that maps the file and trusts it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edge_mmllm.errors import CheckpointError, CorruptCheckpoint, MissingDependency
from edge_mmllm_runtime.gguf.header import Faults, GgufTensor, read_header

from .base import Float32, Layout, TensorInfo, TextAssets
from .files import (
    NUMPY_DTYPES,
    WeightFile,
    check_ranges,
    elements,
    lookup,
    read_floats,
    row_range,
    valid_shape,
)
from .gguf_text import gguf_text

try:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize
except ImportError as error:
    raise MissingDependency("gguf", "export") from error

#: Elements dequantized at a time; a block type needs up to ten times that in scratch.
_TILE_ELEMENTS = 1 << 18


class GgufCheckpoint:
    """An opened GGUF file.

    Attributes:
        source: what the user named (the file, or the directory that holds it).
        layout: always `gguf`.
    """

    layout: Layout = "gguf"

    def __init__(self, path: Path, source: Path) -> None:
        """Raises: CorruptCheckpoint, CheckpointError for a version, type or split unknown here."""
        self.path, self.source = path, source
        self._file = WeightFile(path)
        try:
            self._header = read_header(self._file, Faults(CorruptCheckpoint, CheckpointError))
            self._check_split()
            self._tensors: dict[str, TensorInfo] = {}
            self._stored: dict[str, GgufTensor] = {}
            self._index_tensors()
        except BaseException:
            self._file.close()
            raise

    @property
    def config(self) -> dict[str, Any]:
        """The metadata. Arrays above 1,024 items are sequences that read the file when used."""
        return self._header.metadata

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by its stored name, shapes in numpy order."""
        return self._tensors

    @property
    def files(self) -> tuple[Path, ...]:
        """The one file."""
        return (self.path,)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Float32:
        """Rows `[start, stop)` of the first axis as float32. Thread-safe."""
        info = lookup(self._tensors, name, self.path)
        begin, end = row_range(info, start, stop)
        row = elements(info.shape[1:])
        offset = self._header.data_start + self._stored[name].offset
        flat = self._elements(info, offset, begin * row, end * row)
        return flat.reshape((end - begin, *info.shape[1:]) if info.shape else ())

    def text(self) -> TextAssets:
        """The tokenizer, rebuilt from the metadata."""
        return gguf_text(self.config, self.path)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _elements(self, info: TensorInfo, offset: int, begin: int, end: int) -> Float32:
        """Elements `[begin, end)` of a tensor that starts at byte `offset`, flat."""
        kind = GGMLQuantizationType[info.dtype]
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if info.dtype in NUMPY_DTYPES:
            return read_floats(self._file, offset + begin * block_bytes, end - begin, info.dtype)
        out = np.empty(end - begin, np.float32)
        done = 0
        while done < len(out):
            first = (begin + done) // block  # rows are whole blocks; a vector's slice may not be
            last = -(-min(end, begin + done + _TILE_ELEMENTS) // block)
            raw = self._file.read(offset + first * block_bytes, (last - first) * block_bytes)
            try:
                with np.errstate(all="ignore"):  # a NaN scale is the caller's to report
                    tile = dequantize(np.frombuffer(raw, np.uint8).reshape(1, -1), kind)
            except NotImplementedError as error:
                raise CheckpointError(
                    f"tensor {info.name!r} has type {info.dtype}, which cannot be dequantized here",
                    where=str(self.path),
                    expected="a type the gguf package dequantizes",
                    found=info.dtype,
                    fix="use a GGUF of another type, or a newer gguf package",
                ) from error
            skip = begin + done - first * block
            take = min(tile.size - skip, len(out) - done)
            out[done : done + take] = tile.reshape(-1)[skip : skip + take]
            done += take
        return out

    def _check_split(self) -> None:
        count = self.config.get("split.count", 0)
        if isinstance(count, int) and count > 1:
            raise CheckpointError(
                f"{self.path.name} is one of {count} parts",
                where=str(self.path),
                fix="join them first: llama-gguf-split --merge FIRST_PART OUT.gguf",
            )

    def _index_tensors(self) -> None:
        """Checks name, type, shape, alignment and range of every tensor."""
        ranges: list[tuple[int, int, str]] = []
        for stored in self._header.tensors:
            kind = self._kind(stored)
            block, block_bytes = GGML_QUANT_SIZES[kind]
            fastest = stored.shape[-1] if stored.shape else 1
            problem = (
                ("appears twice", "each name once", stored.name)
                if stored.name in self._tensors
                else ("has an absurd shape", "at most 2^48 elements", stored.shape)
                if not valid_shape(stored.shape)
                else (f"has rows that are not whole {kind.name} blocks", f"{block}*n", fastest)
                if fastest % block
                else ("is not aligned", f"a multiple of {self._header.alignment}", stored.offset)
                if stored.offset % self._header.alignment
                else None
            )
            if problem is not None:
                what, expected, found = problem
                raise CorruptCheckpoint(
                    f"tensor {stored.name!r} {what} in {self.path.name}",
                    where=str(self.path),
                    expected=expected,
                    found=str(found),
                )
            size = elements(stored.shape) // block * block_bytes
            self._stored[stored.name] = stored
            self._tensors[stored.name] = TensorInfo(stored.name, stored.shape, kind.name, size)
            ranges.append((stored.offset, stored.offset + size, stored.name))
        available = max(0, self._file.size_bytes - self._header.data_start)
        check_ranges(self.path, ranges, available, holes=True)

    def _kind(self, stored: GgufTensor) -> GGMLQuantizationType:
        try:
            kind = GGMLQuantizationType(stored.ggml_type)
            GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError) as error:
            raise CheckpointError(
                f"tensor {stored.name!r} has an unknown type in {self.path.name}",
                where=str(self.path),
                expected="a ggml type the gguf package knows",
                found=str(stored.ggml_type),
                fix="the file is corrupt, or newer than the installed gguf package",
            ) from error
        return kind
