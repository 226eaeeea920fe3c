"""How fast this machine multiplies int4 weights by int8 activations: the floor under a prefill.

One product of 512 rows with a matrix of 8192 x 2048, by onnxruntime's MatMulNBits
(`accuracy_level=4`) and by the native kernels, for blocks of 32 and 128 weights. Prints GFLOP/s
as JSON, two operations for each weight and row, best of several passes.

    python arithmetic.py THREADS
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import onnxruntime as ort

from edge_mmllm_export.checkpoints.base import Checkpoint, Float32
from edge_mmllm_export.ops.native import NativeOps
from edge_mmllm_export.ops.onnx import OnnxOps, Value
from edge_mmllm_export.ops.onnx_graph import GraphBuilder, TensorFile
from edge_mmllm_export.ops.onnx_weights import WeightStore
from edge_mmllm_export.quantize.schemes import Scheme
from edge_mmllm_export.weights import Source, Weight
from edge_mmllm_runtime import native
from edge_mmllm_runtime.onnx import session_options

ROWS, K, N = 512, 2048, 8192
BLOCKS = (32, 128)
PASSES = 12


def _weight(block: int) -> Weight:
    values = np.random.default_rng(0).standard_normal((N, K), np.float32)

    def read(_: str, start: int = 0, stop: int | None = None) -> Float32:
        return values[start:stop]

    checkpoint = cast(Checkpoint, SimpleNamespace(read=read))
    scheme = Scheme(bits=4, block_size=block)
    return Weight("matrix", (N, K), "matrix", checkpoint, Source("matrix"), scheme)


def _write(weight: Weight, path: Path, kernels: bool) -> None:
    data = TensorFile(path.with_suffix(".bin"))
    graph = GraphBuilder("product", data)
    graph.input("inputs_embeds", "float32", ["seq", K])
    if kernels:
        graph.input("logit_rows", "int64", ["rows"])
        ops = NativeOps(graph, WeightStore(graph, None, {}, None), ())
        (out,) = ops.linear(ops.logit_rows(ops.given(K)), weight)
        ops.finish(out, source="embeds", hidden=K, vocab=N)
    else:
        op = OnnxOps(graph)
        name = graph.node("Unsqueeze", ["inputs_embeds", graph.ints(0)])[0]
        (product,) = op.linear(Value(name, K), weight)
        graph.node("Squeeze", [product.name, graph.ints(0)], ["logits"])
        op.finish()
    graph.output("logits", "float32", ["rows", N])
    graph.save(path, {})
    data.close()


def _gflop_per_s(path: Path, threads: int, library: Path | None) -> float:
    options = session_options(threads)
    inputs: dict[str, Any] = {"inputs_embeds": np.ones((ROWS, K), np.float32)}
    if library is not None:
        options.register_custom_ops_library(str(library))
        inputs["logit_rows"] = np.arange(ROWS)
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    best = 0.0
    for _ in range(PASSES):
        started = time.perf_counter()
        session.run(None, inputs)
        best = max(best, 2e-9 * ROWS * K * N / (time.perf_counter() - started))
    return best


def main() -> None:
    threads, found = int(sys.argv[1]), dict[str, float]()
    kinds: dict[str, Path | None] = {"MatMulNBits": None}
    if (library := native.library()) is not None:
        kinds["native"] = library
    with tempfile.TemporaryDirectory() as folder:
        for block in BLOCKS:
            weight = _weight(block)
            for kind, library in kinds.items():
                path = Path(folder) / f"{kind}-{block}.onnx"
                _write(weight, path, library is not None)
                rate = _gflop_per_s(path, threads, library)
                found[f"{kind} block {block}"] = round(rate, 1)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
