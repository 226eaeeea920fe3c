"""The part of the op set that encoders and projectors need: images, sound, attention both ways.

Part of `base.Ops`. As there, activations are `(seq, width)`; what a graph takes in (pixels,
log-mel) comes as it is and becomes rows by `patches` or `input_rows`.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from edge_mmllm_export.weights import Weight

T = TypeVar("T")


class VisionOps(Protocol[T]):
    """Ops over whole images and recordings."""

    def patches(self, pixels: T, shape: tuple[int, ...], size: int) -> T:
        """Pixels of shape `([tiles,] channels, height, width)`, cut into squares of `size`, row
        by row, tile after tile: `(tokens, channels * size * size)`. What is left at the lower and
        right edge is dropped, as a strided convolution does. A patch embedding is then `linear`
        with the convolution's weight as it is stored."""
        ...

    def input_rows(self, x: T, width: int, *, transposed: bool = False) -> T:
        """An input `(seq, width)`, or `(width, seq)` where transposed, as activations."""
        ...

    def windows(self, x: T, width: int, *, stride: int = 1, padding: int = 0) -> T:
        """Every `stride`-th window of `width` rows of x `(seq, C)`, with `padding` rows of zeros
        at both ends: `(seq', C * width)`, each channel's rows side by side. A convolution along
        seq is then `linear` with its weight `(out, C, width)` as it is stored."""
        ...

    def table(self, weight: Weight) -> T:
        """A weight `(rows, width)` or `(width,)` as activations: a class token, queries,
        position embeddings; kept in float32."""
        ...

    def concat_rows(self, *x: T) -> T:
        """One under another."""
        ...

    def take_rows(self, x: T, start: int, stop: int | None = None) -> T:
        """Rows `[start, stop)`, numbered as Python does."""
        ...

    def first_rows(self, x: T, count: T, stride: int = 1) -> T:
        """The first `ceil(count / stride)` rows; count int64 `(1,)`, known at run time."""
        ...

    def split_rows(self, x: T, count: T, each: int) -> tuple[T, T]:
        """The first `count * each` rows, and the rest; count int64 `(1,)`, known at run time."""
        ...

    def repeat_rows(self, x: T, times: int) -> T:
        """Each row so many times, one copy after another."""
        ...

    def zeros(self, rows: int, width: int) -> T:
        """Rows of zeros."""
        ...

    def concat(self, *x: T) -> T:
        """Side by side along the width."""
        ...

    def fold_rows(self, x: T, count: int) -> T:
        """Each `count` rows as one, side by side: `(seq / count, count * width)`."""
        ...

    def unfold_rows(self, x: T, count: int) -> T:
        """Each row as `count` rows, one under another: `(seq * count, width / count)`."""
        ...

    def average_rows(self, x: T, count: int) -> T:
        """The mean of each `count` rows: `(seq // count, width)`; a rest is dropped."""
        ...

    def pixel_shuffle(self, x: T, grid: tuple[int, int], factor: int) -> T:
        """Rows of an image of `grid` (height, width) tokens, each square of `factor` by `factor`
        as one: `(tokens / factor^2, factor^2 * width)`, the square's rows side by side."""
        ...

    def full_attention(
        self,
        q: T,
        k: T,
        v: T,
        *,
        heads: int,
        scale: float,
        kv_heads: int | None = None,
        bias: T | None = None,
        frames: T | None = None,
    ) -> T:
        """Every row of q attends to every row of k and v: self attention of an encoder, or
        cross attention where k and v come from elsewhere.

        q `(seq, heads * d)`, k and v `(keys, kv_heads * d)`; `bias` `(heads, seq, keys)` is added
        to the scaled scores. With `frames`, a grid int64 `(frames, rows, columns)`, the rows fall
        into that many equal runs that do not see each other. Returns `(seq, heads * d)`.
        """
        ...

    def grid_angles(self, grid: T, inv_freq: NDArray[np.float32], merge: int) -> T:
        """Rotary angles `(seq, 2 * n)` of image tokens, for n frequencies: n angles of a token's
        row, then n of its column. grid int64 `(3,)`: frames, rows, columns. Tokens come frame by
        frame, in squares of `merge` by `merge`. Source: `rot_pos_emb` of Qwen2-VL."""
        ...

    def rotary(self, x: T, angles: T, heads: int) -> T:
        """Rotate each head of x `(seq, heads * d)` by angles `(seq, d / 2)`, in two halves."""
        ...
