"""LoRA adapters applied by llama.cpp: the same logits as of the merged export."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

import edge_mmllm
from edge_mmllm.errors import CorruptBundle, StateMismatch, UsageError

pytestmark = pytest.mark.full
pytest.importorskip("llama_cpp")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "export"))

NAMES = ["llama", "llama-tied-llama3", "qwen2", "qwen3", "olmo2", "mamba", "mamba2"]
IDS = np.random.default_rng(1).integers(5, 90, 24)


def made(name: str, folder: Path) -> tuple[Path, Path, Path]:
    """A base, an adapter for it and the two merged."""
    from test_lora import FOLDER, adapter

    from edge_mmllm_export.checkpoints import open_checkpoint
    from edge_mmllm_export.exporter import export
    from edge_mmllm_export.gguf.adapter import write_adapter
    from edge_mmllm_export.planning import ExportOptions
    from edge_mmllm_export.quantize.schemes import QuantPlan

    tensors = open_checkpoint(FOLDER / name).tensors
    ends = tuple(
        f"{e}_proj.weight" for e in ("q", "k", "v", "o", "gate", "up", "down", "in", "out")
    )
    targets = {n[:-7]: i.shape for n, i in tensors.items() if n.endswith(ends)}
    adapter(folder / "peft", targets, rank=3, use_rslora=True)
    write_adapter(FOLDER / name, folder / "peft", folder / "a.gguf")
    for out, lora in (("plain", None), ("merged", str(folder / "peft"))):
        options = ExportOptions(
            QuantPlan("f32"), tokenizer="none", gate=False, format="gguf", lora=lora
        )
        export(FOLDER / name, folder / out, options)
    return folder / "plain", folder / "a.gguf", folder / "merged"


def logits(path: Path, lora: object = None) -> np.ndarray:
    with edge_mmllm.load(path, threads=1, lora=lora) as session:  # type: ignore[arg-type]
        return session.prefill(IDS, logits="all")


@pytest.mark.parametrize("name", NAMES)
def test_base_with_adapter_is_the_merged_model(name: str, tmp_path: Path) -> None:
    plain, lora, merged = made(name, tmp_path)
    expected, base = logits(merged), logits(plain)
    assert np.abs(expected - base).max() > 1
    assert np.abs(logits(plain, lora) - expected).max() <= 1e-3
    assert np.array_equal(logits(plain, (lora, 0.0)), base)
    if name == "llama":
        twice = logits(plain, [(lora, 0.25), (lora, 0.75)])
        assert np.abs(twice - expected).max() <= 1e-3


def test_states_belong_to_the_model_with_its_adapter(tmp_path: Path) -> None:
    plain, lora, _ = made("llama", tmp_path)
    with edge_mmllm.load(plain, threads=1, lora=lora) as session:
        session.prefill(IDS)
        snapshot = session.snapshot()
        expected = session.decode(7)
        session.restore(snapshot)
        assert np.array_equal(session.decode(7), expected)
    with (
        edge_mmllm.load(plain, threads=1) as session,
        pytest.raises(StateMismatch),
    ):
        session.restore(snapshot)


def test_an_adapter_outlives_a_larger_context(tmp_path: Path, monkeypatch) -> None:
    from edge_mmllm_runtime.gguf import engine as gguf

    plain, lora, merged = made("llama", tmp_path)
    monkeypatch.setattr(gguf, "FIRST_CONTEXT", 8)
    assert np.abs(logits(plain, lora) - logits(merged)).max() <= 1e-3


def test_files_that_are_no_adapters(tmp_path: Path) -> None:
    plain, lora, _ = made("llama", tmp_path)
    model = next(plain.glob("*.gguf"))
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(lora.read_bytes()[:200])
    other = tmp_path / "other"
    other.mkdir()
    for given in (bad, model, made("mamba", other)[1]):
        with pytest.raises(CorruptBundle, match="cannot use this adapter"):
            edge_mmllm.load(plain, lora=given)
    with pytest.raises(UsageError, match="edge-mmllm adapter"):
        edge_mmllm.load(plain, lora=tmp_path / "peft")
    session = edge_mmllm.load(model, threads=1, lora=lora)  # the file alone, caches in float16
    assert np.abs(session.prefill(IDS, logits="all") - logits(plain, lora)).max() <= 0.1
    session.close()
