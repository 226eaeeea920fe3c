"""How a snapshot holds its states: one run of bytes, in float32, float16 or int8.

The states lie in the order of the bundle's contract (`model.states`), packed tightly, each in C
order, little-endian; of a state that grows, the first `position` tokens. What each becomes:

    storage   float32 state                             float16 state       others
    f32       as it is                                  as it is            as it is
    f16       float16                                   as it is            as it is
    int8      recurrent, kv: int8 blocks, else float16  kv: int8 blocks,    as it is
                                                        else as it is

Int8 blocks are 64 values in a row (the last block may be shorter), value = int8 * scale with
scale = max|block| / 127: first the float32 scales of all blocks, then the int8 values. Conv and
shift states are a few per cent of a model's state and feed the next token at full weight, so int8
storage keeps them in float16.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from edge_mmllm.errors import SessionError, StateMismatch, UsageError
from edge_mmllm.spec import StateSpec
from edge_mmllm_runtime.engine import Arrays, Float32

Storage = Literal["f32", "f16", "int8"]
Bytes = NDArray[np.uint8]

#: Values that share a scale: a row of a 64 wide RWKV or Mamba-2 head.
BLOCK = 64

_INT8_KINDS = ("recurrent", "kv", "cross_kv")
_DTYPES = {"float32": "<f4", "float16": "<f2", "int8": "<i1", "int64": "<i8", "uint8": "|u1"}
_SCALE_BYTES = 4


def check_storage(storage: str) -> None:
    """Raises `UsageError` unless `storage` is a `Storage`."""
    if storage not in get_args(Storage):
        raise UsageError(
            "unknown storage of a state", expected=", ".join(get_args(Storage)), found=repr(storage)
        )


def packed_bytes(specs: tuple[StateSpec, ...], position: int, storage: Storage) -> int:
    """Bytes that `pack` makes. Exact for any `position`, however absurd: nothing is allocated."""
    return sum(_size(spec, position, storage) for spec in specs)


def pack(specs: tuple[StateSpec, ...], states: Arrays, position: int, storage: Storage) -> Bytes:
    """The states as bytes; read-only.

    Raises:
        SessionError: a value does not fit the storage (beyond 65,504 in f16, NaN in either).
    """
    data = np.empty(packed_bytes(specs, position, storage), np.uint8)
    for spec, part in _parts(specs, data, position, storage):
        encoding = _encoding(spec, storage)
        if encoding == "int8":
            _quantize(spec, states[spec.name], part)
            continue
        stored = part.view(encoding).reshape(spec.at(position))
        with np.errstate(over="ignore"):
            stored[...] = states[spec.name]
        if encoding != _DTYPES[spec.dtype] and not np.isfinite(stored).all():
            raise _does_not_fit(spec, "f16")
    data.flags.writeable = False
    return data


def unpack(specs: tuple[StateSpec, ...], data: Bytes, position: int, storage: Storage) -> Arrays:
    """The inverse of `pack`, in the contract's dtypes; views of `data` where it holds those.

    Raises:
        StateMismatch: `data` is not of the contract's size at `position`.
    """
    expected = packed_bytes(specs, position, storage)
    if data.nbytes != expected:
        raise StateMismatch(
            "the snapshot does not fit this model",
            expected=f"{expected} bytes of {storage} states at position {position}",
            found=f"{data.nbytes} bytes",
        )
    states: Arrays = {}
    for spec, part in _parts(specs, data, position, storage):
        encoding = _encoding(spec, storage)
        if encoding == "int8":
            values: NDArray[Any] = _dequantize(part).astype(spec.dtype, copy=False)
        else:
            values = part.view(encoding).astype(spec.dtype, copy=False)
        states[spec.name] = values.reshape(spec.at(position))
    return states


def _encoding(spec: StateSpec, storage: Storage) -> str:
    """`int8` for blocks, else the numpy dtype that a state is stored in."""
    if storage == "f32" or spec.dtype not in ("float32", "float16"):
        return _DTYPES[spec.dtype]
    if storage == "int8" and spec.kind in _INT8_KINDS:
        return "int8"
    return "<f2"


def _size(spec: StateSpec, position: int, storage: Storage) -> int:
    count = math.prod(spec.at(position))
    encoding = _encoding(spec, storage)
    if encoding == "int8":
        return count + _SCALE_BYTES * -(-count // BLOCK)
    return count * np.dtype(encoding).itemsize


def _parts(
    specs: tuple[StateSpec, ...], data: Bytes, position: int, storage: Storage
) -> Iterator[tuple[StateSpec, Bytes]]:
    """Each state with its bytes in `data`."""
    begin = 0
    for spec in specs:
        end = begin + _size(spec, position, storage)
        yield spec, data[begin:end]
        begin = end


def _quantize(spec: StateSpec, state: NDArray[Any], part: Bytes) -> None:
    """Writes the blocks of `state` to `part`."""
    flat = np.ascontiguousarray(state, np.float32).reshape(-1)
    blocks = -(-flat.size // BLOCK)
    rows: Float32 = np.zeros((blocks, BLOCK), np.float32)
    rows.reshape(-1)[: flat.size] = flat
    scales = np.maximum(rows.max(1, initial=0), -rows.min(1, initial=0)) / np.float32(127)
    if not np.isfinite(scales).all():
        raise _does_not_fit(spec, "int8")
    split = _SCALE_BYTES * blocks
    part[:split].view("<f4")[...] = scales
    rows /= np.where(scales == 0, np.float32(1), scales)[:, None]
    # A scale so small that it is rounded itself could lead beyond 127.
    np.clip(np.rint(rows, out=rows), -127, 127, out=rows)
    part[split:].view(np.int8)[...] = rows.reshape(-1)[: flat.size]


def _dequantize(part: Bytes) -> Float32:
    """Float32 values, flat, of the blocks in `part`."""
    whole, rest = divmod(part.nbytes, BLOCK + _SCALE_BYTES)
    blocks = whole + (1 if rest else 0)
    split = _SCALE_BYTES * blocks
    scales, quantized = part[:split].view("<f4"), part[split:].view(np.int8)
    rows: Float32 = np.zeros((blocks, BLOCK), np.float32)
    rows.reshape(-1)[: quantized.size] = quantized
    rows *= scales[:, None]
    return rows.reshape(-1)[: quantized.size]


def _does_not_fit(spec: StateSpec, storage: str) -> SessionError:
    return SessionError(
        f"a state does not fit {storage} storage",
        where=spec.name,
        found="a value that is not finite, or too large",
        fix='keep it with storage="f32"',
    )
