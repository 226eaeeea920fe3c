"""Bundles whose manifest was changed at random: an error of ours, or an answer."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

import edge_mmllm
from edge_mmllm.errors import EdgeError
from edge_mmllm_export.exporter import ExportOptions, export
from edge_mmllm_export.quantize.schemes import QuantPlan

FAMILIES = Path(__file__).parents[1] / "goldens" / "families"
#: Family -> the argument of `generate` and the folder of a sample for each of its modalities.
SAMPLES = {
    "llava-next": {"images": "pictures"},
    "idefics3": {"images": "pictures"},
    "qwen2-vl-video": {"images": "pictures", "videos": "videos"},
    "mllama": {"images": "pictures"},
    "qwen2-audio": {"audio": "sounds"},
    "instructblip-t5": {"images": "pictures"},
}
MUTATIONS = 60
VALUES = (
    None, -1, 0, 1, 3, 999, 10**12, -(10**12), 2**70, 1.5, 1e308, float("nan"), "", "x",
    "../../etc/passwd", "decoder", "decoder.onnx", "image", "states", "front", "beside", "tiles",
    "grid", "unpadded", "sound", "plain", "int64", True, False, [], [1], [-1], [None], ["a"],
    [10**12], [[1]], {}, {"a": 1},
)  # fmt: skip


def _places(value, prefix=()):
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in pairs:
        yield (*prefix, key)
        if isinstance(inner, (dict, list)):
            yield from _places(inner, (*prefix, key))


def _mutate(document, rng):
    """Changes what is said of the model; most often of its modalities."""
    places = [way for way in _places(document) if way[0] == "model" and len(way) > 1]
    modal = [way for way in places if way[1] == "modalities" and len(way) > 3]
    *way, last = rng.choice(modal if rng.random() < 0.7 else places)
    parent = document
    for key in way:
        parent = parent[key]
    if rng.random() < 0.2:
        del parent[last]
    else:
        parent[last] = rng.choice(VALUES)


def _use(folder, samples):
    with edge_mmllm.load(folder, threads=1) as session:
        for name, source in samples.items():
            given = [next(iter(sorted((FAMILIES / source).iterdir())))]
            list(session.generate("What is this?", max_new_tokens=2, **{name: given}))
        session.snapshot()


@pytest.mark.parametrize("name", SAMPLES)
def test_mutated(name, tmp_path):
    rng = random.Random(name)
    folder = tmp_path / "bundle"
    options = ExportOptions(plan=QuantPlan("f32"), gate=False, workers=1)
    export(FAMILIES / name, folder, options)
    manifest = folder / "manifest.json"
    sound = manifest.read_text("utf-8")
    for _ in range(MUTATIONS):
        document = json.loads(sound)
        _mutate(document, rng)
        manifest.write_text(json.dumps(document), "utf-8")
        try:
            _use(folder, SAMPLES[name])
        except EdgeError as error:
            assert error.what  # noqa: PT017 - an answer is as good as an error
        except Exception as error:
            raise AssertionError(json.dumps(document["model"])) from error
