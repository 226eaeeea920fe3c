"""The header of a GGUF file, parsed with distrust.

Layout, little-endian: `GGUF`, `u32 version` (2 or 3), `u64 tensors`, `u64 pairs`; then the pairs
(`string key, u32 type, value`); then the tensors (`string name, u32 dims, u64 dim[dims],
u32 type, u64 offset`), dims fastest first; then padding to `general.alignment` (32), then the
data, offsets counting from there. A string is `u64 length` and its UTF-8 bytes; an array is
`u32 type, u64 count` and its items.

Every count is checked against the bytes that are left before anything of its size is allocated.
The device's loader and the exporter's reader share this; each has its own errors (`Faults`).

Source: ggml/docs/gguf.md and ggml/src/gguf.cpp of llama.cpp.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np

from edge_mmllm.errors import EdgeError

#: Value types: number -> numpy type; strings (8) and arrays (9) have no fixed size.
_NUMBERS = {
    0: "u1",
    1: "i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
STRING, ARRAY = 8, 9

#: Far above any real file (a 671B mixture of experts has about 1,100 tensors and 60 pairs).
MAX_PAIRS, MAX_TENSORS = 1 << 16, 1 << 20
MAX_STRING_BYTES = 64 << 20
#: All texts that are kept at once: chat templates take kilobytes.
MAX_TEXT_BYTES = 256 << 20
MAX_DIMS = 4  # GGML_MAX_DIMS
MAX_ALIGNMENT = 1 << 20

#: Arrays longer than this stay in the file until they are used.
LAZY_ITEMS = 1024

_WINDOW_BYTES = 1 << 18


class Readable(Protocol):
    """A file that is read at positions."""

    path: Path
    size_bytes: int

    def read(self, offset: int, size: int) -> bytes: ...


@dataclass(frozen=True)
class Faults:
    """What is raised: where a file is damaged, and where it is of a kind not read here."""

    damaged: type[EdgeError]
    unknown: type[EdgeError]


@dataclass(frozen=True)
class GgufTensor:
    """One tensor as the header says it: `shape` already in numpy order (slowest first)."""

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    offset: int


@dataclass(frozen=True)
class GgufHeader:
    """Attributes:
    metadata: the pairs; long arrays are `GgufArray`.
    kinds: the value type of each pair; of an array, minus one less that of its items (-9: texts).
    data_start: byte at which tensor offsets count from.
    """

    version: int
    metadata: dict[str, Any]
    kinds: dict[str, int]
    tensors: tuple[GgufTensor, ...]
    data_start: int
    alignment: int


class GgufArray(Sequence[Any]):
    """A long metadata array, decoded from the file each time it is iterated or indexed."""

    def __init__(
        self, file: Readable, faults: Faults, key: str, kind: int, count: int, begin: int
    ) -> None:
        self._file, self._faults, self._key, self._kind = file, faults, key, kind
        self._count, self._begin = count, begin

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Any]:
        cursor = _Cursor(self._file, self._faults, self._begin)
        if self._kind == STRING:
            for raw in cursor.strings(self._count, self._key):
                yield cursor.decoded(raw, self._key)
        else:
            yield from cursor.numbers(self._kind, self._count, self._key)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        return list(self)[index]

    def __repr__(self) -> str:
        return f"<{self._count} items of {self._key}>"


class _Cursor:
    """Reads forward through a window of the file; never past its end, never all at once."""

    def __init__(self, file: Readable, faults: Faults, position: int = 0) -> None:
        self.file, self.faults, self.position = file, faults, position
        self._window, self._window_start = b"", 0
        self._kept = 0

    @property
    def left(self) -> int:
        return self.file.size_bytes - self.position

    def bad(self, what: str, expected: str, found: object) -> EdgeError:
        return self.faults.damaged(
            f"{self.file.path.name}: {what}",
            where=f"{self.file.path}, byte {self.position}",
            expected=expected,
            found=str(found)[:200],
            fix="not a GGUF file this can trust, or truncated: download it again",
        )

    def take(self, size: int, what: str) -> bytes:
        """The next `size` bytes."""
        if size > self.left:
            raise self.bad(f"{what} ends beyond the file", f"at most {self.left} bytes", size)
        begin = self.position - self._window_start
        if begin < 0 or begin + size > len(self._window):
            wanted = max(size, min(_WINDOW_BYTES, self.left))
            self._window, self._window_start = self.file.read(self.position, wanted), self.position
            begin = 0
        self.position += size
        return self._window[begin : begin + size]

    def u32(self, what: str) -> int:
        return int(struct.unpack("<I", self.take(4, what))[0])

    def peek_u32(self, what: str) -> int:
        """The next u32, which stays."""
        value, self.position = self.u32(what), self.position - 4
        return value

    def u64(self, what: str) -> int:
        return int(struct.unpack("<Q", self.take(8, what))[0])

    def string_bytes(self, what: str) -> bytes:
        length = self.u64(what)
        if length > min(self.left, MAX_STRING_BYTES):
            raise self.bad(
                f"the length of {what} is absurd",
                f"at most {min(self.left, MAX_STRING_BYTES)} bytes",
                length,
            )
        return self.take(length, what)

    def strings(self, count: int, what: str) -> Iterator[bytes]:
        """So many strings, quickly: a vocabulary has a quarter of a million."""
        length_of = struct.Struct("<Q").unpack_from
        while count:
            at, window = self.position - self._window_start, self._window
            end = len(window)
            while count and 0 <= at <= end - 8:
                (length,) = length_of(window, at)
                if at + 8 + length > end:
                    break
                yield window[at + 8 : at + 8 + length]
                at += 8 + length
                count -= 1
                self.position = self._window_start + at
            if count:  # across the window's end, or too long
                yield self.string_bytes(what)
                count -= 1

    def string(self, what: str) -> str:
        """A string that is kept."""
        raw = self.string_bytes(what)
        self._kept += len(raw)
        if self._kept > MAX_TEXT_BYTES:
            raise self.bad("the texts are absurdly long", f"{MAX_TEXT_BYTES} bytes", "more")
        return self.decoded(raw, what)

    def decoded(self, raw: bytes, what: str) -> str:
        """Text of bytes."""
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise self.bad(f"{what} is not UTF-8", "UTF-8 text", error) from error

    def numbers(self, kind: int, count: int, what: str) -> list[Any]:
        dtype = np.dtype(_NUMBERS[kind])
        values: list[Any] = np.frombuffer(self.take(count * dtype.itemsize, what), dtype).tolist()
        return values

    def value(self, kind: int, what: str) -> Any:
        if kind == STRING:
            return self.string(what)
        if kind == ARRAY:
            return self.array(what)
        if kind not in _NUMBERS:
            raise self.bad(f"{what} has an unknown type", "a value type from 0 to 12", kind)
        return self.numbers(kind, 1, what)[0]

    def array(self, what: str) -> Any:
        kind, count = self.u32(what), self.u64(what)
        if kind != STRING and kind not in _NUMBERS:
            raise self.bad(
                f"{what} is an array of an unknown type", "numbers, bools or strings", kind
            )
        smallest = 8 if kind == STRING else np.dtype(_NUMBERS[kind]).itemsize
        if count > self.left // smallest:
            raise self.bad(
                f"the item count of {what} is absurd", f"at most {self.left // smallest}", count
            )
        begin = self.position
        if kind != STRING:
            if count <= LAZY_ITEMS:
                return self.numbers(kind, count, what)
            self.position += count * smallest
        elif count <= LAZY_ITEMS:
            return [self.string(what) for _ in range(count)]
        else:
            for _ in self.strings(count, what):
                pass
        return GgufArray(self.file, self.faults, what, kind, count, begin)


def read_header(file: Readable, faults: Faults) -> GgufHeader:
    """Parses and checks the header; offsets against the data are checked by the caller, who
    knows the size of each type.

    Raises: `faults.damaged`; `faults.unknown` (a version this release does not read).
    """
    cursor = _Cursor(file, faults)
    magic = cursor.take(4, "the magic") if file.size_bytes >= 4 else b""
    if magic != b"GGUF":
        raise cursor.bad("is not a GGUF file", "the four bytes 'GGUF'", magic)
    version = cursor.u32("the version")
    if version not in (2, 3):
        big = version.to_bytes(4, "little") == version.to_bytes(4, "big")[::-1] and (
            int.from_bytes(version.to_bytes(4, "little"), "big") in (2, 3)
        )
        raise faults.unknown(
            f"{file.path.name} is " + ("a big-endian GGUF" if big else f"GGUF version {version}"),
            where=str(file.path),
            expected="version 2 or 3, little-endian",
            found=str(version),
            fix="convert the model again with a current llama.cpp",
        )
    tensor_count, pair_count = cursor.u64("the tensor count"), cursor.u64("the pair count")
    for what, count, limit, smallest in (
        ("tensor count", tensor_count, MAX_TENSORS, 24),  # empty name, no dimension
        ("metadata count", pair_count, MAX_PAIRS, 13),  # empty key, one byte
    ):
        if count > min(limit, cursor.left // smallest):
            raise cursor.bad(
                f"the {what} is absurd", f"at most {min(limit, cursor.left // smallest)}", count
            )
    metadata: dict[str, Any] = {}
    kinds: dict[str, int] = {}
    for _ in range(pair_count):
        key = cursor.string("a metadata key")
        if key in metadata:
            raise cursor.bad(f"metadata key {key!r} appears twice", "each key once", key)
        kind = cursor.u32(f"the type of {key!r}")
        if kind == ARRAY:
            kind = -1 - cursor.peek_u32(f"the item type of {key!r}")
        kinds[key] = kind
        metadata[key] = cursor.value(ARRAY if kind < 0 else kind, f"metadata {key!r}")
    tensors = tuple(_tensor(cursor) for _ in range(tensor_count))
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= MAX_ALIGNMENT or alignment % 8:
        raise cursor.bad(
            "general.alignment is absurd",
            f"a multiple of 8 up to {MAX_ALIGNMENT}",
            alignment,
        )
    data_start = -(-cursor.position // alignment) * alignment
    return GgufHeader(version, metadata, kinds, tensors, data_start, alignment)


def _tensor(cursor: _Cursor) -> GgufTensor:
    name = cursor.string("a tensor name")
    dims = cursor.u32(f"the dimensions of {name!r}")
    if dims > MAX_DIMS:
        raise cursor.bad(f"tensor {name!r} has {dims} dimensions", f"at most {MAX_DIMS}", dims)
    shape = [cursor.u64(f"the shape of {name!r}") for _ in range(dims)]
    ggml_type = cursor.u32(f"the type of {name!r}")
    offset = cursor.u64(f"the offset of {name!r}")
    return GgufTensor(name, tuple(reversed(shape)), ggml_type, offset)
