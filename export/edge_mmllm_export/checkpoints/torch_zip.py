"""PyTorch zip checkpoints (`.pth`, `.pt`, `.bin`), read in place and without executing a pickle.

Layout: a zip whose entries are stored, not deflated, under one folder: `data.pkl` (the state
dict, tensors as references), `byteorder`, and one `data/<key>` for each storage, little-endian. A
tensor is a strided view of a storage, so tensors may share one.

Source: torch 2.13 torch/serialization.py (`_save`), torch/_utils.py (`_rebuild_tensor_v2`).
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import as_strided

from edge_mmllm.errors import CheckpointError, CorruptCheckpoint, EdgeError, UnsafeCheckpoint

from .base import Float32, TensorInfo
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
from .pickle_state import TensorRef, interpret

#: First bytes of torch.save before 1.6: PROTO 2 and the magic number 0x1950a86a20f9469cfc6c.
_LEGACY_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"

#: Keys under which training scripts nest the state dict.
_NESTED = ("state_dict", "model_state_dict", "model", "module")

_MAX_PICKLE_BYTES = 256 << 20

#: A strided block is read whole where at most this share of it is not wanted, and it fits a tile.
_WASTE, _BLOCK_ELEMENTS = 4, 1 << 22


class TorchZipFile:
    """One PyTorch zip file: its pickle interpreted, its tensors read on demand.

    Raises: UnsafeCheckpoint (the pickle wants more than weights need), CorruptCheckpoint,
        CheckpointError (legacy format, TorchScript, deflated entries).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = WeightFile(path)
        try:
            entries = _entries(self._file)
            folder, state = _state_dict(self._file, entries)
            self.tensors: Mapping[str, TensorInfo]
            self.tensors, self._views = _index(path, folder, entries, state)
        except BaseException:
            self._file.close()
            raise

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Float32:
        """Rows `[start, stop)` of the first axis as float32, strides honoured. Thread-safe."""
        info = lookup(self.tensors, name, self.path)
        begin, end = row_range(info, start, stop)
        view, storage_byte = self._views[name]
        shape = (end - begin, *info.shape[1:]) if info.shape else ()
        first = view.offset + (begin * view.strides[0] if info.shape else 0)
        byte = storage_byte + first * _itemsize(info.dtype)
        if _contiguous(shape, view.strides):
            return read_floats(self._file, byte, elements(shape), info.dtype).reshape(shape)
        return self._gather(shape, view.strides, byte, info.dtype)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _gather(
        self, shape: tuple[int, ...], strides: tuple[int, ...], byte: int, dtype: str
    ) -> Float32:
        """A strided view whose first element lies at `byte`: as few reads as memory allows.

        Axes are taken by falling stride. The innermost ones that lie close together become one
        read; the others are looped over.
        """
        item = _itemsize(dtype)
        order = sorted(range(len(shape)), key=lambda axis: -strides[axis])
        outer = 0
        while _span(shape, strides, order[outer:]) > min(
            _WASTE * elements([shape[axis] for axis in order[outer:]]), _BLOCK_ELEMENTS
        ):
            outer += 1
        inner = order[outer:]
        span = _span(shape, strides, inner)
        inner_shape = [shape[axis] for axis in inner]
        inner_strides = [strides[axis] * 4 for axis in inner]
        out = np.empty(shape, np.float32)
        target = out.transpose(order)
        for index in np.ndindex(*(shape[axis] for axis in order[:outer])):
            skip = sum(i * strides[axis] for i, axis in zip(index, order, strict=False))
            flat = read_floats(self._file, byte + skip * item, span, dtype)
            target[index] = as_strided(flat, inner_shape, inner_strides, writeable=False)
        return out


def _itemsize(dtype: str) -> int:
    return np.dtype(NUMPY_DTYPES[dtype]).itemsize


def _span(shape: tuple[int, ...], strides: tuple[int, ...], axes: list[int]) -> int:
    """Elements from the first to the last of the view along `axes`."""
    return 1 + sum((shape[axis] - 1) * strides[axis] for axis in axes)


def _contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether the view is dense and row-major (an empty one counts)."""
    step = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=False):
        if size == 0:
            return True
        if size > 1 and stride != step:
            return False
        step *= size
    return True


def _entries(file: WeightFile) -> dict[str, tuple[int, int]]:
    """Every zip entry: name -> (byte of its data, size).

    Only the directory is parsed by `zipfile`; nothing is ever inflated, so a zip bomb is refused
    by its first deflated entry. Local headers, sizes and overlaps are checked here.
    """
    where = str(file.path)
    try:
        with zipfile.ZipFile(file.path) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error, OSError) as error:
        raise _not_a_zip(file, error) from error
    found: dict[str, tuple[int, int]] = {}
    ranges: list[tuple[int, int, str]] = []
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise CheckpointError(
                f"entry {info.filename!r} of {file.path.name} is compressed or encrypted",
                where=where,
                expected="stored entries, as torch.save writes them",
                found=f"method {info.compress_type}, flags {info.flag_bits:#x}",
                fix="save the checkpoint again with torch.save, or repack it with `zip -0`",
            )
        # Local header: "PK\3\4" ... u16 name length at 26, u16 extra length at 28, then both.
        header = file.read(info.header_offset, 30)
        name_length, extra_length = struct.unpack_from("<HH", header, 26)
        data = info.header_offset + 30 + name_length + extra_length
        if (
            header[:4] != b"PK\x03\x04"
            or info.file_size != info.compress_size
            or info.filename in found
        ):
            raise CorruptCheckpoint(
                f"entry {info.filename!r} of {file.path.name} contradicts itself",
                where=where,
                expected="one local header at the byte the directory names, and one size",
                found=f"{header[:4]!r}, {info.file_size} and {info.compress_size} bytes",
            )
        found[info.filename] = (data, info.file_size)
        ranges.append((info.header_offset, data + info.file_size, info.filename))
    check_ranges(file.path, ranges, file.size_bytes, holes=True, thing="entry")
    return found


def _not_a_zip(file: WeightFile, error: Exception) -> EdgeError:
    """What a `.pth` that is no zip is, as far as its first bytes say."""
    start = file.read(0, min(16, file.size_bytes))
    where, name = str(file.path), file.path.name
    if start.startswith(_LEGACY_MAGIC):
        return CheckpointError(
            f"{name} is in the format of torch before 1.6, one pickle after another",
            where=where,
            expected="a zip file",
            fix="convert it once, in a sandbox if you do not trust it: "
            "torch.save(torch.load(OLD, weights_only=True), NEW)",
        )
    if start[:1] == b"\x80":
        return UnsafeCheckpoint(
            f"{name} is a bare pickle; nothing of it was run",
            where=where,
            expected="a zip file as torch.save writes it",
            found=repr(start),
            fix="use the model's safetensors file",
        )
    return CorruptCheckpoint(
        f"{name} is not a PyTorch zip file, or is truncated",
        where=where,
        expected="a zip file with data.pkl in it",
        found=f"{error} (first bytes {start[:8]!r})",
        fix="download or copy it again",
    )


def _state_dict(
    file: WeightFile, entries: dict[str, tuple[int, int]]
) -> tuple[str, dict[str, TensorRef]]:
    """The archive's folder and its tensors by name, straight from the interpreter."""
    where = str(file.path)
    pickles = [name for name in entries if name.rpartition("/")[2] == "data.pkl"]
    if len(pickles) != 1 or any(name.rpartition("/")[2] == "constants.pkl" for name in entries):
        raise CheckpointError(
            f"{file.path.name} is not a saved state dict",
            where=where,
            expected="one data.pkl and no constants.pkl (that is TorchScript)",
            found=f"{len(pickles)} data.pkl in {len(entries)} entries",
            fix="save the weights alone: torch.save(model.state_dict(), PATH)",
        )
    folder = pickles[0][: -len("data.pkl")]
    order = entries.get(folder + "byteorder")
    if order is not None and file.read(order[0], min(order[1], 16)) != b"little":
        raise CheckpointError(
            f"{file.path.name} was saved on a big-endian machine",
            where=where,
            expected="byteorder little",
            fix="convert it there to safetensors",
        )
    begin, size = entries[pickles[0]]
    if size > _MAX_PICKLE_BYTES:
        raise CorruptCheckpoint(
            f"{pickles[0]} of {file.path.name} is absurdly large",
            where=where,
            expected=f"at most {_MAX_PICKLE_BYTES} bytes",
            found=str(size),
        )
    top = interpret(file.read(begin, size), f"{file.path}:{pickles[0]}")
    if isinstance(top, dict) and not any(isinstance(v, TensorRef) for v in top.values()):
        nested = [key for key in _NESTED if isinstance(top.get(key), dict)]
        if len(nested) == 1:
            top = top[nested[0]]
    if not isinstance(top, dict):
        top = {}
    tensors = {k: v for k, v in top.items() if isinstance(v, TensorRef)}
    strange = [k for k, v in top.items() if isinstance(v, (dict, list)) or not isinstance(k, str)]
    if not tensors or strange:
        raise CheckpointError(
            f"{file.path.name} is not a flat state dict",
            where=where,
            expected="tensors by name (also under state_dict, model or module)",
            found=f"{len(tensors)} tensors beside " + ", ".join(map(repr, strange[:10]))
            if strange
            else "no tensors",
            fix="save the weights alone: torch.save(model.state_dict(), PATH)",
        )
    return folder, tensors


def _index(
    path: Path, folder: str, entries: dict[str, tuple[int, int]], state: dict[str, TensorRef]
) -> tuple[dict[str, TensorInfo], dict[str, tuple[TensorRef, int]]]:
    """Holds every view against its storage. Raises: CorruptCheckpoint naming the tensor."""
    tensors: dict[str, TensorInfo] = {}
    views: dict[str, tuple[TensorRef, int]] = {}
    for name, view in state.items():
        storage, item = view.storage, _itemsize(view.storage.dtype)
        entry = entries.get(f"{folder}data/{storage.key}")
        problem = _view_problem(view, item, entry)
        if problem is not None:
            expected, found = problem
            raise CorruptCheckpoint(
                f"tensor {name!r} does not fit its storage {storage.key!r} in {path.name}",
                where=str(path),
                expected=expected,
                found=found,
            )
        tensors[name] = TensorInfo(name, view.shape, storage.dtype, elements(view.shape) * item)
        views[name] = (view, entry[0] if entry else 0)
    return tensors, views


def _view_problem(
    view: TensorRef, item: int, entry: tuple[int, int] | None
) -> tuple[str, str] | None:
    """(expected, found) where a view is absurd or leaves its storage, else None."""
    storage, shape, strides = view.storage, view.shape, view.strides
    if entry is None:
        return "an entry of that name", "none"
    if storage.numel < 0 or storage.numel * item > entry[1]:
        return f"{storage.numel} elements of {item} bytes", f"{entry[1]} bytes"
    if not valid_shape(shape) or len(strides) != len(shape):
        return "a shape of at most 2^48 elements, one stride an axis", f"{shape}, {strides}"
    if view.offset < 0 or any(stride < 0 for stride in strides):
        return "offset and strides from 0 up", f"offset {view.offset}, strides {strides}"
    count = elements(shape)
    end = view.offset + (_span(shape, strides, list(range(len(shape)))) if count else 0)
    if end > storage.numel or count > max(storage.numel, 1):
        return f"at most {storage.numel} elements", f"{count}, the last at {end - 1}"
    return None
