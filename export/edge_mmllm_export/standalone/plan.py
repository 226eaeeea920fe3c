"""From the Relax function `decode` to a flat list of kernel calls over fixed addresses.

With one token a step every shape is known, so that nothing of Relax is left at run time: values
live at fixed offsets of one arena, states at fixed offsets of one block, weights at fixed offsets
of one file. What remains is a list of calls, which `standalone.source` writes as C.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax, tirx

from edge_mmllm.errors import UnsupportedArchitecture
from edge_mmllm_export.mlc.library import planned

#: Bytes: of what the compiled kernels may assume of every address they are given.
ALIGNMENT = 64
#: Bytes at the start of the state block: position int64, tag of the model uint64, zeros.
STATE_HEADER = 64
FUNCTION = "decode"

_Constant = type(relax.const(0.0))

Space = Literal["arena", "state", "weights", "constant"]


@dataclass(frozen=True)
class Address:
    """A byte offset into one of the memories; for `constant`, an index into `constants`."""

    space: Space
    offset: int


@dataclass(frozen=True)
class Slot:
    """A state or a parameter: where it lies, what it is."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int

    @property
    def size_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Call:
    """One kernel call; `arguments` in the kernel's order."""

    kernel: str
    arguments: tuple[Address, ...]


@dataclass
class Program:
    """One step of a model.

    Attributes:
        calls: in order.
        kernels: symbol -> TIR function of static shapes, private, not yet lowered.
        constants: small tables that the definition itself brings.
        states: offsets into the state block, whose first `STATE_HEADER` bytes are the header.
        parameters: offsets into the data of the weight file (without its header).
        token, logits: offsets into the arena of the int64 input and the float32 output.
        capacity: tokens that kv states hold; 0: no limit.
    """

    calls: list[Call] = field(default_factory=list)
    kernels: dict[str, Any] = field(default_factory=dict)
    constants: list[NDArray[Any]] = field(default_factory=list)
    states: list[Slot] = field(default_factory=list)
    parameters: list[Slot] = field(default_factory=list)
    arena_bytes: int = 0
    state_bytes: int = STATE_HEADER
    weight_bytes: int = 0
    token: int = 0
    logits: int = 0
    vocab_size: int = 0
    capacity: int = 0


def round_up(size: int) -> int:
    """To the next multiple of `ALIGNMENT`."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def lowered(module: Any, target: Any, capacity: int = 0) -> Any:
    """`decode` down to calls of TIR functions over planned memory; other functions go."""
    kept = {
        gv: function
        for gv, function in module.functions.items()
        if gv.name_hint == FUNCTION or isinstance(function, tirx.PrimFunc)
    }
    module = tvm.IRModule(kept)
    symbols = relax.analysis.defined_symbolic_vars(module[FUNCTION])
    if "capacity" in {str(v.name) for v in symbols}:
        module = relax.transform.BindSymbolicVars({"capacity": capacity}, FUNCTION)(module)
    with target:
        return planned(relax.transform.DeadCodeElimination([FUNCTION])(module))


def plan(module: Any, target: Any, capacity: int = 0) -> Program:
    """The program of a module's `decode`.

    Args:
        module: with `decode(input_ids (1,), [position (1,)], state.X..., parameters...)`.
        target: of TVM.
        capacity: tokens that the kv states hold, where there are any.

    Raises:
        UnsupportedArchitecture: the function needs more than kernels over fixed memory.
    """
    return _Planner(lowered(module, target, capacity), capacity).run()


class _Planner:
    """Walks the bindings of one lowered function."""

    def __init__(self, module: Any, capacity: int) -> None:
        self.module = module
        self.function = module[FUNCTION]
        self.program = Program(capacity=capacity)
        self.values: dict[Any, Any] = {}  # variable -> Address, tuple of them, or a storage

    def run(self) -> Program:
        for parameter in self.function.params:
            self.values[parameter] = self._parameter(parameter)
        body = self.function.body
        for block in body.blocks:
            for binding in block.bindings:
                self.values[binding.var] = self._value(binding.value, binding.var)
        out = self._value(body.body, None)
        shape = _shape(body.body)
        if not isinstance(out, Address) or out.space != "arena":
            raise _unsupported("a result that is no value of its own")
        self.program.logits, self.program.vocab_size = out.offset, int(shape[-1])
        return self.program

    def _parameter(self, variable: Any) -> Address:
        name, program = str(variable.name), self.program
        shape, dtype = _shape(variable), str(variable.ty.dtype)
        if name == "input_ids":
            if shape != (1,) or dtype != "int64":
                raise _unsupported(f"input_ids of {dtype} {shape}")
            program.token = self._allocate(8)
            return Address("arena", program.token)
        if name == "position":
            return Address("state", 0)
        if name.startswith("state."):
            slot = Slot(name.removeprefix("state."), shape, dtype, program.state_bytes)
            program.states.append(slot)
            program.state_bytes += round_up(slot.size_bytes)
            return Address("state", slot.offset)
        slot = Slot(name, shape, dtype, program.weight_bytes)
        program.parameters.append(slot)
        program.weight_bytes += round_up(slot.size_bytes)
        return Address("weights", slot.offset)

    def _allocate(self, size: int) -> int:
        offset = self.program.arena_bytes
        self.program.arena_bytes += round_up(size)
        return offset

    def _value(self, value: Any, variable: Any) -> Any:
        if isinstance(value, _Constant):
            self.program.constants.append(value.value.numpy())
            return Address("constant", len(self.program.constants) - 1)
        if isinstance(value, relax.Var):
            return self.values[value]
        if isinstance(value, relax.Tuple):
            return tuple(self._value(field, None) for field in value.fields)
        if isinstance(value, relax.TupleGetItem):
            return self._value(value.tuple_value, None)[value.index]
        if isinstance(value, relax.Call):
            return self._call(value, variable)
        raise _unsupported(f"a {type(value).__name__}")

    def _call(self, call: Any, variable: Any) -> Any:
        if isinstance(call.op, tvm.ir.GlobalVar):
            self._kernel(call)
            return None
        name = str(getattr(call.op, "name", call.op))
        if name == "relax.memory.alloc_storage":
            size = int(_integers(call.args[0])[0])
            return Address("arena", self._allocate(size))
        if name == "relax.memory.alloc_tensor":
            storage = self.values[call.args[0]]
            return Address("arena", storage.offset + int(call.args[1]))
        if name == "relax.builtin.alloc_tensor":
            shape, dtype = _shape(variable), np.dtype(str(variable.ty.dtype))
            size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            return Address("arena", self._allocate(size))
        if name in ("relax.reshape", "relax.memory.view", "relax.memory.ensure_zero_offset"):
            return self._value(call.args[0], None)
        raise _unsupported(name)

    def _kernel(self, call: Any) -> None:
        function = self.module[call.op]
        shapes = [_shape(argument) for argument in call.args]
        special = _specialized(function, shapes)
        # One symbol for each kernel and, where it takes any length, each choice of shapes.
        symbol = f"em_{_identifier(call.op.name_hint)}"
        if special is not function:
            symbol += "".join(f"_{'x'.join(map(str, s))}" for s in shapes if s)[:80]
        self.program.kernels.setdefault(symbol, special)
        arguments = tuple(self._value(argument, None) for argument in call.args)
        self.program.calls.append(Call(symbol, arguments))


def _specialized(function: Any, shapes: list[tuple[int, ...]]) -> Any:
    """The TIR function with the sizes of its arguments filled in."""
    known: dict[Any, Any] = {}
    for parameter, shape in zip(function.params, shapes, strict=True):
        ty = parameter.ty
        if all(isinstance(n, tirx.IntImm) for n in ty.shape):
            continue
        known[parameter] = tirx.decl_buffer(
            shape, ty.dtype, parameter.name, elem_offset=ty.elem_offset
        )
    return function.specialize(known) if known else function


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(_integers(value.ty.shape))


def _integers(shape: Any) -> list[int]:
    values = getattr(shape, "values", shape)
    try:
        return [int(n) for n in values]
    except (TypeError, ValueError) as error:
        raise _unsupported(f"the shape {shape}, which is not fixed,") from error


def _identifier(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)


def _unsupported(what: str) -> UnsupportedArchitecture:
    return UnsupportedArchitecture(
        f"{what} cannot be part of a standalone library",
        expected="kernels over memory of fixed size",
        fix="use the model library with the TVM runtime (leave --standalone out)",
    )
