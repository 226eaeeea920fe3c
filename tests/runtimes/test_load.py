"""`edge_mmllm.load`: from a folder to a session; the cache of prepacked weights; imports."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import toys

import edge_mmllm
import edge_mmllm_runtime
from edge_mmllm.errors import (
    CorruptBundle,
    MissingDependency,
    SessionError,
    StateMismatch,
    UnsupportedBundle,
    UsageError,
)
from edge_mmllm_runtime import prepacked

IDS = list(range(40))


@pytest.fixture
def attention(tmp_path):
    (tmp_path / "source").mkdir()
    toy = toys.attention(tmp_path / "source")
    return toy, toys.write_bundle(toy, tmp_path / "bundle")


@pytest.fixture
def quantized(tmp_path):
    (tmp_path / "source").mkdir()
    toy = toys.quantized(tmp_path / "source")
    return toy, toys.write_bundle(toy, tmp_path / "bundle")


def test_load_and_generate(attention):
    toy, folder = attention
    with edge_mmllm.load(folder) as session:
        assert np.allclose(session.prefill(IDS), toy.reference(np.array(IDS))[-1], atol=1e-4)
        text = "".join(session.generate("Hello", max_new_tokens=5))
        assert text == "".join(session.generate("Hello", max_new_tokens=5))
        assert session.context == 256
        assert session.engine.threads >= 1
    with edge_mmllm.load(str(folder), engine="onnx", threads=1, context=7) as session:
        assert (session.engine.threads, session.context) == (1, 7)


def test_snapshots_are_bound_to_the_bundle(attention, tmp_path):
    _, folder = attention
    (tmp_path / "other").mkdir()
    other = toys.write_bundle(toys.attention(tmp_path / "other", seed=1), tmp_path / "b2")
    with edge_mmllm.load(folder) as session, edge_mmllm.load(other) as stranger:
        session.prefill(IDS)
        with pytest.raises(StateMismatch):
            stranger.restore(session.snapshot())
        with edge_mmllm.load(folder, context=64) as same:
            same.restore(session.snapshot())
            assert same.position == len(IDS)


@pytest.mark.parametrize(
    "arguments",
    [
        {"engine": "gguf"}, {"threads": 0}, {"threads": 100_000}, {"threads": 1.5},
        {"threads": "2"}, {"context": 0}, {"context": 257}, {"context": 2.5}, {"context": "x"},
    ],
    ids=str,
)  # fmt: skip
def test_arguments_that_do_not_fit(attention, arguments):
    with pytest.raises(UsageError):
        edge_mmllm.load(attention[1], **arguments)


def test_missing_engine_says_how_to_install_it(attention, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n: None if n == "onnxruntime" else find(n)
    )
    with pytest.raises(MissingDependency, match=r"pip install 'edge-mmllm\[runtime-onnx\]'"):
        edge_mmllm.load(attention[1])


def test_engine_of_a_later_release(attention, monkeypatch):
    monkeypatch.setattr(edge_mmllm_runtime, "ENGINES", {})
    with pytest.raises(UnsupportedBundle):
        edge_mmllm.load(attention[1])


def test_every_engine_can_be_imported():
    for module, _, _ in edge_mmllm_runtime.ENGINES.values():
        assert callable(importlib.import_module(module).open_engine)


def packed(cache):
    return sorted(p.name for p in cache.iterdir())


def test_prepacked_cache_gives_the_same_logits_from_a_file(quantized, tmp_path):
    toy, folder = quantized
    cache = tmp_path / "cache" / "deep"
    with edge_mmllm.load(folder) as session:
        expected = session.prefill(IDS, logits="all")
    assert np.abs(expected - toy.reference(np.array(IDS))).max() < 0.05 * np.abs(expected).max()
    with edge_mmllm.load(folder, prepacked_cache=cache) as session:
        assert np.array_equal(session.prefill(IDS, logits="all"), expected)
    (name,) = packed(cache)
    assert packed(cache / name) == ["complete.json", "decoder.onnx", "weights.bin"]
    source = folder / "weights.bin"
    assert (cache / name / "weights.bin").stat().st_size > source.stat().st_size
    before = (cache / name / "weights.bin").stat().st_mtime_ns
    with edge_mmllm.load(folder, prepacked_cache=cache) as session:
        assert np.array_equal(session.prefill(IDS, logits="all"), expected)
    assert (cache / name / "weights.bin").stat().st_mtime_ns == before


@pytest.mark.parametrize("damage", ["truncate", "unlisted", "no list", "nonsense"])
def test_damaged_cache_is_made_again(quantized, tmp_path, damage):
    _, folder = quantized
    cache = tmp_path / "cache"
    with edge_mmllm.load(folder, prepacked_cache=cache) as session:
        expected = session.prefill(IDS)
    (name,) = packed(cache)
    weights, complete = cache / name / "weights.bin", cache / name / "complete.json"
    size = weights.stat().st_size
    if damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "unlisted":
        weights.unlink()
    elif damage == "no list":
        complete.unlink()
    else:
        complete.write_text("[1]")
    with edge_mmllm.load(folder, prepacked_cache=cache) as session:
        assert np.array_equal(session.prefill(IDS), expected)
    assert packed(cache) == [name]
    assert weights.stat().st_size == size


def test_cache_depends_on_bundle_version_and_cpu(monkeypatch):
    keys = {prepacked.cache_key("a", "decoder.onnx"), prepacked.cache_key("b", "decoder.onnx")}
    monkeypatch.setattr(prepacked, "cpu_identity", lambda: "another")
    keys.add(prepacked.cache_key("a", "decoder.onnx"))
    monkeypatch.setattr(prepacked.ort, "__version__", "0")
    keys.add(prepacked.cache_key("a", "decoder.onnx"))
    assert len(keys) == 4


def test_cache_that_cannot_be_written(quantized, tmp_path, monkeypatch):
    _, folder = quantized
    (tmp_path / "file").write_text("")
    with pytest.raises(SessionError, match="prepacked"):
        edge_mmllm.load(folder, prepacked_cache=tmp_path / "file")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(prepacked.shutil, "disk_usage", lambda _: usage(1, 1, 0))
    with pytest.raises(SessionError, match="make room"):
        edge_mmllm.load(folder, prepacked_cache=tmp_path / "cache")
    assert packed(tmp_path / "cache") == []


def test_failed_packing_leaves_nothing(quantized, tmp_path):
    _, folder = quantized
    (folder / "decoder.onnx").write_bytes(b"\0" * (folder / "decoder.onnx").stat().st_size)
    with pytest.raises((SessionError, CorruptBundle)):
        edge_mmllm.load(folder, prepacked_cache=tmp_path / "cache")
    assert packed(tmp_path / "cache") == []


def fresh(code):
    """Runs code in an interpreter that knows only this one's import path."""
    path = [str(Path(p).resolve()) for p in sys.path if p]
    code = f"import sys; sys.path[:0] = {path!r}\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_import_is_light():
    heavy = fresh(
        "import edge_mmllm; before = set(sys.modules)\n"
        "print(*(n for n in ('numpy', 'onnxruntime', 'jinja2', 'tokenizers') if n in before))"
    )
    assert heavy == []


def test_device_modules_need_no_host_package():
    modules = [
        f"edge_mmllm_runtime.{p.stem}"
        for p in Path(edge_mmllm_runtime.__file__).parent.glob("*.py")
        if p.stem != "__init__"
    ]
    found = fresh(
        "for n in ('onnx', 'torch', 'transformers', 'edge_mmllm_export'): sys.modules[n] = None\n"
        "import importlib\n"
        f"for n in {modules!r}: importlib.import_module(n)\n"
        "print('fine')"
    )
    assert found == ["fine"]


def test_public_names_resolve():
    for name in edge_mmllm.__all__:
        if name != "__version__":
            assert getattr(edge_mmllm, name) is not None
    with pytest.raises(AttributeError, match="no attribute"):
        _ = edge_mmllm.nonsense


def test_no_memory_is_not_a_damaged_bundle(attention, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("[ONNXRuntimeError] : 6 : Failed to allocate memory for a buffer")

    monkeypatch.setattr("onnxruntime.InferenceSession", fails)
    with pytest.raises(SessionError, match="no memory to load"):
        edge_mmllm.load(attention[1])
