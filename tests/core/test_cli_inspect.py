"""`edge-mmllm inspect`, `pack` and `unpack`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_mmllm.bundle import open_bundle

REFERENCES = Path(__file__).resolve().parents[1] / "goldens" / "references"


def test_a_checkpoint(cli: Callable[..., Any], chat_checkpoint: Path) -> None:
    told = cli("inspect", chat_checkpoint, "--json").json
    assert told["kind"] == "checkpoint"
    assert told["architecture"] == "llama"
    assert told["problem"] is None
    assert told["text"]["tokenizer"] == "tokenizers"
    assert told["state"]["kinds"] == {"kv": 4}
    assert told["state"]["bytes_at_8k"] == 8 * told["state"]["bytes_at_1k"] > 0
    assert sum(told["bytes_by_dtype"].values()) == told["size_bytes"]
    assert sum(group["tensors"] for group in told["groups"]) == told["tensors"]
    assert sum(group["parameters"] for group in told["groups"]) == told["parameters"]


def test_every_tensor_is_listed(cli: Callable[..., Any]) -> None:
    told = cli("inspect", REFERENCES / "mamba2", "--tensors", "--json").json
    assert {t["role"] for t in told["tensors"]} == {"embedding", "matrix", "vector"}
    assert sum(t["size_bytes"] for t in told["tensors"]) == told["size_bytes"]
    # Names as --override takes them.
    assert "layers.0.in" in " ".join(n for t in told["tensors"] for n in t["parameters"])
    shown = cli("inspect", REFERENCES / "mamba2", "--tensors").stderr
    assert all(t["name"] in shown for t in told["tensors"])


def test_what_cannot_be_exported_is_described_all_the_same(
    cli: Callable[..., Any], tmp_path: Path
) -> None:
    shutil.copyfile(REFERENCES / "llama" / "model.safetensors", tmp_path / "model.safetensors")
    config = json.loads((REFERENCES / "llama" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "llamba"}))
    told = cli("inspect", tmp_path, "--json")
    assert told.status == 0
    assert told.json["architecture"] == "llamba"
    assert "llamba" in told.json["problem"]
    assert told.json["state"] is None
    assert "no: " in cli("inspect", tmp_path).stderr


def test_a_bundle(cli: Callable[..., Any], base_bundle: Path, chat_bundle: Path) -> None:
    told = cli("inspect", base_bundle, "--json").json
    bundle = open_bundle(base_bundle)
    assert told["kind"] == "bundle"
    assert told["bundle_sha256"] == bundle.sha256
    assert told["state"]["bytes_at_1k"] == told["state"]["bytes_at_8k"] > 0
    assert told["manifest"]["gate"]["verdict"] == "not judged"
    shown = cli("inspect", chat_bundle)
    assert shown.stdout == ""
    for text in ("passed", "kl_mean", "a chat template", "4 kv", "llama"):
        assert text in shown.stderr


def test_a_bundles_tensors(cli: Callable[..., Any], base_bundle: Path) -> None:
    told = cli("inspect", base_bundle, "--tensors", "--json").json
    stored = sum(t["size_bytes"] for t in told["tensors"])
    groups = sum(g["size_bytes"] for g in told["manifest"]["quantization"]["groups"])
    assert stored == pytest.approx(groups, rel=0.15)
    assert not [t for t in told["tensors"] if "=" in t["name"]]


def test_neither(cli: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    done = cli("inspect", tmp_path, "--json")
    assert done.status == 1
    assert "notes.txt" in done.json["error"]["found"]


def test_there_and_back(cli: Callable[..., Any], base_bundle: Path, tmp_path: Path) -> None:
    packed, out = tmp_path / "model.edge", tmp_path / "model"
    assert cli("pack", base_bundle, packed, "--json").json["size_bytes"] == packed.stat().st_size
    assert cli("pack", base_bundle, packed).status == 1
    assert cli("pack", base_bundle, packed, "--force").status == 0
    told = cli("unpack", packed, out, "--json").json
    assert told["bundle_sha256"] == open_bundle(base_bundle).sha256 == open_bundle(out).sha256
    hint = cli("inspect", packed)
    assert hint.status == 2
    assert "edge-mmllm unpack model.edge model" in hint.stderr
