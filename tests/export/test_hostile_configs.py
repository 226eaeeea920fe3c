"""Published configs with wrong, absurd and hostile values: an error of ours, or a plan."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from family_files import FOLDER, NAMES

from edge_mmllm.errors import CheckpointError, EdgeError
from edge_mmllm_export.exporter import plan_export
from edge_mmllm_export.planning import ExportOptions

OPTIONS = ExportOptions(gate=False, workers=1)
MUTATIONS = 40
VALUES = (
    None, -1, 0, 1, 3, 999, 10**12, -(10**12), 2**70, 1.5, 1e308, float("nan"), float("inf"),
    "", "7", "gelu", "../../etc/passwd", True, False, [], [1], [-1], [None], ["a"], [[1]],
    [10**12], {}, {"a": 1}, {"height": 10**9, "width": 10**9}, {"height": "x"},
)  # fmt: skip


def _copy(name: str, to: Path) -> Path:
    shutil.copytree(FOLDER / name, to, ignore=shutil.ignore_patterns("golden.npz"))
    return to


def _places(value, prefix=()):
    """The keys of everything in a JSON document."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in pairs:
        yield (*prefix, key)
        if isinstance(inner, (dict, list)):
            yield from _places(inner, (*prefix, key))


def _mutate(document, rng):
    """Takes something out, or puts something else in its place."""
    *way, last = rng.choice(list(_places(document)))
    parent = document
    for key in way:
        parent = parent[key]
    if rng.random() < 0.25:
        del parent[last]
    else:
        parent[last] = rng.choice(VALUES)


@pytest.mark.parametrize("name", NAMES)
def test_mutated(name, tmp_path):
    rng = random.Random(name)
    folder = _copy(name, tmp_path / "model")
    settings = [
        p for p in sorted(folder.glob("*.json")) if p.name not in ("tokenizer.json", "config.json")
    ]
    for _ in range(MUTATIONS):
        path = rng.choice([folder / "config.json"] * 3 + settings)
        kept = path.read_text("utf-8")
        document = json.loads(kept)
        for _ in range(rng.choice((1, 1, 2))):
            _mutate(document, rng)
        path.write_text(json.dumps(document), "utf-8")
        try:
            plan_export(folder, OPTIONS)
        except EdgeError as error:
            assert error.what  # noqa: PT017 - a plan is as good as an error
        except Exception as error:
            raise AssertionError(f"{path.name}: {json.dumps(document)}") from error
        path.write_text(kept, "utf-8")


@pytest.mark.parametrize("name", ["llava", "idefics3", "qwen2-vl"])
def test_missing_files(name, tmp_path):
    for path in sorted((FOLDER / name).glob("*.json")):
        folder = _copy(name, tmp_path / path.name)
        (folder / path.name).unlink()
        if path.name == "config.json" or path.name.startswith("pre"):
            with pytest.raises(CheckpointError):
                plan_export(folder, OPTIONS)


@pytest.mark.parametrize(
    ("name", "way", "value"),
    [
        ("llava", ("vision_feature_layer",), "-2"),
        ("llava", ("vision_feature_layer",), []),
        ("llava", ("vision_feature_layer",), [True]),
        ("llava", ("vision_feature_layer",), 99),
        ("llava", ("image_token_index",), 10**7),
        ("llava", ("text_config", "model_type"), ["llama"]),
        ("llava", ("vision_config", "model_type"), {}),
        ("llava", ("vision_config", "hidden_act"), ["gelu"]),
        ("llava", ("text_config", "hidden_act"), {}),
        ("llava", ("text_config", "num_hidden_layers"), 10**12),
        ("llava", ("text_config", "rope_parameters"), {"rope_theta": "x"}),
        ("llava", ("text_config", "rope_parameters"), {"rope_theta": float("nan")}),
        ("llava", ("text_config", "rope_parameters"), {"rope_theta": -1.0}),
        ("llava", ("text_config", "rms_norm_eps"), float("inf")),
        ("qwen2-vl", ("text_config", "rope_parameters"), [-1]),
        ("qwen2-vl", ("vision_config", "mlp_ratio"), float("nan")),
        ("blip2-opt", ("text_config", "activation_function"), [0]),
        ("blip2-opt", ("vision_config", "hidden_act"), {}),
        ("blip2-opt", ("qformer_config", "hidden_act"), []),
        ("blip2-t5", ("text_config", "feed_forward_proj"), []),
        ("mllama", ("text_config", "cross_attention_layers"), [[1]]),
        ("mllama", ("vision_config", "intermediate_layers_indices"), [{}]),
    ],
)
def test_named(name, way, value, tmp_path):
    """The error says which key."""
    folder = _copy(name, tmp_path / "model")
    document = json.loads((folder / "config.json").read_text("utf-8"))
    parent = document
    for key in way[:-1]:
        parent = parent[key]
    parent[way[-1]] = value
    if way[-1] == "image_token_index":
        document.pop("image_token_id", None)
    (folder / "config.json").write_text(json.dumps(document), "utf-8")
    with pytest.raises(CheckpointError) as caught:
        plan_export(folder, OPTIONS)
    named = {"99": "feature layer"}.get(str(value), way[-1])
    if isinstance(value, dict):
        named = next(iter(value), named)
    assert named in str(caught.value)
