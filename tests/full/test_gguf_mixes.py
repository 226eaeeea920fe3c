"""K and I types through llama.cpp, and our importance matrix against its activations."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.full
llama_cpp = pytest.importorskip("llama_cpp")

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "export"))
sys.path.insert(0, str(ROOT / "benchmarks"))

import random_models  # noqa: E402
from references import DATA, load  # noqa: E402

from edge_mmllm.errors import ExportError  # noqa: E402
from edge_mmllm.spec import TextSpec  # noqa: E402
from edge_mmllm_export import exporter  # noqa: E402
from edge_mmllm_export.checkpoints.base import TextAssets  # noqa: E402
from edge_mmllm_export.gguf import imatrix  # noqa: E402
from edge_mmllm_export.gguf import stored as gguf_stored  # noqa: E402
from edge_mmllm_export.gguf import types as gguf_types  # noqa: E402
from edge_mmllm_export.gguf import write as gguf  # noqa: E402
from edge_mmllm_export.gguf.imatrix_collect import Calibration, collect  # noqa: E402
from edge_mmllm_export.gguf.layout import Wanted  # noqa: E402
from edge_mmllm_export.planning import ExportOptions  # noqa: E402
from edge_mmllm_export.quantize.schemes import QuantPlan  # noqa: E402
from edge_mmllm_runtime.gguf.llama import Model  # noqa: E402

BYTES = TextAssets(TextSpec("bytes"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs data not in the repository")


def llama(folder):
    """A random llama of 256 columns, q and k to be permuted."""
    r = random_models._Random()
    out = {"model.embed_tokens.weight": r.matrix(128, 256)}
    for i in range(2):
        p = f"model.layers.{i}"
        out |= {
            f"{p}.{n}.weight": r.vector(256, mean=1)
            for n in ("input_layernorm", "post_attention_layernorm")
        }
        out |= {f"{p}.self_attn.{n}_proj.weight": r.matrix(256, 256) for n in "qo"}
        out |= {f"{p}.self_attn.{n}_proj.weight": r.matrix(64, 256) for n in "kv"}
        out |= {f"{p}.mlp.{n}_proj.weight": r.matrix(512, 256) for n in ("gate", "up")}
        out[f"{p}.mlp.down_proj.weight"] = r.matrix(256, 512)
    out["model.norm.weight"] = r.vector(256, mean=1)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128,
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 2, "hidden_act": "silu",
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    }  # fmt: skip
    random_models.write((config, out), folder)
    return folder


def random(name, folder):
    folder.mkdir()
    if name == "llama":
        return llama(folder)
    random_models.write(getattr(random_models, name)(256, 2, 128), folder)
    return folder


def matrix_for(source, path):
    text = path.with_suffix(".txt")
    text.write_bytes(np.random.default_rng(1).integers(32, 127, 512, np.uint8).tobytes())
    loaded = load(source)
    found = collect(loaded.model, loaded.weights, BYTES, Calibration(str(text)))
    imatrix.write(found, path)
    return str(path)


#: One of each kind: an export takes two processes of llama.cpp. All were tried.
MANY = ("Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K", "IQ4_XS", "IQ4_NL", "IQ3_S", "IQ3_XXS",
        "IQ2_XXS", "IQ1_S")  # fmt: skip
FEW = ("Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K", "IQ2_XXS", "IQ1_S")


@pytest.mark.parametrize("name", ["llama", "rwkv7"])
def test_every_mix(name, tmp_path):
    """The types in the file are those of the manifest; what a reader sees is what is in it."""
    source = random(name, tmp_path / "source")
    matrix = matrix_for(source, tmp_path / "m.gguf")
    sizes = {}
    for word in MANY if name == "llama" else FEW:
        own = matrix if word in gguf_types.NEED_IMATRIX else None
        options = ExportOptions(format="gguf", gguf_type=word, gate=False, imatrix=own)
        bundle = exporter.export(source, tmp_path / word, options)
        path = bundle.file(gguf.FILE)
        kinds = gguf_stored.kinds(path)
        groups = bundle.manifest.quantization.groups
        counted = {}
        for kind in kinds.values():
            counted[kind] = counted.get(kind, 0) + 1
        said = {}
        for group in groups:
            said[group.scheme] = said.get(group.scheme, 0) + group.tensors
        assert said == counted
        assert sum(g.size_bytes for g in groups) <= path.stat().st_size
        assert bundle.spec.details["gguf"]["file_type"] == f"MOSTLY_{word}"
        sizes[word] = path.stat().st_size
        assert sorted(p.name for p in bundle.root.iterdir()) == ["manifest.json", "model.gguf"]
        model = Model(path)
        assert model.metadata("general.file_type") is not None
        model.close()
        if name == "rwkv7":
            assert all(kind in ("F32", "F16") for n, kind in kinds.items() if n[-9] in "12")
        else:
            _same_as_read(source, word, path)
    assert sizes["Q6_K"] > sizes["Q5_K_M"] > sizes["Q4_K_M"] > sizes["Q3_K_M"] > sizes["Q2_K"]
    assert sizes["Q2_K"] > sizes["IQ2_XXS"] > sizes["IQ1_S"]


def _same_as_read(source, word, path):
    """What the gate takes for the stored weights is what a checkpoint reader finds."""
    plan = gguf.plan_for(word, QuantPlan())
    loaded = load(source, plan)
    read = load(path).weights
    stored = gguf_stored.as_stored(loaded.model, loaded.weights, Wanted(plan, word), path)
    for name, w in stored.items():
        np.testing.assert_array_equal(w.rows(), read[name].rows(), err_msg=name)


def test_a_matrix_changes_what_is_stored(tmp_path):
    source = random("llama", tmp_path / "source")
    matrix = matrix_for(source, tmp_path / "m.gguf")
    found = []
    for own in (None, matrix):
        options = ExportOptions(format="gguf", gguf_type="Q4_K_S", gate=False, imatrix=own)
        bundle = exporter.export(source, tmp_path / str(bool(own)), options)
        model = Model(bundle.file(gguf.FILE))
        chunks = model.metadata("quantize.imatrix.chunks_count")
        model.close()
        found.append((load(bundle.file(gguf.FILE)).weights["layers.0.attn.q"].rows(), chunks))
    assert [chunks for _, chunks in found] == [None, "1"]
    assert not np.array_equal(found[0][0], found[1][0])


def test_rows_that_are_no_multiple_of_256(tmp_path):
    """llama.cpp takes another block; the manifest says so."""
    folder = tmp_path / "source"
    folder.mkdir()
    random_models.write(random_models.mamba(96, 2, 128), folder)
    options = ExportOptions(format="gguf", gguf_type="Q4_K_M", gate=False)
    manifest = exporter.export(folder, tmp_path / "out", options).manifest
    schemes = {g.scheme for g in manifest.quantization.groups}
    assert "Q5_0" in schemes
    assert "Q4_K" not in schemes


@needs_data
@pytest.mark.parametrize("word", ["Q6_K", "Q4_K_M", "IQ4_XS"])
@pytest.mark.parametrize("name", ["tiny-mamba", "tiny-rwkv7"])
def test_the_gate_judges_mixes(name, word, tmp_path):
    options = ExportOptions(format="gguf", gguf_type=word)
    manifest = exporter.export(DATA / "zoo" / name, tmp_path / "out", options).manifest
    figures = manifest.gate.figures
    print(name, word, figures["kl_mean"], figures["kl_mean_of_engine"])
    assert manifest.gate.verdict == "passed"
    assert figures["kl_mean_of_engine"] < 0.01  # the activations of llama.cpp, in 8 bits


@needs_data
def test_with_a_text(tmp_path):
    text = DATA / "zoo" / "eval" / "heldout.txt"
    options = ExportOptions(
        format="gguf", gguf_type="IQ2_S", imatrix_text=str(text), imatrix_chunks=1,
        accept_quality_loss=True,
    )  # fmt: skip
    bundle = exporter.export(DATA / "zoo" / "tiny-mamba", tmp_path / "out", options)
    assert not (bundle.root / "imatrix.gguf").exists()
    assert bundle.manifest.gate.figures["scheme"] == "int2"


def test_what_llama_cpp_refuses_is_its_word(tmp_path, monkeypatch):
    """A draft cut short: the child says what llama.cpp says."""
    source = random("llama", tmp_path / "source")
    monkeypatch.setattr(gguf.os, "truncate", lambda *_: None)  # no room for the data
    with pytest.raises(ExportError, match=r"llama\.cpp could not quantize"):
        exporter.plan_export(source, ExportOptions(format="gguf", gguf_type="Q4_K_M", gate=False))


class Tensor(ctypes.Structure):
    """`struct ggml_tensor` of the pinned version, as far as it is read here."""

    _fields_ = (
        ("type", ctypes.c_int), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4), ("op", ctypes.c_int), ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32), ("src", ctypes.c_void_p * 10), ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t), ("data", ctypes.c_void_p), ("name", ctypes.c_char * 64),
    )  # fmt: skip


#: `GGML_OP_MUL_MAT` of the pinned version; the test fails where it is another.
MUL_MAT = 29


def activations(path, ids):
    """Sums of squares of what llama.cpp multiplies each matrix with, by the matrix's name."""
    sums = {}

    def seen(address, asks, _):
        t = Tensor.from_address(address)
        if t.op != MUL_MAT:
            return False
        weight, x = (Tensor.from_address(a) for a in t.src[:2])
        name = weight.name.decode()
        if not name.startswith("blk.") or not name.endswith(".weight"):
            return False
        if not asks:
            assert x.type == 0
            rows = x.ne[1] * x.ne[2] * x.ne[3]
            assert x.nb[1] == 4 * x.ne[0]
            data = (ctypes.c_float * (rows * x.ne[0])).from_address(x.data)
            values = np.frombuffer(data, np.float32).reshape(rows, -1).astype(np.float64)
            sums[name] = sums.get(name, 0) + (values**2).sum(0)
        return True

    kind = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)
    callback = kind(seen)
    model = Model(path)
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = len(ids)
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.type_k = params.type_v = 0
    params.cb_eval = ctypes.cast(callback, type(params.cb_eval))
    context = llama_cpp.llama_init_from_model(model.pointer, params)
    batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.n_seq_id[i] = int(token), i, 1
        batch.seq_id[i][0], batch.logits[i] = 0, 1
    assert llama_cpp.llama_decode(context, batch) == 0
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    model.close()
    return sums


@pytest.mark.parametrize("name", ["llama", "mamba", "mamba2", "rwkv6", "rwkv7"])
def test_our_matrix_is_llama_cpps(name, tmp_path):
    """What the oracle adds up is what goes into llama.cpp's products, for each tensor."""
    source = random(name, tmp_path / "source")
    options = ExportOptions(QuantPlan("f32"), format="gguf", gate=False)
    path = exporter.export(source, tmp_path / "out", options).file(gguf.FILE)
    ids = np.random.default_rng(2).integers(1, 127, 256)
    (tmp_path / "t").write_bytes(ids.astype(np.uint8).tobytes())
    loaded = load(source)
    found = collect(loaded.model, loaded.weights, BYTES, Calibration(str(tmp_path / "t")))
    theirs = activations(path, ids)
    common = found.entries.keys() & theirs.keys()
    assert len(common) >= 2 * {"llama": 7, "mamba": 4, "mamba2": 2}.get(name, 6)
    worst = 0.0
    for tensor in common:
        ours = found.entries[tensor].sums[0]
        error = np.abs(ours - theirs[tensor]) / theirs[tensor].mean()
        worst = max(worst, float(error.max()))
    print(name, len(common), "tensors, worst relative difference", worst)
    assert worst < 1e-4
    assert theirs.keys() <= found.entries.keys()
