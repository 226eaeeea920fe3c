"""Binding parameters to a checkpoint: everything wrong is listed at once, nothing is guessed."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import references
import safetensors.numpy
from memory import MemoryCheckpoint, weight

from edge_mmllm.errors import NonFiniteWeights, TensorMismatch
from edge_mmllm_export import weights
from edge_mmllm_export.quantize.schemes import F16, QuantPlan, Scheme
from edge_mmllm_export.weights import Parameter, Source, as_stored, bind

RNG = np.random.default_rng(0)
A = RNG.standard_normal((6, 4)).astype(np.float32)


def _bind(arrays, parameters, sources=None, **options):
    sources = sources or {p.name: Source(p.name) for p in parameters}
    return bind(MemoryCheckpoint(arrays), parameters, sources, **options)


def test_everything_that_does_not_fit_is_listed_at_once():
    parameters = [Parameter(n, (6, 4)) for n in ("a", "b", "c", "layers.0.weight")]
    arrays = {"a": A, "b": A.T, "layers.0.weigth": A, "extra": A[0], "rope.inv_freq": A[0]}
    with pytest.raises(TensorMismatch) as caught:
        _bind(arrays, parameters, ignored=["*.inv_freq"])
    message = str(caught.value)
    assert "2 tensors missing, 2 unexpected, 1 of the wrong shape" in message
    for line in (
        "missing: c (6, 4)",
        "missing: layers.0.weight (6, 4) (there is: layers.0.weigth)",
        "unexpected: layers.0.weigth (6, 4)",
        "unexpected: extra (4,)",
        "wrong shape: b: expected (6, 4), found (4, 6)",
    ):
        assert line in message.splitlines() or f"    {line}" in message.splitlines()
    assert "inv_freq" not in message


@pytest.mark.parametrize("extra", ["b.bias", "a.inv_freq.b"])
def test_a_tensor_that_the_model_would_ignore_is_an_error(extra):
    with pytest.raises(TensorMismatch, match=f"unexpected: {extra} "):
        _bind({"a": A, extra: A}, [Parameter("a", (6, 4))], ignored=["*.inv_freq"])


def test_a_real_checkpoint_with_wrong_tensors(tmp_path):
    shutil.copy(references.FOLDER / "mamba2" / "config.json", tmp_path)
    tensors = safetensors.numpy.load_file(references.FOLDER / "mamba2" / "model.safetensors")
    del tensors["backbone.layers.0.mixer.D"]
    tensors["backbone.layers.1.mixer.A"] = tensors.pop("backbone.layers.1.mixer.A_log")
    tensors["backbone.norm_f.weight"] = tensors["backbone.norm_f.weight"][:-1].copy()
    fused = tensors["backbone.layers.1.mixer.in_proj.weight"]
    tensors["backbone.layers.1.mixer.in_proj.weight"] = fused[:-2].copy()
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(TensorMismatch) as caught:
        references.load(tmp_path)
    lines = [line.strip() for line in str(caught.value).splitlines()]
    layer = "backbone.layers.1.mixer"
    assert lines[2:-1] == [
        "found:",
        "missing: backbone.layers.0.mixer.D (6,)",
        f"missing: {layer}.A_log (6,) (there is: {layer}.A)",
        f"unexpected: {layer}.A (6,)",
        f"wrong shape: {layer}.in_proj.weight: expected 230 rows, found (228, 48)",
        "wrong shape: backbone.norm_f.weight: expected (48,), found (47,)",
    ]


def test_a_fused_tensor_with_rows_to_spare_is_refused():
    """Slices that leave rows over would drop weights in silence."""
    parts = {"q": Source("qkv", rows=(0, 2)), "k": Source("qkv", rows=(2, 4))}
    parameters = [Parameter("q", (2, 4)), Parameter("k", (2, 4))]
    bound = _bind({"qkv": A[:4]}, parameters, parts)
    np.testing.assert_array_equal(bound["k"].rows(), A[2:4])
    with pytest.raises(TensorMismatch, match=r"wrong shape: qkv: expected 4 rows, found \(6, 4\)"):
        _bind({"qkv": A}, parameters, parts)


def test_a_row_slice_of_the_wrong_width():
    with pytest.raises(TensorMismatch, match=r"wrong shape: qkv: expected \(2, 5\)"):
        _bind({"qkv": A[:2]}, [Parameter("q", (2, 5))], {"q": Source("qkv", rows=(0, 2))})


def test_axes_of_length_one_are_no_difference():
    conv = RNG.standard_normal((6, 1, 4)).astype(np.float32)
    bound = _bind({"conv": conv}, [Parameter("conv", (6, 4), "vector")])
    np.testing.assert_array_equal(bound["conv"].values, conv[:, 0])


def test_slices_order_and_function_apply_to_any_tile():
    big = RNG.standard_normal((17, 4)).astype(np.float32)
    order = RNG.permutation(12)
    source = Source("t", rows=(5, 17), order=order, apply=lambda x: -np.exp(x))
    w = _bind({"t": big}, [Parameter("w", (12, 4))], {"w": source})["w"]
    expected = -np.exp(big[5:17][order])
    np.testing.assert_array_equal(w.rows(), expected)
    for start, stop in ((0, 1), (3, 9), (11, 12)):
        np.testing.assert_array_equal(w.rows(start, stop), expected[start:stop])


def test_tiles_cover_every_row_once(monkeypatch):
    monkeypatch.setattr(weights, "TILE_BYTES", 40)
    w = weight(A)
    tiles = list(w.tiles())
    assert [(start, stop) for start, stop, _ in tiles] == [(0, 2), (2, 4), (4, 6)]
    np.testing.assert_array_equal(np.concatenate([t for _, _, t in tiles]), A)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite_is_named_with_tensor_and_index(value):
    array = A.copy()
    array[4, 3] = value
    w = weight(array, name="model.layers.0.q")
    w.rows(0, 4)
    for start in (0, 3):
        with pytest.raises(NonFiniteWeights) as caught:
            w.rows(start, 6)
        assert "tensor model.layers.0.q, first at (4, 3)" in str(caught.value)
        assert f"found: {value}" in str(caught.value)


def test_not_finite_is_named_by_the_checkpoints_own_row():
    array = np.concatenate([A, A])
    array[9, 1] = np.nan
    source = Source("qkv", rows=(6, 12), order=np.arange(6)[::-1].copy())
    w = _bind({"qkv": array}, [Parameter("k", (6, 4))], {"k": source})["k"]
    with pytest.raises(NonFiniteWeights, match=r"tensor qkv, first at \(9, 1\)"):
        w.rows(1, 4)


def test_large_finite_weights_are_no_error():
    array = np.full((2, 4), 3e38, np.float32)
    np.testing.assert_array_equal(weight(array).rows(), array)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_export_with_a_nan_fails_and_names_it(workers, tmp_path):
    from edge_mmllm_export.onnx import write_stages

    loaded = references.load(references.FOLDER / "llama")
    up = loaded.weights["layers.1.mlp.up"]
    bad = up.rows().copy()
    bad[70, 5] = np.nan
    loaded.weights["layers.1.mlp.up"] = weight(bad, name="their.up_proj.weight")
    with pytest.raises(NonFiniteWeights, match=r"their.up_proj.weight, first at \(70, 5\)"):
        write_stages(loaded.model, loaded.weights, tmp_path, workers=workers)
    assert not (tmp_path / "decoder.onnx").exists()


def test_as_stored_shows_what_a_device_sees():
    scheme = Scheme(4, 32)
    matrix = weight(A, scheme)
    (stored,) = as_stored({"w": matrix}).values()
    assert not np.array_equal(stored.rows(), A)
    np.testing.assert_array_equal(stored.rows(2, 5), stored.rows()[2:5])
    (half,) = as_stored({"w": weight(A, F16)}).values()
    np.testing.assert_array_equal(half.rows(), A.astype(np.float16))
    (vector,) = as_stored({"w": weight(A, scheme, "vector")}).values()
    np.testing.assert_array_equal(vector.rows(), A)


def _tied(tmp_path, head):
    """The tied qwen2 reference with an `lm_head.weight` of these values."""
    source = references.FOLDER / "qwen2"
    tensors = safetensors.numpy.load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = head(tensors["model.embed_tokens.weight"])
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(source / "config.json", tmp_path)
    return tmp_path


def test_a_tied_head_that_repeats_the_embedding_is_left_out(tmp_path):
    assert "head" not in references.load(_tied(tmp_path, lambda e: e.copy())).weights


@pytest.mark.parametrize("head", [lambda e: e + 1, lambda e: e[:-1].copy()])
def test_a_tied_head_of_its_own_is_an_error(tmp_path, head):
    with pytest.raises(TensorMismatch, match=r"another head[\s\S]*lm_head\.weight"):
        references.load(_tied(tmp_path, head))


def test_float16_that_would_overflow_is_named(tmp_path):
    source = references.FOLDER / "llama"
    tensors = safetensors.numpy.load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = tensors[name].astype(np.float32)
    tensors[name][3, 5] = 1e5
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(source / "config.json", tmp_path)
    with pytest.raises(NonFiniteWeights, match=r"down_proj[\s\S]*layers\.1\.mlp\.down=f32"):
        references.export(references.load(tmp_path, QuantPlan("f16")), tmp_path)


def test_rows_that_follow_in_another_tensor():
    """An extended vocabulary kept apart: one weight, read across the seam."""
    arrays = {"a": A, "b": -A[:2]}
    sources = {"x": Source("a", more=("b",))}
    whole = np.concatenate([A, -A[:2]])
    bound = _bind(arrays, [Parameter("x", (8, 4))], sources)["x"]
    np.testing.assert_array_equal(bound.rows(), whole)
    for start, stop in ((0, 6), (5, 7), (6, 8), (7, 8)):
        np.testing.assert_array_equal(bound.rows(start, stop), whole[start:stop])
    with pytest.raises(TensorMismatch, match="wrong shape: a"):
        _bind(arrays, [Parameter("x", (9, 4))], sources)
    with pytest.raises(TensorMismatch, match="missing: c"):
        _bind({"a": A}, [Parameter("x", (8, 4))], {"x": Source("a", more=("c",))})
