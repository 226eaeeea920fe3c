"""LoRA adapters in PEFT layout, merged below every weight map."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import references
from family_files import FOLDER as FAMILIES
from references import FOLDER
from safetensors.numpy import load_file, save_file

from edge_mmllm.errors import CheckpointError, TensorMismatch, UnsupportedArchitecture
from edge_mmllm_export.checkpoints import open_checkpoint
from edge_mmllm_export.exporter import export, plan_export
from edge_mmllm_export.planning import ExportOptions
from edge_mmllm_export.quantize.schemes import QuantPlan
from edge_mmllm_export.weights import bind

CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "bias": "none", "use_dora": False,
          "fan_in_fan_out": False, "target_modules": ["q_proj"]}  # fmt: skip


def adapter(folder, targets, *, rank=4, suffix=".weight", seed=0, **config):
    """Writes an adapter. targets: module -> (rows, columns). Returns module -> B @ A."""
    rng = np.random.default_rng(seed)
    tensors, products = {}, {}
    for module, (rows, columns) in targets.items():
        a = rng.standard_normal((rank, columns)).astype(np.float32)
        b = rng.standard_normal((rows, rank)).astype(np.float32)
        stem = f"base_model.model.{module}.lora_"
        tensors[f"{stem}A{suffix}"], tensors[f"{stem}B{suffix}"] = a, b
        products[module] = b @ a
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, "r": rank, **config}))
    return products


def weights(source, lora=None):
    checkpoint = open_checkpoint(source, lora)
    model = references.build(checkpoint)
    sources = model.sources(checkpoint.layout)
    return bind(checkpoint, model.parameters(), sources, ignored=model.ignored())


Q = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 1.5),
        ({"use_rslora": True}, 3.0),
        ({"alpha_pattern": {"q_proj": 2}}, 0.5),
        ({"alpha_pattern": {"layers.1.self_attn.q_proj": 2}}, 0.5),
        ({"alpha_pattern": {"proj": 2}}, 1.5),
        ({"r": 9, "rank_pattern": {r".*\.q_proj": 4}}, 1.5),
    ],
)
def test_the_product_is_added(config, scale, tmp_path):
    delta = adapter(tmp_path / "a", {Q: (48, 48)}, **config)[Q]
    plain, merged = weights(FOLDER / "llama"), weights(FOLDER / "llama", tmp_path / "a")
    for name, weight in plain.items():
        expected = weight.rows()
        if name == "layers.1.attn.q":
            expected = expected + scale * delta
        np.testing.assert_allclose(merged[name].rows(), expected, rtol=0, atol=2e-6)


def test_tiles_are_rows_of_the_whole(tmp_path):
    adapter(tmp_path / "a", {Q: (48, 48)})
    merged = weights(FOLDER / "llama", tmp_path / "a")["layers.1.attn.q"]
    whole = merged.rows()
    for start, stop in ((0, 1), (5, 17), (47, 48), (3, 3)):
        np.testing.assert_allclose(
            merged.checkpoint.read(f"{Q}.weight", start, stop), whole[start:stop], atol=1e-6
        )


def test_a_fused_projection_takes_its_rows(tmp_path):
    """Mamba-2's in_proj is three of our matrices."""
    module = "backbone.layers.0.mixer.in_proj"
    base = open_checkpoint(FOLDER / "mamba2")
    shape = base.tensors[f"{module}.weight"].shape
    delta = adapter(tmp_path / "a", {module: shape})[module] * 1.5
    plain, merged = weights(FOLDER / "mamba2"), weights(FOLDER / "mamba2", tmp_path / "a")
    names = [f"layers.0.in.{n}" for n in ("z", "xBC", "dt")]
    found = np.concatenate([merged[n].rows() - plain[n].rows() for n in names])
    np.testing.assert_allclose(found, delta, rtol=0, atol=2e-6)


def test_an_embedding(tmp_path):
    rng = np.random.default_rng(1)
    a = rng.standard_normal((4, 96)).astype(np.float32)
    b = rng.standard_normal((48, 4)).astype(np.float32)
    adapter(tmp_path / "a", {Q: (48, 48)})
    stem = "base_model.model.model.embed_tokens.lora_embedding_"
    save_file({f"{stem}A": a, f"{stem}B": b}, tmp_path / "a" / "adapter_model.safetensors")
    plain, merged = weights(FOLDER / "llama"), weights(FOLDER / "llama", tmp_path / "a")
    delta = merged["embed"].rows() - plain["embed"].rows()
    np.testing.assert_allclose(delta, 1.5 * (b @ a).T, rtol=0, atol=2e-6)
    np.testing.assert_allclose(merged["embed"].rows(7, 9), merged["embed"].rows()[7:9])


@pytest.mark.parametrize(
    "module",
    [
        "language_model.model.layers.0.self_attn.v_proj",
        "model.language_model.layers.0.self_attn.v_proj",
    ],
)
def test_either_spelling_of_a_multimodal_target(module, tmp_path):
    delta = adapter(tmp_path / "a", {module: (16, 48)})[module]
    source = FAMILIES / "llava"
    plain, merged = weights(source), weights(source, tmp_path / "a")
    found = merged["layers.0.attn.v"].rows() - plain["layers.0.attn.v"].rows()
    np.testing.assert_allclose(found, 1.5 * delta, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "module",
    [
        "vision_tower.encoder.layers.0.mlp.fc1",
        "model.vision_tower.vision_model.encoder.layers.0.mlp.fc1",
        "model.multi_modal_projector.linear_2",
        "lm_head",
        "model.language_model.lm_head",
    ],
)
def test_targets_outside_the_language_model(module, tmp_path):
    tensors = open_checkpoint(FAMILIES / "llava").tensors
    shapes = {"fc1": (40, 32), "linear_2": (48, 48), "lm_head": (96, 48)}
    adapter(tmp_path / "a", {module: shapes[module.rsplit(".")[-1]]})
    found = open_checkpoint(FAMILIES / "llava", tmp_path / "a")
    assert len(found.targets) == 1
    assert found.targets[0] in tensors


def test_everything_that_does_not_fit_is_listed(tmp_path):
    adapter(
        tmp_path / "a",
        {
            "model.layers.0.self_attn.q_proj": (48, 48),
            "model.layers.0.self_attn.x_proj": (48, 48),
            "model.layers.0.self_attn.o_proj": (48, 47),
            "model.norm": (48, 1),
        },
    )
    with pytest.raises(TensorMismatch) as caught:
        open_checkpoint(FOLDER / "llama", tmp_path / "a")
    shown = str(caught.value)
    assert "3 of its targets are wrong" in shown
    assert "x_proj: no such weight" in shown
    assert "o_proj: expected A (4, 48)" in shown
    assert "norm: a weight of shape (48,), not a matrix" in shown


def test_another_rank_than_the_config_says(tmp_path):
    adapter(tmp_path / "a", {Q: (48, 48)}, r=8)
    with pytest.raises(TensorMismatch, match=r"expected A \(8, 48\)"):
        open_checkpoint(FOLDER / "llama", tmp_path / "a")


def test_half_a_pair_and_foreign_tensors(tmp_path):
    adapter(tmp_path / "a", {Q: (48, 48)})
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors[f"base_model.model.{Q}.lora_B.weight"]
    tensors["base_model.model.lm_head.weight"] = np.zeros((96, 48), np.float32)
    save_file(tensors, path)
    with pytest.raises(TensorMismatch) as caught:
        open_checkpoint(FOLDER / "llama", tmp_path / "a")
    assert "only A of A and B" in str(caught.value)
    assert "not of a LoRA: base_model.model.lm_head.weight" in str(caught.value)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"use_dora": True}, UnsupportedArchitecture, "use_dora"),
        ({"bias": "all"}, UnsupportedArchitecture, "bias"),
        ({"fan_in_fan_out": True}, UnsupportedArchitecture, "fan_in_fan_out"),
        ({"peft_type": "LOHA"}, CheckpointError, "peft_type"),
        ({"r": 0}, CheckpointError, "'r'"),
        ({"lora_alpha": "x"}, CheckpointError, "lora_alpha"),
        ({"rank_pattern": {"(": 4}}, CheckpointError, "pattern of rank_pattern"),
        ({"rank_pattern": {"a{99999999999}": 4}}, CheckpointError, "pattern of rank_pattern"),
        ({"rank_pattern": {"q_proj": 0}}, CheckpointError, "q_proj"),
        ({"rank_pattern": {"q_proj": -4}, "use_rslora": True}, CheckpointError, "q_proj"),
        ({"rank_pattern": {"q_proj": 1.5}}, CheckpointError, "q_proj"),
        ({"alpha_pattern": {"q_proj": float("inf")}}, CheckpointError, "q_proj"),
        ({"alpha_pattern": {"((.+)+)+x": 4}}, CheckpointError, "repeats a group"),
        ({"lora_alpha": float("nan")}, CheckpointError, "lora_alpha"),
        ({"alpha_pattern": []}, CheckpointError, "alpha_pattern"),
        ({"r": "8"}, CheckpointError, "'r'"),
    ],
)
def test_what_changes_more_than_a_lora_is_refused(config, error, message, tmp_path):
    adapter(tmp_path / "a", {Q: (48, 48)}, **config)
    with pytest.raises(error, match=message):
        open_checkpoint(FOLDER / "llama", tmp_path / "a")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_without_an_adapter(name, tmp_path):
    adapter(tmp_path / "a", {Q: (48, 48)})
    (tmp_path / "a" / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        open_checkpoint(FOLDER / "llama", tmp_path / "a")


def test_an_export_is_that_of_the_merged_checkpoint(tmp_path):
    """The gate judges against the merged weights, too."""
    delta = adapter(tmp_path / "a", {Q: (48, 48)})[Q]
    shutil.copytree(FOLDER / "llama", tmp_path / "merged")
    file = tmp_path / "merged" / "model.safetensors"
    merged = {k: v.astype(np.float32) for k, v in _floats(FOLDER / "llama").items()}
    merged[f"{Q}.weight"] += 1.5 * delta
    save_file(merged, file)
    plan = QuantPlan("f32")
    options = ExportOptions(plan, tokenizer="none", lora=str(tmp_path / "a"), workers=1)
    one = export(FOLDER / "llama", tmp_path / "one", options)
    two = export(tmp_path / "merged", tmp_path / "two", ExportOptions(
        plan, tokenizer="none", workers=1))  # fmt: skip
    assert one.manifest.gate.verdict == "passed"
    with np.load(one.file("golden.npz")) as a, np.load(two.file("golden.npz")) as b:
        np.testing.assert_array_equal(a["top1"], b["top1"])
        np.testing.assert_allclose(a["margin"], b["margin"], atol=1e-3)
    assert "adapter_model.safetensors" in {f.name for f in one.manifest.source.files}
    bare = ExportOptions(plan, tokenizer="none", workers=1)
    assert plan_export(FOLDER / "llama", bare).parameters == one.manifest.model.parameters


def _floats(source):
    checkpoint = open_checkpoint(source)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}
