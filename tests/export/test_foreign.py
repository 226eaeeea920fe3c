"""Encoders by way of optimum: what needs no optimum. The way itself is in tests/full."""

from __future__ import annotations

import json
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_mmllm.errors import CheckpointError, ExportError, MissingDependency, QualityGateFailed
from edge_mmllm_export.foreign import LENGTHS, PYTHON_VARIABLE, bring_in, export_foreign

KERNEL = np.random.default_rng(0).standard_normal((24, 1, 16)).astype(np.float32)


def _graph(path, source="input_values", kind=TensorProto.FLOAT, width=24):
    """A convolution over the waveform, as optimum would name and shape it."""
    nodes = [
        helper.make_node("Unsqueeze", [source, "one"], ["wave"]),
        helper.make_node("Conv", ["wave", "kernel"], ["channels"], strides=[5]),
        helper.make_node("Transpose", ["channels"], ["last_hidden_state"], perm=[0, 2, 1]),
    ]
    graph = helper.make_graph(
        nodes,
        "main",
        [helper.make_tensor_value_info(source, kind, ["batch_size", "length"])],
        [
            helper.make_tensor_value_info(
                "last_hidden_state", TensorProto.FLOAT, ["batch_size", "length", width]
            )
        ],
        [
            numpy_helper.from_array(KERNEL, "kernel"),
            numpy_helper.from_array(np.array([1]), "one"),
        ],
    )
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 18)])
    onnx.save_model(model, path)
    return path


def test_a_foreign_graph_becomes_a_stage(tmp_path):
    stage, width = bring_in(_graph(tmp_path / "model.onnx"), tmp_path, "encode_audio")
    assert (stage.file, stage.inputs, stage.outputs, width) == (
        "encode_audio.onnx",
        ("samples",),
        ("features",),
        24,
    )
    assert (tmp_path / "encode_audio.bin").stat().st_size >= KERNEL.nbytes
    onnx.checker.check_model(tmp_path / stage.file)
    samples = np.random.default_rng(1).standard_normal(66).astype(np.float32)
    session = onnxruntime.InferenceSession(tmp_path / stage.file)
    features = session.run(None, {"samples": samples})[0]
    windows = np.lib.stride_tricks.sliding_window_view(samples, 16)[::5]
    np.testing.assert_allclose(features, windows @ KERNEL[:, 0].T, atol=1e-5)


@pytest.mark.parametrize(
    "wrong",
    [{"source": "pixel_values"}, {"kind": TensorProto.DOUBLE}, {"width": "width"}],
)
def test_a_graph_of_anything_else_is_refused(wrong, tmp_path):
    with pytest.raises(ExportError, match="not an encoder of a waveform"):
        bring_in(_graph(tmp_path / "model.onnx", **wrong), tmp_path, "encode_audio")
    assert not (tmp_path / "encode_audio.onnx").exists()


def test_without_optimum_the_pip_line_is_given(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "hubert"}))
    stub = tmp_path / "python"  # an environment without it
    stub.write_text("#!/bin/sh\nexit 1\n")
    stub.chmod(0o755)
    monkeypatch.setenv(PYTHON_VARIABLE, str(stub))
    with pytest.raises(MissingDependency, match=r"pip install 'edge-mmllm\[optimum\]'"):
        export_foreign(tmp_path, tmp_path)


def test_what_optimum_says_is_passed_on(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "hubert"}))
    stub = tmp_path / "python"
    stub.write_text("#!/bin/sh\n[ $# -gt 2 ] || exit 0\necho 'no such layer' >&2\nexit 1\n")
    stub.chmod(0o755)
    with pytest.raises(ExportError, match="could not export hubert") as failure:
        export_foreign(tmp_path, tmp_path, python=str(stub))
    assert "no such layer" in str(failure.value)


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="hub layout"):
        export_foreign(tmp_path, tmp_path, python=sys.executable)


def test_an_interpreter_that_is_not_there(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ExportError, match=PYTHON_VARIABLE):
        export_foreign(tmp_path, tmp_path, python=str(tmp_path / "nothing"))


@pytest.mark.parametrize("off", [0.0, 0.02])
def test_the_graph_is_judged_by_torch(off, tmp_path):
    """A stand-in for the other environment, which says what torch computed."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "hubert"}))
    made = tmp_path / "made"
    made.mkdir()
    _graph(made / "model.onnx")
    arrays = {}
    for n in LENGTHS:
        samples = np.random.default_rng(n).standard_normal(n).astype(np.float32)
        windows = np.lib.stride_tricks.sliding_window_view(samples, 16)[::5]
        arrays[f"input.{n}"] = samples
        arrays[f"output.{n}"] = windows @ KERNEL[:, 0].T + off * (n == LENGTHS[1])
    np.savez(made / "reference.npz", **arrays)
    stub = tmp_path / "python"
    stub.write_text(f'#!/bin/sh\n[ $# -gt 2 ] || exit 0\ncp {made}/* "$4"\n')
    stub.chmod(0o755)
    if off:
        with pytest.raises(QualityGateFailed, match="disagrees with the model in torch"):
            export_foreign(tmp_path, tmp_path, python=str(stub))
        return
    found = export_foreign(tmp_path, tmp_path, python=str(stub))
    assert (found.model_type, found.width) == ("hubert", 24)
    assert found.max_delta < 1e-5
