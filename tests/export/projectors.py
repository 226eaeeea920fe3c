"""The projectors of `tests/goldens/projectors`: weights made again from their seeds, and run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from seeded import seeded

from edge_mmllm.spec import TextSpec
from edge_mmllm_export.checkpoints.base import Float32, Layout, TensorInfo, TextAssets
from edge_mmllm_export.ops.numpy import NumpyOps
from edge_mmllm_export.ops.onnx import OnnxOps, Value
from edge_mmllm_export.ops.onnx_graph import GraphBuilder, TensorFile
from edge_mmllm_export.quantize.schemes import QuantPlan
from edge_mmllm_export.weights import Weight, bind

FOLDER = Path(__file__).resolve().parents[1] / "goldens" / "projectors"


class SeededCheckpoint:
    """A checkpoint whose tensors are random, by name and shape."""

    layout: Layout = "hub"
    source = Path("seeded")
    config: Mapping[str, Any] = {}
    files: tuple[Path, ...] = ()

    def __init__(self, shapes: Mapping[str, list[int]]) -> None:
        self._values = {n: seeded(n, tuple(s)).astype(np.float32) for n, s in shapes.items()}
        self.tensors = {n: TensorInfo(n, v.shape, "F32", v.nbytes) for n, v in self._values.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Float32:
        return np.ascontiguousarray(self._values[name][start:stop])

    def text(self) -> TextAssets:
        return TextAssets(TextSpec("none"))


class Golden:
    """One stored projector: config, shapes, inputs, output."""

    def __init__(self, name: str) -> None:
        with np.load(FOLDER / f"{name}.npz") as data:
            arrays = dict(data)
        self.config: dict[str, Any] = json.loads(str(arrays.pop("config")))
        self.checkpoint = SeededCheckpoint(json.loads(str(arrays.pop("shapes"))))
        self.output = arrays.pop("output")
        self.inputs: dict[str, NDArray[Any]] = arrays

    def bind(self, component: Any, prefix: str = "", plan: QuantPlan | None = None) -> Any:
        """The component's weights. Raises: TensorMismatch."""
        return bind(
            self.checkpoint,
            component.parameters(),
            component.sources("hub", prefix),
            ignored=component.ignored(prefix),
            schemes=(plan or QuantPlan("f32")).of,
        )


#: What a component does with its inputs, by name.
Forward = Callable[[Any, Mapping[str, Weight], dict[str, Any]], Any]


def oracle(forward: Forward, weights: Mapping[str, Weight], inputs: dict[str, Any]) -> Float32:
    """The component in numpy."""
    result: Float32 = forward(NumpyOps({}, cache={}), weights, dict(inputs))
    return result


def onnx(
    forward: Forward, weights: Mapping[str, Weight], inputs: dict[str, Any], folder: Path
) -> Float32:
    """The component in onnxruntime, as a stage of a bundle: every length symbolic."""
    data = TensorFile(folder / "weights.bin")
    graph = GraphBuilder("stage", data)
    op = OnnxOps(graph)
    values = {}
    for name, array in inputs.items():
        if array.dtype == np.int64:
            values[name] = Value(graph.input(name, "int64", [f"{name}.rows"]), 1)
            continue
        graph.input(name, "float32", [f"{name}.rows", array.shape[1]])
        batched = graph.node("Unsqueeze", [name, graph.ints(0)])[0]
        values[name] = Value(batched, array.shape[1])
    y = forward(op, weights, values)
    graph.node("Squeeze", [y.name, graph.ints(0)], ["output"])
    graph.output("output", "float32", ["rows", y.width])
    op.finish()
    graph.save(folder / "stage.onnx", {})
    data.close()
    session = ort.InferenceSession(folder / "stage.onnx", providers=["CPUExecutionProvider"])
    result: Float32 = session.run(["output"], inputs)[0]
    return result
