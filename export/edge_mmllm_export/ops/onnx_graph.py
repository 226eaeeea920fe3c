"""Building an ONNX graph node by node, with weights streamed into one external data file.

Layout of the data file: each tensor at an offset that is a multiple of `ALIGNMENT`, row-major,
little-endian, as ONNX external data prescribes (onnx.proto, `TensorProto.external_data`).
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from edge_mmllm.errors import OutOfSpace

OPSET, MICROSOFT_OPSET, IR_VERSION = 21, 1, 10
#: A page: onnxruntime maps each external tensor, and a map starts on a page.
ALIGNMENT = 4096

_TYPES: dict[str, int] = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "uint8": TensorProto.UINT8,
    "int64": TensorProto.INT64,
    "int32": TensorProto.INT32,
}


class TensorFile:
    """Append-only file of tensors; regions are reserved first and filled in any order.

    Attributes:
        constants: offsets of constants by name, so that the graphs of a bundle share them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.constants: dict[str, int] = {}
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        self._end = 0

    def reserve(self, size_bytes: int) -> int:
        """The offset of a new region."""
        offset = self._end
        self._end += -(-size_bytes // ALIGNMENT) * ALIGNMENT
        return offset

    def write(self, offset: int, values: NDArray[Any]) -> None:
        """Write an array at an absolute offset. Thread-safe. Raises: OutOfSpace."""
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
        try:
            while data:
                done = os.pwrite(self._fd, data, offset)
                data, offset = data[done:], offset + done
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise OutOfSpace(
                    "the disk is full",
                    where=str(self.path.parent),
                    expected=f"room for at least {self._end} bytes",
                    fix="free some space or choose another --out; nothing was left behind",
                ) from error
            raise

    def close(self) -> None:
        """Extend to the last reserved byte and close."""
        if self._fd >= 0:
            os.ftruncate(self._fd, self._end)
            os.close(self._fd)
            self._fd = -1


class Body:
    """The graph inside a Scan, Loop or If; it may use every value of the graph around it."""

    def __init__(self, graph: GraphBuilder, name: str) -> None:
        self._graph, self.name = graph, graph.fresh(name)
        self.nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    def input(self, stem: str, shape: Sequence[int | str]) -> str:
        """A float32 input of the next position."""
        name = self._graph.fresh(stem)
        self._inputs.append(helper.make_tensor_value_info(name, _TYPES["float32"], list(shape)))
        return name

    def output(self, name: str, shape: Sequence[int | str]) -> None:
        """Makes a float32 value, computed in this body, the output of the next position."""
        self._outputs.append(helper.make_tensor_value_info(name, _TYPES["float32"], list(shape)))

    def graph(self) -> onnx.GraphProto:
        """The attribute of the node that owns it."""
        return helper.make_graph(self.nodes, self.name, self._inputs, self._outputs)


class GraphBuilder:
    """Collects nodes, inputs, outputs and initializers of one graph.

    Args:
        data: the file that large initializers go to; shared by the stages of a bundle.
    """

    def __init__(self, name: str, data: TensorFile) -> None:
        self.name, self.data = name, data
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._names: dict[str, int] = {}
        self._own_domains: set[str] = set()
        self._lock = threading.Lock()
        self.scope = ""

    def fresh(self, stem: str) -> str:
        """A value name not used before, under the current scope."""
        stem = f"{self.scope}{stem}"
        count = self._names.get(stem, 0)
        self._names[stem] = count + 1
        return stem if count == 0 else f"{stem}.{count}"

    def node(
        self,
        op: str,
        inputs: Sequence[str],
        outputs: int | Sequence[str] = 1,
        *,
        domain: str = "",
        **attributes: Any,
    ) -> list[str]:
        """Add a node and return its output names. An empty input name means absent."""
        if isinstance(outputs, int):
            stem = op.lower()
            outputs = [self.fresh(f"{stem}:{i}" if i else stem) for i in range(outputs)]
        attributes = {k: v for k, v in attributes.items() if v is not None}
        if domain not in ("", "com.microsoft"):
            self._own_domains.add(domain)
        self._nodes.append(
            helper.make_node(
                op, list(inputs), list(outputs), name=outputs[0], domain=domain, **attributes
            )
        )
        return list(outputs)

    @contextmanager
    def body(self, name: str) -> Iterator[Body]:
        """Nodes added inside the `with` belong to a graph within this one; initializers do not."""
        inner = Body(self, name)
        nodes, self._nodes = self._nodes, inner.nodes
        try:
            yield inner
        finally:
            self._nodes = nodes

    def microsoft(
        self, op: str, inputs: Sequence[str], outputs: int | Sequence[str] = 1, **attributes: Any
    ) -> list[str]:
        """A node of onnxruntime's own domain."""
        return self.node(op, inputs, outputs, domain="com.microsoft", **attributes)

    def input(self, name: str, dtype: str, shape: Sequence[int | str]) -> str:
        self._inputs.append(helper.make_tensor_value_info(name, _TYPES[dtype], list(shape)))
        return name

    def inputs(self) -> list[str]:
        """Names of the graph's inputs, in order."""
        return [i.name for i in self._inputs]

    def plain_inputs(self) -> list[str]:
        """Names of the graph's inputs, states left out."""
        return [i.name for i in self._inputs if not i.name.startswith("state.")]

    def output(self, name: str, dtype: str, shape: Sequence[int | str]) -> None:
        self._outputs.append(helper.make_tensor_value_info(name, _TYPES[dtype], list(shape)))

    def constant(self, stem: str, values: NDArray[Any]) -> str:
        """A small constant kept inside the graph; equal constants are shared."""
        name = f"{stem}={values.dtype.name}{list(values.shape)}{values.tobytes().hex()}"
        if values.nbytes > 64:
            raise ValueError("large constants go to the data file")
        if name not in self._initializers:
            self._initializers[name] = helper.make_tensor(
                name, _TYPES[values.dtype.name], values.shape, values.tobytes(), raw=True
            )
        return name

    def ints(self, *values: int) -> str:
        """A 1-D int64 constant."""
        return self.constant("ints", np.asarray(values, np.int64))

    def has(self, name: str) -> bool:
        return name in self._initializers

    def external(
        self, name: str, dtype: str, shape: Sequence[int], offset: int | None = None
    ) -> int:
        """Declare an initializer in the data file; returns its offset (reserved if not given)."""
        itemsize = np.dtype(dtype).itemsize
        size = int(np.prod(shape, dtype=np.int64)) * itemsize
        with self._lock:
            if offset is None:
                offset = self.data.reserve(size)
            tensor = TensorProto(
                name=name,
                data_type=_TYPES[dtype],
                dims=list(shape),
                data_location=TensorProto.EXTERNAL,
            )
            entries = {
                "location": self.data.path.name,
                "offset": str(offset),
                "length": str(size),
            }
            for key, value in entries.items():
                tensor.external_data.add(key=key, value=value)
            self._initializers[name] = tensor
        return offset

    def fixed(self, name: str, values: NDArray[Any]) -> str:
        """A float constant in the data file, written once."""
        if not self.has(name):
            known = self.data.constants.get(name)
            offset = self.external(name, values.dtype.name, values.shape, known)
            if known is None:
                self.data.write(offset, values)
                self.data.constants[name] = offset
        return name

    def save(self, path: Path, metadata: dict[str, str]) -> None:
        """Write the graph (the data file stays where it is)."""
        graph = helper.make_graph(
            self._nodes,
            self.name,
            self._inputs,
            self._outputs,
            initializer=list(self._initializers.values()),
        )
        model = helper.make_model(
            graph,
            producer_name="edge-mmllm",
            ir_version=IR_VERSION,
            opset_imports=[
                helper.make_opsetid("", OPSET),
                helper.make_opsetid("com.microsoft", MICROSOFT_OPSET),
                *(helper.make_opsetid(domain, 1) for domain in sorted(self._own_domains)),
            ],
        )
        helper.set_model_props(model, metadata)
        path.write_bytes(model.SerializeToString(deterministic=True))
