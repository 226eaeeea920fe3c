"""The model library: a definition as compiled functions, for one kind of CPU.

A shared library that the TVM runtime loads. What is in it says `_metadata() -> str`, a JSON object
(the function has the name that mlc-llm's libraries give it):

    {"format": 1, "architecture": ..., "quantization": ..., "hidden_size": H, "vocab_size": V,
     "longest": tokens of the longest prefill,
     "states": [{"name", "shape", "dtype"}],    -1: the capacity, -2: rows of a memory
     "parameters": [{"name", "layout", "tensors", "size", "shape", "dtype"}],
     "functions": {NAME: {"inputs": [...], "states": [...], "parameters": [...]}}}

The functions take their inputs, then states, then parameters, each a tensor:

- `prefill(input_ids int64 (seq,), [position int64 (1,)], logit_rows int64 (rows,), ...)
  -> logits float32 (rows, vocab)`;
- `decode(input_ids int64 (1,), [position int64 (1,)], ...) -> logits float32 (1, vocab)`;
- `embed(input_ids int64 (seq,), ...) -> float32 (seq, hidden)`, and `prefill_embeds`, which takes
  `inputs_embeds float32 (seq, hidden)` in place of the ids;
- of an encoder-decoder `encode_text(input_ids, ...) -> (cross_kv states...)`;
- of a multimodal model, one for each stage, e.g. `encode_image(pixels, ...) -> features` and
  `project_image(features, ...) -> inputs_embeds`.

`position` is there where the model has kv states. States are written in place; those that grow
take any capacity. For `parameters` see `ops/relax_params.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tvm
from tvm import relax, tirx

from edge_mmllm.spec import CAPACITY, MEMORY, StateSpec
from edge_mmllm_export.families.composite import Composite, StageDefinition, scoped
from edge_mmllm_export.mlc.link import find_linker
from edge_mmllm_export.mlc.targets import MlcTarget
from edge_mmllm_export.ops.base import Architecture, EncoderDecoder
from edge_mmllm_export.ops.relax import RelaxOps
from edge_mmllm_export.ops.relax_params import Layouts, Packed
from edge_mmllm_export.ops.tir.isa import Isa
from edge_mmllm_export.weights import Weight

FORMAT = 1
#: Tokens of one prefill; a runtime splits what is longer. Bounds the memory of values in between.
LONGEST = 512
FUNCTIONS = ("prefill", "decode", "embed", "prefill_embeds")


@dataclass
class Library:
    """A module to compile, and what its metadata says.

    Attributes:
        module: the `IRModule`.
        parameters: name -> what it is, in the order of first use.
        functions: name -> inputs, states, parameters, by name.
    """

    module: Any
    states: tuple[StateSpec, ...]
    parameters: dict[str, Packed] = field(default_factory=dict)
    functions: dict[str, dict[str, list[str]]] = field(default_factory=dict)


def build_library(
    model: Architecture,
    weights: Mapping[str, Weight],
    layouts: Layouts,
    isa: Isa,
    *,
    quantization: str = "q0f32",
    exact: bool = False,
    functions: Sequence[str] = FUNCTIONS,
) -> Library:
    """Lower a definition; nothing is compiled yet.

    Args:
        layouts: of every weight: which ones are quantized, and how.
        exact: keep activations in float32 where matrices are quantized.

    Raises:
        UnsupportedArchitecture: an op has no lowering; it is named.
    """
    library = Library(None, model.states())
    builder = relax.BlockBuilder()
    for name in functions:
        _function(builder, library, name, model, weights, layouts, isa, exact)
    backbone = getattr(model, "backbone", model)
    if isinstance(backbone, EncoderDecoder):
        _reader(builder, library, model, backbone, weights, layouts, isa, exact)
    if isinstance(model, Composite):
        for stage in model.stage_definitions():
            _stage(builder, library, stage, scoped(weights, stage.scope), layouts, isa, exact)
    metadata = {
        "format": FORMAT,
        "architecture": model.name,
        "quantization": quantization,
        "hidden_size": model.hidden_size,
        "vocab_size": model.vocab_size,
        "longest": LONGEST,
        "states": [
            {
                "name": s.name,
                "shape": list(s.shape),
                "dtype": s.dtype,
            }
            for s in library.states
        ],
        "parameters": [p.to_json() for p in library.parameters.values()],
        "functions": library.functions,
    }
    with builder.function("_metadata", []):
        builder.emit_func_output(tvm.ir.StringImm(json.dumps(metadata)))
    library.module = builder.finalize()
    return library


def _function(
    builder: Any,
    library: Library,
    name: str,
    model: Architecture,
    weights: Mapping[str, Weight],
    layouts: Layouts,
    isa: Isa,
    exact: bool,
) -> None:
    one, embeds = name == "decode", name == "prefill_embeds"
    seq = 1 if one else tirx.Var("seq", "int64")
    inputs = {}
    if embeds:
        inputs["inputs_embeds"] = _tensor("inputs_embeds", (seq, model.hidden_size), "float32")
    else:
        inputs["input_ids"] = _tensor("input_ids", (seq,), "int64")
    carried = {}
    if name != "embed":
        free = {d: tirx.Var(n, "int64") for d, n in ((CAPACITY, "capacity"), (MEMORY, "memory"))}
        if any(s.kind == "kv" for s in library.states):
            inputs["position"] = _tensor("position", (1,), "int64")
        if not one:
            rows = (tirx.Var("rows", "int64"),)
            inputs["logit_rows"] = _tensor("logit_rows", rows, "int64")
        carried = {
            s.name: _tensor(f"state.{s.name}", tuple(free.get(d, d) for d in s.shape), s.dtype)
            for s in library.states
        }
    given = [*inputs.values(), *carried.values()]
    # `num_input` tells Relax's passes which parameters are weights (all after these).
    attributes = {
        "num_input": len(given),
        "tir_var_upper_bound": {"seq": LONGEST, "rows": LONGEST},
    }
    with builder.function(name, attrs=attributes):
        op = RelaxOps(
            builder,
            layouts,
            carried,
            isa=isa,
            exact=exact,
            position=inputs.get("position"),
            wanted=inputs.get("logit_rows"),
        )
        with builder.dataflow():
            x = inputs["inputs_embeds"] if embeds else model.embed(op, weights, inputs["input_ids"])
            y = x if name == "embed" else model.decode(op, weights, x)
            result = builder.emit_output(op.finished(y))
        wanted = [variable for _, variable in op.parameters.values()]
        builder.emit_func_output(result, params=[*given, *wanted])
    library.parameters |= {p.name: p for p, _ in op.parameters.values()}
    library.functions[name] = {
        "inputs": list(inputs),
        "states": list(carried),
        "parameters": list(op.parameters),
    }


def _reader(
    builder: Any,
    library: Library,
    model: Architecture,
    backbone: EncoderDecoder,
    weights: Mapping[str, Weight],
    layouts: Layouts,
    isa: Isa,
    exact: bool,
) -> None:
    """`encode_text`: a prompt, as ids or (of a multimodal model) embeddings -> the cross_kv states
    in their order."""
    seq, embeds = tirx.Var("seq", "int64"), model is not backbone
    name = "inputs_embeds" if embeds else "input_ids"
    given = _tensor(
        name, (seq, model.hidden_size) if embeds else (seq,), "float32" if embeds else "int64"
    )
    with builder.function("encode_text", attrs={"num_input": 1}):
        op = RelaxOps(builder, layouts, {}, isa=isa, exact=exact)
        with builder.dataflow():
            backbone.remember(op, weights, given if embeds else model.embed(op, weights, given))
            filled = [op.remembered[s.name] for s in library.states if s.kind == "cross_kv"]
            result = builder.emit_output(relax.Tuple(filled))
        wanted = [variable for _, variable in op.parameters.values()]
        builder.emit_func_output(result, params=[given, *wanted])
    library.parameters |= {p.name: p for p, _ in op.parameters.values()}
    library.functions["encode_text"] = {
        "inputs": [name],
        "states": [],
        "parameters": list(op.parameters),
    }


def _stage(
    builder: Any,
    library: Library,
    stage: StageDefinition,
    weights: Mapping[str, Weight],
    layouts: Layouts,
    isa: Isa,
    exact: bool,
) -> None:
    """A function of a stage that prepares pictures or sounds for the decoder."""
    sizes: dict[str, Any] = {}
    inputs = {}
    for port in stage.ports:
        shape = [
            sizes.setdefault(d, tirx.Var(d, "int64")) if isinstance(d, str) else d
            for d in port.shape
        ]
        inputs[port.name] = _tensor(port.name, tuple(shape), port.dtype)
    given = list(inputs.values())
    with builder.function(stage.name, attrs={"num_input": len(given)}):
        op = RelaxOps(builder, layouts, {}, isa=isa, exact=exact)
        with builder.dataflow():
            result = builder.emit_output(op.finished(stage.run(op, weights, given)))
        wanted = [variable for _, variable in op.parameters.values()]
        builder.emit_func_output(result, params=[*given, *wanted])
    library.parameters |= {p.name: p for p, _ in op.parameters.values()}
    library.functions[stage.name] = {
        "inputs": list(inputs),
        "states": [],
        "parameters": list(op.parameters),
    }


def _tensor(name: str, shape: tuple[Any, ...], dtype: str) -> Any:
    return relax.Var(name, relax.TensorType(shape, dtype))


def planned(module: Any) -> Any:
    """Every function down to calls of kernels over planned memory (`call_tir` is gone). Our ops
    are kernels already, so that nothing is legalized or fused."""
    passes = relax.transform
    return tvm.transform.Sequential(
        [
            passes.ToNonDataflow(),
            passes.RemovePurityChecking(),
            passes.CallTIRRewrite(),
            passes.StaticPlanBlockMemory(),
        ]
    )(module)


def _finished(module: Any) -> Any:
    """What is planned, as the virtual machine takes it."""
    passes = relax.transform
    return tvm.transform.Sequential(
        [
            passes.LowerAllocTensor(),
            passes.KillAfterLastUse(),
            passes.LowerRuntimeBuiltin(),
            passes.ComputePrimValue(),
            passes.VMShapeLower(emit_err_ctx=False),
            passes.AttachGlobalSymbol(),
        ]
    )(module)


def compile_module(module: Any, target: MlcTarget) -> Any:
    """The executable of a library's module, for `relax.VirtualMachine` or `export_library`."""

    @tvm.transform.module_pass(opt_level=0)  # type: ignore[untyped-decorator]
    def pipeline(module: Any, _: Any) -> Any:
        return _finished(planned(module))

    found = target.tvm()
    with found:
        return tvm.compile(module, found, relax_pipeline=pipeline)


def write_library(library: Library, target: MlcTarget, out: Path) -> None:
    """Compile and link into `out`.

    Raises:
        ExportError: there is no linker for the target, or it fails.
    """
    linker = find_linker(target)

    def link(file: str, objects: list[str], options: Any = None, **_: Any) -> None:
        linker.share([Path(o) for o in objects], Path(file), tuple(options or ()))

    link.output_format = "so"  # type: ignore[attr-defined]
    executable = compile_module(library.module, target)
    out.parent.mkdir(parents=True, exist_ok=True)
    executable.export_library(str(out), fcompile=link)


def compile_library(
    model: Architecture,
    weights: Mapping[str, Weight],
    layouts: Layouts,
    quantization: str,
    target: MlcTarget,
    out: Path,
    *,
    exact: bool = False,
) -> Library:
    """Lower, compile and link a model for one target.

    Raises: as `build_library` and `write_library`.
    """
    library = build_library(
        model,
        weights,
        layouts,
        Isa.of(target.tvm()),
        quantization=quantization,
        exact=exact,
    )
    write_library(library, target, out)
    return library
