"""GGUF files as we write them: tensors, types, metadata, tokenizers, bundles.

The expected tensors come from writers that know nothing of our maps: `test_gguf_models.write_gguf`
(names of the `gguf` package) and `benchmarks/random_gguf.py`.
"""

from __future__ import annotations

import json

import gguf
import numpy as np
import pytest
import rwkv_models
from gguf.quants import dequantize
from references import DATA, FOLDER, ROOT, golden, load
from test_gguf_models import write_gguf

from edge_mmllm.errors import CheckpointError, ExportError, UnsupportedArchitecture, UsageError
from edge_mmllm.spec import TextSpec
from edge_mmllm.text import Text
from edge_mmllm_export import exporter
from edge_mmllm_export.checkpoints import open_checkpoint
from edge_mmllm_export.checkpoints.base import TextAssets
from edge_mmllm_export.checkpoints.gguf_text import gguf_text
from edge_mmllm_export.gguf import maps as gguf_maps
from edge_mmllm_export.gguf import types as gguf_types
from edge_mmllm_export.gguf import write as ours
from edge_mmllm_export.gguf.layout import Wanted
from edge_mmllm_export.gguf.stored import as_stored
from edge_mmllm_export.gguf.vocab import vocabulary
from edge_mmllm_export.planning import ExportOptions
from edge_mmllm_export.quantize.schemes import QuantPlan, Scheme

NONE = TextAssets(TextSpec("none"))
QUANTIZED = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")


def convert(source, path, kind="F32", *, workers=1):
    """A checkpoint as GGUF; returns the file as the `gguf` package reads it."""
    plan = ours.plan_for(kind, QuantPlan())
    loaded = load(source, plan)
    checkpoint = open_checkpoint(source)
    file = ours.layout(loaded.model, loaded.weights, Wanted(plan, kind), checkpoint)
    ours.write(file, NONE, checkpoint, path, workers=workers)
    return gguf.GGUFReader(path)


def tensors(reader):
    return {
        t.name: dequantize(t.data, t.tensor_type).reshape(t.shape[::-1]) for t in reader.tensors
    }


def metadata(reader):
    return {key: f.contents() for key, f in reader.fields.items() if not key.startswith("GGUF.")}


def same(said, theirs):
    for key in theirs.keys() - {"tokenizer.ggml.model"}:
        value = theirs[key]
        exact = isinstance(value, str)
        assert said[key] == (value if exact else pytest.approx(value, rel=1e-6)), key


@pytest.mark.parametrize(
    "name", ["llama", "llama-tied-llama3", "llama-linear", "qwen2", "qwen3", "olmo2"]
)
def test_tensors_of_the_llama_family(name, tmp_path):
    wanted = gguf.GGUFReader(write_gguf(FOLDER / name, tmp_path / "wanted.gguf"))
    found = convert(FOLDER / name, tmp_path / "found.gguf", workers=2)
    expected, actual = tensors(wanted), tensors(found)
    assert actual.keys() == expected.keys()
    for key, values in expected.items():
        tolerance = 1e-5 if key == "rope_freqs.weight" else 0
        np.testing.assert_allclose(actual[key], values, rtol=tolerance, atol=0, err_msg=key)
    same(metadata(found), metadata(wanted))


@pytest.mark.parametrize("name", ["llama", "llama-tied-llama3", "qwen3", "olmo2"])
def test_read_back_it_is_the_same_model(name, tmp_path):
    convert(FOLDER / name, tmp_path / "m.gguf")
    ids = golden(name)[0]
    expected = load(FOLDER / name).oracle().forward(ids)
    np.testing.assert_allclose(
        load(tmp_path / "m.gguf").oracle().forward(ids), expected, rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("name", ["mamba", "mamba2", "rwkv6", "rwkv7"])
def test_tensors_of_recurrent_models(name, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import random_gguf
    import random_models

    random_models.write(getattr(random_models, name)(128, 2, 96), tmp_path)
    random_gguf.write(tmp_path, tmp_path / "wanted.gguf")
    wanted = gguf.GGUFReader(tmp_path / "wanted.gguf")
    found = convert(tmp_path, tmp_path / "found.gguf")
    expected, actual = tensors(wanted), tensors(found)
    assert actual.keys() == expected.keys()
    scaled = ("time_mix_value", "time_mix_r_k")  # see `gguf_maps.rwkv._louder`
    for key, values in expected.items():
        assert actual[key].shape == values.shape, key
        if not any(s in key for s in scaled):
            np.testing.assert_allclose(actual[key], values, rtol=1e-3, atol=1e-6, err_msg=key)
    same(metadata(found), metadata(wanted))


@pytest.mark.parametrize("version", ["6", "7"])
def test_rwkv_of_both_layouts_is_one_file(version, tmp_path, monkeypatch):
    """But for the group norm's epsilon, which the values' projection makes up for."""
    for name, value in (("HIDDEN", 128), ("HEADS", 2), ("SIZE", 64)):
        monkeypatch.setattr(rwkv_models, name, value)
    monkeypatch.setattr(rwkv_models._Random.norm, "__defaults__", (128,))
    made = rwkv_models.blinkdl(version)
    pth = rwkv_models.write_pth(tmp_path / "a.pth", made)
    hub = {"6": rwkv_models.fla6, "7": lambda t: rwkv_models.fla7(t, fused=False)}[version](made)
    folder = tmp_path / "hub"
    folder.mkdir()
    rwkv_models.write_hub(folder, hub, model_type=f"rwkv{version}", group_norm_eps=64e-5)
    first = tensors(convert(pth, tmp_path / "a.gguf"))
    second = tensors(convert(folder, tmp_path / "b.gguf"))
    assert first.keys() == second.keys()
    for key, values in first.items():
        np.testing.assert_array_equal(second[key], values, err_msg=key)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_block_type_is_read_as_it_was_meant(kind):
    rng = np.random.default_rng(3)
    rows = rng.normal(0.01, 0.1, (5, 96)).astype(np.float32)
    rows[1, :32] = 0
    rows[2, 32:64] = 0.25  # one value
    raw = gguf_types.encode(rows, kind)
    assert raw.shape == (5, gguf_types.row_bytes(kind, 96))
    back = dequantize(raw, gguf.GGMLQuantizationType[kind])
    levels = (1 << gguf_types.BITS[kind]) - 1
    blocks = rows.reshape(5, 3, 32)
    if kind.endswith("_1"):
        step = (blocks.max(-1) - blocks.min(-1)) / levels
    else:
        step = 2 * np.abs(blocks).max(-1) / (levels - 1)
    error = np.abs(back.reshape(blocks.shape) - blocks)
    # The search may shrink the range a little: outliers then err by more than half a step.
    assert (error <= 2.2 * step[..., None] + 3e-4).all()
    rms = np.sqrt((error**2).mean(-1))
    assert (rms <= 0.40 * step + 1e-4).all()
    assert (back[1, :32] == 0).all()


@pytest.mark.parametrize(("kind", "bits"), [("Q4_0", 4), ("Q8_0", 8)])
def test_symmetric_types_are_the_other_formats_numbers(kind, bits):
    from edge_mmllm_export.quantize import blocks

    rows = np.random.default_rng(4).normal(0, 1, (7, 64)).astype(np.float32)
    scheme = Scheme(bits, 32)
    expected = blocks.dequantize(blocks.quantize(rows, scheme), scheme, 64)
    back = dequantize(gguf_types.encode(rows, kind), gguf.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(back, expected)


def test_plain_types():
    rows = np.random.default_rng(5).normal(0, 1, (3, 40)).astype(np.float32)
    for kind in ("F32", "F16", "BF16"):
        back = dequantize(gguf_types.encode(rows, kind), gguf.GGMLQuantizationType[kind])
        tolerance = {"F32": 0, "F16": 2**-11, "BF16": 2**-8}[kind]
        np.testing.assert_allclose(back, rows, rtol=tolerance)
    bf16 = gguf_types.encode(rows, "BF16")
    np.testing.assert_array_equal(bf16, gguf.quants.quantize(rows, gguf.GGMLQuantizationType.BF16))
    with pytest.raises(ExportError, match="too large for F16"):
        gguf_types.encode(rows * 1e6, "F16")


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0", "Q5_1"])
def test_what_is_protected(kind, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import random_models

    random_models.write(random_models.mamba(128, 2, 96), tmp_path)
    plan = ours.plan_for(kind, QuantPlan())
    found = {t.name: t.tensor_type.name for t in convert(tmp_path, tmp_path / "a", kind).tensors}
    assert found["blk.0.ssm_in.weight"] == kind
    assert found["blk.0.ssm_a"] == found["blk.0.ssm_conv1d.weight"] == "F32"
    assert found["blk.0.ssm_x.weight"] == ("F16" if kind == "F16" else "Q8_0")
    assert found["token_embd.weight"] == ("Q8_0" if plan.name == "int4" else kind)
    general = metadata(gguf.GGUFReader(tmp_path / "a"))
    assert general["general.file_type"] == gguf.LlamaFileType[f"MOSTLY_{kind}"]


def test_a_bundle(tmp_path):
    bundle = exporter.export(
        FOLDER / "llama",
        tmp_path / "out",
        ExportOptions(QuantPlan("int8"), format="gguf", gate=False),
    )
    manifest = bundle.manifest
    assert (manifest.engine, manifest.gate.verdict) == ("gguf", "not judged")
    assert manifest.model.states == ()
    assert manifest.model.stages["decoder"].file == "model.gguf"
    reader = gguf.GGUFReader(bundle.file("model.gguf"))
    sizes = sum(int(t.n_bytes) for t in reader.tensors)
    assert sizes == sum(g.size_bytes for g in manifest.quantization.groups)
    plan = exporter.plan_export(
        FOLDER / "llama", ExportOptions(QuantPlan("int8"), format="gguf", gate=False)
    )
    assert plan.groups == manifest.quantization.groups
    assert bundle.size_bytes <= plan.disk_bytes


def test_a_sliding_window_limits_the_context(tmp_path):
    options = ExportOptions(QuantPlan("f32"), format="gguf", gate=False)
    manifest = exporter.export(FOLDER / "mistral-window", tmp_path / "out", options).manifest
    window = json.loads((FOLDER / "mistral-window" / "config.json").read_text())["sliding_window"]
    assert manifest.model.context_length == window


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("opt", "llama.cpp cannot run this opt"),
        ("rwkv", "llama.cpp cannot run this rwkv4"),
        ("llama-bias", "its activation is gelu"),
        ("mamba2-limits", "it limits time steps"),
        ("mamba-bias", "biases"),
    ],
)
def test_what_llama_cpp_has_no_graph_for(name, message, tmp_path):
    with pytest.raises(UnsupportedArchitecture, match=message) as caught:
        exporter.export(FOLDER / name, tmp_path / "out", ExportOptions(format="gguf"))
    assert "--format onnx" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_small_heads_that_llama_cpp_would_read_beyond(tmp_path):
    path = rwkv_models.write_pth(tmp_path / "a.pth", rwkv_models.blinkdl("7"))
    with pytest.raises(UnsupportedArchitecture, match="its heads are of 16"):
        convert(path, tmp_path / "a.gguf")


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q5_1"])
def test_the_oracle_can_compute_with_what_is_stored(kind, tmp_path):
    """What the gate tells the engine's arithmetic from."""
    source = FOLDER / "llama"
    plan = ours.plan_for(kind, QuantPlan())
    loaded = load(source, plan)
    path = tmp_path / "m.gguf"
    convert(source, path, kind)
    read = load(path).weights
    for name, w in as_stored(loaded.model, loaded.weights, Wanted(plan, kind), path).items():
        np.testing.assert_array_equal(w.rows(), read[name].rows(), err_msg=name)


def test_every_map_is_of_a_definition():
    from edge_mmllm_export.models import ARCHITECTURES

    assert gguf_maps.GGUF_MAPS.keys() < ARCHITECTURES.keys() | {"qwen2_vl_text"}


def test_usage():
    with pytest.raises(UsageError, match="gguf_type"):
        ExportOptions(gguf_type="Q4_0")
    with pytest.raises(UsageError, match="unknown format"):
        ExportOptions(format="exe")
    options = ExportOptions(QuantPlan(block_size=64), format="gguf")
    with pytest.raises(UsageError, match="one size"):
        exporter.plan_export(FOLDER / "llama", options)


def _read_back(assets, rows):
    """The tokenizer of a file with this vocabulary, rebuilt."""
    words = vocabulary(assets, rows)
    said = {f"tokenizer.ggml.{key}": value for key, value in words.settings.items()}
    lists = {"tokens": words.tokens, "token_type": words.types, "merges": words.merges}
    lists |= {"scores": words.scores, "model": words.model}
    said |= {f"tokenizer.ggml.{key}": value for key, value in lists.items() if value}
    again = gguf_text(said, ROOT)
    return words, Text(again.spec, again.tokenizer_json), Text(assets.spec, assets.tokenizer_json)


SAMPLES = ("Hello world, it's 12345!", " \n\n a  b\tc", "naïve café 中文 🤗", "<s>x</s>", "")


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the data that is not in the repository")
@pytest.mark.parametrize("name", ["tiny-mamba", "tiny-llava"])
def test_a_byte_level_tokenizer_survives(name):
    assets = open_checkpoint(DATA / "zoo" / name).text()
    words, again, before = _read_back(assets, 5000)
    assert words.model == "gpt2"
    assert words.settings["pre"] == "gpt-2"
    assert len(words.tokens) == 5000
    for text in SAMPLES:
        assert list(again.encode(text)) == list(before.encode(text)), text


def _llama_tokenizer():
    """SentencePiece as `tokenizer.json`: byte tokens, scores lost, merges in order."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    letters = [*"▁abehlot", "he", "ll", "llo", "hello", "▁hello", "▁a", "to"]
    vocab = {p: i for i, p in enumerate([*pieces, *letters])}
    merges = [("h", "e"), ("l", "l"), ("ll", "o"), ("he", "llo"), ("▁", "hello"), ("▁", "a")]
    merges.append(("t", "o"))
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{"id": i, "content": pieces[i], "special": True, **special} for i in range(3)]
    steps = [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ]
    document = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": steps}, "pre_tokenizer": None,
        "post_processor": None, "decoder": {"type": "ByteFallback"},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": "<unk>", "fuse_unk": True,
            "continuing_subword_prefix": None, "end_of_word_suffix": None, "byte_fallback": True,
            "ignore_merges": False, "vocab": vocab, "merges": [list(m) for m in merges],
        },
    }  # fmt: skip
    spec = TextSpec("tokenizers", bos_id=1, eos_ids=(2,), add_bos=True)
    return TextAssets(spec, json.dumps(document).encode())


def test_a_sentencepiece_tokenizer_survives():
    assets = _llama_tokenizer()
    words, again, before = _read_back(assets, 300)
    assert words.model == "llama"
    assert words.types[3:259] == [6] * 256
    assert words.types[:3] == [2, 3, 3]
    assert words.settings["add_bos_token"] is True
    for text in ("hello a hello", "hellto é", "a", "to be"):
        assert list(again.encode(text)) == list(before.encode(text)), text


def test_an_unknown_way_to_split_is_refused():
    assets = _llama_tokenizer()
    document = json.loads(assets.tokenizer_json or b"")
    document["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "a"}, "behavior": "Removed", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
        ],
    }
    with pytest.raises(CheckpointError, match="no form for this tokenizer"):
        vocabulary(TextAssets(assets.spec, json.dumps(document).encode()), 300)


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the data that is not in the repository")
def test_the_world_tokenizer():
    words = vocabulary(open_checkpoint(DATA / "zoo" / "tiny-rwkv7").text(), 2100)
    assert words.model == "rwkv"
    assert len(words.tokens) == len(words.types) == 2100
    assert words.tokens[1] == r"\x00"
    assert words.types[0] == 3
    assert words.types[-1] == 5


def test_licence_and_name(tmp_path):
    import shutil

    shutil.copytree(FOLDER / "llama", tmp_path / "my-model")
    card = (
        '---\nlicense: apache-2.0\nlanguage:\n- en\nlicense_name: "Mine"\n---\n# text\nlicense: no'
    )
    (tmp_path / "my-model" / "README.md").write_text(card)
    said = metadata(convert(tmp_path / "my-model", tmp_path / "m.gguf"))
    assert said["general.name"] == "my-model"
    assert said["general.license"] == "apache-2.0"
    assert said["general.license.name"] == "Mine"
    assert metadata(convert(tmp_path / "m.gguf", tmp_path / "n.gguf"))["general.license"] == (
        "apache-2.0"
    )
