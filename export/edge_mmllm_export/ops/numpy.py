"""The oracle: float32 numpy, straight from the papers, weights streamed from the checkpoint.

Every export is judged by it, so it favours being plainly right over being fast. Matrices are
read in row tiles and dropped again, so that memory stays bounded whatever the model's size.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_mmllm.spec import StateSpec
from edge_mmllm_export.ops import numpy_rwkv
from edge_mmllm_export.ops.base import Activation, Attention, Wkv7, Wkv7Weights
from edge_mmllm_export.ops.numpy_memory import NumpyMemory, distance_bias
from edge_mmllm_export.ops.numpy_vision import NumpyVision
from edge_mmllm_export.weights import Weight

Array = NDArray[Any]


def sigmoid(x: Array) -> Array:
    """Numerically stable logistic function."""
    return np.asarray(0.5 * (np.tanh(0.5 * x) + 1.0), np.float32)


def _erf(x: Array) -> Array:
    """The error function, from the C library, element by element."""
    return np.asarray(np.vectorize(math.erf, otypes=[np.float32])(x), np.float32)


class NumpyOps(NumpyVision, NumpyMemory):
    """Runs a definition. Activations are `(seq, width)` float32 arrays.

    Args:
        states: current value of each state by name; replaced by the forward.
        position: index of the first new token.
        rows: which of the new tokens get logits; None = all.
        cache: keep matrices in memory between forwards (tiny models stepped token by token).
        places: see `stream_angles`; None for text.
    """

    def __init__(
        self,
        states: dict[str, Array],
        position: int = 0,
        logit_rows: NDArray[np.int64] | None = None,
        cache: dict[str, Array] | None = None,
        places: NDArray[np.int64] | None = None,
    ) -> None:
        self.places = places
        self.states, self.position, self.wanted, self.cache = states, position, logit_rows, cache

    def rows(self, table: Weight, index: Array) -> Array:
        if self.cache is not None:
            return self._matrix(table)[index]
        return np.concatenate([table.rows(int(i), int(i) + 1) for i in index])

    def positions(self, x: Array, table: Weight, *, offset: int = 0) -> Array:
        first = self.position + offset
        return self.rows(table, np.arange(first, first + x.shape[0]))

    def logit_rows(self, x: Array) -> Array:
        return x if self.wanted is None else x[self.wanted]

    def _matrix(self, w: Weight) -> Array:
        assert self.cache is not None  # noqa: S101 - callers check
        if w.name not in self.cache:
            self.cache[w.name] = w.rows()
        return self.cache[w.name]

    def linear(
        self, x: Array, *w: Weight, bias: tuple[Weight | None, ...] = ()
    ) -> tuple[Array, ...]:
        outputs = []
        for i, weight in enumerate(w):
            y = np.empty((x.shape[0], weight.shape[0]), np.float32)
            if self.cache is not None:
                np.matmul(x, self._matrix(weight).T, out=y)
            else:
                for start, stop, tile in weight.tiles():
                    y[:, start:stop] = x @ tile.T
            own = bias[i] if bias else None
            outputs.append(y if own is None else y + own.values)
        return tuple(outputs)

    def norm(
        self,
        x: Array,
        weight: Weight,
        *,
        eps: float,
        groups: int = 1,
        bias: Weight | None = None,
    ) -> Array:
        parts = x.reshape(x.shape[0], groups, x.shape[1] // groups)
        if bias is not None:
            parts = parts - parts.mean(axis=-1, keepdims=True)
        mean_square = np.mean(parts * parts, axis=-1, keepdims=True)
        y: Array = (parts / np.sqrt(mean_square + np.float32(eps))).reshape(x.shape) * weight.values
        return y if bias is None else y + bias.values

    def unit_rms(self, x: Array, *, eps: float) -> Array:
        mean_square = np.mean(x * x, axis=-1, keepdims=True)
        return np.asarray(x / np.sqrt(mean_square + np.float32(eps)), np.float32)

    def add_norm(
        self,
        x: Array,
        delta: Array | None,
        weight: Weight,
        *,
        eps: float,
        bias: Weight | None = None,
    ) -> tuple[Array, Array]:
        x = x if delta is None else x + delta
        return x, self.norm(x, weight, eps=eps, bias=bias)

    def add(self, a: Array, b: Array) -> Array:
        return a + b

    def mul(self, a: Array, b: Array) -> Array:
        return a * b

    def split(self, x: Array, sizes: tuple[int, ...]) -> tuple[Array, ...]:
        return tuple(np.split(x, np.cumsum(sizes)[:-1], axis=-1))

    def activation(self, x: Array, kind: Activation) -> Array:
        if kind == "silu":
            return x * sigmoid(x)
        if kind == "relu":
            return np.maximum(x, np.float32(0))
        if kind == "relu2":
            return np.square(np.maximum(x, np.float32(0)))
        if kind == "sigmoid":
            return sigmoid(x)
        if kind == "tanh":
            return np.tanh(x)
        if kind == "minus_exp":
            return -np.exp(x)
        if kind == "quick_gelu":
            return x * sigmoid(np.float32(1.702) * x)
        if kind == "gelu":
            return np.asarray(0.5 * x * (1.0 + _erf(x / np.float32(np.sqrt(2.0)))), np.float32)
        inner = np.float32(np.sqrt(2.0 / np.pi)) * (x + np.float32(0.044715) * x * x * x)
        return np.asarray(0.5 * x * (1.0 + np.tanh(inner)), np.float32)

    def glu(self, gate: Array, up: Array, kind: Activation) -> Array:
        return self.activation(gate, kind) * up

    def attention(
        self,
        q: Array,
        k: Array,
        v: Array,
        k_state: StateSpec,
        v_state: StateSpec,
        spec: Attention,
    ) -> Array:
        seq, d = q.shape[0], spec.head_dim
        queries = q.reshape(seq, spec.heads, d).transpose(1, 0, 2)
        keys = k.reshape(seq, spec.kv_heads, d).transpose(1, 0, 2)
        values = v.reshape(seq, spec.kv_heads, d).transpose(1, 0, 2)
        if spec.q_norm is not None and spec.k_norm is not None:
            queries = self._head_norm(queries, spec.q_norm, spec.norm_eps)
            keys = self._head_norm(keys, spec.k_norm, spec.norm_eps)
        positions = np.arange(self.position, self.position + seq)
        if spec.rope is not None:
            angle = positions.astype(np.float32)[:, None] * spec.rope.inv_freq
            cos, sin = np.cos(angle), np.sin(angle)
            queries = _rotate(queries, cos, sin, spec.rope.scale)
            keys = _rotate(keys, cos, sin, spec.rope.scale)
        # States hold (1, kv_heads, tokens, head_dim); here only the tokens seen so far.
        past_k, past_v = self.states[k_state.name], self.states[v_state.name]
        all_k = np.concatenate([past_k[0, :, : self.position], keys], axis=1)
        all_v = np.concatenate([past_v[0, :, : self.position], values], axis=1)
        self.states[k_state.name], self.states[v_state.name] = all_k[None], all_v[None]
        seen = np.arange(all_k.shape[1])
        hidden = seen[None, :] > positions[:, None]
        if spec.window is not None:
            hidden |= seen[None, :] <= positions[:, None] - spec.window
        share = spec.heads // spec.kv_heads
        output = np.empty((spec.heads, seq, d), np.float32)
        for h in range(spec.heads):
            scores = queries[h] @ all_k[h // share].T * np.float32(spec.scale)
            if spec.relative is not None:
                scores += distance_bias(spec.relative, positions, seen)[h]
            if spec.softcap is not None:
                scores = np.float32(spec.softcap) * np.tanh(scores / np.float32(spec.softcap))
            scores[hidden] = -np.inf
            scores -= scores.max(axis=-1, keepdims=True)
            np.exp(scores, out=scores)
            scores /= scores.sum(axis=-1, keepdims=True)
            output[h] = scores @ all_v[h // share]
        return output.transpose(1, 0, 2).reshape(seq, spec.heads * d)

    @staticmethod
    def _head_norm(x: Array, weight: Weight, eps: float) -> Array:
        mean_square = np.mean(x * x, axis=-1, keepdims=True)
        return np.asarray(x / np.sqrt(mean_square + np.float32(eps)) * weight.values, np.float32)

    def stream_angles(
        self, state: StateSpec, inv_freq: NDArray[np.float32], streams: NDArray[np.int64]
    ) -> Array:
        assert self.places is not None  # noqa: S101 - the oracle gives them
        first = self.states[state.name]
        at = self.places + first
        self.states[state.name] = np.maximum(first, at.max() + 1)
        return at[streams].T.astype(np.float32) * inv_freq

    def causal_conv(
        self, x: Array, weight: Weight, bias: Weight | None, state: StateSpec, *, silu: bool
    ) -> Array:
        width = weight.shape[1]
        padded = np.concatenate([self.states[state.name][0], x])
        self.states[state.name] = padded[-(width - 1) :][None]
        kernel = weight.values
        y = sum(padded[i : i + x.shape[0]] * kernel[:, i] for i in range(width))
        y = np.asarray(y if bias is None else y + bias.values, np.float32)
        return self.activation(y, "silu") if silu else y

    def time_step(self, dt: Array, bias: Weight | None, limit: tuple[float, float]) -> Array:
        softplus = np.logaddexp(dt if bias is None else dt + bias.values, np.float32(0))
        return np.asarray(np.clip(softplus, limit[0], limit[1]), np.float32)

    def selective_scan(
        self,
        x: Array,
        dt: Array,
        b: Array,
        c: Array,
        decay: Weight,
        skip: Weight,
        state: StateSpec,
    ) -> Array:
        s = self.states[state.name][0]
        rates, inputs = decay.values.T, dt * x
        y = skip.values * x
        for t in range(x.shape[0]):
            s = np.exp(dt[t] * rates) * s + b[t][:, None] * inputs[t]
            y[t] += c[t] @ s
        self.states[state.name] = s[None]
        return np.asarray(y, np.float32)

    def gated_linear_attention(
        self,
        q: Array,
        k: Array,
        v: Array,
        dt: Array,
        decay: Weight,
        state: StateSpec,
        *,
        groups: int,
    ) -> Array:
        seq, heads = dt.shape
        s = self.states[state.name][0].copy()  # (heads, d_k, d_v)
        share = heads // groups
        queries = np.repeat(q.reshape(seq, groups, -1), share, axis=1)
        keys = np.repeat(k.reshape(seq, groups, -1), share, axis=1)
        values = v.reshape(seq, heads, -1) * dt[..., None]
        gates = np.exp(dt * decay.values)
        y = np.empty_like(values)
        for t in range(seq):
            s *= gates[t][:, None, None]
            s += keys[t][:, :, None] * values[t][:, None, :]
            y[t] = np.matmul(queries[t][:, None, :], s)[:, 0]
        self.states[state.name] = s[None]
        return y.reshape(seq, -1)

    def head_scale(self, x: Array, weight: Weight) -> Array:
        heads = weight.shape[0]
        scaled = x.reshape(x.shape[0], heads, -1) * weight.values[:, None]
        return np.asarray(scaled.reshape(x.shape), np.float32)

    def token_shift(self, x: Array, state: StateSpec) -> Array:
        rows = np.concatenate([self.states[state.name][0], x])
        self.states[state.name] = rows[-1:][None]
        return rows[:-1]

    def mix(self, x: Array, previous: Array, *mu: Weight) -> tuple[Array, ...]:
        return tuple(x + (previous - x) * m.values for m in mu)

    def lerp(self, x: Array, y: Array, amount: Array) -> Array:
        return np.asarray(x + (y - x) * amount, np.float32)

    def wkv4(self, k: Array, v: Array, decay: Weight, bonus: Weight, state: StateSpec) -> Array:
        y, new = numpy_rwkv.wkv4(k, v, decay.values, bonus.values, self.states[state.name][0])
        self.states[state.name] = new[None]
        return y

    def wkv6(
        self,
        r: Array,
        k: Array,
        v: Array,
        log_decay: Array | Weight,
        bonus: Weight,
        state: StateSpec,
    ) -> Array:
        if isinstance(log_decay, Weight):
            log_decay = np.broadcast_to(log_decay.values.reshape(-1), k.shape)
        y, new = numpy_rwkv.wkv6(r, k, v, log_decay, bonus.values, self.states[state.name][0])
        self.states[state.name] = new[None]
        return y

    def wkv7(self, x: Wkv7[Array], w: Wkv7Weights, state: StateSpec) -> tuple[Array, Array]:
        y, bonus, new = numpy_rwkv.wkv7(x, w, self.states[state.name][0])
        self.states[state.name] = new[None]
        return y, bonus


def _rotate(x: Array, cos: Array, sin: Array, scale: float) -> Array:
    """x `(heads, seq, d)`; cos and sin `(seq, d / 2)`."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    rotated = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return np.asarray(rotated * np.float32(scale), np.float32)
