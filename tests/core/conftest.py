"""A tiny, valid bundle for the tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_mmllm.bundle import (
    Bundle,
    BundleWriter,
    ExportRecord,
    Gate,
    Manifest,
    QuantGroup,
    Quantization,
    Source,
    SourceFile,
    source_hash,
)
from edge_mmllm.spec import CAPACITY, ModelSpec, Stage, StateSpec, TextSpec

#: Writes the sample bundle to a path; `force` as in BundleWriter; `salt` changes golden.npz.
WriteSample = Callable[..., Bundle]

FILES = {
    "decoder.onnx": b"graph " * 100,
    "weights/decoder.onnx.data": bytes(range(256)) * 64,
    "tokenizer.json": b"{}",
    "golden.npz": b"golden",
}


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test cuts the power: waiting for a slow disk would tell nothing."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def sample_files() -> dict[str, bytes]:
    return dict(FILES)


@pytest.fixture
def sample_spec() -> ModelSpec:
    return ModelSpec(
        architecture="llama",
        vocab_size=300,
        hidden_size=8,
        layers=1,
        parameters=12_345,
        context_length=64,
        states=(
            StateSpec("layers.0.attn.k", (1, 2, CAPACITY, 4), "float32", "kv"),
            StateSpec("layers.0.conv", (1, 3, 8), "float16", "conv"),
        ),
        stages={"decoder": Stage("decoder.onnx", ("input_ids", "position"), ("logits",))},
        text=TextSpec("tokenizers", bos_id=1, eos_ids=(2, 3), chat_template="{{ messages }}"),
        details={"rope_theta": 10000.0},
    )


@pytest.fixture
def sample_manifest(sample_spec: ModelSpec) -> Manifest:
    files = (SourceFile("model.safetensors", 10, "ab" * 32),)
    return Manifest(
        engine="onnx",
        engine_format={"opset": 21},
        source=Source("tiny", "hub", files, source_hash(files), {"model_type": "llama"}),
        model=sample_spec,
        quantization=Quantization(
            "int4", (QuantGroup("attention", "int4", 4.0, 32, True, 4, 1000),), 4.5
        ),
        gate=Gate("passed", {"top1_agreement": 0.99}),
        export=ExportRecord({"numpy": "2"}, 1.5, None, "2026-01-31T12:00:00Z", "export SRC"),
        golden="golden.npz",
    )


@pytest.fixture
def write_sample(sample_manifest: Manifest) -> WriteSample:
    def write(out: Path, *, force: bool = False, salt: bytes = b"") -> Bundle:
        with BundleWriter(out, force=force) as writer:
            for name, content in FILES.items():
                extra = salt if name == "golden.npz" else b""
                writer.path(name).write_bytes(content + extra)
            return writer.commit(sample_manifest)

    return write
