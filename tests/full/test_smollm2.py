"""SmolLM2-135M-Instruct, the published model: exported, judged, talking; llama.cpp's tokenizer."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import edge_mmllm

pytestmark = pytest.mark.full

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
QUESTION = "What is the capital of France?"


def _edge(*words: object) -> dict[str, object]:
    command = [sys.executable, "-m", "edge_mmllm", *map(str, words), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def sources() -> dict[str, Path]:
    from smollm2 import smollm2_gguf, smollm2_hub

    return {"gguf": smollm2_gguf(), "hub": smollm2_hub()}


@pytest.fixture(scope="module", params=["gguf", "hub"])
def bundle(request, sources, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("smollm2") / request.param
    exported = _edge("export", sources[request.param], "--quant", "int4", "--out", out)
    assert exported["gate"]["verdict"] == "passed"
    return out


def test_answers_the_question(bundle: Path) -> None:
    answer = _edge("run", bundle, "--prompt", QUESTION, "--max-new-tokens", 32)
    assert "Paris" in str(answer["text"])


def test_checks_itself(bundle: Path) -> None:
    assert _edge("check", bundle)["ok"] is True


def test_both_layouts_store_the_same_weights(sources, tmp_path: Path) -> None:
    data = []
    for name, source in sources.items():
        _edge("export", source, "--quant", "int4", "--out", tmp_path / name, "--gate", "off")
        data.append((tmp_path / name / "weights.bin").read_bytes())
    assert data[0] == data[1]


def test_tokenizer_equals_llama_cpp(bundle: Path, sources, shared_data: Path) -> None:
    llama_cpp = pytest.importorskip(
        "llama_cpp", reason="llama-cpp-python is not installed: pip install 'edge-mmllm[gguf]'"
    )
    quiet = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    parameters = llama_cpp.llama_model_default_params()
    parameters.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(str(sources["gguf"]).encode(), parameters)
    vocab = llama_cpp.llama_model_get_vocab(model)
    text = (shared_data / "text/wiki.test.raw").read_text(encoding="utf-8")
    lines = text.splitlines()[:200]
    assert sum(bool(line.strip()) for line in lines) > 50
    with edge_mmllm.load(bundle) as session:
        for line in lines:
            raw = line.encode()
            ids = np.empty(len(raw) + 8, np.int32)
            place = ids.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token))
            count = llama_cpp.llama_tokenize(vocab, raw, len(raw), place, len(ids), False, True)
            assert session.text.encode(line, add_bos=False) == ids[:count].tolist(), line
    llama_cpp.llama_model_free(model)
