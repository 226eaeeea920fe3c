"""The same weights from GGUF and from the hub give the same logits.

The GGUF is written here as llama.cpp's converter would: tensor names from the `gguf` package's own
map, q and k permuted for `llama` by a copy of the converter's formula, llama3 scaling as
`rope_freqs`. Nothing of it comes from our weight maps.
"""

from __future__ import annotations

import json
import math
import shutil
import struct

import gguf
import numpy as np
import pytest
from references import FOLDER, export, golden, load

from edge_mmllm.errors import TensorMismatch, UnsupportedArchitecture
from edge_mmllm_export.checkpoints import open_checkpoint


def _permute(w: np.ndarray, heads: int) -> np.ndarray:
    """Source: `LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py."""
    return (
        w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)
    )


def _llama3_factors(rope, head_dim):
    """Divisors of the frequencies, in scalar float64. Source: `LlamaModel.generate_extra_tensors`
    of the same converter."""
    factors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / head_dim)
        low = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
        high = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
        if wavelength < high:
            factors.append(1.0)
        elif wavelength > low:
            factors.append(rope["factor"])
        else:
            smooth = rope["original_max_position_embeddings"] / wavelength - rope["low_freq_factor"]
            smooth /= rope["high_freq_factor"] - rope["low_freq_factor"]
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, np.float32)


def write_gguf(source, path, *, skip=(), metadata=None):
    """Converts a hub folder of the llama family."""
    checkpoint = open_checkpoint(source)
    c = checkpoint.config
    arch = c["model_type"]
    rope = c["rope_parameters"]
    head_dim = c.get("head_dim", c["hidden_size"] // c["num_attention_heads"])
    w = gguf.GGUFWriter(path, arch)
    w.add_context_length(c["max_position_embeddings"])
    w.add_embedding_length(c["hidden_size"])
    w.add_block_count(c["num_hidden_layers"])
    w.add_feed_forward_length(c["intermediate_size"])
    w.add_head_count(c["num_attention_heads"])
    w.add_head_count_kv(c["num_key_value_heads"])
    w.add_layer_norm_rms_eps(c["rms_norm_eps"])
    w.add_rope_freq_base(rope["rope_theta"])
    if "head_dim" in c:
        w.add_key_length(head_dim)
        w.add_value_length(head_dim)
    w.add_tokenizer_model("none")
    if rope["rope_type"] == "linear":
        w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        w.add_rope_scaling_factor(rope["factor"])
    for key, value in (metadata or {}).items():
        getattr(w, f"add_{key}")(value)
    if rope["rope_type"] == "llama3":
        w.add_tensor("rope_freqs.weight", _llama3_factors(rope, head_dim))
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, arch.upper()), c["num_hidden_layers"])
    for name in checkpoint.tensors:
        values = checkpoint.read(name)
        if arch == "llama" and ".q_proj." in name:
            values = _permute(values, c["num_attention_heads"])
        if arch == "llama" and ".k_proj." in name:
            values = _permute(values, c["num_key_value_heads"])
        their = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert their is not None, name
        if their not in skip:
            w.add_tensor(their, np.ascontiguousarray(values))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


@pytest.fixture
def silu_bias(tmp_path):
    """`llama-bias` with the activation that llama.cpp gives every llama."""
    folder = tmp_path / "silu"
    folder.mkdir()
    shutil.copy(FOLDER / "llama-bias" / "model.safetensors", folder)
    config = json.loads((FOLDER / "llama-bias" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "silu"}))
    return folder


@pytest.mark.parametrize(
    "name", ["llama", "llama-tied-llama3", "llama-linear", "qwen2", "qwen3", "olmo2"]
)
def test_gguf_equals_hub(name, tmp_path):
    _compare(FOLDER / name, tmp_path, golden(name)[0])


def test_biases_are_permuted_too(silu_bias, tmp_path):
    _compare(silu_bias, tmp_path, golden("llama-bias")[0])


def _compare(source, folder, ids):
    hub, ours = load(source), load(write_gguf(source, folder / "model.gguf"))
    assert [(p.name, p.shape) for p in ours.model.parameters()] == [
        (p.name, p.shape) for p in hub.model.parameters()
    ]
    for name, w in hub.weights.items():
        np.testing.assert_array_equal(ours.weights[name].rows(), w.rows(), err_msg=name)
    expected = hub.oracle().forward(ids)
    # Frequencies go through other roundings (float32 divisors, float32 epsilon).
    np.testing.assert_allclose(ours.oracle().forward(ids), expected, rtol=0, atol=1e-4)
    exported = export(ours, folder)
    np.testing.assert_allclose(exported.logits(ids), expected, rtol=0, atol=2e-4)


def test_missing_tensors_have_ggufs_names(tmp_path):
    skip = ("blk.1.attn_q.weight", "output_norm.weight")
    path = write_gguf(FOLDER / "llama", tmp_path / "model.gguf", skip=skip)
    with pytest.raises(TensorMismatch, match="2 tensors missing, 0 unexpected") as caught:
        load(path)
    assert "missing: blk.1.attn_q.weight (48, 48)" in str(caught.value)
    assert "missing: output_norm.weight (48,)" in str(caught.value)


def test_partial_rope_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(FOLDER / "llama", path, metadata={"rope_dimension_count": 4})
    with pytest.raises(UnsupportedArchitecture, match="a part of each head"):
        load(path)


def test_nan_in_a_permuted_tensor_is_named_by_its_row_in_the_file(tmp_path):
    from edge_mmllm.errors import NonFiniteWeights

    path = write_gguf(FOLDER / "llama", tmp_path / "model.gguf")
    reader = gguf.GGUFReader(path)
    (tensor,) = (t for t in reader.tensors if t.name == "blk.0.attn_q.weight")
    with path.open("r+b") as file:
        file.seek(tensor.data_offset + (11 * 48 + 7) * 4)
        file.write(struct.pack("<f", math.nan))
    w = load(path).weights["layers.0.attn.q"]
    with pytest.raises(NonFiniteWeights, match=r"blk.0.attn_q.weight, first at \(11, 7\)"):
        w.rows()
