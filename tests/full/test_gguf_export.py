"""Our GGUF files through llama.cpp, against the oracle and, for tokenizers, against our own."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.full
llama_cpp = pytest.importorskip("llama_cpp")

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "export"))

import rwkv_models  # noqa: E402
from references import DATA, FOLDER, load  # noqa: E402

from edge_mmllm.text import Text  # noqa: E402
from edge_mmllm_export import exporter  # noqa: E402
from edge_mmllm_export.checkpoints import open_checkpoint  # noqa: E402
from edge_mmllm_export.gguf import vocab as gguf_vocab  # noqa: E402
from edge_mmllm_export.gguf import write as gguf  # noqa: E402
from edge_mmllm_export.planning import ExportOptions  # noqa: E402
from edge_mmllm_export.quantize.schemes import QuantPlan  # noqa: E402

TINY = ("llama", "llama-linear", "llama-tied-llama3", "mistral-window", "qwen2", "qwen2-window",
        "qwen3", "olmo2", "mamba", "mamba2", "falcon-mamba")  # fmt: skip
ZOO = ("zoo/tiny-mamba", "zoo/tiny-mamba2", "zoo/tiny-rwkv7",
       "rwkv/tiny-rwkv-6v0-1m.pth", "rwkv/tiny-rwkv-7v0-834K.pth")  # fmt: skip


def llama_logits(path: Path, ids: np.ndarray) -> np.ndarray:
    """All logits of one whole forward, with caches in float32."""
    model_params = llama_cpp.llama_model_default_params()
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_params)
    assert model
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = max(64, len(ids))
    params.n_threads = params.n_threads_batch = 2
    params.type_k = params.type_v = params.flash_attn_type = 0
    context = llama_cpp.llama_init_from_model(model, params)
    batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.n_seq_id[i] = int(token), i, 1
        batch.seq_id[i][0], batch.logits[i] = 0, 1
    assert llama_cpp.llama_decode(context, batch) == 0
    count = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    rows = [
        np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, i), shape=(count,)).copy()
        for i in range(len(ids))
    ]
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return np.stack(rows)


def _compare(source: Path, folder: Path) -> None:
    options = ExportOptions(QuantPlan("f32"), format="gguf", gate=False)
    bundle = exporter.export(source, folder / "out", options)
    loaded = load(source)
    length = min(24, bundle.spec.context_length or 24)
    ids = np.random.default_rng(0).integers(0, loaded.model.vocab_size, length)
    expected = loaded.oracle().forward(ids)
    found = llama_logits(bundle.file(gguf.FILE), ids)
    print(source.name, "max |delta logit|", np.abs(found - expected).max())
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 5e-3
    assert (found.argmax(-1) == expected.argmax(-1)).all()


@pytest.mark.parametrize("name", TINY)
def test_float32_is_the_oracle(name, tmp_path):
    _compare(FOLDER / name, tmp_path)


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the data that is not in the repository")
@pytest.mark.parametrize("name", ZOO)
def test_float32_is_the_oracle_for_trained_models(name, tmp_path):
    _compare(DATA / name, tmp_path)


@pytest.mark.parametrize("version", ["6", "7"])
@pytest.mark.parametrize("eps", [64e-5, 1e-5])
def test_rwkv_of_the_hub_with_any_epsilon(version, eps, tmp_path, monkeypatch):
    """llama.cpp's group norm has one epsilon; another is made up for in the weights."""
    for name, value in (("HIDDEN", 128), ("HEADS", 2), ("SIZE", 64)):
        monkeypatch.setattr(rwkv_models, name, value)
    monkeypatch.setattr(rwkv_models._Random.norm, "__defaults__", (128,))
    made = rwkv_models.blinkdl(version)
    hub = {"6": rwkv_models.fla6, "7": lambda t: rwkv_models.fla7(t, fused=False)}[version](made)
    folder = tmp_path / "hub"
    folder.mkdir()
    rwkv_models.write_hub(folder, hub, model_type=f"rwkv{version}", group_norm_eps=eps)
    _compare(folder, tmp_path)


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the data that is not in the repository")
@pytest.mark.parametrize("name", ["tiny-mamba", "tiny-rwkv7"])
def test_llama_cpp_tokenizes_alike(name, tmp_path):
    options = ExportOptions(QuantPlan("f32"), format="gguf", gate=False)
    bundle = exporter.export(DATA / "zoo" / name, tmp_path / "out", options)
    assets = open_checkpoint(DATA / "zoo" / name).text()
    text = Text(assets.spec, assets.tokenizer_json)
    wiki = (DATA / "text" / "wiki.test.raw").read_text(encoding="utf-8")
    samples = [wiki[i : i + 300] for i in range(0, len(wiki), len(wiki) // 300)]
    # llama.cpp does not compose characters (NFC) first, which such a tokenizer.json may ask for.
    samples += [s for s in gguf_vocab.SAMPLES if "\u0301" not in s]
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    path = str(bundle.file(gguf.FILE)).encode()
    model = llama_cpp.llama_model_load_from_file(path, params)
    vocab = llama_cpp.llama_model_get_vocab(model)
    for sample in samples:
        data = sample.encode()
        out = (llama_cpp.llama_token * (2 * len(data) + 16))()
        count = llama_cpp.llama_tokenize(vocab, data, len(data), out, len(out), True, True)
        assert out[:count] == list(text.encode(sample)), sample
    llama_cpp.llama_model_free(model)


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the data that is not in the repository")
@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"])
def test_the_gate_judges_every_type(kind, tmp_path):
    options = ExportOptions(format="gguf", gguf_type=kind, accept_quality_loss=True)
    manifest = exporter.export(DATA / "zoo" / "tiny-rwkv7", tmp_path / "out", options).manifest
    print(kind, manifest.gate.figures["kl_mean"], manifest.quantization.bits_per_weight)
    assert manifest.gate.verdict == "passed"
    assert manifest.golden is not None
