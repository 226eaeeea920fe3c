"""How far two sets of logits over the same tokens are apart."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]

#: A margin between the two best logits below this is a coin toss under int8 activations.
CLEAR_MARGIN = 1.0


@dataclass(frozen=True)
class Divergence:
    """A candidate's next-token distributions against a reference's, over n positions.

    Attributes:
        positions: n.
        top1_agreement: share of positions with the same best token.
        top1_agreement_clear: the same, over positions where the reference's two best logits are
            at least `CLEAR_MARGIN` apart; None where there is no such position.
        kl_mean, kl_p99: Kullback-Leibler divergence reference || candidate in nats.
        max_logit_difference: largest |difference| after both rows are centred.
        perplexity_reference, perplexity_candidate: over the tokens that really follow; None
            without targets.
    """

    positions: int
    top1_agreement: float
    top1_agreement_clear: float | None
    kl_mean: float
    kl_p99: float
    max_logit_difference: float
    perplexity_reference: float | None
    perplexity_candidate: float | None

    @property
    def perplexity_change(self) -> float | None:
        """Relative: 0.01 means one per cent worse."""
        if self.perplexity_reference is None or self.perplexity_candidate is None:
            return None
        return self.perplexity_candidate / self.perplexity_reference - 1.0

    def figures(self) -> dict[str, float | int | None]:
        """All figures by name, for the manifest."""
        return {**asdict(self), "perplexity_change": self.perplexity_change}


def divergence(reference: Float32, candidate: Float32, targets: Int64 | None = None) -> Divergence:
    """Compare logits `(n, vocab)` row by row; `targets` `(n,)`, -1 = no target."""
    n = len(reference)
    kl = np.empty(n)
    same = np.empty(n, bool)
    clear = np.empty(n, bool)
    worst = 0.0
    losses: list[tuple[float, float]] = []
    for i in range(n):
        a, b = _log_softmax(reference[i]), _log_softmax(candidate[i])
        kl[i] = max(0.0, float(np.sum(np.exp(a) * (a - b))))
        best = int(a.argmax())
        same[i] = best == int(b.argmax())
        top = np.partition(a, -2)[-2:]
        clear[i] = top[1] - top[0] >= CLEAR_MARGIN
        worst = max(worst, float(np.abs((a - a.mean()) - (b - b.mean())).max()))
        if targets is not None and targets[i] >= 0:
            losses.append((-float(a[targets[i]]), -float(b[targets[i]])))
    perplexity = np.exp(np.mean(losses, axis=0)) if losses else (None, None)
    return Divergence(
        positions=n,
        top1_agreement=float(same.mean()),
        top1_agreement_clear=float(same[clear].mean()) if clear.any() else None,
        kl_mean=float(kl.mean()),
        kl_p99=float(np.percentile(kl, 99)),
        max_logit_difference=worst,
        perplexity_reference=None if perplexity[0] is None else float(perplexity[0]),
        perplexity_candidate=None if perplexity[1] is None else float(perplexity[1]),
    )


def _log_softmax(x: Float32) -> NDArray[np.float64]:
    y = x.astype(np.float64)
    y -= y.max()
    shifted: NDArray[np.float64] = y - np.log(np.exp(y).sum())
    return shifted
