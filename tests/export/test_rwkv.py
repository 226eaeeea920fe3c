"""RWKV: third-party logits, the published layouts, and every way to cut a text."""

from __future__ import annotations

import shutil
from functools import cache

import numpy as np
import pytest
import references
import rwkv_models
from references import DATA, load
from rwkv_models import HEADS, SIZE, VERSIONS, VOCAB, blinkdl, fla6, fla7, write_hub, write_pth

from edge_mmllm.errors import (
    CheckpointError,
    CorruptCheckpoint,
    TensorMismatch,
    UnsupportedArchitecture,
)
from edge_mmllm_export.checkpoints import open_checkpoint
from edge_mmllm_export.models import architecture_name
from edge_mmllm_export.quantize.schemes import QuantPlan
from edge_mmllm_export.weights import as_stored
from edge_mmllm_runtime.divergence import divergence
from edge_mmllm_runtime.sampling import Sampling

IDS = np.random.default_rng(1).integers(0, VOCAB, 40)
LONG = np.random.default_rng(2).integers(0, VOCAB, 1024)
#: Whole, chunked and stepwise prefill, relative to the largest logit.
CHUNK_TOLERANCE = 2e-5
TINY = {"4": "4v0-660K", "5.2": "5v2-730K", "6": "6v0-1m", "7": "7v0-834K"}
needs_data = pytest.mark.skipif(
    not (DATA / "rwkv").is_dir(), reason=f"no tiny RWKV in {DATA} (set EDGE_MMLLM_DATA)"
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """`models(version, plan)`: a random model loaded and exported, once."""
    root = tmp_path_factory.mktemp("rwkv")

    @cache
    def get(version, plan=references.F32):
        path = root / f"{version}.pth"
        if not path.exists():
            write_pth(path, blinkdl(version))
        loaded = load(path, plan)
        folder = root / f"{version}-{plan.name}-{len(plan.overrides)}"
        folder.mkdir()
        return loaded, references.export(loaded, folder)

    return get


def _close(actual, expected):
    limit = CHUNK_TOLERANCE * np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=limit)


@needs_data
@pytest.mark.parametrize("version", TINY)
def test_logits_of_rwkv_cpp(version, tmp_path):
    """Tiny trained models, their last-token logits computed by another implementation."""
    loaded = load(DATA / "rwkv" / f"tiny-rwkv-{TINY[version]}.pth")
    expected = np.load(DATA / "rwkv" / f"expected-logits-{TINY[version]}.npy")
    ids = np.array([34, 105, 110])
    oracle = loaded.oracle().forward(ids)[-1]
    np.testing.assert_allclose(oracle, expected, rtol=0, atol=1e-4)
    exported = references.export(loaded, tmp_path)
    with exported.session() as session:
        np.testing.assert_allclose(session.prefill(ids), expected, rtol=0, atol=1e-4)
        session.reset()
        for i in ids:
            stepped = session.decode(int(i))
        np.testing.assert_allclose(stepped, expected, rtol=0, atol=1e-4)


@pytest.mark.skipif(not (DATA / "zoo" / "tiny-rwkv7").is_dir(), reason="no zoo")
def test_zoo_rwkv7(tmp_path):
    loaded = load(DATA / "zoo" / "tiny-rwkv7")
    exported = references.export(loaded, tmp_path)
    with np.load(DATA / "zoo" / "tiny-rwkv7" / "golden.npz") as data, exported.session() as session:
        for i in range(4):
            ids, expected = data[f"input_ids_{i}"].astype(np.int64), data[f"logits_{i}"]
            oracle = loaded.oracle().forward(ids, np.array([len(ids) - 1]))[0]
            np.testing.assert_allclose(oracle, expected, rtol=0, atol=1e-4)
            session.reset()
            greedy = list(session.generate_tokens(ids.tolist(), 32, ignore_eos=True))
            assert greedy == data[f"greedy_{i}"].tolist()
            session.reset()
            np.testing.assert_allclose(session.prefill(ids), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("version", VERSIONS)
def test_onnx_equals_oracle(version, models):
    loaded, exported = models(version)
    expected = loaded.oracle().forward(LONG[:100])
    assert expected.std() > 1
    np.testing.assert_allclose(exported.logits(LONG[:100]), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_text_in_pieces(version, models):
    """Whole = in pieces = token by token; 511 and 5 leave a chunk of RWKV-7 unfilled."""
    loaded, exported = models(version)
    with exported.session(chunk=len(LONG)) as session:
        whole = session.prefill(LONG, logits="all")
    for chunk in (1, 5, 64, 511):
        with exported.session(chunk=chunk) as session:
            _close(session.prefill(LONG, logits="all"), whole)
    oracle = loaded.oracle()
    pieces = [oracle.forward(LONG[i : i + 37]) for i in range(0, 148, 37)]
    _close(np.concatenate(pieces), whole[:148])
    with exported.session() as session:
        _close(np.stack([session.decode(int(i)) for i in LONG]), whole)


@pytest.mark.parametrize("version", VERSIONS)
def test_snapshot_restore_and_branch(version, models, tmp_path):
    _, exported = models(version)
    sampling = Sampling(temperature=1.0, seed=5)
    with exported.session() as session, exported.session() as other:
        session.prefill(LONG[:30])
        snapshot = session.snapshot()
        first = list(session.generate_tokens(None, 24, sampling, ignore_eos=True))
        assert len(set(first)) > 6
        session.prefill(LONG[30:50])  # another branch, which must leave no trace
        session.restore(snapshot)
        assert list(session.generate_tokens(None, 24, sampling, ignore_eos=True)) == first
        snapshot.save(tmp_path / "snapshot.npz")
        other.restore(type(snapshot).load(tmp_path / "snapshot.npz"))
        assert list(other.generate_tokens(None, 24, sampling, ignore_eos=True)) == first
        assert session.state_bytes == other.state_bytes


@pytest.mark.parametrize("plan", ["f16", "int8", "int4"])
@pytest.mark.parametrize("version", VERSIONS)
def test_quantized(version, plan, models):
    """With float activations the graph equals the oracle on the stored weights; as shipped, its
    int8 activations cost little beside what rounding the weights does."""
    from test_quantized_models import _float_activations

    loaded, exported = models(version, QuantPlan(plan))
    expected = loaded.oracle(as_stored(loaded.weights)).forward(IDS)
    exact = _float_activations(exported).logits(IDS)
    np.testing.assert_allclose(exact, expected, rtol=0, atol=3e-4)
    shipped = divergence(expected, exported.logits(IDS))
    damage = divergence(loaded.oracle().forward(IDS), expected).kl_mean
    assert shipped.kl_mean <= max(0.02, 0.2 * damage)


@pytest.mark.parametrize("fused", [False, True])
def test_rwkv7_of_the_hub(fused, tmp_path):
    tensors = blinkdl("7")
    expected = load(write_pth(tmp_path / "m.pth", tensors)).oracle().forward(IDS)
    hub = write_hub(tmp_path / "hub", fla7(tensors, fused=fused), model_type="rwkv7")
    assert load(hub).model.config.group_norm_eps == pytest.approx(SIZE * 1e-5)
    write_hub(hub, fla7(tensors, fused=fused), model_type="rwkv7", group_norm_eps=64e-5)
    np.testing.assert_array_equal(load(hub).oracle().forward(IDS), expected)


def test_rwkv6_of_the_hub(tmp_path):
    tensors = blinkdl("6")
    expected = load(write_pth(tmp_path / "m.pth", tensors)).oracle().forward(IDS)
    settings = {"model_type": "rwkv6", "group_norm_eps": 64e-5}
    hub = write_hub(tmp_path / "hub", fla6(tensors), **settings)
    np.testing.assert_array_equal(load(hub).oracle().forward(IDS), expected)


def test_rwkv51_is_52_with_equal_channels(tmp_path):
    tensors = blinkdl("5.1")
    one = load(write_pth(tmp_path / "51.pth", tensors))
    for name, x in list(tensors.items()):
        if name.endswith(("time_decay", "time_faaaa")):
            assert x.shape == (HEADS,)
            tensors[name] = np.repeat(x[:, None], SIZE, axis=1)
    two = load(write_pth(tmp_path / "52.pth", tensors))
    np.testing.assert_array_equal(one.oracle().forward(IDS), two.oracle().forward(IDS))


def test_the_first_layers_dummy_adapter_changes_nothing(tmp_path):
    tensors = blinkdl("7", dummy_v=True)
    with_dummy = load(write_pth(tmp_path / "a.pth", tensors)).oracle().forward(IDS)
    assert "blocks.0.att.v1" in tensors
    for n in "012":
        tensors.pop(f"blocks.0.att.v{n}")
    without = load(write_pth(tmp_path / "b.pth", tensors)).oracle().forward(IDS)
    np.testing.assert_array_equal(with_dummy, without)


@pytest.mark.parametrize(
    ("version", "name"),
    [("4", "rwkv4"), ("5.1", "rwkv5"), ("5.2", "rwkv5"), ("6", "rwkv6"), ("7", "rwkv7")],
)
def test_the_version_is_read_from_the_tensors(version, name, tmp_path):
    assert (
        architecture_name(open_checkpoint(write_pth(tmp_path / "m.pth", blinkdl(version)))) == name
    )


def test_group_norm_epsilon(tmp_path):
    """By the head size in RWKV-5, fixed in 6 and 7, and always the config's where it says so."""
    for version, expected in (("5.2", 4e-5), ("6", 64e-5), ("7", 64e-5)):
        folder = tmp_path / version
        folder.mkdir()
        write_pth(folder / "m.pth", blinkdl(version))
        assert load(folder).model.config.group_norm_eps == pytest.approx(expected)
        (folder / "config.json").write_text('{"group_norm_eps": 0.25}')
        assert load(folder).model.config.group_norm_eps == 0.25


def test_wkv4_survives_large_keys(tmp_path):
    """exp(k) overflows float32 from 89 on; the running maximum keeps it in range, in both."""
    tensors = blinkdl("4")
    for i in range(rwkv_models.LAYERS):
        tensors[f"blocks.{i}.att.key.weight"] *= 100
    loaded = load(write_pth(tmp_path / "m.pth", tensors))
    exported = references.export(loaded, tmp_path)
    expected = loaded.oracle().forward(IDS)
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(exported.logits(IDS), expected, rtol=0, atol=1e-3)


def test_what_does_not_fit(tmp_path):
    tensors = blinkdl("7")
    tensors["blocks.1.att.w1"] = tensors["blocks.1.att.w1"][:, :8]
    tensors["blocks.2.att.extra"] = np.ones(3, np.float32)
    with pytest.raises(TensorMismatch) as error:
        load(write_pth(tmp_path / "a.pth", tensors))
    assert "blocks.1.att.w1: expected (48, 16), found (48, 8)" in str(error.value)
    assert "unexpected: blocks.2.att.extra" in str(error.value)
    tensors = blinkdl("5.2")
    for i in range(rwkv_models.LAYERS):
        tensors.pop(f"blocks.{i}.att.gate.weight")
    with pytest.raises(UnsupportedArchitecture, match=r"5\.0"):
        load(write_pth(tmp_path / "b.pth", tensors))
    tensors = blinkdl("7")
    tensors["blocks.0.att.r_k"] = np.ones((3, 15), np.float32)
    with pytest.raises(CheckpointError, match="heads"):
        load(write_pth(tmp_path / "c.pth", tensors))


@needs_data
def test_the_vocabulary_beside_the_weights(tmp_path):
    assert open_checkpoint(DATA / "rwkv" / "tiny-rwkv-7v0-834K.pth").text().spec.tokenizer == "none"
    path = write_pth(tmp_path / "m.pth", blinkdl("7"))
    small = "".join(f"{i + 1} {bytes([i])!r} 1\n" for i in range(256))
    (tmp_path / "rwkv_vocab_x.txt").write_text(small)
    assert open_checkpoint(path).text().spec.tokenizer == "none"  # 257 ids, 96 rows
    (tmp_path / "config.json").write_text('{"vocab_file": "rwkv_vocab_x.txt"}')
    with pytest.raises(CorruptCheckpoint, match="more ids"):
        open_checkpoint(path).text()
    (tmp_path / "config.json").write_text('{"vocab_file": "../rwkv_vocab_x.txt"}')
    with pytest.raises(CorruptCheckpoint, match="plain file name"):
        open_checkpoint(path).text()


@pytest.mark.skipif(not (DATA / "zoo" / "tiny-rwkv7").is_dir(), reason="no zoo")
def test_a_bundle_speaks(tmp_path):
    """The whole way: `.pth` with its vocabulary to a bundle that answers in text."""
    import edge_mmllm
    from edge_mmllm_export.exporter import ExportOptions, export

    for name in ("tiny-rwkv7.pth", "rwkv_vocab_tiny2k.txt"):
        shutil.copy(DATA / "zoo" / "tiny-rwkv7" / name, tmp_path)
    bundle = export(tmp_path, tmp_path / "out", ExportOptions(QuantPlan("f16"), gate=False))
    assert (bundle.root / "rwkv_vocab.txt").is_file()
    with edge_mmllm.load(bundle.root, threads=1) as session:
        answer = "".join(session.generate("The old man looked at the", max_new_tokens=10))
    assert answer == ' old man, and said, "I am a'
