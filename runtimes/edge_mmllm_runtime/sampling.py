"""Picks the next token from the logits.

Order, as in Hugging Face's `generate`: repetition penalty, temperature, `top_k`, `top_p`,
`min_p`, then one draw. Each filter keeps at least the likeliest token. Temperature 0 is greedy:
one argmax (the lowest id wins a tie) and no random number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np

from edge_mmllm.errors import SessionError, UsageError
from edge_mmllm_runtime.engine import Float32, Int64

#: A temperature or penalty beyond these is taken as these: float32 could not tell them apart.
_TINY, _HUGE = 1e-20, 1e20

#: Tokens looked at first for `top_p`: enough for nearly every distribution of a trained model.
_FIRST_CANDIDATES = 256


@dataclass(frozen=True)
class Sampling:
    """How tokens are picked.

    Attributes:
        temperature: 0 for greedy; else logits are divided by it.
        top_k: keep the k likeliest tokens; 0 for all.
        top_p: keep the fewest tokens whose probabilities reach it; 1 for all.
        min_p: keep tokens at least `min_p` times as likely as the likeliest; 0 for all.
        repetition_penalty: divides positive logits of tokens of the prompt and the answer so
            far, multiplies negative ones; 1 for none. Source: CTRL, arXiv 1909.05858, 4.1.
        seed: of the random generator; None for another one each time.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        """Refuses values without meaning.

        Raises:
            UsageError: names the value and its range.
        """
        for name, kind in (
            ("temperature", Real), ("top_k", Integral), ("top_p", Real), ("min_p", Real),
            ("repetition_penalty", Real), ("seed", Integral),
        ):  # fmt: skip
            value = getattr(self, name)
            if isinstance(value, bool) or not (
                isinstance(value, kind) or (name == "seed" and value is None)
            ):
                raise UsageError(
                    f"{name} is no {'number' if kind is Real else 'whole number'}",
                    found=repr(value)[:80],
                )
        for name, good, expected in (
            ("temperature", 0 <= self.temperature < math.inf, "0 or more"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0"),
            ("seed", self.seed is None or self.seed >= 0, "0 or more"),
        ):
            if not good:
                raise UsageError(
                    f"{name} is out of range", expected=expected, found=str(getattr(self, name))
                )


class Sampler:
    """The state of one generation: its random generator and the tokens seen.

    Args:
        settings: how to pick.
        vocab_size: number of logits.
        seen: ids of the prompt, for the repetition penalty.
    """

    def __init__(self, settings: Sampling, vocab_size: int, seen: Iterable[int] = ()) -> None:
        self._settings = settings
        self._penalty = min(max(float(settings.repetition_penalty), _TINY), _HUGE)
        self._temperature = np.float32(min(max(float(settings.temperature), _TINY), _HUGE))
        # Embeddings and pictures have no id: below 0.
        self._seen: set[int] = (
            {i for i in seen if 0 <= i < vocab_size} if self._penalty != 1 else set()
        )
        self._vocab_size = vocab_size
        self._random = np.random.default_rng(settings.seed) if settings.temperature else None

    def pick(self, logits: Float32) -> int:
        """The next token.

        Args:
            logits: float32 `(vocab,)`; not changed.

        Raises:
            SessionError: the logits are not finite.
        """
        if self._seen:
            logits = self._penalized(logits)
        best = int(logits.argmax())  # the first NaN, where there is one
        if not math.isfinite(logits[best]):
            raise SessionError(
                "the model gave logits that are not finite",
                where=f"token {best}",
                found=str(logits[best]),
                fix="check the bundle: edge-mmllm check BUNDLE",
            )
        token = best if self._random is None else self._draw(logits, float(logits[best]))
        if self._penalty != 1:
            self._seen.add(token)
        return token

    def saw(self, token: int) -> None:
        """Notes a token that was taken without `pick`."""
        if self._penalty != 1:
            self._seen.add(token)

    def _penalized(self, logits: Float32) -> Float32:
        logits = logits.copy()
        ids = np.fromiter(self._seen, np.int64, len(self._seen))
        values = logits[ids]
        with np.errstate(over="ignore"):  # an infinite one is refused by `pick`
            logits[ids] = np.where(values > 0, values / self._penalty, values * self._penalty)
        return logits

    def _draw(self, logits: Float32, best: float) -> int:
        settings = self._settings
        ids: Int64 | None = None  # None: all, in order
        if 0 < settings.top_k < len(logits):
            ids = largest(logits, settings.top_k)
            logits = logits[ids]
        # Weights relative to the likeliest token, whose own is 1.
        with np.errstate(over="ignore"):  # to minus infinity, whose weight is 0
            weights = np.exp((logits - np.float32(best)) / self._temperature)
        if settings.top_p < 1:
            kept = _nucleus(weights, settings.top_p)
            ids, weights = kept if ids is None else ids[kept], weights[kept]
        if settings.min_p > 0:
            kept = np.flatnonzero(weights >= settings.min_p)
            ids, weights = kept if ids is None else ids[kept], weights[kept]
        assert self._random is not None  # noqa: S101 - for the type checker
        at = _at(weights, self._random.random())
        return at if ids is None else int(ids[at])


def _at(weights: Float32, fraction: float) -> int:
    """Where the running sum of the weights passes `fraction` of the whole.

    Blocks are summed first: a running sum over a whole vocabulary costs more than all the rest.
    """
    block = 512
    sums = np.cumsum(np.add.reduceat(weights, np.arange(0, len(weights), block)), dtype=np.float64)
    target = fraction * sums[-1]
    chosen = min(int(np.searchsorted(sums, target, side="right")), len(sums) - 1)
    part = np.cumsum(weights[chosen * block : (chosen + 1) * block], dtype=np.float64)
    rest = target - (sums[chosen - 1] if chosen else 0.0)
    # Rounding may put `rest` beyond the part's own sum: then its last token of any weight.
    rest = min(rest, np.nextafter(part[-1], 0.0))
    return chosen * block + int(np.searchsorted(part, rest, side="right"))


def largest(values: Float32, count: int) -> Int64:
    """Indices of the `count` largest values, largest first, the lowest index first in a tie.

    No value below the `count`-th largest of the maxima of disjoint groups can belong to them,
    which leaves few to sort (`argpartition` of 150,000 values takes a millisecond).
    """
    groups = max(512, 8 * count)
    rows = len(values) // groups
    if rows < 4:
        candidates = np.arange(len(values))
    else:
        maxima = values[: rows * groups].reshape(rows, groups).max(axis=0)
        candidates = np.flatnonzero(values >= np.partition(maxima, -count)[-count])
    order = np.argsort(-values[candidates], kind="stable")[:count]
    result: Int64 = candidates[order]
    return result


def _nucleus(weights: Float32, top_p: float) -> Int64:
    """Indices of the fewest weights whose sum reaches `top_p` of the whole, largest first."""
    needed = top_p * float(weights.sum(dtype=np.float64))
    count = _FIRST_CANDIDATES
    while True:
        top = largest(weights, min(count, len(weights)))
        sums = np.cumsum(weights[top], dtype=np.float64)
        if sums[-1] >= needed or len(top) == len(weights):
            return top[: int(np.searchsorted(sums, needed, side="left")) + 1]
        count *= 8
