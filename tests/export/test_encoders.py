"""Encoders against transformers 5, and their ONNX against the oracle.

References are random in every tensor, in the published layout; outputs have a spread of 1 to 4.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import encoder_files
import numpy as np
import onnxruntime
import pytest

from edge_mmllm.errors import CheckpointError, TensorMismatch, UnsupportedArchitecture
from edge_mmllm_export.checkpoints import open_checkpoint
from edge_mmllm_export.families.composite import Port
from edge_mmllm_export.models.clip import Clip
from edge_mmllm_export.models.config import Fields
from edge_mmllm_export.models.dinov2 import Dinov2
from edge_mmllm_export.models.eva import Eva
from edge_mmllm_export.models.mllama_vision import MllamaVision
from edge_mmllm_export.models.qwen2_vl_vision import (
    PatchMerger,
    Qwen2VlVision,
    Qwen2VlVisionConfig,
)
from edge_mmllm_export.models.siglip import Siglip, own_buckets
from edge_mmllm_export.models.whisper import Whisper
from edge_mmllm_export.ops.numpy import NumpyOps
from edge_mmllm_export.ops.onnx import OnnxOps, Value
from edge_mmllm_export.ops.onnx_graph import GraphBuilder, TensorFile
from edge_mmllm_export.quantize.schemes import QuantPlan
from edge_mmllm_export.weights import as_stored, bind

noise = encoder_files.noise


@dataclass(frozen=True)
class Case:
    """An encoder as a family would make it.

    Attributes:
        name: of the reference; the outputs that it is to give, side by side, are `outputs`.
        build: the encoder of a config.
        prefix: what its tensors' names begin with.
        skip: rows of the reference that it drops.
        inputs: what it is run on.
    """

    name: str
    outputs: tuple[str, ...]
    build: Callable[[Fields], Any]
    prefix: str
    inputs: tuple[np.ndarray, ...]
    skip: int = 0

    @property
    def expected(self) -> np.ndarray:
        with np.load(encoder_files.FOLDER / f"{self.name}.npz") as golden:
            return np.concatenate([golden[n] for n in self.outputs], axis=-1)[self.skip :]


def _pixels(size):
    return (noise("pixels", 1, 3, size, size)[0],)


def _mel(*frames):
    return (noise("mel", 1, 10, 36)[0], *(np.array([n]) for n in frames))


def _grid(name, *grid):
    return noise(name, int(np.prod(grid)), 96), np.array(grid)


def _tiles(ratio, used):
    return noise("tiles", 1, 1, 4, 3, 28, 28)[0, 0], np.array([ratio]), np.array([used])


class _WithMerger:
    """Qwen2-VL's tower and merger in one, as the reference has them."""

    def __init__(self, fields):
        config = Qwen2VlVisionConfig.from_config(fields)
        self.tower, self.merger = Qwen2VlVision(config), PatchMerger(config)
        self.tokens, self.width = 0, self.merger.hidden_size
        self.ports, self.ignored = self.tower.ports, self.tower.ignored

    def parameters(self):
        return self.tower.parameters() + self.merger.parameters()

    def sources(self, layout, prefix):
        return self.tower.sources(layout, prefix) | self.merger.sources(layout, prefix)

    def encode(self, op, w, pixels, grid):
        return self.merger.project(op, w, self.tower.encode(op, w, pixels, grid))


def _clip(**choices):
    return lambda fields: Clip.from_config(fields, **choices)


def _siglip(**choices):
    return lambda fields: Siglip.from_config(fields, **choices)


def _dinov2(**choices):
    return lambda fields: Dinov2.from_config(fields, **choices)


TOWER = "vision_tower.vision_model."
CASES = {
    "clip": Case("clip", ("state2",), _clip(), TOWER, _pixels(30), 1),
    "clip-full": Case("clip", ("state2",), _clip(select="full"), TOWER, _pixels(30)),
    "clip-layers": Case(
        "clip", ("state1", "state3"), _clip(feature_layers=(-3, 3)), "v.", _pixels(30), 1
    ),
    "siglip": Case("siglip", ("last",), Siglip.from_config, TOWER, _pixels(30)),
    "siglip-layer": Case("siglip", ("state2",), _siglip(feature_layers=(-2,)), TOWER, _pixels(30)),
    "siglip-pooled": Case("siglip", ("pooled",), _siglip(pooled=True), "", _pixels(30)),
    "idefics3": Case(
        "idefics3", ("last",), Siglip.from_idefics3, "model.vision_model.", _pixels(49)
    ),
    "eva": Case("eva", ("last",), Eva.from_config, "vision_model.", _pixels(28)),
    "dinov2": Case("dinov2", ("last28",), Dinov2.from_config, "", _pixels(28)),
    "dinov2-larger": Case(
        "dinov2", ("last44",), _dinov2(image_size=44, select="default"), "", _pixels(44), 1
    ),
    "dinov2-smaller": Case("dinov2", ("last16",), _dinov2(image_size=16), "", _pixels(16)),
    "dinov2-swiglu": Case("dinov2-swiglu", ("last28",), Dinov2.from_config, "d.", _pixels(28)),
    "whisper": Case("whisper", ("last",), Whisper.from_config, "model.encoder.", _mel()),
    "qwen2-audio": Case("qwen2-audio", ("last",), Whisper.from_config, "audio_tower.", _mel(36)),
    "qwen2-audio-short": Case(
        "qwen2-audio", ("short",), Whisper.from_config, "audio_tower.", _mel(21)
    ),
    "qwen2-vl": Case("qwen2-vl", ("image",), _WithMerger, "visual.", _grid("image", 1, 4, 6)),
    "qwen2-vl-video": Case("qwen2-vl", ("video",), _WithMerger, "visual.", _grid("video", 2, 2, 4)),
    "mllama-three": Case("mllama", ("three",), MllamaVision.from_config, "v.", _tiles(3, 3)),
    "mllama-one": Case("mllama", ("one",), MllamaVision.from_config, "v.", _tiles(1, 1)),
    "mllama-four": Case("mllama", ("four",), MllamaVision.from_config, "v.", _tiles(6, 4)),
}


class _Loaded:
    """A case's encoder over a checkpoint written for it."""

    def __init__(self, case, folder, plan=None, **changes):
        entry = encoder_files.read(case.name)
        tensors = entry["tensors"]
        if case.name == "whisper":  # of a whole Whisper, the encoder's alone
            stem = "encoder."
            tensors = {n[len(stem) :]: s for n, s in tensors.items() if n.startswith(stem)}
        config = entry["config"] | changes
        self._write(folder, config, tensors, case)
        self.encoder = case.build(Fields(config, "config.json"))
        checkpoint = open_checkpoint(folder)
        self.weights = bind(
            checkpoint,
            self.encoder.parameters(),
            self.encoder.sources(checkpoint.layout, case.prefix),
            ignored=self.encoder.ignored(case.prefix),
            schemes=(plan or QuantPlan("f32")).of,
        )

    @staticmethod
    def _write(folder, config, tensors, case):
        """Values come from the names without the prefix."""
        stem = "encoder." if case.name == "whisper" else ""
        arrays = {
            case.prefix + n: encoder_files.weight(stem + n, shape) for n, shape in tensors.items()
        }
        encoder_files.save_file(arrays, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config))

    def oracle(self, inputs, weights=None):
        return self.encoder.encode(NumpyOps({}), weights or self.weights, *inputs)

    def onnx(self, inputs, folder):
        """What the exported graph gives; its inputs are the encoder's ports."""
        data = TensorFile(folder / "weights.bin")
        graph = GraphBuilder("encode", data)
        op = OnnxOps(graph)
        if hasattr(self.encoder, "ports"):
            ports = self.encoder.ports()
        else:
            ports = (Port("pixels", "float32", inputs[0].shape),)
        values = [Value(graph.input(p.name, p.dtype, p.shape), 1) for p in ports]
        y = self.encoder.encode(op, self.weights, *values)
        graph.node("Squeeze", [op._use(y), graph.ints(0)], ["features"])
        graph.output("features", "float32", ["rows", self.encoder.width])
        op.finish()
        graph.save(folder / "encode.onnx", {})
        data.close()
        session = onnxruntime.InferenceSession(folder / "encode.onnx")
        return session.run(None, {p.name: x for p, x in zip(ports, inputs, strict=True)})[0]


@pytest.mark.parametrize("name", CASES)
def test_oracle_against_transformers(name, tmp_path):
    case = CASES[name]
    loaded = _Loaded(case, tmp_path)
    y = loaded.oracle(case.inputs)
    if loaded.encoder.tokens:
        assert y.shape == (loaded.encoder.tokens, loaded.encoder.width)
    expected = case.expected
    if case.name == "mllama":  # the reference's unused tiles are not stored
        y = y[: len(expected)]
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_onnx_against_oracle(name, tmp_path):
    case = CASES[name]
    loaded = _Loaded(case, tmp_path)
    y = loaded.onnx(case.inputs, tmp_path)
    np.testing.assert_allclose(y, loaded.oracle(case.inputs), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_int8_stays_close(name, tmp_path):
    """To the float32 oracle within a few percent of its spread, activations rounded too."""
    case = CASES[name]
    loaded = _Loaded(case, tmp_path, QuantPlan("int8"))
    assert {w.scheme.bits for w in loaded.weights.values() if w.role == "matrix"} == {8}
    y, exact = loaded.onnx(case.inputs, tmp_path), loaded.oracle(case.inputs)
    rounded = loaded.oracle(case.inputs, as_stored(loaded.weights))
    spread = exact.std()
    assert 0 < np.sqrt(np.mean((rounded - exact) ** 2)) < 0.02 * spread
    assert np.sqrt(np.mean((y - exact) ** 2)) < 0.03 * spread


def test_only_what_the_features_need_is_read(tmp_path):
    """At -2 neither the last layer nor the final norm; a tensor of no layer is not overlooked."""
    loaded = _Loaded(CASES["clip"], tmp_path)
    names = {w.source.name for w in loaded.weights.values()}
    assert f"{TOWER}encoder.layers.1.mlp.fc1.weight" in names
    assert not any("layers.2." in n or "post_layernorm" in n for n in names)
    with pytest.raises(TensorMismatch, match=r"unexpected: vision_tower.*layers\.2\.layer_norm1"):
        _Loaded(CASES["clip"], tmp_path, num_hidden_layers=2)


@pytest.mark.parametrize(
    ("name", "changes", "error", "message"),
    [
        ("clip", {"hidden_act": "gelu_10"}, UnsupportedArchitecture, "gelu_10"),
        ("clip", {"num_attention_heads": 5}, CheckpointError, "divisor of 48"),
        ("clip-layers", {"num_hidden_layers": 2}, CheckpointError, "from -3 to 2"),
        ("qwen2-vl", {"num_heads": 32}, CheckpointError, "multiple of 4"),
        ("whisper", {"model_type": "moonshine"}, CheckpointError, "moonshine"),
        ("idefics3", {"image_size": 25 * 7}, UnsupportedArchitecture, "rounding of the machine"),
        ("mllama-one", {"intermediate_layers_indices": [3]}, CheckpointError, "from 0 to 2"),
        ("dinov2", {"image_size": 6}, CheckpointError, "at least 7 pixels"),
    ],
)
def test_configs_that_are_refused(name, changes, error, message, tmp_path):
    with pytest.raises(error, match=message):
        _Loaded(CASES[name], tmp_path, **changes)


def test_sizes_at_which_idefics3_takes_plain_positions():
    """As torch buckets them on machines with and without AVX-512; 7 is the reference's size."""
    assert all(own_buckets(n) for n in (7, 26, 27, 32, 64))
    assert not any(own_buckets(n) for n in (19, 25, 31, 49))


def test_rows_of_a_recording():
    entry = encoder_files.read("qwen2-audio")["config"]
    encoder = Whisper.from_config(Fields(entry, "config.json"))
    assert [encoder.tokens_of(n) for n in (36, 21, 1)] == [9, 5, 0]
