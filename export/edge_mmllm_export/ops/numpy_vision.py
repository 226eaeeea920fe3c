"""The oracle's ops over images and recordings. See `vision.VisionOps` for what they compute."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_mmllm_export.weights import Weight

Array = NDArray[Any]


class NumpyVision:
    """The part of `NumpyOps` that encoders and projectors use."""

    def patches(self, pixels: Array, shape: tuple[int, ...], size: int) -> Array:
        if pixels.shape != shape:
            raise ValueError(f"pixels are {pixels.shape}, not {shape}")
        channels, height, width = shape[-3:]
        rows, columns = height // size, width // size
        whole = pixels.reshape(-1, *shape[-3:])[..., : rows * size, : columns * size]
        squares = whole.reshape(-1, channels, rows, size, columns, size)
        return squares.transpose(0, 2, 4, 1, 3, 5).reshape(-1, channels * size * size)

    def input_rows(self, x: Array, width: int, *, transposed: bool = False) -> Array:
        return np.ascontiguousarray(x.T if transposed else x).reshape(-1, width)

    def windows(self, x: Array, width: int, *, stride: int = 1, padding: int = 0) -> Array:
        padded = np.pad(x, ((padding, padding), (0, 0)))
        count = (len(padded) - width) // stride + 1
        parts = [padded[i : i + (count - 1) * stride + 1 : stride] for i in range(width)]
        return np.stack(parts, axis=-1).reshape(count, -1)

    def table(self, weight: Weight) -> Array:
        return weight.values.reshape(-1, weight.shape[-1])

    def concat_rows(self, *x: Array) -> Array:
        return np.concatenate(x)

    def take_rows(self, x: Array, start: int, stop: int | None = None) -> Array:
        return x[start:stop]

    def first_rows(self, x: Array, count: Array, stride: int = 1) -> Array:
        return x[: -(-int(count[0]) // stride)]

    def split_rows(self, x: Array, count: Array, each: int) -> tuple[Array, Array]:
        at = int(count[0]) * each
        return x[:at], x[at:]

    def repeat_rows(self, x: Array, times: int) -> Array:
        return np.repeat(x, times, axis=0)

    def zeros(self, rows: int, width: int) -> Array:
        return np.zeros((rows, width), np.float32)

    def concat(self, *x: Array) -> Array:
        return np.concatenate(x, axis=-1)

    def fold_rows(self, x: Array, count: int) -> Array:
        return x.reshape(-1, count * x.shape[1])

    def unfold_rows(self, x: Array, count: int) -> Array:
        return x.reshape(-1, x.shape[1] // count)

    def average_rows(self, x: Array, count: int) -> Array:
        whole = x[: len(x) // count * count]
        return np.asarray(whole.reshape(-1, count, x.shape[1]).mean(axis=1), np.float32)

    def pixel_shuffle(self, x: Array, grid: tuple[int, int], factor: int) -> Array:
        rows, columns, width = grid[0] // factor, grid[1] // factor, x.shape[1]
        squares = x.reshape(rows, factor, columns, factor, width).transpose(0, 2, 1, 3, 4)
        return squares.reshape(rows * columns, factor * factor * width)

    def full_attention(
        self,
        q: Array,
        k: Array,
        v: Array,
        *,
        heads: int,
        scale: float,
        kv_heads: int | None = None,
        bias: Array | None = None,
        frames: Array | None = None,
    ) -> Array:
        count = 1 if frames is None else int(frames[0])
        d, share = q.shape[1] // heads, heads // (kv_heads or heads)
        y = np.empty(q.shape, np.float32)
        runs = zip(*(np.split(x, count) for x in (q, k, v, y)), strict=True)
        for queries, keys, values, out in runs:
            for h in range(heads):
                own = slice(h // share * d, (h // share + 1) * d)
                scores = queries[:, h * d : (h + 1) * d] @ keys[:, own].T * np.float32(scale)
                if bias is not None:
                    scores += bias[h]
                scores -= scores.max(axis=-1, keepdims=True)
                np.exp(scores, out=scores)
                scores /= scores.sum(axis=-1, keepdims=True)
                out[:, h * d : (h + 1) * d] = scores @ values[:, own]
        return y

    def grid_angles(self, grid: Array, inv_freq: NDArray[np.float32], merge: int) -> Array:
        frames, rows, columns = (int(n) for n in grid)
        place = np.indices((rows, columns)).reshape(
            2, rows // merge, merge, columns // merge, merge
        )
        row, column = place.transpose(0, 1, 3, 2, 4).reshape(2, -1, 1).astype(np.float32)
        return np.tile(np.concatenate([row * inv_freq, column * inv_freq], axis=1), (frames, 1))

    def rotary(self, x: Array, angles: Array, heads: int) -> Array:
        parts = x.reshape(len(x), heads, 2, -1)
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        first, second = parts[:, :, 0], parts[:, :, 1]
        turned = [first * cos - second * sin, second * cos + first * sin]
        return np.stack(turned, axis=2).reshape(x.shape)
