"""`linear` of the Relax backend: calls of the TIR kernels over packed matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import relax

from edge_mmllm_export.ops.tir import linear as kernels
from edge_mmllm_export.ops.tir.isa import Isa
from edge_mmllm_runtime.mlc_packing import Packing

#: A Relax variable (tvm ships no type hints).
Value = Any


def parameter(name: str, packing: Packing) -> Value:
    """The function parameter of a packed matrix: uint8 `(bytes,)`."""
    return relax.Var(name, relax.TensorType((packing.size_bytes,), "uint8"))


def linear(
    builder: Any,
    x: Value,
    matrices: Sequence[Value],
    packings: Sequence[Packing],
    isa: Isa,
    *,
    biases: Sequence[Value | None] = (),
    activations: Sequence[str | None] = (),
    exact: bool = False,
) -> tuple[Value, ...]:
    """`activation(x @ w.T + bias)` for each matrix: one launch where their packings agree.

    Args:
        builder: an open `relax.BlockBuilder` scope.
        x: float32 `(seq, K)`, seq 1 or symbolic.
        matrices: parameters as `parameter` makes them.
        exact: keep activations in float32 where the matrix is quantized.
    """
    biases = tuple(biases) or (None,) * len(matrices)
    activations = tuple(activations) or (None,) * len(matrices)
    seq = x.ty.shape[0]
    alike = {(p.kind, p.columns, p.block, p.zero, p.scale) for p in packings}
    if len(alike) > 1:
        alone = (
            linear(builder, x, [m], [p], isa, biases=[b], activations=[a], exact=exact)
            for m, p, b, a in zip(matrices, packings, biases, activations, strict=True)
        )
        return tuple(y for results in alone for y in results)
    product = kernels.Product(
        tuple(packings), tuple(b is not None for b in biases), activations, isa,
        seq=_static(seq), exact=exact,
    )  # fmt: skip
    call = relax.call_tir(
        builder.add_func(kernels.kernel(product), "linear"),
        [x, *matrices, *(b for b in biases if b is not None)],
        [relax.TensorType((seq, p.rows), "float32") for p in packings],
    )
    results = builder.emit(call)
    if len(packings) == 1:
        return (results,)
    return tuple(builder.emit(relax.TupleGetItem(results, i)) for i in range(len(packings)))


def rows(builder: Any, index: Value, matrix: Value, packing: Packing, isa: Isa) -> Value:
    """Rows of a packed matrix (an embedding): index int64 `(seq,)` -> float32 `(seq, K)`."""
    seq = index.ty.shape[0]
    kernel = builder.add_func(kernels.rows_kernel(packing, isa, _static(seq)), "rows")
    result = relax.TensorType((seq, packing.columns), "float32")
    return builder.emit(relax.call_tir(kernel, [index, matrix], [result]))


def _static(seq: Any) -> int | None:
    """A length that is known, or None."""
    return int(seq) if isinstance(seq, int) or hasattr(seq, "value") else None
