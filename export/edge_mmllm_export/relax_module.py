"""A definition as a compiled TVM Relax module: the proof that it fits TVM as it fits ONNX.

Module contract: `prefill(input_ids (seq,), [position (1,)], logit_rows (rows,), states..., weights
...) -> logits (rows, vocab)` with symbolic `seq` and `rows`, and `decode(input_ids (1,),
[position], states..., weights...) -> logits (1, vocab)`. Integers are int64, the rest float32.
`position` is there where the model has kv states. States have fixed shapes and are written in
place; weights come in the order of the weight map, so a host uploads them once for both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax, tirx

from edge_mmllm.errors import ContextFull
from edge_mmllm_export.ops.base import Architecture
from edge_mmllm_export.ops.relax import RelaxOps
from edge_mmllm_export.weights import Weight


def build_module(model: Architecture, weights: Mapping[str, Weight], capacity: int) -> Any:
    """The `IRModule` with `prefill` and `decode`; `capacity` is what the kv states hold."""
    builder = relax.BlockBuilder()
    for name in ("prefill", "decode"):
        _function(builder, name, model, weights, capacity)
    return builder.finalize()


def _function(
    builder: Any, name: str, model: Architecture, weights: Mapping[str, Weight], capacity: int
) -> None:
    prefill = name == "prefill"
    seq = tirx.Var("seq", "int64") if prefill else 1
    inputs = {"input_ids": relax.Var("input_ids", relax.TensorType((seq,), "int64"))}
    if any(s.kind == "kv" for s in model.states()):
        inputs["position"] = relax.Var("position", relax.TensorType((1,), "int64"))
    if prefill:
        rows = tirx.Var("rows", "int64")
        inputs["logit_rows"] = relax.Var("logit_rows", relax.TensorType((rows,), "int64"))
    carried = {
        s.name: relax.Var(f"state.{s.name}", relax.TensorType(s.at(capacity), s.dtype))
        for s in model.states()
    }
    stored = {
        w.name: relax.Var(w.name, relax.TensorType(w.shape, "float32")) for w in weights.values()
    }
    parameters = [*inputs.values(), *carried.values(), *stored.values()]
    # `num_input` tells Relax's passes which parameters are weights (all after these).
    attributes = {"num_input": len(inputs) + len(carried)}
    with builder.function(name, parameters, attrs=attributes):
        with builder.dataflow():
            op = RelaxOps(
                builder,
                stored,
                carried,
                capacity=capacity,
                position=inputs.get("position"),
                wanted=inputs.get("logit_rows"),
            )
            x = model.embed(op, weights, inputs["input_ids"])
            logits = builder.emit_output(model.decode(op, weights, x))
        builder.emit_func_output(logits)


class RelaxRunner:
    """Compiles a definition for this machine and runs it like the oracle.

    Attributes:
        states: name -> the device tensor that every forward updates in place.
        position: tokens seen.
    """

    def __init__(
        self, model: Architecture, weights: Mapping[str, Weight], *, capacity: int = 64
    ) -> None:
        self.model, self.capacity = model, capacity
        executable = tvm.compile(
            build_module(model, weights, capacity), tvm.target.Target({"kind": "llvm"})
        )
        self._machine = relax.VirtualMachine(executable, tvm.cpu())
        self._weights = [tvm.runtime.tensor(w.rows()) for w in weights.values()]
        self.states = {
            s.name: tvm.runtime.tensor(np.zeros(s.at(capacity), s.dtype)) for s in model.states()
        }
        self._kv = any(s.kind == "kv" for s in model.states())
        self.position = 0

    def reset(self) -> None:
        """Back to the empty state, in the same buffers."""
        self.position = 0
        for state in self.states.values():
            state.copyfrom(np.zeros(state.shape, state.dtype))

    def forward(
        self,
        ids: NDArray[np.int64],
        rows: NDArray[np.int64] | None = None,
        *,
        function: str | None = None,
    ) -> NDArray[np.float32]:
        """Token ids `(seq,)` -> logits `(rows, vocab)`; all rows by default.

        Args:
            function: `prefill` or `decode`; by default `decode` for one token.

        Raises:
            ContextFull: the kv states cannot hold that many tokens.
        """
        if self._kv and self.position + len(ids) > self.capacity:
            raise ContextFull(self.position, len(ids), self.capacity)
        function = function or ("decode" if len(ids) == 1 else "prefill")
        inputs = [np.asarray(ids, np.int64)]
        if self._kv:
            inputs.append(np.asarray([self.position], np.int64))
        if function == "prefill":
            inputs.append(np.arange(len(ids)) if rows is None else np.asarray(rows, np.int64))
        tensors = [tvm.runtime.tensor(value) for value in inputs]
        logits = self._machine[function](*tensors, *self.states.values(), *self._weights)
        self.position += len(ids)
        result: NDArray[np.float32] = logits.numpy()
        return result
