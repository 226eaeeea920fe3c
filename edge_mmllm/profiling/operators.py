"""Where an engine's time goes, by operator and by layer.

onnxruntime tells it for each node of a graph (its own session profile, a list of trace events);
the native kernels by kind of phase, through a function of their library:

    void edge_mmllm_profile(int start, double seconds[100], int64_t runs[100])

`start` counts anew; without it, seconds and runs since are given by the opcode of a phase's first
op. Profiling slows an engine: these figures are shares, not speeds, and come from runs of their
own.
"""

from __future__ import annotations

import ctypes
import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edge_mmllm.errors import UsageError

_ENTRIES = 100
#: Opcodes of `edge_mmllm_export.ops.native`; 0 stands for all row ops.
NATIVE_PHASES = {
    0: "row by row", 20: "products", 30: "token shift", 31: "causal convolution",
    32: "selective scan", 33: "gated linear attention", 34: "WKV-4", 35: "WKV-6", 36: "WKV-7",
    37: "attention",
}  # fmt: skip

_LAYER = re.compile(r"(?:^|[./])(?:layers|blocks|h)[./](\d+)[./]")


@dataclass(frozen=True)
class Share:
    """One row of a table.

    Attributes:
        name: of an operator, or of a layer (`layer 3`; `other`: before, after or fused across).
        calls: in one forward.
        us: microseconds in one forward.
        percent: of all rows.
    """

    name: str
    calls: float
    us: float
    percent: float


@dataclass(frozen=True)
class OperatorProfile:
    """The tables of one kind of forward.

    Attributes:
        what: `prefill` or `decode`.
        by_type, by_layer: the costliest first; layers in order. Empty where the engine does not
            tell.
        outside_us: of a forward, what belongs to no node: the engine's own work.
    """

    what: str
    by_type: tuple[Share, ...]
    by_layer: tuple[Share, ...] = ()
    outside_us: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def operator_profile(
    bundle: str, *, prompt_tokens: int = 64, new_tokens: int = 16, threads: int | None = None,
    context: int | None = None, kernels: str = "auto",
) -> list[OperatorProfile]:  # fmt: skip
    """Profiles the decoder of a bundle, prefill and decode apart, in a session of its own.

    Raises:
        EdgeError: as `edge_mmllm.load`.
    """
    import numpy as np

    import edge_mmllm
    from edge_mmllm.spec import NATIVE_DECODER

    with tempfile.TemporaryDirectory(prefix="edge-mmllm-") as folder:
        session = edge_mmllm.load(
            bundle, threads=threads, context=context, kernels=kernels, trace=folder
        )
        with session:
            spec, engine = session.spec, session.engine
            ids = np.random.default_rng(0).integers(0, spec.vocab_size, prompt_tokens)
            if spec.decoder_start_id is not None:
                raise UsageError("operators of an encoder-decoder are not profiled yet")
            native = _NativeCounts.of(engine.version)
            session.prefill(ids)
            session.step(0)  # warms up
            session.reset()
            native.start()
            session.prefill(ids)
            prefill = native.stop("prefill", 1)
            native.start()
            for _ in range(new_tokens):
                session.step(0)
            decode = native.stop("decode", new_tokens)
        if prefill is not None and decode is not None:
            return [prefill, decode]
        opened = edge_mmllm.open_bundle(bundle)
        name = NATIVE_DECODER if "native" in engine.version else "decoder"
        graph = opened.file(spec.stages[name].file)
        found = sorted(Path(folder).glob(f"{graph.stem}_*.json"))
        if not found:
            return []
        runs = model_runs(json.loads(found[0].read_text(encoding="utf-8")))
        layers = node_layers(graph.read_bytes())
        return [
            tables("prefill", runs[-new_tokens - 1 : -new_tokens], layers),
            tables("decode", runs[-new_tokens:], layers),
        ]


class _NativeCounts:
    """The native library's function, where the engine uses it."""

    def __init__(self, function: Any) -> None:
        self._function = function

    @classmethod
    def of(cls, version: str) -> _NativeCounts:
        from edge_mmllm_runtime import native

        library = native.library() if "native" in version else None
        name = "edge_mmllm_profile"  # the engine has loaded the library already
        return cls(getattr(ctypes.CDLL(str(library)), name, None) if library else None)

    def start(self) -> None:
        if self._function is not None:
            self._function(1, None, None)

    def stop(self, what: str, forwards: int) -> OperatorProfile | None:
        if self._function is None:
            return None
        seconds, runs = (ctypes.c_double * _ENTRIES)(), (ctypes.c_int64 * _ENTRIES)()
        self._function(0, seconds, runs)
        rows = {
            NATIVE_PHASES.get(i, f"op {i}"): (runs[i] / forwards, 1e6 * seconds[i] / forwards)
            for i in range(_ENTRIES)
            if runs[i]
        }
        return OperatorProfile(what, _shares(rows))


#: One forward: (microseconds in all, [(node, operator, own microseconds)]).
Run = tuple[float, list[tuple[str, str, float]]]


def model_runs(events: Sequence[Mapping[str, Any]]) -> list[Run]:
    """onnxruntime's trace events as forwards, in order.

    A node with a subgraph (`Scan`, `If`) contains the time of the nodes inside; it is given its
    own only.
    """
    spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("name") == "model_run")
    nodes = [
        (e["ts"], e["ts"] + e["dur"], e["name"].removesuffix("_kernel_time"),
         str(e["args"].get("op_name", "?")))
        for e in events
        if e.get("cat") == "Node" and str(e.get("name", "")).endswith("_kernel_time")
    ]  # fmt: skip
    nodes.sort(key=lambda n: (n[0], -n[1]))
    runs: list[Run] = []
    at = 0
    for begin, end in spans:
        while at < len(nodes) and nodes[at][0] < begin:
            at += 1
        first = at
        while at < len(nodes) and nodes[at][0] <= end:
            at += 1
        runs.append((end - begin, list(_own_times(nodes[first:at]))))
    return runs


def _own_times(nodes: Sequence[tuple[int, int, str, str]]) -> Iterator[tuple[str, str, float]]:
    """Each node's time without that of nodes inside it. Sorted by start, longest first."""
    inside = [0.0] * len(nodes)
    stack: list[int] = []
    for i, (begin, end, _, _) in enumerate(nodes):
        while stack and nodes[stack[-1]][1] <= begin:
            stack.pop()
        # Both ends are rounded to microseconds: a neighbour may seem to overlap by one.
        while stack and nodes[stack[-1]][1] < end:
            stack.pop()
        if stack:
            inside[stack[-1]] += end - begin
        stack.append(i)
    for (begin, end, name, kind), within in zip(nodes, inside, strict=True):
        yield name, kind, max(end - begin - within, 0.0)


def tables(what: str, runs: Sequence[Run], layers: Mapping[str, int]) -> OperatorProfile:
    """Forwards of one kind as tables.

    Args:
        layers: name of a node -> its layer, see `node_layers`.
    """
    count = len(runs)
    if not count:
        return OperatorProfile(what, ())
    types: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    by_layer: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
    outside = 0.0
    for total, nodes in runs:
        outside += total - sum(us for _, _, us in nodes)
        for name, kind, us in nodes:
            for row in (types[kind], by_layer[layers.get(name, -1)]):
                row[0] += 1 / count
                row[1] += us / count
    ordered = sorted(by_layer.items(), key=lambda item: (item[0] < 0, item[0]))
    rows = {"other" if n < 0 else f"layer {n}": (row[0], row[1]) for n, row in ordered}
    return OperatorProfile(
        what,
        _shares({kind: (row[0], row[1]) for kind, row in types.items()}),
        _shares(rows, ordered=True) if len(rows) > 1 else (),
        max(outside / count, 0.0),
    )


def _shares(rows: Mapping[str, tuple[float, float]], *, ordered: bool = False) -> tuple[Share, ...]:
    total = sum(us for _, us in rows.values()) or 1.0
    shares = [Share(name, calls, us, 100 * us / total) for name, (calls, us) in rows.items()]
    return tuple(shares if ordered else sorted(shares, key=lambda s: -s.us))


def node_layers(model: bytes) -> dict[str, int]:
    """Name of a node of an ONNX graph -> the layer it belongs to.

    A node belongs to the layer that a name of its inputs or outputs says (`layers.3.attn.q`);
    nodes are in the order of the forward pass, so one without belongs where the one before does.
    A device has no onnx package: this reads the few protobuf fields it needs
    (`ModelProto.graph` = 7, `GraphProto.node` = 1, `NodeProto.{input, output, name}` = 1, 2, 3).
    """
    layers: dict[str, int] = {}
    layer = -1
    view = memoryview(model)
    for number, graph in _fields(view):
        if number != 7:
            continue
        for part, node in _fields(graph):
            if part != 1:
                continue
            names: dict[int, list[str]] = defaultdict(list)
            for kind, value in _fields(node):
                if kind in (1, 2, 3):
                    names[kind].append(bytes(value).decode("utf-8", "replace"))
            said = [int(m[1]) for n in (*names[2], *names[1]) if (m := _LAYER.search(n))]
            if said:
                layer = said[0]
            elif any(n.startswith(("logits", "head", "lm_head", "norm")) for n in names[1]):
                layer = -1
            if names[3] and layer >= 0:
                layers[names[3][0]] = layer
    return layers


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The length-delimited fields of a protobuf message: (number, content)."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    try:
        while at < len(message):
            key = varint()
            if key & 7 == 2:
                size = varint()
                yield key >> 3, message[at : at + size]
                at += size
            elif key & 7 == 0:
                varint()
            elif key & 7 in (1, 5):
                at += 8 if key & 7 == 1 else 4
            else:
                return
    except IndexError:
        return
