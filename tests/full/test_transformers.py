"""Against transformers itself, run live: the goldens still hold, and SmolLM2 agrees.

transformers runs in a process of its own: the interpreter that `EDGE_MMLLM_REFERENCE_PYTHON`
names, else this one, else that of `.venv-full` or `.venv-reference`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.full

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests" / "goldens" / "make_references.py"
REFERENCES = ROOT / "tests" / "goldens" / "references"
NAMES = sorted(p.name for p in REFERENCES.iterdir())
for folder in (ROOT / "tests" / "export", ROOT / "benchmarks"):
    sys.path.insert(0, str(folder))
_PROBE = "import torch, transformers; print(transformers.__version__)"


@cache
def _reference_python() -> tuple[str | None, str]:
    """An interpreter with torch and transformers 5, or why there is none."""
    named = os.environ.get("EDGE_MMLLM_REFERENCE_PYTHON")
    local = [str(ROOT / venv / "bin" / "python") for venv in (".venv-full", ".venv-reference")]
    tried = []
    for python in [named] if named else [sys.executable, *local]:
        try:
            probe = subprocess.run([python, "-c", _PROBE], capture_output=True, text=True)
        except OSError as error:
            tried.append(f"{python}: {error}")
            continue
        version = probe.stdout.strip()
        if probe.returncode == 0 and int(version.split(".")[0]) >= 5:
            return python, ""
        why = (probe.stderr.strip().splitlines() or [f"transformers {version}"])[-1]
        tried.append(f"{python}: {why}")
    return None, "torch and transformers 5 are needed (extra `reference`); " + "; ".join(tried)


@pytest.fixture(scope="module")
def again(python, tmp_path_factory):
    """Logits of every reference, computed now."""
    out = tmp_path_factory.mktemp("again") / "logits.npz"
    subprocess.run([python, SCRIPT, "--again", out], check=True)
    with np.load(out) as data:
        return dict(data)


@pytest.fixture(scope="module")
def python() -> str:
    found, why = _reference_python()
    if found is None:
        pytest.skip(why)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_goldens_are_what_transformers_computes(name, again):
    with np.load(REFERENCES / name / "golden.npz") as golden:
        np.testing.assert_allclose(again[name], golden["logits"], rtol=0, atol=1e-4)


def test_the_script_makes_the_references(python, tmp_path):
    """The same configs, and weights up to the last bit of torch's random numbers."""
    from edge_mmllm_export.checkpoints import open_checkpoint

    subprocess.run([python, SCRIPT, "--out", tmp_path], check=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == NAMES
    for name in NAMES:
        for config in (REFERENCES / name).glob("config*.json"):
            assert _config(tmp_path / name / config.name) == _config(config)
        kept, made = open_checkpoint(REFERENCES / name), open_checkpoint(tmp_path / name)
        assert kept.tensors == made.tensors
        for tensor in kept.tensors:
            found, expected = made.read(tensor), kept.read(tensor)
            np.testing.assert_allclose(found, expected, rtol=0.01, atol=1e-3, err_msg=tensor)


def _config(path: Path) -> dict[str, object]:
    config: dict[str, object] = json.loads(path.read_text())
    del config["transformers_version"]
    return config


def test_smollm2(python, tmp_path):
    """SmolLM2-135M-Instruct, 64 tokens: transformers, the oracle and ONNX f32; hub and GGUF."""
    import references
    import smollm2

    cache_dir = Path(os.environ.get("EDGE_MMLLM_CACHE", smollm2.CACHE))
    try:
        gguf = smollm2.smollm2_gguf(cache_dir)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"SmolLM2 cannot be had: {error}")
    hub = smollm2.smollm2_hub(cache_dir)
    ids = np.random.default_rng(0).integers(100, 40000, 64)
    with tempfile.TemporaryDirectory() as folder:
        paths = Path(folder, "ids.npy"), Path(folder, "logits.npy")
        np.save(paths[0], ids)
        subprocess.run([python, SCRIPT, "--logits", hub, *paths], check=True)
        expected = np.load(paths[1])

    loaded = references.load(hub, context=128)
    oracle = loaded.oracle().forward(ids)
    np.testing.assert_allclose(oracle, expected, rtol=0, atol=1e-3)
    np.testing.assert_array_equal(oracle.argmax(-1), expected.argmax(-1))
    np.testing.assert_array_equal(
        references.load(gguf, context=128).oracle().forward(ids[:8]),
        loaded.oracle().forward(ids[:8]),
    )
    exported = references.export(loaded, tmp_path)
    logits = exported.logits(ids)
    print(
        f"max |delta logit|: oracle to transformers {abs(oracle - expected).max():.1e}, "
        f"ONNX to oracle {abs(logits - oracle).max():.1e}"
    )
    np.testing.assert_allclose(logits, oracle, rtol=0, atol=2e-3)
    np.testing.assert_array_equal(logits.argmax(-1), oracle.argmax(-1))
    with exported.session(chunk=7) as session:
        chunked = session.prefill(ids, logits="all")
    np.testing.assert_allclose(chunked, logits, rtol=0, atol=2e-5 * abs(logits).max())
    with exported.session() as session:
        stepwise = np.stack([session.decode(int(i)) for i in ids[:16]])
    np.testing.assert_allclose(stepwise, logits[:16], rtol=0, atol=2e-5 * abs(logits).max())
