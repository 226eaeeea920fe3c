"""The layout state-spaces publishes in: the same weights as on the hub give the same logits."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.numpy
from references import FOLDER, golden, load, oracle_logits

from edge_mmllm.errors import CheckpointError, UnsupportedArchitecture

CONFIGS = {
    "mamba": {"ssm_cfg": {"d_state": 8}},
    "mamba-bias": {
        "tie_embeddings": False,
        "ssm_cfg": {
            "layer": "Mamba1", "d_state": 5, "d_conv": 3, "dt_rank": 7,
            "bias": True, "conv_bias": False,
        },
    },
    "mamba2": {"ssm_cfg": {"layer": "Mamba2", "d_state": 16, "headdim": 16}},
    "mamba2-groups": {
        "tie_embeddings": False,
        "ssm_cfg": {"layer": "Mamba2", "d_state": 16, "headdim": 16, "ngroups": 2, "bias": True},
    },
    "mamba2-limits": {
        "ssm_cfg": {
            "layer": "Mamba2", "d_state": 16, "headdim": 16, "ngroups": 3, "conv_bias": False,
            "dt_limit": [0.05, 0.4],
        }
    },
}  # fmt: skip


def _write(folder, name, *, vocab=96, **changes):
    """A reference in state-spaces' layout. Its `save_pretrained` stores a tied head too."""
    tensors = safetensors.numpy.load_file(_as_float32(folder, name))
    embedding = tensors.pop("backbone.embeddings.weight")
    tensors["backbone.embedding.weight"] = embedding
    tensors.setdefault("lm_head.weight", embedding)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    config = {"d_model": 48, "n_layer": 2, "vocab_size": vocab, "rms_norm": True}
    config |= {"residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8}
    (folder / "config.json").write_text(json.dumps(config | CONFIGS[name] | changes))


def _as_float32(folder, name):
    """numpy has no bfloat16: the stored values as float32, read by our own reader."""
    checkpoint = load(FOLDER / name).weights["embed"].checkpoint
    path = folder / "float32.tmp"
    arrays = {n: checkpoint.read(n) for n in checkpoint.tensors}
    safetensors.numpy.save_file(arrays, path)
    return path


@pytest.mark.parametrize("name", CONFIGS)
def test_same_logits_as_the_hub_layout(name, tmp_path):
    _write(tmp_path, name)
    ids, _ = golden(name)
    np.testing.assert_array_equal(load(tmp_path).oracle().forward(ids), oracle_logits(name))


def test_the_vocabulary_is_padded(tmp_path):
    _write(tmp_path, "mamba", vocab=89)
    assert load(tmp_path).model.vocab_size == 96


def test_published_sizes_follow_from_few_settings(tmp_path):
    """state-spaces/mamba2-130m says no more than this; its sizes are its package's defaults."""
    from edge_mmllm_export.models import mamba2, state_spaces

    config = {
        "d_model": 768, "d_intermediate": 0, "n_layer": 24, "vocab_size": 50277,
        "ssm_cfg": {"layer": "Mamba2"}, "attn_layer_idx": [], "attn_cfg": {}, "rms_norm": True,
        "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 16,
        "tie_embeddings": True,
    }  # fmt: skip
    assert state_spaces.architecture(config) == "mamba2"
    c = mamba2._original(*state_spaces.fields(config, "here"))
    assert (c.vocab_size, c.heads, c.head_dim, c.d_state, c.groups) == (50288, 24, 64, 128, 1)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mamba", {"attn_layer_idx": [1]}, "attn_layer_idx"),
        ("mamba", {"d_intermediate": 64}, "d_intermediate"),
        ("mamba", {"rms_norm": False}, "rms_norm"),
        ("mamba", {"ssm_cfg": {"layer": "Mamba3"}}, "mamba3"),
        ("mamba2", {"ssm_cfg": {"layer": "Mamba2", "norm_before_gate": True}}, "norm_before_gate"),
        ("mamba2", {"ssm_cfg": {"layer": "Mamba2", "d_ssm": 32}}, "d_ssm"),
    ],
)
def test_other_variants_are_refused(name, changes, message, tmp_path):
    _write(tmp_path, name, **changes)
    with pytest.raises(UnsupportedArchitecture, match=message):
        load(tmp_path)


def test_sizes_that_do_not_fit_together(tmp_path):
    _write(tmp_path, "mamba2", ssm_cfg={"layer": "Mamba2", "d_state": 16, "headdim": 36})
    with pytest.raises(CheckpointError, match="do not fit together"):
        load(tmp_path)
