"""A tiny, valid bundle for the tests."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

sys.path.insert(0, str(Path(__file__).parent))

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


REFERENCES = Path(__file__).resolve().parents[1] / "goldens" / "references"

#: ChatML in small.
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def _chat_checkpoint(folder: Path, template: str | None) -> Path:
    """The tiny random llama with a tokenizer of single characters and a chat template."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir()
    characters = ["<unk>", "\n", *map(chr, range(32, 126))]  # 96 ids
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, characters[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(REFERENCES / "llama" / name, folder / name)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str | None], Path]:
    """Makes a tiny checkpoint with a tokenizer and this chat template (None: a base model)."""

    def make(template: str | None) -> Path:
        return _chat_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny-chat", template)

    return make


@pytest.fixture(scope="session")
def chat_checkpoint(make_checkpoint: Callable[[str | None], Path]) -> Path:
    """A tiny random llama that can chat; read it only."""
    return make_checkpoint(TEMPLATE)


@pytest.fixture(scope="session")
def chat_bundle(chat_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`chat_checkpoint` as a judged float32 bundle; read it only."""
    from edge_mmllm_export.exporter import ExportOptions, export
    from edge_mmllm_export.quantize.schemes import QuantPlan

    out = tmp_path_factory.mktemp("bundles") / "chat.f32"
    export(chat_checkpoint, out, ExportOptions(plan=QuantPlan("f32"), workers=1))
    return out


@pytest.fixture(scope="session")
def base_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Mamba-2 without tokenizer, in int8, not judged; read it only."""
    from edge_mmllm_export.exporter import ExportOptions, export
    from edge_mmllm_export.quantize.schemes import QuantPlan

    out = tmp_path_factory.mktemp("bundles") / "base.int8"
    options = ExportOptions(plan=QuantPlan("int8"), gate=False, workers=1)
    export(REFERENCES / "mamba2", out, options)
    return out


@dataclass(frozen=True)
class Result:
    """What a command did."""

    status: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        """The one document on stdout."""
        assert self.stdout.endswith("\n")
        assert "\n" not in self.stdout[:-1]
        return json.loads(self.stdout, parse_constant=lambda name: pytest.fail(name))


@pytest.fixture
def cli() -> Callable[..., Result]:
    """Runs `edge-mmllm ARGUMENTS` in this process. An unexpected error is raised."""
    from click.testing import CliRunner

    from edge_mmllm.cli import main

    def run(*arguments: object, stdin: str | bytes | None = None) -> Result:
        words = [str(argument) for argument in arguments]
        done = CliRunner().invoke(main, words, input=stdin, prog_name="edge-mmllm")
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return Result(done.exit_code, done.stdout, done.stderr)

    return run
