"""A prompt as the decoder reads it: token ids, and rows of features where pictures stand.

Every position has an identity: a token's id, or a negative number made of the content's hash and
the row. So a state knows which picture it has read, and what was read of one picture is never
taken for another's: the prompt cache, `reuse` and state files compare identities only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from edge_mmllm_runtime.engine import Float32, Int64

#: Identities of rows lie in [-2**31 + 1, -2]; -1 is an embedding that nobody named.
_IDENTITIES = 2**31 - 2


def identities(key: bytes, count: int) -> Int64:
    """Identities of the rows of what `key` names: negative, 31 bits of a hash each."""
    drawn = hashlib.shake_256(key).digest(4 * count)
    return -2 - (np.frombuffer(drawn, "<u4").astype(np.int64) % _IDENTITIES)


@dataclass(frozen=True)
class Span:
    """Positions that take rows of features.

    Attributes:
        start: first position.
        count: positions.
        first: the row that the first position takes.
        rows: all rows, float32 `(n, hidden)`, computed when they are needed.
    """

    start: int
    count: int
    first: int
    rows: Callable[[], Float32]

    def within(self, begin: int, end: int) -> Span | None:
        """The part at positions `begin .. end`, counted from `begin`; None where there is none."""
        low, high = max(self.start, begin), min(self.start + self.count, end)
        if low >= high:
            return None
        return replace(
            self, start=low - begin, count=high - low, first=self.first + low - self.start
        )


@dataclass(frozen=True)
class Look:
    """Rows that stand beside the tokens, in cross_kv states, and who sees them.

    Attributes:
        stage: what puts them there, e.g. `remember_image`.
        start, end: positions of the first token of the prompt that sees them, and of the first
            that does not any more.
        rows: see `Span`.
    """

    stage: str
    start: int
    end: int
    rows: Callable[[], Float32]


@dataclass(frozen=True, eq=False)
class Prompted:
    """A prompt.

    Attributes:
        ids: int64 `(n,)`, the identity of each position.
        spans: where rows stand in the token stream.
        known: int64 `(n,)`, token ids: a placeholder's where `ids` is negative. None: `ids`.
        looks: rows beside the tokens, of the whole prompt.
        origin: of a part: its position in the whole prompt.
        places: int64 `(3, n)`, where the tokens of the whole prompt stand, for models whose
            pictures take other positions than as many tokens; None: as text does.
    """

    ids: Int64
    spans: tuple[Span, ...] = ()
    known: Int64 | None = None
    looks: tuple[Look, ...] = ()
    origin: int = 0
    places: Int64 | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, part: slice) -> Prompted:
        begin, end, _ = part.indices(len(self.ids))
        cut = (span.within(begin, end) for span in self.spans)
        return Prompted(
            self.ids[begin:end],
            tuple(span for span in cut if span is not None),
            None if self.known is None else self.known[begin:end],
            self.looks,
            self.origin + begin,
            self.places,
        )

    @property
    def tokens(self) -> Int64:
        """int64 `(n,)`, ids of the vocabulary at every position."""
        return self.ids if self.known is None else self.known

    def own_places(self) -> Int64 | None:
        """int64 `(3, n)`, counted from the first position behind what comes before this part."""
        if self.places is None:
            return None
        before = int(self.places[:, : self.origin].max(initial=-1)) + 1
        own: Int64 = self.places[:, self.origin : self.origin + len(self)] - before
        return own

    def load(self) -> None:
        """Has the rows of every span and look computed now."""
        for span in self.spans:
            span.rows()
        for look in self.looks:
            look.rows()

    def embeddings(self, embed: Callable[[Int64], Float32]) -> Float32:
        """float32 `(n, hidden)`: tokens through `embed`, rows in their places."""
        out = embed(self.tokens)
        if not out.flags.writeable:
            out = out.copy()
        for span in self.spans:
            out[span.start : span.start + span.count] = span.rows()[
                span.first : span.first + span.count
            ]
        return out


def parts(chunk: Int64 | Float32 | Prompted, longest: int) -> Iterator[tuple[int, Int64 | Float32]]:
    """A chunk as runs of ids `(n,)` and of rows float32 `(n, hidden)`, at most `longest` each, with
    the place that each begins at."""
    if not isinstance(chunk, Prompted):
        for start in range(0, len(chunk), longest):
            yield start, chunk[start : start + longest]
        return
    done = 0
    for span in (*chunk.spans, Span(len(chunk), 0, 0, lambda: np.empty((0, 0), np.float32))):
        for start in range(done, span.start, longest):
            yield start, chunk.tokens[start : min(start + longest, span.start)]
        rows = span.rows()[span.first : span.first + span.count]
        for start in range(0, span.count, longest):
            part = np.ascontiguousarray(rows[start : start + longest], np.float32)
            yield span.start + start, part
        done = span.start + span.count
