"""LoRA adapters as GGUF files: what is in them, what is refused; what `load(lora=...)` takes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from references import FOLDER
from safetensors.numpy import load_file, save_file
from test_lora import adapter

from edge_mmllm.errors import OutputExists, TensorMismatch, UnsupportedArchitecture, UsageError
from edge_mmllm_export.gguf.adapter import write_adapter
from edge_mmllm_export.gguf.layout import Wanted, layout
from edge_mmllm_export.models import build
from edge_mmllm_export.quantize.schemes import QuantPlan
from edge_mmllm_export.weights import bind
from edge_mmllm_runtime.adapters import Adapter, adapters_of, identity

LAYER = "model.layers.1"
LLAMA = {f"{LAYER}.self_attn.q_proj": (48, 48), f"{LAYER}.mlp.down_proj": (48, 80)}


def shapes(name: str, *ends: str) -> dict[str, tuple[int, ...]]:
    from edge_mmllm_export.checkpoints import open_checkpoint

    tensors = open_checkpoint(FOLDER / name).tensors
    return {n.removesuffix(".weight"): i.shape for n, i in tensors.items() if n.endswith(ends)}


def stored(name: str, lora: Path | None) -> dict[str, np.ndarray]:
    """Each tensor of the GGUF export in float32."""
    from edge_mmllm_export.checkpoints import open_checkpoint

    checkpoint = open_checkpoint(FOLDER / name, lora)
    model = build(checkpoint)
    sources = model.sources(checkpoint.layout)
    weights = bind(checkpoint, model.parameters(), sources, ignored=model.ignored())
    file = layout(model, weights, Wanted(QuantPlan("f32")))
    return {
        t.tensor.name: np.concatenate([p.weight.rows() for p in t.pieces]).reshape(t.shape)
        * t.tensor.scale
        for t in file.tensors
        if t.pieces
    }


@pytest.mark.parametrize(
    ("name", "ends", "config"),
    [
        ("llama", ("_proj.weight",), {}),
        ("llama", ("_proj.weight",), {"use_rslora": True, "alpha_pattern": {"q_proj": 2}}),
        ("qwen2", ("_proj.weight",), {}),
        ("mamba", ("in_proj.weight", "out_proj.weight"), {}),
        ("mamba2", ("in_proj.weight", "out_proj.weight"), {}),
    ],
)
def test_base_and_product_are_the_merged_export(name, ends, config, tmp_path) -> None:
    adapter(tmp_path / "a", shapes(name, *ends), rank=3, **config)
    names = write_adapter(FOLDER / name, tmp_path / "a", tmp_path / "a.gguf")
    reader = GGUFReader(tmp_path / "a.gguf")
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    assert reader.fields["general.type"].contents() == "adapter"
    assert reader.fields["adapter.type"].contents() == "lora"
    pairs = {t.name: np.asarray(t.data) for t in reader.tensors}
    assert len(pairs) == 2 * len(names)
    plain, merged = stored(name, None), stored(name, tmp_path / "a")
    for tensor, base in plain.items():
        expected = merged[tensor]
        if tensor in names:
            a, b = pairs[f"{tensor}.lora_a"], pairs[f"{tensor}.lora_b"]
            assert a.shape == (3, base.shape[1])
            base = base + alpha / 3 * (b @ a)
        np.testing.assert_allclose(base, expected, rtol=0, atol=1e-5)


def test_what_llama_cpp_would_pass_over_is_refused(tmp_path) -> None:
    rng = np.random.default_rng(1)
    adapter(tmp_path / "a", LLAMA)
    file = tmp_path / "a" / "adapter_model.safetensors"
    stem = "base_model.model.model.embed_tokens.lora_embedding_"
    more = {
        f"{stem}A": rng.random((4, 96), np.float32),
        f"{stem}B": rng.random((48, 4), np.float32),
    }
    save_file({**load_file(file), **more}, file)
    with pytest.raises(UnsupportedArchitecture, match=r"token_embd[\s\S]*export SRC --lora"):
        write_adapter(FOLDER / "llama", tmp_path / "a", tmp_path / "a.gguf")
    adapter(tmp_path / "b", shapes("mamba", "x_proj.weight"))
    with pytest.raises(UnsupportedArchitecture, match="ssm_x"):
        write_adapter(FOLDER / "mamba", tmp_path / "b", tmp_path / "a.gguf")
    adapter(tmp_path / "c", {f"{LAYER}.self_attn.x_proj": (48, 48)})
    with pytest.raises(TensorMismatch, match="x_proj"):
        write_adapter(FOLDER / "llama", tmp_path / "c", tmp_path / "a.gguf")
    assert not list(tmp_path.glob("*.gguf*"))


def test_the_command(tmp_path) -> None:
    from click.testing import CliRunner

    from edge_mmllm.cli.adapter import command

    adapter(tmp_path / "a", LLAMA)
    words = [
        str(FOLDER / "llama"),
        "--lora",
        str(tmp_path / "a"),
        "--out",
        str(tmp_path / "a.gguf"),
    ]
    done = CliRunner().invoke(command, [*words, "--json"])
    assert json.loads(done.stdout)["tensors"] == 2
    again = CliRunner().invoke(command, words)
    assert isinstance(again.exception, OutputExists)
    assert CliRunner().invoke(command, [*words, "--force"]).exit_code == 0


def test_what_load_takes(tmp_path) -> None:
    a, b = tmp_path / "a.gguf", tmp_path / "b.gguf"
    a.write_bytes(b"a")
    b.write_bytes(b"b")
    assert adapters_of(None) == ()
    assert adapters_of(a) == adapters_of(str(a)) == adapters_of([a]) == (Adapter(a),)
    assert adapters_of((a, 0.5)) == (Adapter(a, 0.5),)
    assert adapters_of([a, (b, 2)]) == (Adapter(a), Adapter(b, 2.0))
    names = [identity("0" * 64, adapters_of(g)) for g in (None, a, b, (a, 0.5), [a, b], [b, a])]
    assert names[0] == "0" * 64
    assert len(set(names)) == 6
    for given, words in (
        (tmp_path, "edge-mmllm adapter"),
        (tmp_path / "no", "no such adapter"),
        ((a, float("nan")), "scale"),
        ([a, 5], "no adapter"),
    ):
        with pytest.raises(UsageError, match=words):
            adapters_of(given)


def test_other_engines_say_how(tmp_path, monkeypatch) -> None:
    import edge_mmllm_runtime

    with pytest.raises(UsageError, match=r"GGUF model[\s\S]*export SRC --lora DIR"):
        edge_mmllm_runtime._adapters(tmp_path / "a.gguf", "onnx")


def test_options_of_the_command_line() -> None:
    from edge_mmllm.cli._options import lora_given

    assert lora_given(()) is None
    found = lora_given(("a.gguf", "b=0.5", "c=d.gguf"))
    assert found == [("a.gguf", 1.0), ("b", 0.5), ("c=d.gguf", 1.0)]
