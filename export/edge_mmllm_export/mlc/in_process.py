"""A definition through TVM in this process: the proof that it fits TVM as it fits ONNX.

For tests: float32 weights straight from a checkpoint, compiled by `mlc.library` for this machine
and run by the TVM that compiled it. Bundles are run by `edge_mmllm_runtime.mlc.engine`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax

from edge_mmllm.errors import ContextFull
from edge_mmllm_export.mlc.library import Library, build_library, compile_module
from edge_mmllm_export.mlc.targets import target_of
from edge_mmllm_export.ops.base import Architecture
from edge_mmllm_export.ops.relax_params import layouts_of
from edge_mmllm_export.ops.tir.isa import Isa
from edge_mmllm_export.weights import Weight
from edge_mmllm_runtime.mlc.packing import Packing, pack_float


def build_float(model: Architecture, weights: Mapping[str, Weight]) -> Library:
    """The library of a model whose weights are stored in float32 under our names."""
    isa = Isa.of(target_of("native").tvm())
    return build_library(model, weights, layouts_of(weights), isa, functions=("prefill", "decode"))


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
        library = build_float(model, weights)
        executable = compile_module(library.module, target_of("native"))
        self._machine = relax.VirtualMachine(executable, tvm.cpu())
        parameters = {}
        for p in library.parameters.values():
            value: NDArray[Any] = weights[p.name].rows()
            if p.layout != "float32":
                value = pack_float(Packing.of(p.layout, *p.size), value)
            parameters[p.name] = tvm.runtime.tensor(value)
        self._weights = {
            name: [parameters[p] for p in function["parameters"]]
            for name, function in library.functions.items()
        }
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
        logits = self._machine[function](*tensors, *self.states.values(), *self._weights[function])
        self.position += len(ids)
        result: NDArray[np.float32] = logits.numpy()
        return result
