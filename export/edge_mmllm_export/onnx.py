"""The ONNX exporter: one graph serves prefill and decode, state in and out.

Graph contract (also in docs/bundle.md): inputs `input_ids` int64 `(seq,)` or `inputs_embeds`
float32 `(seq, hidden)`, `position` int64 `(1,)`, `logit_rows` int64 `(rows,)`, and
`state.<name>` for every state; outputs `logits` float32 `(rows, vocab)` and `next.<name>`, but
for cross_kv states, which another stage gives: `encode_text` of an encoder-decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

from edge_mmllm.errors import UnsupportedArchitecture
from edge_mmllm.spec import CAPACITY, MEMORY, NATIVE_DECODER, Stage
from edge_mmllm_export.families.composite import Composite, StageDefinition, scoped
from edge_mmllm_export.formats.base import Inputs
from edge_mmllm_export.ops.base import Architecture, EncoderDecoder, Onlooker
from edge_mmllm_export.ops.native import NativeOps
from edge_mmllm_export.ops.onnx import OnnxOps, Value
from edge_mmllm_export.ops.onnx_graph import GraphBuilder, TensorFile
from edge_mmllm_export.ops.onnx_weights import WeightStore
from edge_mmllm_export.weights import Weight


def write_stages(
    model: Architecture,
    weights: Mapping[str, Weight],
    folder: Path,
    *,
    inputs: Inputs = "ids",
    workers: int = 1,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Stage]:
    """Write `decoder.onnx` (and `embed.onnx` for `embeds`) with their weights into `folder`.

    Of a `Composite` also the stages of its modalities, each with a data file of its own, so that
    a device that releases a stage has its memory back.

    Args:
        inputs: `ids` puts the embedding inside the decoder; `embeds` makes it a stage of its
            own, for models whose embeddings also come from elsewhere (images, audio). A
            `Composite` has `embeds` always.
        workers: threads that read, quantize and write tiles.
        progress: called with numbers of weights done; they add up to the model's.

    Raises:
        OutOfSpace, NonFiniteWeights, CorruptCheckpoint.
    """
    data = TensorFile(folder / "weights.bin")
    stored: dict[str, tuple[int, ...]] = {}
    stages: dict[str, Stage] = {}
    pool = ThreadPoolExecutor(workers) if workers > 1 else None
    try:
        if isinstance(model, Composite):
            inputs = "embeds"
            for definition in model.stage_definitions():
                stages[definition.name] = _media_stage(definition, weights, folder, pool, progress)
        if inputs == "embeds":
            graph = GraphBuilder("embed", data)
            op = OnnxOps(graph, workers=pool, stored=stored, progress=progress)
            ids = Value(graph.input("input_ids", "int64", ["seq"]), 1)
            _output(graph, model.embed(op, weights, ids), "inputs_embeds", model.hidden_size)
            op.finish()
            graph.save(folder / "embed.onnx", {"stage": "embed"})
            stages["embed"] = Stage("embed.onnx", ("input_ids",), ("inputs_embeds",))
        if isinstance(backbone := getattr(model, "backbone", model), EncoderDecoder):
            graph = GraphBuilder("encode_text", data)
            op = OnnxOps(graph, workers=pool, stored=stored, progress=progress)
            stages["encode_text"] = _reader(graph, op, backbone, weights, inputs)
            op.finish()
            graph.save(folder / "encode_text.onnx", {"stage": "encode_text"})
        if isinstance(backbone, Onlooker):
            graph = GraphBuilder("remember_image", data)
            op = OnnxOps(graph, workers=pool, stored=stored, progress=progress)
            stages["remember_image"] = _onlooker(graph, op, backbone, weights)
            op.finish()
            graph.save(folder / "remember_image.onnx", {"stage": "remember_image"})
        graph = GraphBuilder("decoder", data)
        op = OnnxOps(graph, workers=pool, stored=stored, progress=progress)
        _decoder(graph, op, model, weights, inputs)
        op.finish()
        graph.save(folder / "decoder.onnx", {"stage": "decoder", "architecture": model.name})
        stages["decoder"] = Stage(
            "decoder.onnx", tuple(graph.plain_inputs()), ("logits",), tuple(op.in_place)
        )
        program = _native_decoder(model, weights, inputs, data, stored)
        if program is not None:
            program.save(folder / "decoder_native.onnx", {"stage": NATIVE_DECODER})
            stages[NATIVE_DECODER] = Stage(
                "decoder_native.onnx",
                tuple(program.plain_inputs()),
                ("logits",),
                tuple(s.name for s in model.states()),
            )
    finally:
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)
        data.close()
    return stages


def _media_stage(
    definition: StageDefinition,
    weights: Mapping[str, Weight],
    folder: Path,
    pool: Executor | None,
    progress: Callable[[int], None] | None,
) -> Stage:
    """A stage of an encoder or projector, with its own data file `NAME.bin`."""
    name = definition.name
    data = TensorFile(folder / f"{name}.bin")
    try:
        graph = GraphBuilder(name, data)
        op = OnnxOps(graph, workers=pool, progress=progress)
        inputs = []
        for port in definition.ports:
            graph.input(port.name, port.dtype, port.shape)
            last = port.shape[-1] if port.shape else 1
            inputs.append(Value(port.name, last if isinstance(last, int) else 1))
        result = definition.run(op, scoped(weights, definition.scope), inputs)
        _output(graph, result, definition.output, definition.width)
        op.finish()
        graph.save(folder / f"{name}.onnx", {"stage": name})
    finally:
        data.close()
    ports = tuple(port.name for port in definition.ports)
    return Stage(f"{name}.onnx", ports, (definition.output,))


def _native_decoder(
    model: Architecture,
    weights: Mapping[str, Weight],
    inputs: Inputs,
    data: TensorFile,
    stored: dict[str, tuple[int, ...]],
) -> GraphBuilder | None:
    """The decoder as a program for the native kernels, over the weights that are there already;
    None where they lack one of its ops."""
    states = model.states()
    if any(s.dtype != "float32" or s.kind == "cross_kv" for s in states):
        return None
    graph = GraphBuilder(NATIVE_DECODER, data)
    if inputs == "ids":
        graph.input("input_ids", "int64", ["seq"])
    else:
        graph.input("inputs_embeds", "float32", ["seq", model.hidden_size])
    if any(s.kind == "kv" for s in states):
        graph.input("position", "int64", [1])
    graph.input("logit_rows", "int64", ["rows"])
    for s in states:
        graph.input(f"state.{s.name}", s.dtype, _symbolic(s.shape))
    op = NativeOps(graph, WeightStore(graph, None, stored, None), states)
    try:
        # A program reads its token ids itself: what stands for them is never looked at.
        x = (
            op.given(model.hidden_size)
            if inputs == "embeds"
            else model.embed(op, weights, op.ids())
        )
        logits = model.decode(op, weights, x)
    except UnsupportedArchitecture:
        return None
    op.finish(logits, source=inputs, hidden=model.hidden_size, vocab=model.vocab_size)
    graph.output("logits", "float32", ["rows", model.vocab_size])
    for s in states:
        graph.output(f"next.{s.name}", s.dtype, _symbolic(s.shape))
    return graph


def _decoder(
    graph: GraphBuilder,
    op: OnnxOps,
    model: Architecture,
    weights: Mapping[str, Weight],
    inputs: Inputs,
) -> None:
    states = model.states()
    embeddings = _embeddings(graph, op, model, weights, inputs)
    if any(s.kind == "kv" for s in states):
        graph.input("position", "int64", [1])
    if any(s.kind == "place" for s in states):
        graph.input("places", "int64", [3, "seq"])
    graph.input("logit_rows", "int64", ["rows"])
    for s in states:
        graph.input(f"state.{s.name}", s.dtype, _symbolic(s.shape))
    logits = model.decode(op, weights, embeddings())
    _output(graph, logits, "logits", model.vocab_size)
    for s in states:
        if s.kind != "cross_kv":
            graph.output(f"next.{s.name}", s.dtype, _symbolic(s.shape))


def _reader(
    graph: GraphBuilder,
    op: OnnxOps,
    model: EncoderDecoder,
    weights: Mapping[str, Weight],
    inputs: Inputs,
) -> Stage:
    """`encode_text`: a prompt's ids or embeddings -> the cross_kv states."""
    filled = [s for s in model.states() if s.kind == "cross_kv"]
    model.remember(op, weights, _embeddings(graph, op, model, weights, inputs)())
    for s in filled:
        graph.output(f"next.{s.name}", s.dtype, _symbolic(s.shape))
    names = tuple(s.name for s in filled)
    return Stage("encode_text.onnx", tuple(graph.plain_inputs()), (), fills=names)


def _onlooker(
    graph: GraphBuilder, op: OnnxOps, model: Onlooker, weights: Mapping[str, Weight]
) -> Stage:
    """`remember_image`: rows of one picture, and which tokens see it -> the cross_kv states."""
    filled = [s for s in model.states() if s.kind == "cross_kv"]
    graph.input("features", "float32", ["rows", model.memory_width])
    span = Value(graph.input("span", "int64", [2]), 1)
    batched = graph.node("Unsqueeze", ["features", graph.ints(0)])[0]
    model.remember_features(op, weights, Value(batched, model.memory_width), span)
    for s in filled:
        graph.output(f"next.{s.name}", s.dtype, _symbolic(s.shape))
    names = tuple(s.name for s in filled)
    return Stage("remember_image.onnx", tuple(graph.plain_inputs()), (), fills=names)


def _embeddings(
    graph: GraphBuilder,
    op: OnnxOps,
    model: Architecture,
    weights: Mapping[str, Weight],
    inputs: Inputs,
) -> Callable[[], Value]:
    """Declares the input that tokens come by; what it returns makes embeddings of it."""
    if inputs == "ids":
        ids = Value(graph.input("input_ids", "int64", ["seq"]), 1)
        return lambda: model.embed(op, weights, ids)
    graph.input("inputs_embeds", "float32", ["seq", model.hidden_size])
    name, width = "inputs_embeds", model.hidden_size
    return lambda: Value(graph.node("Unsqueeze", [name, graph.ints(0)])[0], width)


def _output(graph: GraphBuilder, x: Value, name: str, width: int) -> None:
    """Drop the batch axis and give a graph output its name."""
    graph.scope = ""
    graph.node("Squeeze", [x.name, graph.ints(0)], [name])
    graph.output(name, "float32", ["seq" if graph.name == "embed" else "rows", width])


def _symbolic(shape: tuple[int, ...]) -> list[int | str]:
    names = {CAPACITY: "capacity", MEMORY: "memory"}
    return [names.get(d, d) for d in shape]
