"""MLC's weight files, read by the format's facts alone: nothing here comes from our writer, reader
or maps. Names are those that mlc-llm's own models list (79d603a, built under tvm 0.27)."""

from __future__ import annotations

import hashlib
import json
import math
import shutil

import numpy as np
import pytest
import rwkv_models
import safetensors.numpy
from references import DATA, FOLDER, ROOT, load

from edge_mmllm_export.checkpoints import open_checkpoint
from edge_mmllm_export.mlc import layout as mlc
from edge_mmllm_export.mlc import write as mlc_write
from edge_mmllm_export.oracle import Oracle
from edge_mmllm_runtime.mlc.weights import QUANTIZATIONS, WeightFiles

LAYER = "model.layers.{i}"
LLAMA = (
    "self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj",
    "input_layernorm.weight", "post_attention_layernorm.weight",
)  # fmt: skip
QWEN2 = ("self_attn.c_attn", "self_attn.c_attn.bias", *LLAMA[1:])
QWEN3 = (*QWEN2[:1], *LLAMA[1:], "self_attn.q_norm.weight", "self_attn.k_norm.weight")
OLMO2 = (
    *LLAMA[:4], "self_attn.q_norm.weight", "self_attn.k_norm.weight",
    "post_attention_layernorm.weight", "post_feedforward_layernorm.weight",
)  # fmt: skip
LAYERS = {
    "llama": LLAMA, "llama-tied-llama3": LLAMA, "mistral-window": LLAMA,
    "qwen2": QWEN2, "qwen3": QWEN3, "olmo2": OLMO2,
}  # fmt: skip
ITEM = {"uint32": 4, "float16": 2, "float32": 4}
NUMPY = {"uint32": "<u4", "float16": "<f2", "float32": "<f4"}


def convert(source, folder, quant, workers=1):
    """Writes the files of a checkpoint; returns its definition and weights too."""
    loaded = load(source)
    files = mlc.layout(loaded.model, loaded.weights, QUANTIZATIONS[quant])
    folder.mkdir(exist_ok=True)
    mlc_write.write(files, open_checkpoint(source), folder, workers=workers)
    return loaded, files


def read(folder):
    """Every tensor by its name, by the words of the format."""
    index = json.loads((folder / "tensor-cache.json").read_text())
    found = {}
    for shard in index["records"]:
        assert shard["format"] == "raw-shard"
        data = (folder / shard["dataPath"]).read_bytes()
        assert len(data) == shard["nbytes"]
        assert hashlib.md5(data).hexdigest() == shard["md5sum"]  # noqa: S324
        end = 0
        for r in shard["records"]:
            assert r["byteOffset"] == end  # one after another
            end += r["nbytes"]
            part = data[r["byteOffset"] : end]
            if r["dtype"] == "float32" and r["format"] == "f32-to-bf16":
                assert r["nbytes"] == 2 * math.prod(r["shape"])
                bits = np.frombuffer(part, "<u2").astype(np.uint32) << 16
                values = bits.view(np.float32)
            else:
                assert r["nbytes"] == ITEM[r["dtype"]] * math.prod(r["shape"])
                values = np.frombuffer(part, NUMPY[r["dtype"]])
            assert r["name"] not in found
            found[r["name"]] = values.reshape(r["shape"])
        assert end == len(data)
    return index, found


def matrix(found, name, k, *, bits=4, group=32, transposed=False):
    """`(code - zero) * scale`, lowest K in the lowest bits."""
    words, scales = found[f"{name}.q_weight"], found[f"{name}.q_scale"].astype(np.float32)
    if transposed:
        words, scales = words.T, scales.T
    per_word = 32 // bits
    assert words.shape == (len(words), -(-k // group) * group // per_word)
    assert scales.shape == (len(words), -(-k // group))
    out = np.empty((len(words), words.shape[1] * per_word), np.float32)
    for i in range(per_word):
        out[:, i::per_word] = (words >> (i * bits)) & (2**bits - 1)
    zero = 2 ** (bits - 1) - 1
    return ((out - zero) * np.repeat(scales, group, axis=1))[:, :k]


def wanted(loaded, *names):
    return np.concatenate([loaded.weights[name].rows() for name in names])


@pytest.mark.parametrize("quant", ["q4f16_1", "q4f32_1", "q0f16", "q0f32"])
@pytest.mark.parametrize("name", LAYERS)
def test_names_and_types_are_those_of_mlc_llms_models(name, quant, tmp_path):
    loaded, _ = convert(FOLDER / name, tmp_path, quant)
    index, found = read(tmp_path)
    stems = ["model.embed_tokens", "model.norm.weight"]
    if "head" in loaded.weights:
        stems.append("lm_head")
    for i in range(loaded.model.layers):
        stems += [f"{LAYER.format(i=i)}.{stem}" for stem in LAYERS[name]]
    expected = set()
    for stem in stems:
        if stem.endswith((".weight", ".bias")):
            expected.add(stem)
        elif quant.startswith("q4"):
            expected |= {f"{stem}.q_weight", f"{stem}.q_scale"}
        else:
            expected.add(f"{stem}.weight")
    assert set(found) == expected
    kinds = {r["name"]: r["dtype"] for s in index["records"] for r in s["records"]}
    plain = "float16" if "f16" in quant else "float32"
    for key, kind in kinds.items():
        assert kind == ("uint32" if key.endswith("q_weight") else plain), key
    assert (tmp_path / "ndarray-cache.json").read_text() == (
        tmp_path / "tensor-cache.json"
    ).read_text()


@pytest.mark.parametrize("quant", ["q4f16_1", "q4f32_1"])
def test_fused_matrices_hold_their_parts(quant, tmp_path):
    bound = 0.55 / 7
    loaded, _ = convert(FOLDER / "llama", tmp_path, quant, workers=2)
    _, found = read(tmp_path)
    k = loaded.model.hidden_size
    fused = {
        "model.embed_tokens": ("embed",),
        "model.layers.1.self_attn.qkv_proj": tuple(f"layers.1.attn.{n}" for n in "qkv"),
        "model.layers.1.mlp.gate_up_proj": ("layers.1.mlp.gate", "layers.1.mlp.up"),
        "lm_head": ("head",),
    }
    for theirs, ours in fused.items():
        w = wanted(loaded, *ours)
        np.testing.assert_allclose(
            matrix(found, theirs, k), w, rtol=0, atol=bound * np.abs(w).max()
        )
    down = wanted(loaded, "layers.1.mlp.down")
    values = matrix(found, "model.layers.1.mlp.down_proj", down.shape[1])
    np.testing.assert_allclose(values, down, rtol=0, atol=bound * np.abs(down).max())
    norm = found["model.layers.0.input_layernorm.weight"]
    np.testing.assert_allclose(norm, wanted(loaded, "layers.0.norm_attn"), rtol=2**-8, atol=0)


def test_what_is_transposed(tmp_path):
    """q4f16_0: K first, but for the embedding."""
    loaded, _ = convert(FOLDER / "llama", tmp_path / "a", "q4f16_0", workers=2)
    convert(FOLDER / "llama", tmp_path / "b", "q4f16_1")
    (_, found), (_, other) = read(tmp_path / "a"), read(tmp_path / "b")
    k = loaded.model.hidden_size
    for name, swapped in (("lm_head", True), ("model.embed_tokens", False)):
        np.testing.assert_array_equal(
            matrix(found, name, k, transposed=swapped), matrix(other, name, k)
        )
    name = "model.layers.0.self_attn.qkv_proj"
    assert found[f"{name}.q_weight"].shape == other[f"{name}.q_weight"].shape[::-1]
    np.testing.assert_array_equal(found[f"{name}.q_scale"].T, other[f"{name}.q_scale"])


def test_three_bits(tmp_path):
    loaded, _ = convert(FOLDER / "llama", tmp_path, "q3f16_1")
    _, found = read(tmp_path)
    w = wanted(loaded, "layers.0.mlp.down")
    values = matrix(found, "model.layers.0.mlp.down_proj", w.shape[1], bits=3, group=40)
    np.testing.assert_allclose(values, w, rtol=0, atol=0.55 / 3 * np.abs(w).max())


def test_q4f16_2_leaves_the_ends(tmp_path):
    loaded, _ = convert(FOLDER / "llama", tmp_path, "q4f16_2")
    _, found = read(tmp_path)
    for theirs, ours in (("model.embed_tokens", "embed"), ("lm_head", "head")):
        expected = wanted(loaded, ours).astype(np.float16)
        np.testing.assert_array_equal(found[f"{theirs}.weight"], expected)
    assert "model.layers.0.mlp.down_proj.q_weight" in found


@pytest.fixture
def precise(tmp_path):
    """The llama reference, whose weights are bfloat16, with weights that are not."""
    folder = tmp_path / "precise"
    shutil.copytree(FOLDER / "llama", folder)
    (file,) = folder.glob("*.safetensors")
    rng = np.random.default_rng(0)
    checkpoint = open_checkpoint(FOLDER / "llama")
    values = {
        name: checkpoint.read(name) * (1 + 1e-3 * rng.standard_normal(t.shape, np.float32))
        for name, t in checkpoint.tensors.items()
    }
    safetensors.numpy.save_file(values, file)
    return folder


def test_float32_is_rounded_to_bfloat16(precise, tmp_path):
    loaded, _ = convert(precise, tmp_path / "out", "q0f32")
    index, found = read(tmp_path / "out")
    w = wanted(loaded, "layers.0.attn.q", "layers.0.attn.k", "layers.0.attn.v")
    bits = w.view(np.uint32).astype(np.uint64)
    even = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)
    np.testing.assert_array_equal(found["model.layers.0.self_attn.qkv_proj.weight"], even)
    assert (even != w).mean() > 0.9
    size = sum(v.size for v in found.values())
    assert index["metadata"] == {
        "ParamSize": len(found), "ParamBytes": 4.0 * size, "BitsPerParam": 32.0,
    }  # fmt: skip


def test_a_tied_head_is_counted_once(tmp_path):
    loaded, _ = convert(FOLDER / "qwen2", tmp_path, "q4f16_1")
    index, found = read(tmp_path)
    size = sum(v.nbytes for v in found.values())
    count = sum(w.size for w in loaded.weights.values())
    assert index["metadata"]["BitsPerParam"] == pytest.approx(8 * size / count)


@pytest.mark.parametrize("limit", [4096, 8192, 40000])
def test_shards_end_where_tvms_do(limit, tmp_path, monkeypatch):
    """By a second reading of tvm's rule: the open file is closed before it would reach the limit;
    a tensor of half the limit or more, that does not fit, has a file of its own at once."""
    monkeypatch.setattr(mlc, "SHARD_BYTES", limit)
    _, files = convert(FOLDER / "llama", tmp_path, "q0f16", workers=2)
    index, _ = read(tmp_path)
    done, pending = [], []
    for t in files.tensors:
        for r in t.records:
            size = math.prod(r.shape) * 2
            held = sum(s for _, s in pending)
            if held + size >= limit and 2 * size >= limit:
                done.append([(r.name, size)])
                continue
            if held + size >= limit and pending:
                done.append(pending)
                pending = []
            pending = [*pending, (r.name, size)]
    done.append(pending)
    found = [[(r["name"], r["nbytes"]) for r in s["records"]] for s in index["records"]]
    assert found == done
    assert [s["dataPath"] for s in index["records"]] == [
        f"params_shard_{i}.bin" for i in range(len(done))
    ]
    assert len(done) > 1


def test_a_file_that_would_be_full(monkeypatch):
    """As tvm's own writer places tensors of these sizes (its cap set to 100 bytes)."""
    monkeypatch.setattr(mlc, "SHARD_BYTES", 100)
    spots, files = mlc.shard([40, 60, 50, 30, 70])
    assert spots == [(1, 0), (0, 0), (1, 40), (3, 0), (2, 0)]
    assert files == [60, 90, 70, 30]


@pytest.mark.parametrize("name", ["mamba", "mamba2", "falcon-mamba", "opt", "rwkv"])
def test_what_mlc_llm_does_not_have_goes_by_our_names(name, tmp_path):
    loaded, files = convert(FOLDER / name, tmp_path, "q4f16_1")
    index, found = read(tmp_path)
    assert not files.map.stock
    kinds = {r["name"]: (r["dtype"], r["format"]) for s in index["records"] for r in s["records"]}
    for w in loaded.weights.values():
        if w.role in ("vector", "table"):
            assert kinds[w.name] == ("float32", "raw"), w.name
            np.testing.assert_array_equal(found[w.name], w.rows())
        elif w.name in found:  # small, and part of a recurrence
            assert kinds[w.name][0] == "float16"
        else:
            values, rows = matrix(found, w.name, w.shape[1]), w.rows()
            bound = 1.3 / 7 * np.abs(rows).max()
            np.testing.assert_allclose(values, rows, rtol=0, atol=bound, err_msg=w.name)


RWKV6 = """
    attention.time_maa_x attention.time_maa_w attention.time_maa_k attention.time_maa_v
    attention.time_maa_r attention.time_maa_g attention.time_maa_w1 attention.time_maa_w2
    attention.time_decay_w1 attention.time_decay_w2 attention.time_decay attention.time_faaaa
    attention.key attention.value attention.receptance attention.gate.weight attention.output
    attention.ln_x.weight attention.ln_x.bias ln1.weight ln1.bias ln2.weight ln2.bias
    feed_forward.time_maa_k feed_forward.time_maa_r feed_forward.key feed_forward.receptance
    feed_forward.value
""".split()  # noqa: SIM905
RWKV5 = """
    attention.time_decay attention.time_faaaa attention.time_mix_gate attention.time_mix_key
    attention.time_mix_value attention.time_mix_receptance attention.key attention.value
    attention.receptance attention.gate.weight attention.output attention.ln_x.weight
    attention.ln_x.bias ln1.weight ln1.bias ln2.weight ln2.bias feed_forward.time_mix_key
    feed_forward.time_mix_receptance feed_forward.key feed_forward.receptance feed_forward.value
""".split()  # noqa: SIM905
needs_data = pytest.mark.skipif(
    not (DATA / "rwkv").is_dir(), reason="the tiny RWKV models are not there: EDGE_MMLLM_DATA"
)


@needs_data
@pytest.mark.parametrize(("file", "names"), [("6v0-1m", RWKV6), ("5v2-730K", RWKV5)])
def test_rwkv_as_mlc_llm_has_it(file, names, tmp_path):
    path = DATA / "rwkv" / f"tiny-rwkv-{file}.pth"
    loaded, files = convert(path, tmp_path, "q4f16_1")
    assert files.map.stock
    _, found = read(tmp_path)
    expected = {"model.ln_out.weight", "model.ln_out.bias"}
    expected |= {f"model.blocks.0.pre_ln.{n}" for n in ("weight", "bias")}
    quantized = {"model.embeddings", "head"}
    for i in range(loaded.model.layers):
        for name in names:
            plain = "time" in name or name.endswith((".weight", ".bias"))
            (expected if plain else quantized).add(f"model.blocks.{i}.{name}")
    expected |= {f"{q}.{n}" for q in quantized for n in ("q_weight", "q_scale")}
    assert set(found) == expected
    raw = open_checkpoint(path)

    def theirs(name):
        return raw.read(f"blocks.1.{name}")

    def same(name, values, tolerance=1e-3):
        stored = found[f"model.blocks.1.{name}"]
        np.testing.assert_allclose(stored, values.reshape(stored.shape), rtol=0, atol=tolerance)

    same("attention.time_faaaa", theirs("att.time_faaaa"), 0)
    if file.startswith("6"):
        for name in ("time_maa_x", "time_maa_w", "time_maa_g", "time_maa_w1", "time_decay_w2"):
            same(f"attention.{name}", theirs(f"att.{name}"))
        same("attention.time_maa_w2", theirs("att.time_maa_w2"))
        same("attention.time_decay", theirs("att.time_decay"), 0)
        same("feed_forward.time_maa_k", theirs("ffn.time_maa_k"))
    else:
        same("attention.time_mix_gate", theirs("att.time_mix_g"))
        same("feed_forward.time_mix_receptance", theirs("ffn.time_mix_r"))
        decay = np.exp(-np.exp(theirs("att.time_decay").astype(np.float64)))
        same("attention.time_decay", decay.astype(np.float32), 1e-7)


#: Of `clip_vision.py`; mlc-llm quantizes none of it.
TOWER = ("embeddings.class_embedding", "embeddings.patch_embedding.weight",
         "embeddings.position_embedding.weight", "pre_layrnorm.weight", "pre_layrnorm.bias",
         "post_layernorm.weight", "post_layernorm.bias")  # fmt: skip
TOWER_LAYER = ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj",
               "layer_norm1", "mlp.fc1", "mlp.fc2", "layer_norm2")  # fmt: skip


def test_llava_as_mlc_llm_has_it(tmp_path):
    source = ROOT / "tests/goldens/families/llava"
    loaded, files = convert(source, tmp_path, "q4f16_1", workers=2)
    assert files.map.stock
    _, found = read(tmp_path)
    checkpoint = open_checkpoint(source)
    layers = checkpoint.config["vision_config"]["num_hidden_layers"]
    tower = {f"vision_tower.vision_model.{name}" for name in TOWER} | {
        f"vision_tower.vision_model.encoder.layers.{i}.{name}.{part}"
        for i in range(layers) for name in TOWER_LAYER for part in ("weight", "bias")
    }  # fmt: skip
    quantized = {f"multi_modal_projector.linear_{i}" for i in (1, 2)}
    plain = {f"{name}.bias" for name in quantized} | {"language_model.model.norm.weight"}
    quantized |= {"language_model.model.embed_tokens", "language_model.lm_head"}
    for i in range(loaded.model.layers):
        for name in LLAMA:
            whole = f"language_model.{LAYER.format(i=i)}.{name}"
            (plain if name.endswith(".weight") else quantized).add(whole)
    assert set(found) == tower | plain | {
        f"{q}.{part}" for q in quantized for part in ("q_weight", "q_scale")
    }
    for name in tower:  # the last layer included, which our definition does not need
        theirs = checkpoint.read(name.replace("vision_model.", ""))
        np.testing.assert_array_equal(found[name], theirs.astype(np.float16), err_msg=name)
    assert found["vision_tower.vision_model.embeddings.patch_embedding.weight"].ndim == 4
    config = files.map.config
    assert config["image_token_index"] == checkpoint.config["image_token_index"]
    assert config["text_architecture"] == "LlamaForCausalLM"


def test_another_llava_keeps_our_names(tmp_path):
    loaded, files = convert(ROOT / "tests/goldens/families/llava-full-qwen2", tmp_path, "q4f16_1")
    assert not files.map.stock
    _, found = read(tmp_path)
    for name, w in loaded.weights.items():
        if name.startswith("image.") and w.role == "matrix":
            assert found[name].dtype == np.float16


@pytest.mark.parametrize(
    ("source", "quant"),
    [(n, q) for n in ("llama", "mamba2") for q in QUANTIZATIONS] + [("qwen2-window", "q4f16_0")],
)
def test_the_gates_weights_are_those_of_the_files(source, quant, tmp_path):
    """What the oracle computes with, to tell rounding from the engine's own errors."""
    loaded, files = convert(FOLDER / source, tmp_path, quant)
    stored = mlc.as_stored(files, loaded.weights)
    with WeightFiles(tmp_path, views=files.views) as reader:
        reader.check_md5()
        for name, kind in files.kinds.items():
            if kind.startswith("q"):
                values = reader.matrix(name, loaded.weights[name].shape[1], files.quant)
            else:
                values = reader.read(name)
            np.testing.assert_array_equal(values, stored[name].rows(), err_msg=name)


@needs_data
@pytest.mark.parametrize("version", ["5v2-730K", "6v0-1m"])
def test_our_names_find_what_mlc_llm_stores_otherwise(version, tmp_path):
    loaded, files = convert(DATA / "rwkv" / f"tiny-rwkv-{version}.pth", tmp_path, "q0f16")
    stored = mlc.as_stored(files, loaded.weights)
    with WeightFiles(tmp_path, views=files.views) as reader:
        for name, w in loaded.weights.items():
            values = reader.read(name)
            np.testing.assert_array_equal(values, stored[name].rows(), err_msg=name)
            np.testing.assert_allclose(values, w.rows(), rtol=2e-3, atol=2e-3, err_msg=name)


def test_half_precision_costs_next_to_nothing(tmp_path):
    loaded, files = convert(FOLDER / "llama", tmp_path, "q0f16")
    ids = np.arange(1, 20)
    exact = loaded.oracle().forward(ids)
    stored = Oracle(loaded.model, mlc.as_stored(files, loaded.weights)).forward(ids)
    np.testing.assert_allclose(stored, exact, rtol=0, atol=2e-2)


def test_models_that_mlc_llm_would_compute_otherwise_keep_our_names():
    for name in ("llama-linear", "llama-bias"):
        loaded = load(FOLDER / name)
        found = mlc.layout(loaded.model, loaded.weights, QUANTIZATIONS["q4f16_1"]).map
        assert not found.stock
        assert found.remarks
        assert found.tensors[0].name == "embed"


def test_mixes_in_another_order_keep_our_names(tmp_path):
    made = rwkv_models.blinkdl("6")
    folder = tmp_path / "hub"
    folder.mkdir()
    rwkv_models.write_hub(folder, rwkv_models.fla6(made), model_type="rwkv6")
    loaded = load(folder)
    assert not mlc.layout(loaded.model, loaded.weights, QUANTIZATIONS["q4f16_1"]).map.stock


def test_memory_stays_at_tiles(tmp_path, monkeypatch):
    """No tensor is read whole: not more rows at a time than make a tile."""
    monkeypatch.setattr("edge_mmllm_export.weights.TILE_BYTES", 4096)
    asked = []
    checkpoint = type(open_checkpoint(FOLDER / "llama"))
    read_rows = checkpoint.read

    def counting(self, name, start=0, stop=None):
        rows = read_rows(self, name, start, stop)
        asked.append(rows.nbytes)
        return rows

    monkeypatch.setattr(checkpoint, "read", counting)
    convert(FOLDER / "llama", tmp_path, "q4f16_1")
    assert max(asked) <= 4096


def test_a_bundle_moves(tmp_path):
    """The index names files, not places."""
    convert(FOLDER / "llama", tmp_path / "a", "q4f16_1")
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert str(ROOT) not in (tmp_path / "b" / "tensor-cache.json").read_text()
    read(tmp_path / "b")
