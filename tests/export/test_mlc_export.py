"""`--format mlc` without a compiler: weights alone, what is planned, what is refused."""

from __future__ import annotations

import importlib.util
import json

import pytest
from references import FOLDER

from edge_mmllm.bundle import open_bundle, verify_bundle
from edge_mmllm.errors import MemoryLimitExceeded, MissingDependency, UsageError
from edge_mmllm.inspection import inspect_bundle
from edge_mmllm_export import exporter
from edge_mmllm_export.inspection import bundle_tensors
from edge_mmllm_export.mlc import compile as mlc_compile
from edge_mmllm_export.planning import ExportOptions
from edge_mmllm_export.quantize.schemes import QuantPlan
from edge_mmllm_runtime.mlc.weights import WeightFiles, read_views

needs_no_tvm = pytest.mark.skipif(
    importlib.util.find_spec("tvm") is not None, reason="says what is missing where TVM is not"
)


def options(**given):
    return ExportOptions(format="mlc", gate=False, **{"targets": ("none",), **given})


def test_weights_alone(tmp_path):
    bundle = exporter.export(FOLDER / "llama", tmp_path / "b", options(mlc_quant="q4f16_1"))
    verify_bundle(tmp_path / "b")
    names = {file.path for file in bundle.manifest.files}
    assert names == {
        "mlc-chat-config.json", "tensor-cache.json", "ndarray-cache.json", "params_shard_0.bin",
    }  # fmt: skip
    manifest = bundle.manifest
    assert manifest.engine == "mlc"
    assert manifest.quantization.scheme == "q4f16_1"
    assert manifest.model.details["mlc"]["stock"] is True
    assert manifest.engine_format["libraries"] == {}
    config = json.loads((tmp_path / "b" / "mlc-chat-config.json").read_text())
    assert config["quantization"] == "q4f16_1"
    assert inspect_bundle(tmp_path / "b").bundle.sha256 == bundle.sha256
    rows = {row.name: row for row in bundle_tensors(tmp_path / "b")}
    fused = rows["model.layers.0.self_attn.qkv_proj.q_weight"]
    assert fused.parameters == tuple(f"layers.0.attn.{n}.q_weight" for n in "qkv")
    assert sum(r.size_bytes for r in rows.values()) == sum(
        g.size_bytes for g in manifest.quantization.groups
    )


def test_a_reader_finds_our_weights(tmp_path):
    exporter.export(FOLDER / "qwen2", tmp_path / "b", options(plan=QuantPlan("f16")))
    bundle = open_bundle(tmp_path / "b")
    views = read_views(bundle.manifest.engine_format)
    with WeightFiles(bundle.file, views=views) as files:
        assert files.read("layers.1.attn.k_bias").shape == (32,)
        assert files.read("layers.1.mlp.up").shape == (80, 64)


@pytest.mark.parametrize(
    ("plan", "name"), [("int4", "q4f32_1"), ("f16", "q0f16"), ("f32", "q0f32")]
)
def test_our_words_have_a_meaning(plan, name, tmp_path):
    bundle = exporter.export(FOLDER / "mamba2", tmp_path / "b", options(plan=QuantPlan(plan)))
    assert bundle.manifest.quantization.scheme == name
    assert bundle.manifest.model.details["mlc"]["stock"] is False


def test_a_plan_is_what_is_written(tmp_path):
    plan = exporter.plan_export(FOLDER / "llama", options(workers=2))
    bundle = exporter.export(FOLDER / "llama", tmp_path / "b", options())
    assert plan.groups == bundle.manifest.quantization.groups
    assert bundle.size_bytes < plan.disk_bytes
    assert plan.peak_ram_bytes < mlc_compile.CHILD_RAM_BYTES
    compiled = exporter.plan_export(FOLDER / "llama", options(targets=("native",), workers=2))
    assert compiled.peak_ram_bytes == mlc_compile.CHILD_RAM_BYTES


def test_a_compiler_counts(tmp_path):
    with pytest.raises(MemoryLimitExceeded):
        exporter.export(
            FOLDER / "llama", tmp_path / "b", options(targets=(), max_ram=300 << 20, workers=2)
        )
    exporter.export(FOLDER / "llama", tmp_path / "b", options(max_ram=300 << 20, workers=2))


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"plan": QuantPlan("int8")}, "int8"),
        ({"plan": QuantPlan("int4", block_size=64)}, "no parts"),
        ({"plan": QuantPlan("int4", embedding="f16")}, "no parts"),
        ({"mlc_quant": "q4f16_ft"}, "mlc-quant"),
        ({"inputs": "embeds"}, "embeds"),
        ({"targets": ("none", "native")}, "none"),
    ],
)
def test_what_is_refused(given, text, tmp_path):
    with pytest.raises(UsageError, match=text):
        exporter.export(FOLDER / "llama", tmp_path / "b", options(**given))
    assert not list(tmp_path.iterdir())


@needs_no_tvm
def test_a_missing_compiler_says_what_to_install(tmp_path):
    with pytest.raises(MissingDependency, match=r"edge-mmllm\[mlc\]"):
        exporter.export(FOLDER / "llama", tmp_path / "b", options(targets=()))
    assert not list(tmp_path.iterdir())


def test_a_child_that_dies_is_an_error(tmp_path, monkeypatch):
    from edge_mmllm.errors import ExportError

    monkeypatch.setattr(
        mlc_compile, "python_command", lambda code: ["sh", "-c", "echo killed >&2; exit 137"]
    )
    with pytest.raises(ExportError, match="killed"):
        exporter.export(FOLDER / "llama", tmp_path / "b", options(targets=()))
    assert not list(tmp_path.iterdir())
