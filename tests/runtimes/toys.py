"""Tiny ONNX graphs that keep the runtime's contract, and their numpy references."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edge_mmllm.bundle import (
    BundleWriter,
    ExportRecord,
    Gate,
    Manifest,
    Quantization,
    Source,
    source_hash,
)
from edge_mmllm.spec import CAPACITY, ModelSpec, Stage, StateSpec, TextSpec
from edge_mmllm_runtime.onnx import OnnxEngine
from edge_mmllm_runtime.session import Session

Float32 = NDArray[np.float32]
VOCAB, HIDDEN = 256, 32
HEADS, KV_HEADS, HEAD_DIM, LAYERS = 4, 2, 16, 2


@dataclass(frozen=True)
class Toy:
    """A model on disk and its reference: ids `(n,)` -> logits `(n, vocab)`."""

    spec: ModelSpec
    folder: Path
    reference: Callable[[NDArray[np.int64]], Float32]

    def engine(self, context: int | None = None) -> OnnxEngine:
        return OnnxEngine(
            self.spec,
            lambda f: self.folder / f,
            threads=2,
            context=context or self.spec.context_length,
        )

    def session(
        self, context: int | None = None, *, chunk: int = 512, sha: str = "0" * 64
    ) -> Session:
        return Session(
            self.engine(context),
            self.spec,
            sha,
            make_text(self.spec),
            context=context or self.spec.context_length,
            chunk=chunk,
        )


def make_text(spec: ModelSpec):
    def make():
        from edge_mmllm.text import Text

        return Text(spec.text, None)

    return make


def _info(name: str, kind: int, shape: list[object]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def _write(path: Path, nodes, inputs, outputs, weights: dict[str, NDArray]) -> None:
    initializers = [numpy_helper.from_array(a, n) for n, a in weights.items()]
    graph = helper.make_graph(nodes, "toy", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)


def recurrent(
    folder: Path, *, eos: tuple[int, ...] = (), embeds: bool = False, seed: int = 0
) -> Toy:
    """h_t = 0.9 h_{t-1} + E[id_t]; logits_t = h_t W. State `h` is `(1, hidden)`."""
    rng = np.random.default_rng(seed)
    table = rng.standard_normal((VOCAB, HIDDEN)).astype(np.float32)
    head = rng.standard_normal((HIDDEN, VOCAB)).astype(np.float32)
    body = helper.make_graph(
        [
            helper.make_node("Mul", ["h_in", "decay"], ["decayed"]),
            helper.make_node("Add", ["decayed", "x_t"], ["h_out"]),
            helper.make_node("Identity", ["h_out"], ["y_t"]),
        ],
        "body",
        [_info("h_in", TensorProto.FLOAT, [HIDDEN]), _info("x_t", TensorProto.FLOAT, [HIDDEN])],
        [_info("h_out", TensorProto.FLOAT, [HIDDEN]), _info("y_t", TensorProto.FLOAT, [HIDDEN])],
    )
    nodes = [
        helper.make_node("Squeeze", ["state.h", "zero"], ["h0"]),
        helper.make_node("Scan", ["h0", "x"], ["h1", "y"], body=body, num_scan_inputs=1),
        helper.make_node("Unsqueeze", ["h1", "zero"], ["next.h"]),
        helper.make_node("Gather", ["y", "logit_rows"], ["picked"], axis=0),
        helper.make_node("MatMul", ["picked", "head"], ["logits"]),
    ]
    weights = {"decay": np.float32(0.9) * np.ones(1, np.float32), "head": head}
    weights["zero"] = np.zeros(1, np.int64)
    first = _info("input_ids", TensorProto.INT64, ["seq"])
    if embeds:
        lookup = [helper.make_node("Gather", ["table", "input_ids"], ["inputs_embeds"], axis=0)]
        result = _info("inputs_embeds", TensorProto.FLOAT, ["seq", HIDDEN])
        _write(folder / "embed.onnx", lookup, [first], [result], {"table": table})
        nodes = [helper.make_node("Identity", ["inputs_embeds"], ["x"]), *nodes]
        first = result
    else:
        nodes = [helper.make_node("Gather", ["table", "input_ids"], ["x"], axis=0), *nodes]
        weights["table"] = table
    _write(
        folder / "decoder.onnx",
        nodes,
        [
            first,
            _info("logit_rows", TensorProto.INT64, ["rows"]),
            _info("state.h", TensorProto.FLOAT, [1, HIDDEN]),
        ],
        [
            _info("logits", TensorProto.FLOAT, ["rows", VOCAB]),
            _info("next.h", TensorProto.FLOAT, [1, HIDDEN]),
        ],
        weights,
    )
    stages = {"decoder": Stage("decoder.onnx", (first.name, "logit_rows"), ("logits",))}
    if embeds:
        stages["embed"] = Stage("embed.onnx", ("input_ids",), ("inputs_embeds",))
    spec = ModelSpec(
        "toy_recurrent",
        VOCAB,
        HIDDEN,
        1,
        table.size + head.size,
        None,
        (StateSpec("h", (1, HIDDEN), "float32", "recurrent"),),
        stages,
        TextSpec("bytes", eos_ids=eos),
    )

    def reference(ids: NDArray[np.int64]) -> Float32:
        h, out = np.zeros(HIDDEN, np.float32), []
        for i in ids:
            h = np.float32(0.9) * h + table[i]
            out.append(h)
        return np.stack(out) @ head

    return Toy(spec, folder, reference)


def attention(folder: Path, *, context: int = 256, seed: int = 0) -> Toy:
    """Two layers of rotary grouped-query attention with residuals; one buffer per cache."""
    rng = np.random.default_rng(seed)

    def matrix(*shape: int) -> Float32:
        return (rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)

    width = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    angles = np.outer(np.arange(context), 10000.0 ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    weights = {
        "table": matrix(VOCAB, HIDDEN) * 16,
        "head": matrix(HIDDEN, VOCAB),
        "cos": cos,
        "sin": sin,
        "zero": np.zeros(1, np.int64),
        "one": np.ones(1, np.int64),
    }
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["x2"], axis=0),
        helper.make_node("Unsqueeze", ["x2", "zero"], ["x.0"]),
        helper.make_node("Shape", ["input_ids"], ["seq"]),
        helper.make_node("Add", ["position", "seq"], ["total64"]),
        helper.make_node("Sub", ["total64", "one"], ["last64"]),
        helper.make_node("Cast", ["last64"], ["seqlens_k"], to=TensorProto.INT32),
        helper.make_node("Cast", ["total64"], ["total1"], to=TensorProto.INT32),
        helper.make_node("Squeeze", ["total1"], ["total"]),
    ]
    states = []
    for i in range(LAYERS):
        weights[f"qkv.{i}"], weights[f"o.{i}"] = matrix(HIDDEN, width), matrix(64, HIDDEN)
        nodes += [
            helper.make_node("MatMul", [f"x.{i}", f"qkv.{i}"], [f"packed.{i}"]),
            helper.make_node(
                "GroupQueryAttention",
                [
                    f"packed.{i}",
                    "",
                    "",
                    f"state.{i}.k",
                    f"state.{i}.v",
                    "seqlens_k",
                    "total",
                    "cos",
                    "sin",
                ],
                [f"mixed.{i}", f"next.{i}.k", f"next.{i}.v"],
                domain="com.microsoft",
                num_heads=HEADS,
                kv_num_heads=KV_HEADS,
                do_rotary=1,
            ),
            helper.make_node("MatMul", [f"mixed.{i}", f"o.{i}"], [f"out.{i}"]),
            helper.make_node("Add", [f"x.{i}", f"out.{i}"], [f"x.{i + 1}"]),
        ]
        for part in "kv":
            shape = (1, KV_HEADS, CAPACITY, HEAD_DIM)
            states.append(StateSpec(f"{i}.{part}", shape, "float32", "kv"))
    nodes += [
        helper.make_node("Gather", [f"x.{LAYERS}", "logit_rows"], ["picked"], axis=1),
        helper.make_node("Squeeze", ["picked", "zero"], ["rows2"]),
        helper.make_node("MatMul", ["rows2", "head"], ["logits"]),
    ]
    shape = [1, KV_HEADS, "capacity", HEAD_DIM]
    _write(
        folder / "decoder.onnx",
        nodes,
        [
            _info("input_ids", TensorProto.INT64, ["seq"]),
            _info("position", TensorProto.INT64, [1]),
            _info("logit_rows", TensorProto.INT64, ["rows"]),
            *(_info(f"state.{s.name}", TensorProto.FLOAT, shape) for s in states),
        ],
        [
            _info("logits", TensorProto.FLOAT, ["rows", VOCAB]),
            *(_info(f"next.{s.name}", TensorProto.FLOAT, shape) for s in states),
        ],
        weights,
    )
    stage = Stage("decoder.onnx", ("input_ids", "position", "logit_rows"), ("logits",))
    spec = ModelSpec(
        "toy_attention",
        VOCAB,
        HIDDEN,
        LAYERS,
        sum(w.size for w in weights.values()),
        context,
        tuple(states),
        {"decoder": stage},
        TextSpec("bytes"),
    )

    def rotate(x: Float32) -> Float32:
        c, s = cos[: x.shape[1]], sin[: x.shape[1]]
        a, b = np.split(x, 2, axis=-1)
        return np.concatenate([a * c - b * s, b * c + a * s], axis=-1)

    def reference(ids: NDArray[np.int64]) -> Float32:
        x, n = weights["table"][ids], len(ids)
        for i in range(LAYERS):
            heads = (x @ weights[f"qkv.{i}"]).reshape(n, -1, HEAD_DIM).transpose(1, 0, 2)
            q, k = rotate(heads[:HEADS]), rotate(heads[HEADS : HEADS + KV_HEADS])
            k, v = (np.repeat(t, HEADS // KV_HEADS, 0) for t in (k, heads[HEADS + KV_HEADS :]))
            scores = q @ k.transpose(0, 2, 1) / np.sqrt(HEAD_DIM)
            scores = np.where(np.tril(np.ones((n, n), bool)), scores, -np.inf)
            p = np.exp(scores - scores.max(-1, keepdims=True))
            mixed = (p / p.sum(-1, keepdims=True)) @ v
            x = x + mixed.transpose(1, 0, 2).reshape(n, -1) @ weights[f"o.{i}"]
        return (x @ weights["head"]).astype(np.float32)

    return Toy(spec, folder, reference)


def quantized(folder: Path, *, seed: int = 0) -> Toy:
    """One 8-bit MatMulNBits over embeddings, its weights outside the graph: it gets prepacked."""
    rng = np.random.default_rng(seed)
    hidden, block = 64, 32
    table = rng.standard_normal((VOCAB, hidden)).astype(np.float32)
    q = rng.integers(0, 256, (VOCAB, hidden // block, block), dtype=np.uint8)
    scales = rng.random((VOCAB, hidden // block)).astype(np.float32) / 100
    multiply = helper.make_node(
        "MatMulNBits",
        ["picked", "q", "scales"],
        ["logits"],
        domain="com.microsoft",
        K=hidden,
        N=VOCAB,
        bits=8,
        block_size=block,
        accuracy_level=4,
    )
    _write(
        folder / "decoder.onnx",
        [
            helper.make_node("Gather", ["table", "input_ids"], ["x"], axis=0),
            helper.make_node("Gather", ["x", "logit_rows"], ["picked"], axis=0),
            multiply,
        ],
        [
            _info("input_ids", TensorProto.INT64, ["seq"]),
            _info("logit_rows", TensorProto.INT64, ["rows"]),
        ],
        [_info("logits", TensorProto.FLOAT, ["rows", VOCAB])],
        {"table": table, "q": q, "scales": scales},
    )
    graph = onnx.load(folder / "decoder.onnx")
    onnx.save(graph, folder / "decoder.onnx", save_as_external_data=True, location="weights.bin")
    stage = Stage("decoder.onnx", ("input_ids", "logit_rows"), ("logits",))
    spec = ModelSpec(
        "toy_quantized", VOCAB, hidden, 1, q.size, None, (), {"decoder": stage}, TextSpec("bytes")
    )
    dense = ((q.astype(np.float32) - 128) * scales[..., None]).reshape(VOCAB, hidden)
    return Toy(spec, folder, lambda ids: table[ids] @ dense.T)


def write_bundle(toy: Toy, out: Path) -> Path:
    """A bundle of a toy's files, not judged."""
    manifest = Manifest(
        engine="onnx",
        engine_format={"opset": 21},
        source=Source("toy", "hub", (), source_hash(())),
        model=toy.spec,
        quantization=Quantization("f32", (), 32.0),
        gate=Gate("not judged"),
        export=ExportRecord({}, 0.0, None, "2026-01-31T12:00:00Z", "export SRC"),
    )
    with BundleWriter(out) as writer:
        for file in toy.folder.iterdir():
            if file.is_file():
                writer.path(file.name).write_bytes(file.read_bytes())
        writer.commit(manifest)
    return out
