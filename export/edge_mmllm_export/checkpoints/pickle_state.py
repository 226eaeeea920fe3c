"""An allow-list interpreter for the pickles inside PyTorch state dicts.

A pickle is a program for a stack machine. `pickle.load` runs it, and its REDUCE may call any
function of any module. This interpreter knows the opcodes that `torch.save(state_dict)` emits and
a handful of names; a name is never imported and nothing is ever called. Any other opcode or
global ends in UnsafeCheckpoint.

Source: CPython Lib/pickletools.py (opcodes), torch/_utils.py `_rebuild_tensor_v2`,
torch/serialization.py `persistent_id`.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from edge_mmllm.errors import CorruptCheckpoint, EdgeError, UnsafeCheckpoint

#: Storage classes of `torch` -> element type, named as safetensors names them.
STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}

_CALLABLE = {
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("collections", "OrderedDict"),
}


@dataclass(frozen=True)
class Global:
    """A name from the allow list. Only a name: nothing was imported."""

    module: str
    name: str

    @property
    def dtype(self) -> str | None:
        """Element type, if this is a storage class."""
        return STORAGES.get(self.name) if self.module == "torch" else None


@dataclass(frozen=True)
class StorageRef:
    """A persistent id: `numel` elements of `dtype` in the archive's `data/<key>`."""

    dtype: str
    key: str
    numel: int


@dataclass(frozen=True)
class TensorRef:
    """The arguments of `_rebuild_tensor_v2`, types checked, values not: offset, shape and strides
    count elements and are for the caller to hold against the storage."""

    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Ordered(dict[Any, Any]):
    """Stands for an OrderedDict, the one object whose state (BUILD) may be dropped."""


class _Mark:
    """Where a tuple or a batch of items begins on the stack."""


_MARK = _Mark()


def interpret(data: bytes, where: str) -> Any:
    """Evaluates a pickle to plain dicts, lists, tuples, numbers, text and `TensorRef`.

    Args:
        data: the pickle.
        where: file and entry, for messages.

    Raises: UnsafeCheckpoint naming the opcode or global, CorruptCheckpoint.
    """
    machine = _Machine(data, where)
    try:
        return machine.run()
    except (IndexError, KeyError, struct.error, UnicodeDecodeError, TypeError, ValueError) as error:
        raise CorruptCheckpoint(
            "the pickle is malformed or truncated",
            where=f"{where}, byte {machine.position}",
            found=f"{type(error).__name__}: {error}",
            fix="download or copy the file again",
        ) from error


class _Machine:
    def __init__(self, data: bytes, where: str) -> None:
        self.data, self.where, self.position = data, where, 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        while True:
            begin = self.position
            code = self.take(1)
            if code == b".":
                return self.stack.pop()
            step = _STEPS.get(code)
            if step is None:
                known = pickletools.code2op.get(code.decode("latin-1"))  # type: ignore[attr-defined]
                name = known.name if known else f"0x{code.hex()}"
                raise self.unsafe(f"the opcode {name}", name, begin)
            step(self)

    def unsafe(self, what: str, found: str, position: int | None = None) -> EdgeError:
        at = self.position if position is None else position
        return UnsafeCheckpoint(
            f"this pickle uses {what}, which weights do not need; nothing of it was run",
            where=f"{self.where}, byte {at}",
            expected="a state dict, saved by torch.save(model.state_dict(), PATH)",
            found=found,
            fix="use the model's safetensors file; never load this one with pickle or torch.load",
        )

    def take(self, size: int) -> bytes:
        piece = self.data[self.position : self.position + size]
        if len(piece) < size:
            raise ValueError("ends in the middle of an instruction")
        self.position += size
        return piece

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def line(self) -> str:
        end = self.data.index(b"\n", self.position)
        text = self.data[self.position : end].decode()
        self.position = end + 1
        return text

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def items(self) -> list[Any]:
        """Everything above the topmost mark; the mark goes too."""
        for i in range(len(self.stack) - 1, -1, -1):
            if self.stack[i] is _MARK:
                found = self.stack[i + 1 :]
                del self.stack[i:]
                return found
        raise ValueError("no mark on the stack")

    def tuple_of(self, size: int) -> None:
        if len(self.stack) < size:
            raise ValueError("a tuple of more items than the stack holds")
        found = tuple(self.stack[-size:])
        del self.stack[-size:]
        self.push(found)

    def global_(self) -> None:
        module, name = self.line(), self.line()
        found = Global(module, name)
        if (module, name) not in _CALLABLE and found.dtype is None:
            full = f"{module}.{name}"[:200]
            raise self.unsafe(f"the global {full}", full)
        self.push(found)

    def persistent_id(self) -> None:
        pid = self.stack.pop()
        if (
            isinstance(pid, tuple)
            and len(pid) == 5
            and pid[0] == "storage"
            and isinstance(pid[1], Global)
            and pid[1].dtype is not None
            and isinstance(pid[2], str)
            and type(pid[4]) is int
        ):
            self.push(StorageRef(pid[1].dtype, pid[2], pid[4]))
        else:
            raise ValueError("a persistent id that is not a storage")

    def reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, Global) or function.dtype is not None:
            kind = type(function).__name__  # not its repr: a hostile one nests without end
            raise self.unsafe("REDUCE on something that is not a known function", kind)
        if not isinstance(arguments, tuple):
            raise ValueError("arguments that are not a tuple")
        if function.name == "OrderedDict":
            self.push(_Ordered())
            for pair in arguments[0] if arguments else ():
                key, value = pair
                self.set_items([key, value])
        elif function.name == "_rebuild_parameter":
            if not arguments or not isinstance(arguments[0], TensorRef):
                raise ValueError("a parameter without a tensor")
            self.push(arguments[0])
        else:
            self.push(_tensor(arguments))

    def build(self) -> None:
        """`state_dict()` hangs `_metadata` on its OrderedDict; it says nothing about weights."""
        self.stack.pop()
        if not isinstance(self.stack[-1], _Ordered):
            kind = type(self.stack[-1]).__name__
            raise self.unsafe("BUILD on something that is not an OrderedDict", kind)

    def set_items(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(pairs) % 2:
            raise ValueError("items for something that is not a dict")
        if not all(isinstance(key, (str, int)) for key in pairs[::2]):
            raise ValueError("a key that is neither text nor a number")  # nor a tuple to be hashed
        target.update(zip(pairs[::2], pairs[1::2], strict=True))

    def append(self, values: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise ValueError("items for something that is not a list")
        self.stack[-1].extend(values)


def _tensor(arguments: tuple[Any, ...]) -> TensorRef:
    """`(storage, offset, size, stride, requires_grad, hooks[, metadata])`."""
    storage, offset, shape, strides = arguments[:4]
    if (
        not isinstance(storage, StorageRef)
        or type(offset) is not int
        or not all(
            isinstance(t, tuple) and all(type(n) is int for n in t) for t in (shape, strides)
        )
    ):
        raise ValueError("a tensor rebuilt from arguments of wrong types")
    return TensorRef(storage, offset, shape, strides)


def _protocol(machine: _Machine) -> None:
    version = machine.take(1)[0]
    if version > 5:
        raise ValueError(f"pickle protocol {version}")


#: Opcode -> what it does. Source: CPython Lib/pickletools.py.
_STEPS: dict[bytes, Callable[[_Machine], None]] = {
    b"\x80": _protocol,  # PROTO
    b"(": lambda m: m.push(_MARK),  # MARK
    b"}": lambda m: m.push({}),  # EMPTY_DICT
    b"]": lambda m: m.push([]),  # EMPTY_LIST
    b")": lambda m: m.push(()),  # EMPTY_TUPLE
    b"t": lambda m: m.push(tuple(m.items())),  # TUPLE
    b"\x85": lambda m: m.tuple_of(1),  # TUPLE1
    b"\x86": lambda m: m.tuple_of(2),  # TUPLE2
    b"\x87": lambda m: m.tuple_of(3),  # TUPLE3
    b"N": lambda m: m.push(None),  # NONE
    b"\x88": lambda m: m.push(True),  # NEWTRUE
    b"\x89": lambda m: m.push(False),  # NEWFALSE
    b"J": lambda m: m.push(m.number("<i")),  # BININT
    b"K": lambda m: m.push(m.number("<B")),  # BININT1
    b"M": lambda m: m.push(m.number("<H")),  # BININT2
    b"\x8a": lambda m: m.push(int.from_bytes(m.take(m.number("<B")), "little", signed=True)),
    b"G": lambda m: m.push(m.number(">d")),  # BINFLOAT
    b"X": lambda m: m.push(m.take(m.number("<I")).decode()),  # BINUNICODE
    b"q": lambda m: m.memo.__setitem__(m.number("<B"), m.stack[-1]),  # BINPUT
    b"r": lambda m: m.memo.__setitem__(m.number("<I"), m.stack[-1]),  # LONG_BINPUT
    b"h": lambda m: m.push(m.memo[m.number("<B")]),  # BINGET
    b"j": lambda m: m.push(m.memo[m.number("<I")]),  # LONG_BINGET
    b"c": _Machine.global_,  # GLOBAL
    b"Q": _Machine.persistent_id,  # BINPERSID
    b"R": _Machine.reduce,  # REDUCE
    b"b": _Machine.build,  # BUILD
    b"s": lambda m: m.set_items([m.stack.pop(-2), m.stack.pop()]),  # SETITEM
    b"u": lambda m: m.set_items(m.items()),  # SETITEMS
    b"a": lambda m: m.append([m.stack.pop()]),  # APPEND
    b"e": lambda m: m.append(m.items()),  # APPENDS
}
