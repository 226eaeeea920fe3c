"""Where tokens stand in a model whose pictures take other positions than as many tokens (M-RoPE).

llama.cpp's caches know the first stream of positions (the frame) alone: all rows of a picture have
the same. So a cache can be cut before and behind a picture, and nowhere inside it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge_mmllm_runtime.engine import Int64

#: Streams of positions a row takes in a batch: frame, row, column, and one that is not used.
STREAMS = 4
#: Bytes a token takes in a saved state.
TOKEN_BYTES = 8

Int32 = NDArray[np.int32]


class Places:
    """The places of the tokens in a context.

    Args:
        room: tokens.
    """

    def __init__(self, room: int) -> None:
        self._frames = np.zeros(room, np.int32)
        self._next = np.zeros(room + 1, np.int32)  # behind so many tokens

    def add(self, position: int, count: int, steps: Int64 | None) -> Int32:
        """Places `(3, count)` of new tokens, remembered.

        Args:
            steps: `(3, count)` counted from the first place behind what comes before; None: text.
        """
        base = int(self._next[position])
        if steps is None:
            steps = np.broadcast_to(np.arange(count), (3, count))
        found = (base + steps).astype(np.int32)
        end = position + count
        self._frames[position:end] = found[0]
        reached = np.maximum.accumulate(found.max(0)) + 1
        self._next[position + 1 : end + 1] = np.maximum(reached, base)
        return found

    def cut(self, position: int, end: int) -> int | None:
        """The first place to forget so that `position` of `end` tokens stay; None: there is no
        such place."""
        place = int(self._next[position])
        if position < end and int(self._frames[position]) < place:
            return None
        return place

    def splits(self, position: int) -> bool:
        """Whether what comes behind `position` tokens may belong to the picture before it."""
        return position > 0 and int(self._next[position]) != int(self._frames[position - 1]) + 1

    def save(self, position: int) -> NDArray[np.uint8]:
        """`TOKEN_BYTES` a token, little-endian int32: frames, then what follows each token."""
        both = np.concatenate([self._frames[:position], self._next[1 : position + 1]])
        return both.astype("<i4").view(np.uint8)

    def load(self, content: NDArray[np.uint8], position: int) -> None:
        """Takes back what `save` gave."""
        both = np.frombuffer(content.tobytes(), "<i4")
        self._frames[:position], self._next[1 : position + 1] = both[:position], both[position:]
