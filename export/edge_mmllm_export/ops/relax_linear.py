"""`linear` of the Relax backend: calls of the TIR kernels over packed matrices.

A product is not emitted when a definition asks for it but when something first reads it, so that
an activation that follows becomes part of its kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import relax

from edge_mmllm_export.ops.tir import linear as kernels
from edge_mmllm_export.ops.tir.isa import Isa
from edge_mmllm_runtime.mlc.packing import Packing

#: A Relax variable (tvm ships no type hints).
Value = Any


def linear(
    builder: Any,
    x: Value,
    matrices: Sequence[Value],
    packings: Sequence[Packing],
    isa: Isa,
    *,
    biases: Sequence[Value | None] = (),
    exact: bool = False,
) -> tuple[Deferred, ...]:
    """`x @ w.T + bias` for each matrix: one launch where their packings agree.

    Args:
        builder: an open `relax.BlockBuilder` scope.
        x: float32 `(seq, K)`, seq 1 or symbolic.
        matrices: parameters, uint8 `(bytes,)`.
        exact: keep activations in float32 where the matrix is quantized.
    """
    biases = tuple(biases) or (None,) * len(matrices)
    alike = {(p.kind, p.columns, p.block, p.zero, p.scale) for p in packings}
    if len(alike) > 1:
        alone = (
            linear(builder, x, [m], [p], isa, biases=[b], exact=exact)
            for m, p, b in zip(matrices, packings, biases, strict=True)
        )
        return tuple(y for results in alone for y in results)
    launch = _Launch(builder, x, list(matrices), list(packings), list(biases), isa, exact)
    return tuple(Deferred(launch, i) for i in range(len(packings)))


def emitted(value: Value) -> Value:
    """The variable of a value that may be deferred."""
    return value.emit() if isinstance(value, Deferred) else value


class _Launch:
    """Products of one input, one kernel."""

    def __init__(
        self,
        builder: Any,
        x: Value,
        matrices: list[Value],
        packings: list[Packing],
        biases: list[Value | None],
        isa: Isa,
        exact: bool,
    ) -> None:
        self.builder, self.x, self.matrices = builder, x, matrices
        self.packings, self.biases, self.isa, self.exact = packings, biases, isa, exact
        self.activations: list[str | None] = [None] * len(packings)
        self.results: tuple[Value, ...] | None = None

    def alone(self, index: int) -> _Launch:
        """One of the products, without an activation."""
        i = slice(index, index + 1)
        return _Launch(
            self.builder, self.x, self.matrices[i], self.packings[i], self.biases[i],
            self.isa, self.exact,
        )  # fmt: skip

    def emit(self) -> tuple[Value, ...]:
        """The results, in one call."""
        if self.results is not None:
            return self.results
        seq = self.x.ty.shape[0]
        product = kernels.Product(
            tuple(self.packings),
            tuple(b is not None for b in self.biases),
            tuple(self.activations),
            self.isa,
            seq=1 if getattr(seq, "value", seq) == 1 else None,
            exact=self.exact,
        )
        call = relax.call_tir(
            self.builder.add_func(kernels.kernel(product), "linear"),
            [self.x, *self.matrices, *(b for b in self.biases if b is not None)],
            [relax.TensorType((seq, p.rows), "float32") for p in self.packings],
        )
        results = self.builder.emit(call)
        if len(self.packings) == 1:
            self.results = (results,)
        else:
            count = len(self.packings)
            self.results = tuple(
                self.builder.emit(relax.TupleGetItem(results, i)) for i in range(count)
            )
        return self.results


class Deferred:
    """A product that is emitted when it is read.

    Args:
        activation: what the kernel applies to it; None: nothing.

    Attributes:
        ty: its Relax type.
    """

    def __init__(self, launch: _Launch, index: int, activation: str | None = None) -> None:
        self._launch, self._index, self._activation = launch, index, activation
        seq, rows = launch.x.ty.shape[0], launch.packings[index].rows
        self.ty = relax.TensorType((seq, rows), "float32")

    def activated(self, name: str) -> Deferred | None:
        """This product with an activation applied by its kernel; None where it is too late."""
        launch, i = self._launch, self._index
        if self._activation or launch.results is not None or launch.activations[i]:
            return None
        launch.activations[i] = name
        return Deferred(launch, i, name)

    def emit(self) -> Value:
        """Its variable."""
        if self._launch.activations[self._index] != self._activation:
            # Both the product and its activation are read: the product is computed for itself.
            self._launch, self._index = self._launch.alone(self._index), 0
        return self._launch.emit()[self._index]
