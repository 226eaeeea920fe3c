"""What the engine over llama.cpp computes itself: places, runs of tokens and rows, activations,
convolutions. Without llama.cpp; with it: tests/full/test_gguf_media.py."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edge_mmllm_runtime.gguf import exact as gguf_exact
from edge_mmllm_runtime.gguf import sound as gguf_sound
from edge_mmllm_runtime.gguf.media import patches_of
from edge_mmllm_runtime.gguf.places import TOKEN_BYTES, Places
from edge_mmllm_runtime.prompted import Prompted, Span, parts

#: Three tokens, a picture of 2 by 3 rows, two tokens.
GRID = np.indices((1, 2, 3)).reshape(3, -1)
STEPS = np.concatenate(
    [np.tile(np.arange(3), (3, 1)), 3 + GRID, np.tile([6, 7], (3, 1))], axis=1
)  # fmt: skip


def placed() -> Places:
    places = Places(16)
    places.add(0, 11, STEPS)
    return places


def test_a_picture_takes_fewer_places_than_rows():
    places = Places(16)
    found = places.add(0, 11, STEPS)
    np.testing.assert_array_equal(found, STEPS)
    np.testing.assert_array_equal(places.add(11, 2, None), np.tile([8, 9], (3, 1)))


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_places_in_chunks(chunk):
    whole, places = placed(), Places(16)
    for start in range(0, 11, chunk):
        part = STEPS[:, start : start + chunk]
        before = int(STEPS[:, :start].max(initial=-1)) + 1
        places.add(start, part.shape[1], part - before)
    np.testing.assert_array_equal(places.save(11), whole.save(11))


@pytest.mark.parametrize(("position", "place"), [(0, 0), (3, 3), (4, None), (8, None), (9, 6)])
def test_where_a_cache_can_be_cut(position, place):
    """Rows of a picture share the place of its frame, so there is no cut between them."""
    assert placed().cut(position, 11) == place


def test_what_may_belong_to_the_picture_before():
    places = placed()
    assert [places.splits(i) for i in (0, 3, 5, 9, 10)] == [False, False, True, True, False]


def test_places_are_saved():
    places, other = placed(), Places(32)
    state = places.save(11)
    assert state.size == 11 * TOKEN_BYTES
    other.load(state, 11)
    np.testing.assert_array_equal(other.add(11, 1, None), [[8]] * 3)


@pytest.mark.parametrize("longest", [1, 2, 4, 100])
def test_runs_of_tokens_and_rows(longest):
    rows = np.arange(12, dtype=np.float32).reshape(6, 2)
    ids = np.arange(20, 31)
    prompt = Prompted(ids, (Span(2, 3, 1, lambda: rows), Span(5, 2, 0, lambda: rows)), ids)
    out = np.zeros((11, 2), np.float32)
    for start, part in parts(prompt, longest):
        assert 0 < len(part) <= longest
        out[start : start + len(part)] = part if part.dtype == np.float32 else part[:, None]
    expected = np.repeat(ids[:, None], 2, 1).astype(np.float32)
    expected[2:5], expected[5:7] = rows[1:4], rows[:2]
    np.testing.assert_array_equal(out, expected)


def test_runs_of_ids_and_of_embeddings_are_cut_alone():
    ids = np.arange(5)
    assert [(s, p.tolist()) for s, p in parts(ids, 3)] == [(0, [0, 1, 2]), (3, [3, 4])]


def test_activations():
    x = np.linspace(-9, 9, 3001, dtype=np.float32)
    erf = np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x.tolist()])
    assert np.abs(gguf_exact.gelu(x) - erf).max() < 1e-6
    tanh = [0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))
            for v in x.tolist()]  # fmt: skip
    assert np.abs(gguf_exact.gelu_tanh(x) - tanh).max() < 1e-6
    quick = [v / (1 + math.exp(-1.702 * v)) for v in x.tolist()]
    assert np.abs(gguf_exact.quick_gelu(x) - quick).max() < 1e-6
    assert gguf_exact.quick_gelu(np.array([-1e4], np.float32))[0] == 0


def test_convolutions_of_sound():
    rng = np.random.default_rng(0)
    mel = rng.normal(size=(4, 10)).astype(np.float32)
    shapes = {"1.weight": (6, 4, 3), "1.bias": (6,), "2.weight": (6, 6, 3), "2.bias": (6,)}
    tensors = {
        f"a.conv1d.{name}": rng.normal(size=shape).astype(np.float32).reshape(-1)
        for name, shape in shapes.items()
    }

    def plain(x, w, stride):
        padded = np.pad(x, ((0, 0), (1, 1)))
        starts = range(0, x.shape[1], stride)
        return np.stack([np.tensordot(w, padded[:, i : i + 3], 2) for i in starts], 1)

    w1, w2 = (tensors[f"a.conv1d.{i}.weight"].reshape(6, -1, 3) for i in (1, 2))
    hidden = gguf_exact.gelu(plain(mel, w1, 1) + tensors["a.conv1d.1.bias"][:, None])
    found = gguf_sound.convolved(mel, tensors)
    assert found.shape == (6, 5)
    np.testing.assert_allclose(found, plain(hidden, w2, 2), rtol=1e-4, atol=1e-4)


def test_patches_leave_out_what_does_not_fill_one():
    pixels = np.arange(3 * 5 * 7, dtype=np.float32).reshape(3, 5, 7)
    found = patches_of(pixels, 2)
    assert found.shape == (6, 12)
    np.testing.assert_array_equal(found[4], pixels[:, 2:4, 2:4].reshape(-1))
