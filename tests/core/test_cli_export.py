"""`edge-mmllm export`: options, refusals, and nothing half-written whatever happens."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_mmllm.bundle import open_bundle
from edge_mmllm.cli.export import QUANT_NAMES
from edge_mmllm_export import verify
from edge_mmllm_export.quantize import schemes

REFERENCES = Path(__file__).resolve().parents[1] / "goldens" / "references"
QUICK = ("--gate", "off", "--threads", 1)

#: Runs `edge-mmllm ARGUMENTS`, but stops in the middle of writing: makes the file named first,
#: then waits to be killed.
STUCK = """
import sys, time
from pathlib import Path
import edge_mmllm_export.formats.onnx as onnx
from edge_mmllm.cli import main

write = onnx.write_stages

def stuck(*args, **options):
    write(*args, **options)
    Path(sys.argv[1]).touch()
    time.sleep(120)

onnx.write_stages = stuck
main(sys.argv[2:], prog_name="edge-mmllm")
"""


def test_an_export_is_a_judged_bundle(
    cli: Callable[..., Any], chat_checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = cli("export", chat_checkpoint, "--out", out, "--quant", "int8", "--json")
    assert done.status == 0
    bundle = open_bundle(out, verify="hashes")
    told = done.json
    assert told["bundle_sha256"] == bundle.sha256
    assert told["size_bytes"] == bundle.size_bytes
    assert told["gate"]["verdict"] == bundle.manifest.gate.verdict == "passed"
    assert told["quantization"]["scheme"] == "int8"
    assert bundle.spec.text.chat_template is not None
    command = bundle.manifest.export.command
    assert command == "export tiny-chat --out out --quant int8 --json"


def test_people_get_a_table_on_stderr(cli: Callable[..., Any], tmp_path: Path) -> None:
    done = cli("export", REFERENCES / "mamba2", "--out", tmp_path / "out", *QUICK)
    assert done.status == 0
    assert done.stdout == ""
    assert "not judged" in done.stderr
    assert "mamba2" in done.stderr


def test_every_option_arrives(
    cli: Callable[..., Any], chat_checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = cli(
        "export", chat_checkpoint, "--out", out, "--format", "onnx", "--quant", "int4",
        "--block-size", 64, "--zero", "float", "--embedding-quant", "f16", "--override",
        "layers.0.*=int8-b32", "--override", "layers.1.attn.q=f16", "--inputs", "embeds",
        "--context", 64, "--tokenizer", chat_checkpoint / "tokenizer.json", "--max-ram", "2GiB",
        *QUICK, "--json",
    )  # fmt: skip
    assert done.status == 0, done.stderr
    manifest = open_bundle(out).manifest
    found = {(g.group, g.scheme) for g in manifest.quantization.groups}
    assert {("embedding", "f16"), ("matrix", "int8-b32"), ("matrix", "f16")} <= found
    assert ("matrix", "int4-b64-min") in found
    assert set(manifest.model.stages) == {"embed", "decoder", "decoder_native"}
    assert manifest.model.context_length == 64
    assert manifest.gate.verdict == "not judged"
    assert str(tmp_path) not in manifest.export.command
    assert str(chat_checkpoint.parent) not in manifest.to_bytes().decode()
    assert "--tokenizer tokenizer.json" in manifest.export.command


def test_the_choices_are_the_exporters() -> None:
    assert QUANT_NAMES == schemes.QUANT_NAMES


@pytest.mark.parametrize(
    ("options", "status", "kind", "text"),
    [
        (["--format", "mlc", "--quant", "int8"], 2, "UsageError", "--quant int8"),
        (["--format", "mlc", "--block-size", "64"], 2, "UsageError", "--block-size"),
        (["--format", "mlc", "--target", "none", "--target", "armv7"], 2, "UsageError", "none"),
        (["--format", "mlc", "--mlc-quant", "q5f16_1"], 2, "UsageError", "q5f16_1"),
        (["--mlc-quant", "q4f16_1"], 2, "UsageError", "--format mlc"),
        (["--target", "armv7"], 2, "UsageError", "--format mlc"),
        (["--format", "tflite"], 2, "UsageError", "unknown --format"),
        (["--quant", "Q4_0"], 2, "UsageError", "Q4_0"),
        (["--block-size", "33"], 2, "UsageError", "33"),
        (["--override", "nonsense"], 2, "UsageError", "nonsense"),
        (["--override", "no.such.*=int8"], 2, "UsageError", "matches no tensor"),
        (["--context", "100000"], 2, "UsageError", "--context"),
        (["--tokenizer", "no/such/file"], 2, "UsageError", "--tokenizer"),
        (["--gate-text", "no/such/file"], 2, "UsageError", "--gate-text"),
        (["--max-ram", "1MiB"], 1, "MemoryLimitExceeded", "--max-ram"),
    ],
)
def test_refusals_leave_nothing(
    cli: Callable[..., Any],
    tmp_path: Path,
    options: list[str],
    status: int,
    kind: str,
    text: str,
) -> None:
    done = cli("export", REFERENCES / "llama", "--out", tmp_path / "out", *options, "--json")
    assert done.status == status
    assert done.json["error"]["type"] == kind
    assert text in done.stderr
    assert not list(tmp_path.iterdir())


def test_out_may_be_left_out_for_a_dry_run_only(cli: Callable[..., Any]) -> None:
    done = cli("export", REFERENCES / "llama")
    assert done.status == 2
    assert "--out" in done.stderr


def test_a_dry_run_writes_nothing(cli: Callable[..., Any], tmp_path: Path) -> None:
    words = ("export", REFERENCES / "llama", "--out", tmp_path / "out", "--dry-run")
    plan = cli(*words, "--json").json
    assert plan["dry_run"] is True
    assert plan["tensors"] > 10
    assert min(plan["disk_bytes"], plan["peak_ram_bytes"], plan["parameters"]) > 0
    assert "peak RAM" in cli(*words).stderr
    assert not list(tmp_path.iterdir())


def test_a_source_that_is_not_there(cli: Callable[..., Any], tmp_path: Path) -> None:
    done = cli("export", tmp_path / "nothing", "--out", tmp_path / "out", "--json")
    assert done.status == 1
    assert done.json["error"]["type"] == "CheckpointError"
    assert "nothing" in done.json["error"]["what"]


def test_an_existing_output_needs_force(cli: Callable[..., Any], tmp_path: Path) -> None:
    words = ("export", REFERENCES / "mamba2", "--out", tmp_path / "out", *QUICK)
    assert cli(*words).status == 0
    before = open_bundle(tmp_path / "out").sha256
    again = cli(*words, "--quant", "int8", "--json")
    assert again.status == 1
    assert again.json["error"]["type"] == "OutputExists"
    assert "--force" in again.stderr
    assert open_bundle(tmp_path / "out").sha256 == before
    assert cli(*words, "--quant", "int8", "--force").status == 0
    assert open_bundle(tmp_path / "out").sha256 != before


def test_force_replaces_nothing_but_a_bundle(cli: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    done = cli("export", REFERENCES / "mamba2", "--out", tmp_path / "out", *QUICK, "--force")
    assert done.status == 1
    assert (tmp_path / "out" / "thesis.tex").exists()


def test_a_failed_gate_prints_its_figures_and_leaves_nothing(
    cli: Callable[..., Any], tmp_path: Path
) -> None:
    # Random weights in four bits throughout, two blocks a row: too much is lost.
    coarse = ("--embedding-quant", "int4", "--block-size", "128")
    words = ("export", REFERENCES / "olmo2", "--out", tmp_path / "out", *coarse)
    done = cli(*words, "--json")
    assert done.status == 1
    assert done.json["error"]["type"] == "QualityGateFailed"
    assert "perplexity_change" in done.json["error"]["found"]
    assert not list(tmp_path.iterdir())
    kept = cli(*words, "--accept-quality-loss", "--json")
    assert kept.status == 0
    assert kept.json["gate"]["verdict"] == "failed-accepted"


def test_a_disk_that_is_too_small(
    cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 30, 1 << 30, 1000))
    done = cli("export", REFERENCES / "mamba2", "--out", tmp_path / "out", *QUICK, "--json")
    assert done.status == 1
    assert done.json["error"]["type"] == "OutOfSpace"
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up(
    cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(model: object, weights: object, folder: Path, **_: object) -> None:
        (folder / "weights.bin").write_bytes(b"begun")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("edge_mmllm_export.formats.onnx.write_stages", full)
    done = cli("export", REFERENCES / "mamba2", "--out", tmp_path / "out", *QUICK, "--json")
    assert done.status == 1
    assert done.json["error"]["type"] == "OutOfSpace"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_a_killed_export_leaves_no_bundle(
    cli: Callable[..., Any], tmp_path: Path, name: str
) -> None:
    folder, marker = tmp_path / "bundles", tmp_path / "marker"
    folder.mkdir()
    words = ["export", str(REFERENCES / "mamba2"), "--out", str(folder / "out"), *map(str, QUICK)]
    child = subprocess.Popen(
        [sys.executable, "-c", STUCK, str(marker), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not marker.exists():
        assert child.poll() is None, child.communicate()
        time.sleep(0.02)
    begun = [path.name for path in folder.iterdir()]
    assert any(".edge-part-" in entry for entry in begun)
    assert "out" not in begun
    child.send_signal(getattr(signal, name))
    stdout, stderr = child.communicate(timeout=60)
    assert stdout == ""
    if name == "SIGKILL":
        assert not (folder / "out").exists()
    else:
        assert child.returncode == 130
        assert stderr.strip() == "interrupted"
        assert not list(folder.iterdir())
    assert cli(*words).status == 0
    assert [path.name for path in folder.iterdir()] == ["out"]
    open_bundle(folder / "out", verify="hashes")


def test_nothing_is_imported_from_the_working_folder(chat_checkpoint: Path, tmp_path: Path) -> None:
    """The folder may be somebody else's checkpoint: the gate's child must not run its code."""
    hostile = tmp_path / "hostile"
    shutil.copytree(chat_checkpoint, hostile)
    for name in ("numpy", "onnxruntime", "json", "edge_mmllm_export"):
        (hostile / f"{name}.py").write_text("open('RAN', 'w')\nraise SystemExit('hostile')\n")
    script = Path(sys.executable).with_name("edge-mmllm")
    words = [script, "export", ".", "--out", tmp_path / "out", "--quant", "int8", "--threads", "1"]
    done = subprocess.run(words, cwd=hostile, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    doctor = subprocess.run([script, "doctor"], cwd=hostile, capture_output=True, check=False)
    assert doctor.returncode == 0
    assert not (hostile / "RAN").exists()


@pytest.mark.parametrize(
    ("content", "what"), [(b"\xff\xfe\x00", "cannot be read"), (b"", "too short")]
)
def test_a_text_that_cannot_judge_is_wrong_usage(
    cli: Callable[..., Any], chat_checkpoint: Path, tmp_path: Path, content: bytes, what: str
) -> None:
    text, out = tmp_path / "text", tmp_path / "out"
    text.write_bytes(content)
    done = cli("export", chat_checkpoint, "--out", out, "--gate-text", text, "--json")
    assert done.status == 2
    assert done.json["error"]["type"] == "UsageError"
    assert what in done.json["error"]["what"]
    assert list(tmp_path.iterdir()) == [text]


def test_a_gate_out_of_memory_says_so(
    cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    monkeypatch.setattr(verify, "python_command", lambda _: [sys.executable, "-c", code])
    out = tmp_path / "out"
    done = cli("export", REFERENCES / "mamba2", "--out", out, "--threads", 1, "--json")
    assert done.status == 1
    assert "out of memory" in done.json["error"]["what"]
    assert not list(tmp_path.iterdir())
