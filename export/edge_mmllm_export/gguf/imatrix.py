"""Importance matrices: how large the inputs of each linear layer are, column by column.

A file of llama.cpp's form is GGUF with `general.type` `imatrix`, `imatrix.datasets` (strings),
`imatrix.chunk_count` and `imatrix.chunk_size` (uint32), and for each tensor of a model two of
float32, by its name: `NAME.in_sum2` `(experts, K)`, sums of squares, and `NAME.counts`
`(experts, 1)`, over how many tokens.

The form before it (`.dat`), little-endian: int32 entries; for each int32 length and bytes of the
name, int32 calls, int32 values, float32 values (means times calls); then, where the file goes on,
int32 calls, int32 length and bytes of the text's name.

Source: tools/imatrix/imatrix.cpp and common/imatrix-loader.cpp of llama.cpp.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_mmllm.errors import CheckpointError, CorruptCheckpoint, MissingDependency, UsageError
from edge_mmllm_export.checkpoints.files import WeightFile

try:
    from gguf import GGUFWriter
except ImportError as error:
    raise MissingDependency("gguf", "export") from error

Float32 = NDArray[np.float32]

_SUMS, _COUNTS = ".in_sum2", ".counts"
#: Far above any real file: 671B parameters have 1,100 tensors.
_MAX_ENTRIES, _MAX_NAME, _MAX_BYTES = 1 << 17, 1 << 10, 4 << 30
#: What stands for a matrix that is not there yet.
ONES = np.ones(1, np.float32)


@dataclass(frozen=True)
class Entry:
    """A tensor's inputs.

    Attributes:
        sums: sums of squares `(experts, K)`.
        counts: tokens seen `(experts,)`.
    """

    sums: Float32
    counts: Float32


@dataclass(frozen=True)
class Imatrix:
    """Entries by the tensors' names in GGUF, and where they come from."""

    entries: Mapping[str, Entry]
    chunk_count: int = 0
    chunk_size: int = 0
    datasets: tuple[str, ...] = field(default=())

    def importances(self) -> dict[str, Float32]:
        """Mean squares, flat `(experts * K,)`, as a quantizer wants them; 1 of what no token
        reached."""
        out = {}
        for name, entry in self.entries.items():
            counts = entry.counts[:, None]
            means = np.divide(entry.sums, counts, out=np.ones_like(entry.sums), where=counts > 0)
            out[name] = np.ascontiguousarray(means.reshape(-1), np.float32)
        return out


class _Writer(GGUFWriter):  # type: ignore[misc]
    """A file that is no model has no `general.architecture`."""

    def add_architecture(self) -> None:
        """Nothing."""


def write(matrix: Imatrix, path: Path) -> None:
    """Write it in llama.cpp's form, tensors by name."""
    out = _Writer(path, "")
    out.add_string("general.type", "imatrix")
    out.add_array("imatrix.datasets", list(matrix.datasets) or [""])
    out.add_uint32("imatrix.chunk_count", matrix.chunk_count)
    out.add_uint32("imatrix.chunk_size", matrix.chunk_size)
    for name, entry in sorted(matrix.entries.items()):
        out.add_tensor(name + _SUMS, np.ascontiguousarray(entry.sums, np.float32))
        out.add_tensor(name + _COUNTS, entry.counts.astype(np.float32)[:, None])
    try:
        out.write_header_to_file()
        out.write_kv_data_to_file()
        out.write_tensors_to_file()
    finally:
        out.close()


def read(path: Path) -> Imatrix:
    """A file of either form.

    Raises:
        UsageError: it cannot be opened. CorruptCheckpoint, CheckpointError: it is no such file.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise UsageError(
            "the importance matrix cannot be read", where=str(path), found=error.strerror
        ) from error
    found = _read_gguf(path) if magic == b"GGUF" else _read_dat(path)
    for name, entry in found.entries.items():
        if not (np.isfinite(entry.sums).all() and np.isfinite(entry.counts).all()):
            raise _corrupt(path, f"the entry of {name} has numbers that are not finite")
        if (entry.sums < 0).any() or (entry.counts < 0).any():
            raise _corrupt(path, f"the entry of {name} has negative sums or counts")
    return found


def _read_gguf(path: Path) -> Imatrix:
    from edge_mmllm_export.checkpoints.gguf import GgufCheckpoint

    file = GgufCheckpoint(path, path)
    try:
        tensors, config = file.tensors, file.config
        names = [name.removesuffix(_SUMS) for name in tensors if name.endswith(_SUMS)]
        if config.get("general.type") != "imatrix" or not names:
            raise CheckpointError(
                "the file holds no importance matrix",
                where=str(path),
                expected=f"general.type imatrix, tensors NAME{_SUMS} and NAME{_COUNTS}",
                found=f"general.type {config.get('general.type')}, {len(tensors)} tensors",
                fix="edge-mmllm imatrix SRC --text FILE --out FILE makes one",
            )
        entries = {}
        for name in names:
            if name + _COUNTS not in tensors:
                raise _corrupt(path, f"{name} has sums without counts")
            kinds = {tensors[name + part].dtype for part in (_SUMS, _COUNTS)}
            if kinds != {"F32"}:
                raise _corrupt(path, f"{name} is stored as {', '.join(sorted(kinds))}")
            counts = file.read(name + _COUNTS).reshape(-1)
            sums = file.read(name + _SUMS)
            if not counts.size or not sums.size or sums.size % counts.size:
                raise _corrupt(path, f"{name} has {sums.size} sums for {counts.size} counts")
            entries[name] = Entry(sums.reshape(counts.size, -1), counts)
        texts = config.get("imatrix.datasets", ())
        return Imatrix(
            entries,
            _count(config.get("imatrix.chunk_count")),
            _count(config.get("imatrix.chunk_size")),
            tuple(str(text) for text in texts if text) if not isinstance(texts, str) else (),
        )
    finally:
        file.close()


def _count(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _read_dat(path: Path) -> Imatrix:
    file = WeightFile(path)
    try:
        if file.size_bytes > _MAX_BYTES:
            raise _corrupt(path, f"{file.size_bytes} bytes")
        content = file.read(0, file.size_bytes)
    finally:
        file.close()
    place = 0

    def take(size: int) -> bytes:
        nonlocal place
        if not 0 <= size <= len(content) - place:
            raise _corrupt(path, f"it ends at byte {len(content)} within an entry")
        place += size
        return bytes(content[place - size : place])

    def number() -> int:
        return int(struct.unpack("<i", take(4))[0])

    count = number()
    if not 0 < count <= _MAX_ENTRIES:
        raise _corrupt(path, f"{count} entries")
    entries = {}
    for _ in range(count):
        length = number()
        if not 0 < length <= _MAX_NAME:
            raise _corrupt(path, f"a name of {length} bytes")
        name = take(length).decode("utf-8", "replace")
        calls, values = number(), number()
        sums = np.frombuffer(take(4 * values if values > 0 else -1), "<f4").copy()
        entries[name] = Entry(sums[None], np.array([max(calls, 1)], np.float32))
    chunks, datasets = 0, list[str]()
    if place < len(content):
        chunks = number()
        if place < len(content):
            datasets = [take(number()).decode("utf-8", "replace")]
    return Imatrix(entries, max(chunks, 0), 0, tuple(datasets))


def _corrupt(path: Path, found: str) -> CorruptCheckpoint:
    return CorruptCheckpoint(
        "the file is no importance matrix, or damaged",
        where=str(path),
        expected="a file of llama.cpp's imatrix tool, or of edge-mmllm imatrix",
        found=found,
    )
