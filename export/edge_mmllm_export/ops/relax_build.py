"""What TIR kernels are written with: TVM's builder, so that Python's own `if` and `for` choose
what is built.

A kernel is a function of no arguments that declares its buffers with `arg` and opens loops with
`serial`, `parallel`, `unrolled` and `lanes`; `build` makes a function of it that Relax can call
with inputs first, then states, then outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

#: Lanes that loops are cut into; LLVM makes of 16 floats what the target has.
LANES = 16

Buffer = Any
Expr = Any


def build(name: str, body: Callable[[], None]) -> Any:
    """The `PrimFunc` of a kernel."""
    with IRBuilder() as builder, T.prim_func(is_private=True, s_tir=True):
        T.func_name(name)
        T.func_attr({"tirx.noalias": True})
        body()
    return builder.get()


def length(one: bool) -> Expr:
    """The number of tokens of a kernel: 1, or a variable."""
    return 1 if one else tirx.Var("seq", "int64")


def lanes_of(width: int) -> int:
    """The most lanes that divide a width."""
    lanes = LANES
    while width % lanes:
        lanes //= 2
    return lanes


def arg(name: str, shape: tuple[Expr, ...], dtype: str = "float32") -> Buffer:
    """An argument of the kernel."""
    return T.arg(name, T.buffer(shape, dtype))


def local(count: int, dtype: str = "float32") -> Buffer:
    """Numbers that live inside the loop that they are declared in."""
    return T.alloc_buffer((count,), dtype)


def serial(count: Expr) -> Any:
    return T.serial(0, count)


def parallel(count: Expr) -> Any:
    """A loop shared out over the threads; a plain one where it has one step."""
    return T.serial(0, 1) if isinstance(count, int) and count == 1 else T.parallel(0, count)


def unrolled(count: int) -> Any:
    return T.unroll(0, count)


def lanes(count: int) -> Any:
    """A loop that becomes vector instructions."""
    return T.vectorized(0, count) if count > 1 else T.serial(0, 1)


def put(buffer: Buffer, index: tuple[Expr, ...] | list[Expr], value: Expr) -> None:
    """Store a number."""
    T.buffer_store(buffer, value, list(index))


def add_to(buffer: Buffer, index: tuple[Expr, ...], value: Expr) -> None:
    """Add to a number."""
    put(buffer, index, buffer[index] + value)


def fill(buffer: Buffer, count: int, value: Expr) -> None:
    """Set the first numbers of a local buffer."""
    with lanes(count) as v:
        put(buffer, (v,), value)


def total(buffer: Buffer, count: int) -> Expr:
    """The sum of the lanes of a local buffer, left in its first, by halves."""
    while count > 1:
        count //= 2
        with lanes(count) as v:
            put(buffer, (v,), buffer[v] + buffer[v + count])
    return buffer[0]
