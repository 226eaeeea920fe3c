"""Sampling: each setting against its definition, statistics, reproducibility."""

from __future__ import annotations

import numpy as np
import pytest

from edge_mmllm.errors import SessionError, UsageError
from edge_mmllm_runtime.sampling import Sampler, Sampling, largest

RNG = np.random.default_rng(0)
LOGITS = (RNG.standard_normal(5000) * 3).astype(np.float32)
SMALL = np.log(np.array([0.4, 0.3, 0.15, 0.1, 0.05], np.float32))


def draws(logits, count, **settings):
    sampler = Sampler(Sampling(seed=7, **settings), len(logits))
    return np.array([sampler.pick(logits) for _ in range(count)])


def softmax(logits):
    p = np.exp(logits.astype(np.float64) - logits.max())
    return p / p.sum()


def test_greedy_is_the_first_largest():
    logits = np.array([1, 5, 5, 0], np.float32)
    assert Sampler(Sampling(), 4).pick(logits) == 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_softmax(temperature):
    count = 20000
    found = np.bincount(draws(SMALL, count, temperature=temperature), minlength=5) / count
    expected = softmax(SMALL / temperature)
    # Five standard deviations of a binomial share.
    assert (np.abs(found - expected) < 5 * np.sqrt(expected * (1 - expected) / count)).all()


def test_frequencies_over_many_blocks():
    logits = np.zeros(5000, np.float32)
    logits[::1000] = 8
    found = draws(logits, 20000, temperature=1.0)
    expected = softmax(logits)[0] * 5
    share = np.isin(found, np.arange(0, 5000, 1000)).mean()
    assert abs(share - expected) < 5 * np.sqrt(expected * (1 - expected) / 20000)
    rest = found[~np.isin(found, np.arange(0, 5000, 1000))]
    assert abs(rest.mean() - 2500) < 5 * 1443 / np.sqrt(len(rest))
    assert len(np.unique(rest)) > 1000


@pytest.mark.parametrize("k", [1, 2, 40, 3000, 5000])
def test_top_k_keeps_the_k_likeliest(k):
    allowed = set(np.argsort(-LOGITS)[:k].tolist())
    found = set(draws(LOGITS, 1000, temperature=3.0, top_k=k).tolist())
    assert found <= allowed
    assert len(found) > min(k, 40) // 2


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_fewest_that_reach_p(p):
    probabilities = softmax(LOGITS / 3.0)
    order = np.argsort(-probabilities, kind="stable")
    keep = int(np.searchsorted(np.cumsum(probabilities[order]), p)) + 1
    found = set(draws(LOGITS, 600, temperature=3.0, top_p=p).tolist())
    assert found <= set(order[: keep + 1].tolist())  # one more: rounding at the edge
    assert len(found) >= min(keep, 100) // 2


def test_top_p_boundary():
    assert set(draws(SMALL, 500, temperature=1.0, top_p=0.69)) == {0, 1}
    assert set(draws(SMALL, 500, temperature=1.0, top_p=0.71)) == {0, 1, 2}
    assert set(draws(SMALL, 500, temperature=1.0, top_p=1e-6)) == {0}


def test_min_p_is_relative_to_the_likeliest():
    assert set(draws(SMALL, 500, temperature=1.0, min_p=0.3)) == {0, 1, 2}
    assert set(draws(SMALL, 500, temperature=1.0, min_p=1.0)) == {0}


def test_temperature_comes_before_the_filters():
    # At temperature 0.25 the first token has 0.75 of the mass: top_p 0.7 keeps it alone.
    assert set(draws(SMALL, 500, temperature=0.25, top_p=0.7)) == {0}


def test_repetition_penalty():
    sampler = Sampler(Sampling(repetition_penalty=2.0), 4, seen=[-1, 0, 3])
    logits = np.array([5, 3, 2, -1], np.float32)
    kept = logits.copy()
    assert sampler.pick(logits) == 1  # 5 / 2 < 3
    assert sampler.pick(logits) == 0  # 1 was picked: 3 / 2, against 5 / 2
    assert np.array_equal(logits, kept)
    negative = np.array([-3, -2, -9, -1.5], np.float32)
    assert Sampler(Sampling(repetition_penalty=2.0), 4, seen=[3]).pick(negative) == 1


def test_seeds():
    one, same = (draws(LOGITS, 50, temperature=1.0) for _ in range(2))
    assert np.array_equal(one, same)
    other = Sampler(Sampling(temperature=1.0, seed=8), 5000)
    assert not np.array_equal(one, [other.pick(LOGITS) for _ in range(50)])
    a, b = (Sampler(Sampling(temperature=1.0), 5000) for _ in range(2))
    assert [a.pick(LOGITS) for _ in range(20)] != [b.pick(LOGITS) for _ in range(20)]


def test_largest_is_a_stable_sort():
    values = RNG.integers(0, 50, 20000).astype(np.float32)
    for count in (1, 7, 300, 19999, 20000):
        assert np.array_equal(largest(values, count), np.argsort(-values, kind="stable")[:count])


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 2}])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite(settings, bad):
    logits = np.array([1, bad, 2, 3], np.float32)
    with pytest.raises(SessionError, match="not finite"):
        Sampler(Sampling(**settings), 4).pick(logits)


def test_masked_logits_are_never_drawn():
    logits = np.array([-np.inf, 0, -np.inf, 0], np.float32)
    assert set(draws(logits, 200, temperature=1.0)) == {1, 3}
    assert set(draws(logits, 200, temperature=1.0, top_k=3)) == {1, 3}


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"repetition_penalty": 0.0},
        {"seed": -1},
    ],
    ids=str,
)
def test_values_without_meaning(settings):
    with pytest.raises(UsageError, match=next(iter(settings))):
        Sampling(**settings)


def test_extreme_settings_are_what_they_tend_to():
    cold = draws(SMALL, 50, temperature=1e-300)
    assert (cold == SMALL.argmax()).all()
    hot = draws(SMALL, 2000, temperature=1e300)
    assert (np.bincount(hot, minlength=5) > 300).all()
    sampler = Sampler(Sampling(repetition_penalty=1e300), 5, seen=[0])
    assert sampler.pick(np.array([5, 1, 0, 0, 0], np.float32)) == 1


@pytest.mark.parametrize(
    "settings",
    [{"temperature": "hot"}, {"top_k": 2.5}, {"seed": 1.5}, {"top_p": None}, {"min_p": True}],
)
def test_values_of_a_wrong_type_are_wrong_usage(settings):
    with pytest.raises(UsageError, match=next(iter(settings))):
        Sampling(**settings)


def test_numpy_numbers_are_fine():
    Sampling(np.float32(0.5), np.int64(4), np.float64(0.9), seed=np.int32(3))
