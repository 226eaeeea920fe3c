"""`mmproj.gguf`: its names, numbers and metadata, and what llama.cpp has no graph for. What mtmd
makes of it is in tests/full/test_gguf_media.py."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import references
from family_files import FOLDER, NAMES
from gguf import GGUFReader

from edge_mmllm.errors import UnsupportedArchitecture
from edge_mmllm_export.exporter import export
from edge_mmllm_export.gguf import mmproj as gguf_mmproj
from edge_mmllm_export.gguf.maps import GgufMap, gguf_map
from edge_mmllm_export.models import build
from edge_mmllm_export.planning import ExportOptions
from edge_mmllm_export.quantize.schemes import QuantPlan

RUN = ("llava", "llava-siglip", "llava-next", "llava-next-llama", "idefics3", "smolvlm",
       "qwen2-vl", "qwen2-vl-video")  # fmt: skip


def model_of(name: str):
    return build(references.open_checkpoint(FOLDER / name))


def found(name: str) -> GgufMap:
    return gguf_mmproj.mmproj_map(model_of(name))


@pytest.mark.parametrize("name", RUN)
def test_every_weight_before_the_backbone_is_in_the_file(name):
    model = model_of(name)
    parts = [part for t in found(name).tensors for part in t.parts]
    own = {p.name for p in model.parameters()} - {p.name for p in model.backbone.parameters()}
    assert set(parts) == own
    several = {part for part in parts if parts.count(part) > 1}
    assert several == ({"image.encoder.patch"} if name.startswith("qwen2") else set())


@pytest.mark.parametrize("name", [n for n in NAMES if n not in RUN])
def test_what_llama_cpp_cannot_run(name, tmp_path):
    options = ExportOptions(QuantPlan("f32"), format="gguf", gate=False)
    with pytest.raises(UnsupportedArchitecture, match=r"llama\.cpp cannot run") as caught:
        export(FOLDER / name, tmp_path / "out", options)
    assert "onnx" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_layers_that_are_not_heard_are_left_out():
    """CLIP's features are those before its last layer here: the file says which, and ends there."""
    model, made = model_of("llava"), found("llava")
    config = model.pathways[0].encoder.component.config
    assert (config.layers, config.feature_layers) == (3, (-2,))
    assert made.metadata["vision.feature_layer"] == [2]
    assert made.metadata["vision.block_count"] == 2
    assert not any(t.name.startswith("v.blk.2.") for t in made.tensors)
    assert gguf_mmproj.activations(model) == ["quick_gelu", "quick_gelu", "gelu"]


def test_metadata(tmp_path):
    options = ExportOptions(QuantPlan("int4"), format="gguf", gate=False)
    source = tmp_path / "source"
    shutil.copytree(FOLDER / "llava-next", source)
    (source / "tokenizer.json").unlink()
    bundle = export(source, tmp_path / "out", options)
    reader = GGUFReader(bundle.file("mmproj.gguf"))
    said = {name: field.contents() for name, field in reader.fields.items()}
    assert said["general.architecture"] == "clip"
    assert said["general.type"] == "mmproj"
    assert said["clip.projector_type"] == "mlp"
    assert said["clip.has_vision_encoder"] is True
    assert said["clip.vision.image_size"] == 16
    # Width and height, where the hub has height and width.
    assert said["clip.vision.image_grid_pinpoints"] == [32, 16, 16, 32, 48, 16]
    assert said["clip.vision.image_mean"] == pytest.approx([0.48145466, 0.4578275, 0.40821073])
    assert "tokenizer.ggml.model" not in said
    tensors = {t.name: t for t in reader.tensors}
    newline = references.open_checkpoint(source).read("image_newline")
    np.testing.assert_array_equal(tensors["v.image_newline"].data, newline)
    assert tensors["v.patch_embd.weight"].tensor_type.name == "F32"
    assert tensors["v.blk.0.attn_q.weight"].tensor_type.name == "Q8_0"
    spec = bundle.spec
    assert spec.stages["encode_image"].file == "mmproj.gguf"
    assert spec.stages["decoder"].file == "model.gguf"
    assert spec.modalities["image"].stages == ("encode_image",)
    assert [c.slot for c in spec.components] == ["encoder", "input_projector", "backbone"]


def test_frames_of_a_patch_are_two_matrices(tmp_path):
    checkpoint = references.open_checkpoint(FOLDER / "qwen2-vl")
    source = tmp_path / "source"
    shutil.copytree(FOLDER / "qwen2-vl", source)
    (source / "tokenizer.json").unlink(missing_ok=True)
    options = ExportOptions(QuantPlan("f32"), format="gguf", gate=False, tokenizer="none")
    bundle = export(source, tmp_path / "out", options)
    tensors = {t.name: t.data for t in GGUFReader(bundle.file("mmproj.gguf")).tensors}
    name = next(n for n in checkpoint.tensors if n.endswith("visual.patch_embed.proj.weight"))
    cube = checkpoint.read(name)
    np.testing.assert_array_equal(tensors["v.patch_embd.weight"], cube[:, :, 0])
    np.testing.assert_array_equal(tensors["v.patch_embd.weight.1"], cube[:, :, 1])
    backbone = GGUFReader(bundle.file("model.gguf"))
    sections = backbone.fields["qwen2vl.rope.dimension_sections"].contents()
    assert len(sections) == 4
    assert sections[3] == 0
    assert sum(sections) * 2 == backbone.fields["qwen2vl.attention.key_length"].contents()


def test_square_layers_are_named_as_mtmd_takes_them(tmp_path):
    """It takes up and down for one another where the second's rows are as wide as the model."""
    source = tmp_path / "source"
    shutil.copytree(FOLDER / "llava", source)
    config = json.loads((source / "config.json").read_text())
    config["vision_config"]["intermediate_size"] = config["vision_config"]["hidden_size"]
    (source / "config.json").write_text(json.dumps(config))
    made = gguf_mmproj.mmproj_map(build(references.open_checkpoint(source)))
    parts = {t.name: t.parts[0] for t in made.tensors}
    assert parts["v.blk.0.ffn_up.weight"] == "image.encoder.layers.0.mlp.down"
    assert parts["v.blk.0.ffn_down.weight"] == "image.encoder.layers.0.mlp.up"


ENCODER_DECODERS = FOLDER.parent / "encoder_decoders"


def test_buckets_of_another_reach():
    """T5's golden tells distances apart up to 24 in 12 buckets; llama.cpp reaches 128 always."""
    model = build(references.open_checkpoint(ENCODER_DECODERS / "t5"))
    made = gguf_map(model)
    assert made.metadata["attention.relative_buckets_count"] == 96
    tensors = {t.name: t for t in made.tensors}
    behind = tensors["dec.blk.0.attn_rel_b.weight"].order
    both = tensors["enc.blk.0.attn_rel_b.weight"].order
    assert len(behind) == len(both) == 96
    assert behind[0] == 0
    assert behind[-1] == 11
    np.testing.assert_array_equal(both[:3], [0, 1, 2])
    assert both[49] == 6 + 1
    assert both[-1] == 11
    # Its decoder has a layer more than its encoder: one that adds nothing follows.
    assert (made.metadata["block_count"], made.metadata["decoder_block_count"]) == (3, 3)
    assert not tensors["enc.blk.2.attn_o.weight"].values.any()
