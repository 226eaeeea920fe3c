"""The op set: what a model definition may say, and what every backend must be able to do.

Rules that keep one definition honest across numpy, ONNX and TVM:

- batch is 1 and not written: activations are `(seq, width)`; `seq` is the only symbolic size;
- state has a fixed capacity and each state is written once in a forward;
- the position of the first token is a run-time value that only the backend sees;
- no Python branch on `seq`;
- ops are semantic, so that each backend can pick its best kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from edge_mmllm.spec import StateSpec
from edge_mmllm_export.checkpoints.base import Layout
from edge_mmllm_export.ops.memory import MemoryOps, RelativeBias
from edge_mmllm_export.ops.vision import VisionOps
from edge_mmllm_export.weights import Parameter, Source, Weight

T = TypeVar("T")
Activation = Literal[
    "silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2", "sigmoid", "tanh", "minus_exp"
]


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding over the whole head, in two halves (not interleaved).

    Attributes:
        inv_freq: float32 `(head_dim / 2,)`, scaling already applied.
        scale: factor on cos and sin (attention factor).
        length: positions that a backend may tabulate (the bundle's context length).
    Source: RoFormer (arXiv 2104.09864) eq. 15, in the half-split order of GPT-NeoX.
    """

    inv_freq: NDArray[np.float32] = field(repr=False)
    length: int
    scale: float = 1.0

    def tables(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """cos and sin, each float32 `(length, head_dim / 2)`, computed in float32 as trained."""
        angle = np.arange(self.length, dtype=np.float32)[:, None] * self.inv_freq[None, :]
        scale = np.float32(self.scale)
        return np.cos(angle) * scale, np.sin(angle) * scale


@dataclass(frozen=True)
class Attention:
    """The constants of one attention layer.

    Attributes:
        window: a token sees at most this many positions, itself included; None = all.
        q_norm, k_norm: RMS norm weights `(head_dim,)` applied to each head before `rope`.
        relative: a bias of the scores by distance (T5).
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rope: Rope | None
    window: int | None = None
    softcap: float | None = None
    q_norm: Weight | None = None
    k_norm: Weight | None = None
    norm_eps: float = 1e-6
    relative: RelativeBias | None = None


@dataclass(frozen=True)
class Wkv7(Generic[T]):
    """What `wkv7` reads for each token, all `(seq, heads * d)`; gate and rate are sigmoids."""

    r: T
    gate: T
    k: T
    v: T
    rate: T


@dataclass(frozen=True)
class Wkv7Weights:
    """The vectors of `wkv7`: k_k and k_a `(heads * d,)`, r_k `(heads, d)`."""

    k_k: Weight
    k_a: Weight
    r_k: Weight


class Ops(VisionOps[T], MemoryOps[T], Protocol[T]):
    """One backend's ops. Shapes are given as `(seq, width)`. Those over images and recordings
    stand in `vision.py`, those over what was read before in `memory.py`."""

    def rows(self, table: Weight, index: T) -> T:
        """Embedding lookup: index int `(seq,)` -> `(seq, K)`."""
        ...

    def positions(self, x: T, table: Weight, *, offset: int = 0) -> T:
        """The table's rows at the positions of x's tokens, counted from `offset`: `(seq, K)`.
        In a stage without states the first token's position is 0."""
        ...

    def logit_rows(self, x: T) -> T:
        """The rows of `(seq, width)` that the caller wants logits for: `(rows, width)`."""
        ...

    def linear(self, x: T, *w: Weight, bias: tuple[Weight | None, ...] = ()) -> tuple[T, ...]:
        """`x @ w.T + bias` for each weight; several are fused where their schemes agree."""
        ...

    def norm(
        self, x: T, weight: Weight, *, eps: float, groups: int = 1, bias: Weight | None = None
    ) -> T:
        """RMS norm over the last axis (over each of `groups` equal parts); with `bias`, a
        layer norm (mean removed)."""
        ...

    def unit_rms(self, x: T, *, eps: float) -> T:
        """RMS norm over the last axis without a weight."""
        ...

    def add_norm(
        self, x: T, delta: T | None, weight: Weight, *, eps: float, bias: Weight | None = None
    ) -> tuple[T, T]:
        """`(x + delta, norm(x + delta))`: the residual stream and the next block's input."""
        ...

    def add(self, a: T, b: T) -> T: ...

    def mul(self, a: T, b: T) -> T: ...

    def split(self, x: T, sizes: tuple[int, ...]) -> tuple[T, ...]:
        """Parts of the last axis, of these widths in order."""
        ...

    def activation(self, x: T, kind: Activation) -> T: ...

    def glu(self, gate: T, up: T, kind: Activation) -> T:
        """`activation(gate) * up`."""
        ...

    def attention(
        self, q: T, k: T, v: T, k_state: StateSpec, v_state: StateSpec, spec: Attention
    ) -> T:
        """Causal grouped-query attention over the kv states and the new tokens.

        q `(seq, heads * head_dim)`, k and v `(seq, kv_heads * head_dim)`, before rope.
        Appends k (after norm and rope) and v to their states. Returns
        `(seq, heads * head_dim)`.
        """
        ...

    def stream_angles(
        self, state: StateSpec, inv_freq: NDArray[np.float32], streams: NDArray[np.int64]
    ) -> T:
        """Rotary angles `(seq, n)` of tokens with a position in each of three streams: frequency
        `inv_freq[j]` turns by the position in stream `streams[j]`.

        Where the tokens stand is given beside them, as `places` int64 `(3, seq)`, counted from
        the state, int64 `(1,)`: the first position behind all tokens so far. Text has 0, 1, 2,
        ... in each stream. Source: Qwen2-VL (arXiv 2409.12191) section 2.1, M-RoPE.
        """
        ...

    def causal_conv(
        self, x: T, weight: Weight, bias: Weight | None, state: StateSpec, *, silu: bool
    ) -> T:
        """Depthwise causal convolution along seq. x `(seq, C)`, weight `(C, width)`, state
        `(1, width - 1, C)`: the last inputs, oldest first."""
        ...

    def time_step(self, dt: T, bias: Weight | None, limit: tuple[float, float]) -> T:
        """`clamp(softplus(dt + bias), limit)`, `(seq, heads)`; `bias` None where `linear` has
        added it, which is faster."""
        ...

    def selective_scan(
        self, x: T, dt: T, b: T, c: T, decay: Weight, skip: Weight, state: StateSpec
    ) -> T:
        """`S_t = exp(dt_t * decay) S_{t-1} + (dt_t x_t) b_t'`, `y_t = S_t c_t + skip x_t`.

        x and dt `(seq, d_inner)`, b and c `(seq, d_state)`, decay `(d_inner, d_state)`
        (negative), skip `(d_inner,)`; the state is kept transposed, `(1, d_state, d_inner)`, so
        that every product runs along the long axis. Returns `(seq, d_inner)`.
        Source: Mamba, arXiv 2312.00752, algorithm 2.
        """
        ...

    def gated_linear_attention(
        self, q: T, k: T, v: T, dt: T, decay: Weight, state: StateSpec, *, groups: int
    ) -> T:
        """`S_t = exp(dt_t * decay) S_{t-1} + k_t (dt_t v_t)'`, `y_t = q_t' S_t`, for each head.

        q and k `(seq, groups * d_k)`, each group shared by `heads / groups` heads; v
        `(seq, heads * d_v)`, dt `(seq, heads)`, decay `(heads,)` (negative), state
        `(1, heads, d_k, d_v)`. Returns `(seq, heads * d_v)`.
        Source: Mamba-2, arXiv 2405.21060, eq. 16 with the state as (N, P).
        """
        ...

    def head_scale(self, x: T, weight: Weight) -> T:
        """Scale each head: x `(seq, heads * d)`, weight `(heads,)`."""
        ...

    def token_shift(self, x: T, state: StateSpec) -> T:
        """The row before each row of x `(seq, C)`; the state `(1, 1, C)` is the one before the
        first, and becomes the last."""
        ...

    def mix(self, x: T, previous: T, *mu: Weight) -> tuple[T, ...]:
        """`x + (previous - x) * mu` for each mu `(C,)`. Source: RWKV's token shift."""
        ...

    def lerp(self, x: T, y: T, amount: T) -> T:
        """`x + (y - x) * amount`."""
        ...

    def wkv4(self, k: T, v: T, decay: Weight, bonus: Weight, state: StateSpec) -> T:
        """RWKV-4's mean of the values seen, weighted by `exp(k)` and by age, for each channel.

        `y_t = (a_{t-1} + exp(u + k_t) v_t) / (b_{t-1} + exp(u + k_t))` with
        `a_t = exp(w) a_{t-1} + exp(k_t) v_t` and `b` the same with 1 for v. k, v `(seq, C)`,
        decay w (negative) and bonus u `(C,)`, state `(1, 3, C)`: a and b, both divided by
        exp(m), and m, the largest exponent so far (any, while b is 0).
        Source: arXiv 2305.13048, section 3.1 and appendix D (the stable form).
        """
        ...

    def wkv6(self, r: T, k: T, v: T, log_decay: T | Weight, bonus: Weight, state: StateSpec) -> T:
        """`y_t = r_t' (S_{t-1} + (u * k_t) v_t')`, `S_t = diag(exp(d_t)) S_{t-1} + k_t v_t'`.

        For each head of r, k, v `(seq, heads * d)`. log_decay d: `(seq, heads * d)` (RWKV-6) or
        a weight `(heads, d)` (RWKV-5), at most 0; bonus u `(heads, d)`; state
        `(1, heads, d, d)`. Returns `(seq, heads * d)`.
        Source: arXiv 2404.05892, eq. 16 to 19.
        """
        ...

    def wkv7(self, x: Wkv7[T], w: Wkv7Weights, state: StateSpec) -> tuple[T, T]:
        """RWKV-7's generalized delta rule, and its bonus.

        For each head, with `c = unit(k * k_k)` (over the head), `a = rate`,
        `k' = k * (1 + (a - 1) * k_a)` and `log w = -exp(-1/2) * gate`:
        `S_t = diag(w_t) S_{t-1} - (c_t * a_t) (c_t' S_{t-1}) + k'_t v_t'`, `y_t = r_t' S_t`, and
        `bonus_t = (sum(r_t * k'_t * r_k)) v_t`. State `(1, heads, d, d)`, keys first. Both
        results `(seq, heads * d)`.
        Source: arXiv 2503.14456, eq. 13 to 19 and `RWKV_x070` of BlinkDL's reference.
        """
        ...


class Architecture(Protocol):
    """One model file: a config, the weights it wants, its states and its forward pass."""

    name: str
    vocab_size: int
    hidden_size: int
    layers: int
    context_length: int | None

    def parameters(self) -> list[Parameter]: ...

    def sources(self, layout: Layout) -> dict[str, Source]:
        """Where each parameter lives in a checkpoint of this layout."""
        ...

    def ignored(self) -> tuple[str, ...]:
        """Patterns of checkpoint tensors that carry no weights of the model."""
        ...

    def states(self) -> tuple[StateSpec, ...]: ...

    def embed(self, op: Ops[T], w: Mapping[str, Weight], ids: T) -> T:
        """Token ids int `(seq,)` -> `(seq, hidden)`."""
        ...

    def decode(self, op: Ops[T], w: Mapping[str, Weight], x: T) -> T:
        """Embeddings `(seq, hidden)` -> logits `(rows, vocab)` of the rows asked for."""
        ...


@runtime_checkable
class EncoderDecoder(Architecture, Protocol):
    """An architecture that reads the prompt with an encoder, into cross_kv states.

    Attributes:
        decoder_start_id: the id that every answer begins from.
    """

    decoder_start_id: int

    def remember(self, op: Ops[T], w: Mapping[str, Weight], x: T) -> None:
        """Embeddings `(seq, hidden)` of a prompt -> the cross_kv states."""
        ...


@runtime_checkable
class Onlooker(Architecture, Protocol):
    """An architecture that finds pictures in cross_kv states, beside its tokens.

    Attributes:
        memory_width: of a picture's rows.
    """

    memory_width: int

    def remember_features(self, op: Ops[T], w: Mapping[str, Weight], features: T, span: T) -> None:
        """Rows of one picture `(rows, memory_width)` -> the cross_kv states. span int64 `(2,)`:
        positions of the first token that sees it, and of the first that does not any more."""
        ...
