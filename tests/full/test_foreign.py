"""HuBERT and Wav2Vec2 by way of optimum, from a tiny checkpoint to a stage.

Needs EDGE_MMLLM_OPTIMUM_PYTHON: the interpreter of an environment with the `optimum` extra.
"""

from __future__ import annotations

import os
import subprocess

import numpy as np
import onnxruntime
import pytest

from edge_mmllm.errors import UnsupportedArchitecture
from edge_mmllm_export.foreign import PYTHON_VARIABLE, export_foreign

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(PYTHON_VARIABLE not in os.environ, reason=f"{PYTHON_VARIABLE} is not set"),
]
_MAKE = """
import sys, torch, transformers
torch.manual_seed(0)
sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
    conv_dim=(16, 16, 16), conv_stride=(5, 2, 2), conv_kernel=(10, 3, 2),
    num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4)
if sys.argv[1] == "ViT":
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)
if sys.argv[3] == "stable":
    sizes |= dict(do_stable_layer_norm=True, feat_extract_norm="layer", conv_bias=True)
config = getattr(transformers, sys.argv[1] + "Config")(**sizes)
model = getattr(transformers, sys.argv[1] + "Model")(config)
for p in model.parameters():
    p.data += 0.1 * torch.randn_like(p)
model.save_pretrained(sys.argv[2])
"""


def _make(family, folder, variant="plain"):
    command = [os.environ[PYTHON_VARIABLE], "-c", _MAKE, family, str(folder), variant]
    subprocess.run(command, check=True, capture_output=True)


@pytest.mark.parametrize("family", ["Hubert", "Wav2Vec2"])
@pytest.mark.parametrize("variant", ["plain", "stable"])
def test_encoders_of_a_waveform(family, variant, tmp_path):
    _make(family, tmp_path / "source", variant)
    found = export_foreign(tmp_path / "source", tmp_path)
    assert (found.model_type, found.width) == (family.lower(), 32)
    assert found.max_delta < 1e-4
    session = onnxruntime.InferenceSession(tmp_path / found.stage.file)
    features = session.run(None, {"samples": np.zeros(4321, np.float32)})[0]
    assert features.shape == (((4321 - 10) // 5 + 1 - 3) // 2 // 2, 32)
    assert np.isfinite(features).all()


def test_an_encoder_of_pictures_is_refused(tmp_path):
    _make("ViT", tmp_path / "source")
    with pytest.raises(UnsupportedArchitecture, match="pixel_values"):
        export_foreign(tmp_path / "source", tmp_path)
