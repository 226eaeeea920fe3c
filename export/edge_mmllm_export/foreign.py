"""Encoders without a definition here, through optimum: HuBERT, Wav2Vec2 and their like.

optimum traces the model in torch, which takes the memory of a whole checkpoint; so it runs in an
environment of its own (its transformers is older than the one the references need), as a child
process, and only its graph comes back:

    python -m venv optimum && optimum/bin/pip install 'edge-mmllm[optimum]'
    export EDGE_MMLLM_OPTIMUM_PYTHON=$PWD/optimum/bin/python

The graph becomes a stage like any other: `samples` float32 `(samples,)` in, `features` float32
`(rows, width)` out, its weights in a file of their own, float32. It is judged by the model in torch
at two lengths, since a trace may have frozen the one it saw.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from edge_mmllm.errors import (
    CheckpointError,
    ExportError,
    MissingDependency,
    QualityGateFailed,
    UnsupportedArchitecture,
)
from edge_mmllm.spec import Stage

#: The interpreter of an environment with the `optimum` extra.
PYTHON_VARIABLE = "EDGE_MMLLM_OPTIMUM_PYTHON"
#: Samples of the two recordings that the graph is judged by.
LENGTHS = (8000, 12345)
#: Largest difference from torch, in units of the features' spread.
TOLERANCE = 1e-3
#: Smaller tensors stay inside the graph.
_INSIDE_BYTES = 1024

_PROBE = "import optimum.exporters.onnx, torch, transformers"
#: Run in the other environment: source, target, lengths. Writes what torch makes of noise.
_CHILD = """
import sys, numpy, torch
from optimum.exporters.onnx import main_export
from transformers import AutoModel
source, target, lengths = sys.argv[1], sys.argv[2], [int(n) for n in sys.argv[3:]]
model = AutoModel.from_pretrained(source, dtype=torch.float32).eval()
if model.main_input_name != "input_values":
    sys.exit("EDGE-MMLLM takes " + model.main_input_name)
main_export(source, output=target, task="feature-extraction", device="cpu", do_validation=False)
arrays = {}
for n in lengths:
    x = numpy.random.RandomState(n).standard_normal((1, n)).astype("float32")
    with torch.no_grad():
        y = model(torch.from_numpy(x)).last_hidden_state.numpy()
    arrays |= {f"input.{n}": x[0], f"output.{n}": y[0]}
numpy.savez(target + "/reference.npz", **arrays)
"""


@dataclass(frozen=True)
class ForeignEncoder:
    """What came back.

    Attributes:
        stage: as the manifest names it.
        model_type: of the checkpoint, e.g. `hubert`.
        width: of the features.
        max_delta: largest difference from torch, in units of the features' spread.
    """

    stage: Stage
    model_type: str
    width: int
    max_delta: float


def export_foreign(
    source: str | os.PathLike[str],
    folder: Path,
    *,
    name: str = "encode_audio",
    python: str | None = None,
) -> ForeignEncoder:
    """Export an encoder of a waveform by optimum, as `NAME.onnx` and `NAME.bin` in `folder`.

    Args:
        source: its checkpoint, a folder in hub layout.
        python: interpreter of the environment with the extra; None for that of the environment
            variable `EDGE_MMLLM_OPTIMUM_PYTHON`, or this one.

    Raises:
        MissingDependency: the interpreter has no optimum.
        CheckpointError, UnsupportedArchitecture: no config, or an encoder of something else.
        ExportError: optimum failed; its last words are in the message.
        QualityGateFailed: the graph disagrees with torch.
    """
    source = Path(source)
    model_type = _model_type(source)
    python = python or os.environ.get(PYTHON_VARIABLE) or sys.executable
    if _run(python, _PROBE).returncode:
        raise MissingDependency(f"optimum-onnx (looked for by {python})", "optimum")
    with tempfile.TemporaryDirectory() as temporary:
        child = _run(python, _CHILD, str(source), temporary, *map(str, LENGTHS))
        if "EDGE-MMLLM takes" in child.stderr:
            raise UnsupportedArchitecture(
                "this way takes encoders of a waveform only",
                where=str(source),
                expected="a model whose main input is input_values",
                found=f"{model_type}, {child.stderr.split('EDGE-MMLLM takes')[-1].strip()}",
            )
        graph = Path(temporary, "model.onnx")
        if child.returncode or not graph.is_file():
            raise ExportError(
                f"optimum could not export {model_type}",
                where=str(source),
                found="\n    ".join(child.stderr.strip().splitlines()[-6:]) or "no model.onnx",
            )
        stage, width = bring_in(graph, folder, name)
        with np.load(Path(temporary, "reference.npz")) as reference:
            delta = max(
                _delta(folder / stage.file, reference[f"input.{n}"], reference[f"output.{n}"])
                for n in LENGTHS
            )
    if not delta <= TOLERANCE:
        raise QualityGateFailed(
            "the graph that optimum made disagrees with the model in torch",
            where=str(source),
            expected=f"features within {TOLERANCE} of their spread",
            found=f"{delta:.2e}",
        )
    return ForeignEncoder(stage, model_type, width, delta)


def bring_in(graph_file: Path, folder: Path, name: str) -> tuple[Stage, int]:
    """Make a stage of a graph `input_values (batch, samples) -> last_hidden_state (batch, rows,
    width)`: the batch axis goes, names become ours, weights go into `NAME.bin`.

    Returns: the stage and the width of its features.
    Raises: ExportError where the graph takes or gives anything else.
    """
    model = onnx.load(graph_file)
    graph = model.graph
    weights = {tensor.name for tensor in graph.initializer}
    inputs = {v.name: _shape(v) for v in graph.input if v.name not in weights}
    outputs = {v.name: _shape(v) for v in graph.output}
    features = outputs.get("last_hidden_state") or ()
    width = features[-1] if len(features) == 3 else None
    if list(inputs) != ["input_values"] or len(inputs["input_values"] or ()) != 2 or not width:
        raise ExportError(
            "the graph is not an encoder of a waveform",
            where=str(graph_file),
            expected="float32 input_values (batch, samples) -> last_hidden_state (batch, rows, "
            "width) with a fixed width",
            found=f"{inputs} -> {outputs}",
        )
    axis = helper.make_tensor("batch_axis", TensorProto.INT64, [1], [0])
    before = helper.make_node("Unsqueeze", ["samples", "batch_axis"], ["input_values"])
    after = helper.make_node("Squeeze", ["last_hidden_state", "batch_axis"], ["features"])
    graph.initializer.append(axis)
    graph.node.insert(0, before)
    graph.node.append(after)
    del graph.input[:]
    del graph.output[:]
    graph.input.append(helper.make_tensor_value_info("samples", TensorProto.FLOAT, ["samples"]))
    value = helper.make_tensor_value_info("features", TensorProto.FLOAT, ["rows", width])
    graph.output.append(value)
    del graph.value_info[:]  # their shapes have a batch axis of any size
    helper.set_model_props(model, {"stage": name, "exporter": "optimum"})
    onnx.save_model(
        model,
        folder / f"{name}.onnx",
        save_as_external_data=True,
        location=f"{name}.bin",
        size_threshold=_INSIDE_BYTES,
    )
    return Stage(f"{name}.onnx", ("samples",), ("features",)), int(width)


def _model_type(source: Path) -> str:
    try:
        config = json.loads((source / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            "no config.json that can be read",
            where=str(source),
            expected="a folder in hub layout",
            found=str(error),
        ) from error
    return str(config.get("model_type") if isinstance(config, dict) else None)


def _run(python: str, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in another environment, offline."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    try:
        return subprocess.run(
            [python, "-c", code, *arguments],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError as error:
        raise ExportError(
            "the interpreter of the optimum environment cannot be run",
            where=python,
            found=str(error),
            fix=f"set {PYTHON_VARIABLE} to its python, or unset it",
        ) from error


def _shape(value: onnx.ValueInfoProto) -> tuple[int, ...] | None:
    """Sizes, 0 for one that is not fixed; None where it is not float32."""
    tensor = value.type.tensor_type
    if tensor.elem_type != TensorProto.FLOAT:
        return None
    return tuple(int(d.dim_value) for d in tensor.shape.dim)


def _delta(graph: Path, samples: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference in units of the expected features' spread; NaN if shapes differ."""
    import onnxruntime

    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    features = session.run(["features"], {"samples": samples})[0]
    if features.shape != expected.shape:
        return float("nan")
    return float(np.abs(features - expected).max() / expected.std())
