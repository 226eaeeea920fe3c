"""The `.state` file: a snapshot on disk, bound to its bundle. See docs/state.md for the layout.

Nothing in a file is trusted: the prefix and header are checked before any size in them is used,
sizes must add up to the file's own, and two checksums cover every byte. Nothing is evaluated
but a short JSON header. The checksums find damage, not malice: who can write the file can make it
say anything, within the bundle's state contract.
"""

from __future__ import annotations

import json
import os
import stat
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from edge_mmllm.errors import CorruptState
from edge_mmllm_runtime.storage import Storage

#: First bytes: not text, and spoilt by whoever changes line ends or clears the eighth bit.
MAGIC = b"\x89EDGE\r\n\x1a"
VERSION = 1

#: magic, version u32, size of the header u32, size of the payload u64, CRC-32 of the payload,
#: CRC-32 of all before this field and of the header; little-endian.
PREFIX = struct.Struct("<8sIIQII")
_HEADER_CRC_AT = PREFIX.size - 4

#: What a file may have beyond its states, unless asked for everything.
OVERHEAD_BYTES = 4095
#: The header is padded with spaces so that the payload starts at a multiple of this.
ALIGNMENT = 64
_MAX_HEADER = 2048
_MAX_COUNT = 1 << 53


@dataclass(frozen=True)
class Header:
    """What the JSON header says. The payload is states, then logits, then tokens.

    Attributes:
        bundle_sha256: the bundle it belongs to, 64 hexadecimal digits.
        position: tokens in the state.
        storage: how the states are stored.
        states_bytes: their size.
        logits: number of float32 logits; 0 for none.
        tokens: number of int32 token ids; `position` or 0.
        memory: rows in the cross_kv states; left out of the JSON where there are none.
    """

    bundle_sha256: str
    position: int
    storage: Storage
    states_bytes: int
    logits: int
    tokens: int
    memory: int = 0

    @property
    def payload_bytes(self) -> int:
        """Bytes after the header."""
        return self.states_bytes + 4 * (self.logits + self.tokens)


def file_bytes(header: Header) -> int:
    """The size of the file that `write` makes."""
    return PREFIX.size + len(_json(header)) + header.payload_bytes


def write(path: Path, header: Header, payload: Sequence[memoryview]) -> None:
    """Writes a state file, whole or not at all.

    Args:
        payload: states, logits and tokens, as `header` counts them.

    Raises:
        OSError: it cannot be written; nothing of it is left.
    """
    told = _json(header)
    checksum = 0
    for part in payload:
        checksum = zlib.crc32(part, checksum)
    prefix = PREFIX.pack(MAGIC, VERSION, len(told), header.payload_bytes, checksum, 0)
    prefix = prefix[:_HEADER_CRC_AT]
    prefix += struct.pack("<I", zlib.crc32(told, zlib.crc32(prefix)))
    partial = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
    try:
        with partial.open("xb") as file:
            file.write(prefix + told)
            for part in payload:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read(
    path: Path, accept: Callable[[Header], None] = lambda header: None
) -> tuple[Header, NDArray[np.uint8]]:
    """Reads a state file.

    Args:
        accept: sees the header before the payload is read; may raise.

    Returns:
        The header and the payload, read-only.

    Raises:
        CorruptState: no state file, of another version, damaged or cut short.
        OSError: it cannot be read.
    """
    with _open(path) as file:
        size = _regular_size(file, path)
        header, at, checksum = _read_header(file, path, size)
        accept(header)
        payload = np.empty(size - at, np.uint8)
        view, got = payload.data, 0
        while got < len(view):
            count = file.readinto(view[got:])
            if not count:
                raise _corrupt(path, "it became shorter while it was read")
            got += count
    if zlib.crc32(payload.data) != checksum:
        raise _corrupt(path, "its states do not match their checksum")
    payload.flags.writeable = False
    return header, payload


def is_state_file(path: Path) -> bool:
    """Whether a regular file at `path` begins as a state file does."""
    try:
        with _open(path) as file:
            return stat.S_ISREG(os.fstat(file.fileno()).st_mode) and file.read(8) == MAGIC
    except OSError:
        return False


def _json(header: Header) -> bytes:
    """The header's JSON, padded."""
    members = {k: v for k, v in asdict(header).items() if k != "memory" or v}
    told = json.dumps(members, separators=(",", ":")).encode("ascii")
    return told + b" " * (-(PREFIX.size + len(told)) % ALIGNMENT)


def _open(path: Path) -> FileIO:
    """`path` for reading; a pipe in its place does not block."""
    flags = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    return FileIO(os.open(path, os.O_RDONLY | flags), "rb")


def _regular_size(file: FileIO, path: Path) -> int:
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode):
        raise _corrupt(path, "not a regular file")
    return status.st_size


def _read_header(file: FileIO, path: Path, size: int) -> tuple[Header, int, int]:
    """The header, where the payload begins, and its checksum; every size is checked."""
    prefix = file.read(PREFIX.size)
    if len(prefix) < PREFIX.size or prefix[:8] != MAGIC:
        raise _corrupt(path, "something else" if prefix else "an empty file")
    _, version, header_bytes, payload_bytes, checksum, header_checksum = PREFIX.unpack(prefix)
    if version != VERSION:
        raise _corrupt(path, f"version {version}")
    if header_bytes > _MAX_HEADER:
        raise _corrupt(path, f"a header of {header_bytes} bytes")
    told = file.read(header_bytes)
    if zlib.crc32(told, zlib.crc32(prefix[:_HEADER_CRC_AT])) != header_checksum:
        raise _corrupt(path, "its header does not match its checksum")
    at = PREFIX.size + header_bytes
    header = _parsed(told, path)
    if not at + payload_bytes == at + header.payload_bytes == size:
        raise _corrupt(path, f"{size} bytes where its header asks for {at + header.payload_bytes}")
    return header, at, checksum


def _parsed(told: bytes, path: Path) -> Header:
    """The header out of its JSON.

    Raises:
        CorruptState: not JSON, unknown or missing members, wrong types, absurd numbers.
    """
    try:
        value = json.loads(told)
    except (ValueError, RecursionError) as error:
        raise _corrupt(path, f"a header that is not JSON: {error}") from error
    names = set(Header.__dataclass_fields__)
    if not isinstance(value, dict) or {*value, "memory"} != names:
        raise _corrupt(path, "a header with other members than this release knows")
    value.setdefault("memory", 0)
    for name in ("position", "states_bytes", "logits", "tokens", "memory"):
        if type(value[name]) is not int or not 0 <= value[name] < _MAX_COUNT:
            raise _corrupt(path, f"{name} is not a usable number")
    sha = value["bundle_sha256"]
    if not isinstance(sha, str) or len(sha) != 64 or set(sha) - set("0123456789abcdef"):
        raise _corrupt(path, "no bundle hash")
    if value["storage"] not in get_args(Storage):
        raise _corrupt(path, "an unknown storage")
    if value["tokens"] not in (0, value["position"]):
        raise _corrupt(path, "another number of tokens than its position")
    return Header(**value)


def _corrupt(path: Path, found: str) -> CorruptState:
    return CorruptState(
        "the state file cannot be used",
        where=str(path),
        expected=f"a .state file of version {VERSION}, whole and unaltered",
        found=found,
    )
