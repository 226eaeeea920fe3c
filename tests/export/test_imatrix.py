"""Importance matrices: files of both forms, damaged ones, and what the oracle collects.

Against llama.cpp's own activations: tests/full/test_gguf_mixes.py.
"""

from __future__ import annotations

import json
import struct

import gguf
import numpy as np
import pytest
from references import FOLDER, load

from edge_mmllm.errors import CheckpointError, CorruptCheckpoint, OutputExists, UsageError
from edge_mmllm.spec import TextSpec
from edge_mmllm_export.checkpoints import open_checkpoint
from edge_mmllm_export.checkpoints.base import TextAssets
from edge_mmllm_export.gguf import imatrix, imatrix_collect
from edge_mmllm_export.gguf.imatrix import Entry, Imatrix
from edge_mmllm_export.gguf.imatrix_collect import Calibration, collect, compute_imatrix

BYTES = TextAssets(TextSpec("bytes"))


def matrix():
    rng = np.random.default_rng(1)
    one = Entry(rng.random((1, 8), np.float32), np.array([96], np.float32))
    experts = Entry(rng.random((3, 4), np.float32), np.array([5, 0, 7], np.float32))
    names = {"blk.0.attn_q.weight": one, "blk.1.ffn_down_exps.weight": experts}
    return Imatrix(names, 3, 32, ("some.txt",))


def test_written_and_read_back(tmp_path):
    wanted, path = matrix(), tmp_path / "m.gguf"
    imatrix.write(wanted, path)
    found = imatrix.read(path)
    assert (found.chunk_count, found.chunk_size, found.datasets) == (3, 32, ("some.txt",))
    assert found.entries.keys() == wanted.entries.keys()
    for name, entry in wanted.entries.items():
        np.testing.assert_array_equal(found.entries[name].sums, entry.sums)
        np.testing.assert_array_equal(found.entries[name].counts, entry.counts)


def test_the_file_is_llama_cpps(tmp_path):
    imatrix.write(matrix(), tmp_path / "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    said = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert said == {
        "general.type": "imatrix",
        "imatrix.datasets": ["some.txt"],
        "imatrix.chunk_count": 3,
        "imatrix.chunk_size": 32,
    }
    shapes = {t.name: (t.tensor_type.name, t.shape.tolist()) for t in reader.tensors}
    assert shapes["blk.0.attn_q.weight.in_sum2"] == ("F32", [8, 1])
    assert shapes["blk.0.attn_q.weight.counts"] == ("F32", [1, 1])
    assert shapes["blk.1.ffn_down_exps.weight.in_sum2"] == ("F32", [4, 3])
    assert shapes["blk.1.ffn_down_exps.weight.counts"] == ("F32", [1, 3])


def test_means_and_what_no_token_reached():
    means = matrix().importances()["blk.1.ffn_down_exps.weight"].reshape(3, 4)
    sums = matrix().entries["blk.1.ffn_down_exps.weight"].sums
    np.testing.assert_allclose(means[[0, 2]], sums[[0, 2]] / [[5], [7]], rtol=1e-6)
    assert (means[1] == 1).all()


def legacy(entries, tail=b""):
    out = struct.pack("<i", len(entries))
    for name, calls, values in entries:
        out += struct.pack("<i", len(name)) + name + struct.pack("<ii", calls, len(values))
        out += np.asarray(values, "<f4").tobytes()
    return out + tail


def test_the_older_form(tmp_path):
    path = tmp_path / "m.dat"
    tail = struct.pack("<ii", 7, 4) + b"text"
    path.write_bytes(legacy([(b"a", 2, [2.0, 4.0]), (b"bc", 0, [3.0])], tail))
    found = imatrix.read(path)
    assert (found.chunk_count, found.datasets) == (7, ("text",))
    means = found.importances()
    np.testing.assert_array_equal(means["a"], [1.0, 2.0])
    np.testing.assert_array_equal(means["bc"], [3.0])
    path.write_bytes(legacy([(b"a", 2, [2.0, 4.0])]))  # without its end, as the oldest are
    assert imatrix.read(path).chunk_count == 0


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"abc",
        struct.pack("<i", -1),
        struct.pack("<i", 1 << 30),
        legacy([(b"a", 2, [1.0])])[:-2],
        legacy([(b"a", 2, [float("nan")])]),
        legacy([(b"a", 2, [-1.0])]),
        struct.pack("<iii", 1, -5, 1),
        struct.pack("<ii", 1, 1) + b"a" + struct.pack("<ii", 1, -1),
        struct.pack("<ii", 1, 1) + b"a" + struct.pack("<ii", 1, 1 << 30),
        legacy([(b"a", 2, [1.0])], struct.pack("<ii", 1, 1 << 30)),
    ],
)
def test_damaged_files_of_the_older_form(content, tmp_path):
    (tmp_path / "m.dat").write_bytes(content)
    with pytest.raises(CorruptCheckpoint):
        imatrix.read(tmp_path / "m.dat")


def test_other_gguf_files_and_damaged_ones(tmp_path):
    path = tmp_path / "m.gguf"
    out = gguf.GGUFWriter(path, "llama")
    out.add_tensor("x", np.ones(4, np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    with pytest.raises(CheckpointError, match="holds no importance matrix"):
        imatrix.read(path)
    imatrix.write(matrix(), path)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"q.weight.counts", b"q.weight.countz"))
    with pytest.raises(CorruptCheckpoint, match="sums without counts"):
        imatrix.read(path)
    rng = np.random.default_rng(5)
    for _ in range(300):  # whatever is changed: an error of ours, or a matrix
        raw = bytearray(whole[: rng.integers(5, len(whole) + 1)])
        for at in rng.integers(4, len(raw), 3):
            raw[at] = rng.integers(256)
        path.write_bytes(raw)
        try:
            imatrix.read(path).importances()
        except CheckpointError:
            continue
    with pytest.raises(UsageError, match="cannot be read"):
        imatrix.read(tmp_path / "none")


@pytest.fixture
def text(tmp_path, monkeypatch):
    """80 bytes in pieces of 32."""
    monkeypatch.setattr(imatrix_collect, "CHUNK", 32)
    path = tmp_path / "text.txt"
    path.write_bytes(np.random.default_rng(2).integers(32, 96, 80, np.uint8).tobytes())
    return path


def test_what_goes_into_the_first_layer(text):
    """By hand: the embeddings' rms norm, and what attention gives of pieces of their own."""
    loaded = load(FOLDER / "llama")
    found = collect(loaded.model, loaded.weights, BYTES, Calibration(str(text)))
    assert (found.chunk_count, found.chunk_size, found.datasets) == (2, 32, ("text.txt",))
    layers = range(loaded.model.layers)
    names = [f"attn_{n}" for n in ("q", "k", "v", "output")] + [
        f"ffn_{n}" for n in ("gate", "up", "down")
    ]
    assert found.entries.keys() == {f"blk.{i}.{n}.weight" for i in layers for n in names}
    ids = np.frombuffer(text.read_bytes(), np.uint8)[:64].astype(np.int64)
    w = loaded.weights
    x = w["embed"].rows()[ids].astype(np.float64)
    x /= np.sqrt((x**2).mean(-1, keepdims=True) + loaded.model.config.norm_eps)
    x *= w["layers.0.norm_attn"].values if "layers.0.norm_attn" in w else first_norm(w)
    for name in ("attn_q", "attn_k", "attn_v"):
        entry = found.entries[f"blk.0.{name}.weight"]
        np.testing.assert_allclose(entry.sums[0], (x**2).sum(0), rtol=1e-5)
        assert entry.counts == [64]


def first_norm(w):
    (name,) = [n for n in w if n.startswith("layers.0.") and "norm" in n and "attn" in n]
    return w[name].values


def test_each_piece_has_a_state_of_its_own(text):
    loaded = load(FOLDER / "mamba")
    both = collect(loaded.model, loaded.weights, BYTES, Calibration(str(text)))
    content = text.read_bytes()
    sums = {name: 0.0 for name in both.entries}
    for piece in (content[:32], content[32:64]):
        text.write_bytes(piece)
        one = collect(loaded.model, loaded.weights, BYTES, Calibration(str(text)))
        sums = {name: sums[name] + e.sums for name, e in one.entries.items()}
    for name, entry in both.entries.items():
        np.testing.assert_allclose(entry.sums, sums[name], rtol=1e-5, err_msg=name)
    text.write_bytes(content)
    first = collect(loaded.model, loaded.weights, BYTES, Calibration(str(text), 1))
    assert first.chunk_count == 1
    assert {float(e.counts[0]) for e in first.entries.values()} == {32.0}


def test_a_text_that_begins_with_a_token(text):
    """As llama.cpp does: before the text, and in the place of each later piece's first token."""
    loaded = load(FOLDER / "llama")
    spec = TextSpec("bytes", bos_id=5, add_bos=True)
    found = collect(loaded.model, loaded.weights, TextAssets(spec), Calibration(str(text), 1))
    content = text.read_bytes()
    text.write_bytes(b"\x05" + content)
    plain = collect(loaded.model, loaded.weights, BYTES, Calibration(str(text), 1))
    for name, entry in plain.entries.items():
        np.testing.assert_allclose(found.entries[name].sums, entry.sums, rtol=1e-6)


def test_texts_that_cannot_be_used(text, tmp_path):
    loaded = load(FOLDER / "llama")
    for assets, path, message in (
        (TextAssets(TextSpec("none")), text, "needs a tokenizer"),
        (BYTES, tmp_path / "none", "cannot be read"),
    ):
        with pytest.raises(UsageError, match=message):
            collect(loaded.model, loaded.weights, assets, Calibration(str(path)))
    text.write_bytes(b"short")
    with pytest.raises(UsageError, match="too short"):
        Calibration(str(text)).check(BYTES)


def test_the_command(text, tmp_path, monkeypatch):
    from click.testing import CliRunner

    from edge_mmllm.cli import main

    made = []
    monkeypatch.setattr(imatrix_collect, "open_checkpoint", lambda *_: _bytes(made))
    words = ["imatrix", str(FOLDER / "llama"), "--text", str(text), "--out"]
    out = tmp_path / "m.gguf"
    done = CliRunner().invoke(main, [*words, str(out), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["chunks"] == 2
    assert len(imatrix.read(out).entries) == json.loads(done.stdout)["entries"]
    assert [p.name for p in tmp_path.iterdir() if "edge" in p.name] == []
    calibration = Calibration(str(text))
    with pytest.raises(OutputExists):
        compute_imatrix(FOLDER / "llama", out, calibration)
    compute_imatrix(FOLDER / "llama", out, calibration, force=True)
    (tmp_path / "other").write_text("mine")
    with pytest.raises(OutputExists, match="not"):
        compute_imatrix(FOLDER / "llama", tmp_path / "other", calibration, force=True)


def _bytes(made):
    """The reference with a tokenizer."""
    checkpoint = open_checkpoint(FOLDER / "llama")
    checkpoint.text = lambda: BYTES
    made.append(checkpoint)
    return checkpoint
