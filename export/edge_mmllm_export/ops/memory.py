"""The part of the op set for what a decoder reads beside its own tokens, and for T5's distances.

Part of `base.Ops`. A memory is a pair of cross_kv states: a stage of its own computes keys and
values from an encoder's output once (`remember`), and every decoder step reads them
(`cross_attention`). Encoder-decoders keep the prompt so, vision models their pictures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from edge_mmllm.spec import StateSpec
from edge_mmllm_export.weights import Weight

T = TypeVar("T")
#: What a token attends to that sees nothing.
Blind = Literal["nothing", "all"]


@dataclass(frozen=True)
class RelativeBias:
    """T5's learned bias of attention scores, by distance.

    Attributes:
        table: `(buckets, heads)`.
        max_distance: from here on all distances share a bucket.
        both_ways: an encoder's, whose keys lie on both sides; a decoder's lie behind.
    Source: arXiv 1910.10683, section 2.1, and `_relative_position_bucket` of transformers 5.23.
    """

    table: Weight
    max_distance: int
    both_ways: bool

    def by_distance(self) -> NDArray[np.float32]:
        """float32 `(heads, n)`: the bias of keys that lie `max_distance`, ..., 1, 0 tokens behind
        the query and, both ways, 1, 2, ... `max_distance` ahead; those further take the ends'."""
        return np.ascontiguousarray(self.table.values[self.bucket_numbers()].T)

    def bucket_numbers(self) -> NDArray[np.int64]:
        """int64 `(n,)`: the table's row of each distance of `by_distance`."""
        buckets = self.table.shape[0]
        behind = np.arange(self.max_distance, -1, -1)
        if not self.both_ways:
            return self._bucket(behind, buckets)
        ahead = self._bucket(np.arange(1, self.max_distance + 1), buckets // 2)
        return np.concatenate([self._bucket(behind, buckets // 2), buckets // 2 + ahead])

    def _bucket(self, distance: NDArray[np.int64], buckets: int) -> NDArray[np.int64]:
        """Half of the buckets hold one distance each, the rest grow with the logarithm. In
        float32, as trained: a bucket's edge may fall on a whole number."""
        exact = buckets // 2
        ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
        span = np.float32(math.log(self.max_distance / exact))
        large = exact + (ratio / span * np.float32(buckets - exact)).astype(np.int64)
        return np.where(distance < exact, distance, np.minimum(large, buckets - 1))


class MemoryOps(Protocol[T]):
    """Ops over memories."""

    def remember(self, x: T, state: StateSpec) -> None:
        """Fill a cross_kv state `(1, heads, MEMORY, d)` with x `(rows, heads * d)`."""
        ...

    def remember_span(self, x: T, span: T, state: StateSpec) -> None:
        """Fill a cross_kv state `(1, MEMORY, 2)` of int64 with the span of every row of x:
        span int64 `(2,)`, the position of the first token that sees it and of the first that
        does not any more."""
        ...

    def cross_attention(
        self,
        q: T,
        k_state: StateSpec,
        v_state: StateSpec,
        *,
        heads: int,
        scale: float,
        span: StateSpec | None = None,
        blind: Blind = "nothing",
    ) -> T:
        """Every row of q `(seq, heads * d)` attends to the rows of a memory that it sees (all,
        without `span`). The memory's heads may be fewer than q's: each serves as many of those in
        a row. Of nothing to see: zeros; a row of q that sees none of those there are attends to
        all of them where `blind` says so."""
        ...

    def sees(self, x: T, span: StateSpec) -> T:
        """1 for each token of x `(seq, width)` that sees any row, else 0: `(seq, 1)`."""
        ...

    def relative_bias(self, x: T, bias: RelativeBias) -> T:
        """What `full_attention` adds to the scores of x `(seq, width)` on itself:
        `(heads, seq, seq)`."""
        ...
