"""RWKV's ops in ONNX: token shift, and the recurrences of versions 4 to 7.

Functions take the graph and names of values, `(1, seq, width)` unless said otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_mmllm_export.ops.numpy_rwkv import DECAY_NATS
from edge_mmllm_export.ops.onnx_graph import Body, GraphBuilder

#: Tokens in one chunk of RWKV-7's prefill. The products of decays inside it stay above
#: exp(-0.6065 * 16) = 6e-5.
CHUNK = 16

FLOAT = "float32"


class Sequence:
    """What depends on the number of tokens, computed once a graph.

    Attributes:
        one: bool `(1,)`, whether there is one token.
        length: int64 `(1,)`.
        padding: int64 `(6,)`, the `pads` that fill the second of three axes up to whole chunks.
    """

    def __init__(self, g: GraphBuilder) -> None:
        scope, g.scope = g.scope, ""
        source = "input_ids" if "input_ids" in g.plain_inputs() else "inputs_embeds"
        self.length = g.node("Shape", [source], start=0, end=1)[0]
        self.one = g.node("Equal", [self.length, g.ints(1)])[0]
        chunk = g.ints(CHUNK)
        missing = g.node("Mod", [g.node("Neg", [self.length])[0], chunk])[0]
        self.padding = g.node("Concat", [g.ints(0, 0, 0, 0), missing, g.ints(0)], axis=0)[0]
        g.scope = scope


def token_shift(g: GraphBuilder, x: str, state: str) -> str:
    """x behind its predecessor `state.X` `(1, 1, C)`; the last row is the next state."""
    rows = g.node("Concat", [f"state.{state}", x], axis=1)[0]
    g.node("Slice", [x, g.ints(-1), g.ints(1 << 62), g.ints(1)], [f"next.{state}"])
    return g.node("Slice", [rows, g.ints(0), g.ints(-1), g.ints(1)])[0]


def _heads_of(g: GraphBuilder, heads: int, width: int) -> tuple[str, str]:
    """The matrices that sum over heads, `(width, heads)`, and spread over them."""
    ones = np.repeat(np.eye(heads, dtype=np.float32), width // heads, axis=0)
    name = f"heads.{heads}.{width}"
    return g.fixed(f"{name}.sum", ones), g.fixed(f"{name}.spread", ones.T)


def head_bonus(g: GraphBuilder, r: str, k: str, v: str, weight: str, heads: int, width: int) -> str:
    """`sum over the head(r * k * weight) * v`; weight `(width,)`.

    Two thin products against constants: a reduction over each head of a reshaped value, and its
    spreading back, take more nodes and more time.
    """
    total, spread = _heads_of(g, heads, width)
    weighted = g.node("Mul", [g.node("Mul", [r, k])[0], weight])[0]
    sums = g.node("MatMul", [weighted, total])[0]
    return g.node("Mul", [g.node("MatMul", [sums, spread])[0], v])[0]


def wkv6(
    g: GraphBuilder,
    rkv: tuple[str, str, str],
    log_decay: str,
    state: str,
    heads: int,
    width: int,
) -> str:
    """LinearAttention gives `q' S_t`, RWKV reads `r' S_{t-1}`: so k, v and decay come one step
    late, after a step that leaves the state as it is, and a last step without an output brings
    the state up to date. Nothing is ever divided by a decay."""
    r, k, v = rkv
    none = g.fixed(f"zeros.{width}", np.zeros((1, 1, width), np.float32))
    inputs = [g.node("Concat", [r, none], axis=1)[0]]
    inputs += [g.node("Concat", [none, x], axis=1)[0] for x in (k, v)]
    inputs += [f"state.{state}", g.node("Concat", [none, log_decay], axis=1)[0]]
    y, _ = _linear_attention(g, inputs, heads, f"next.{state}")
    return g.node("Slice", [y, g.ints(0), g.ints(-1), g.ints(1)])[0]


def _linear_attention(
    g: GraphBuilder, inputs: list[str], heads: int, after: str
) -> tuple[str, str]:
    """q, k, v, state and log decay -> `q' S_t` and the state, which is named `after`."""
    outputs = [g.fresh("linear_attention"), after]
    g.microsoft(
        "LinearAttention",
        inputs,
        outputs,
        q_num_heads=heads,
        kv_num_heads=heads,
        update_rule="gated",
        scale=1.0,
    )
    return outputs[0], after


def constant_decay(g: GraphBuilder, log_decay: str, length: str, width: int) -> str:
    """A decay `(width,)` that is the same for every token."""
    shape = g.node("Concat", [g.ints(1), length, g.ints(width)], axis=0)[0]
    return g.node("Expand", [log_decay, shape])[0]


def wkv4(g: GraphBuilder, k: str, v: str, decay: str, bonus: str, state: str, width: int) -> str:
    """A Scan over tokens that carries (a, b) `(2, C)` and m.

    Output and next state are the same step with different exponents, so both are computed at
    once: rows 0 of p and e are the output's (u + k against m), rows 1 the state's (k against
    m + w).
    """
    pair, m = g.node("Split", [f"state.{state}", g.ints(2, 1)], 2, axis=1)
    b = g.node("Slice", [pair, g.ints(1), g.ints(2), g.ints(1)])[0]
    seen = g.node("Greater", [b, g.constant("zero", np.zeros((), np.float32))])[0]
    never = g.constant("never", np.asarray(-1e38, np.float32))
    m = g.node("Where", [seen, m, never])[0]  # (1, 1, C)
    pair = g.node("Squeeze", [pair, g.ints(0)])[0]
    tokens = g.node("Squeeze", [k, g.ints(0)])[0]
    tokens = g.node("Unsqueeze", [tokens, g.ints(1)])[0]  # (seq, 1, C)
    exponents = g.node("Add", [tokens, bonus])[0]  # bonus (2, C): u and 0
    values = g.node("Unsqueeze", [g.node("Squeeze", [v, g.ints(0)])[0], g.ints(1)])[0]
    pads = g.ints(0, 0, 0, 0, 1, 0)
    one = g.constant("one", np.ones((), np.float32))
    values = g.node("Pad", [values, pads, one])[0]  # (seq, 2, C): v and 1

    with g.body("wkv4") as body:
        ab, top = body.input("ab", [2, width]), body.input("m", [1, width])
        e, x = body.input("exponents", [2, width]), body.input("values", [2, width])
        old = g.node("Add", [top, decay])[0]  # decay (2, C): 0 and w
        highest = g.node("Max", [old, e])[0]
        keep = g.node("Exp", [g.node("Sub", [old, highest])[0]])[0]
        add = g.node("Exp", [g.node("Sub", [e, highest])[0]])[0]
        keep, add = (g.node("Unsqueeze", [y, g.ints(1)])[0] for y in (keep, add))
        kept = g.node("Mul", [keep, ab])[0]  # (2 for output and state, 2 for a and b, C)
        added = g.node("Mul", [add, x])[0]
        both = g.node("Add", [kept, added])[0]
        out, after = g.node("Split", [both, g.ints(1, 1)], 2, axis=0)
        _, highest = g.node("Split", [highest, g.ints(1, 1)], 2, axis=0)
        body.output(g.node("Squeeze", [after, g.ints(0)])[0], [2, width])
        body.output(g.node("Identity", [highest])[0], [1, width])
        body.output(g.node("Squeeze", [out, g.ints(0)])[0], [2, width])
    inputs = [pair, g.node("Squeeze", [m, g.ints(0)])[0], exponents, values]
    pair, m, sums = g.node("Scan", inputs, 3, body=body.graph(), num_scan_inputs=2)
    state_rows = g.node("Concat", [pair, m], axis=0)[0]
    g.node("Unsqueeze", [state_rows, g.ints(0)], [f"next.{state}"])
    above, below = g.node("Split", [sums, g.ints(1, 1)], 2, axis=1)
    mean = g.node("Div", [above, below])[0]
    return g.node("Reshape", [mean, g.ints(1, -1, width)])[0]


@dataclass(frozen=True)
class Wkv7Names:
    """Names of values: unit is `c` of `Ops.wkv7`, k is `k'`; rk its state."""

    r: str
    gate: str
    k: str
    v: str
    unit: str
    rate: str
    state: str


def unit_keys(g: GraphBuilder, k: str, heads: int, d: int) -> str:
    """Each head of k divided by its length: an RMS norm whose weight is 1 / sqrt(d)."""
    weight = g.fixed(f"unit.{d}", np.full(d, d**-0.5, np.float32))
    parts = g.node("Reshape", [k, g.ints(0, 0, heads, d)])[0]
    # The reference divides by at least 1e-12: no length of a key comes near.
    normed = g.node("SimplifiedLayerNormalization", [parts, weight], epsilon=1e-24)[0]
    return g.node("Reshape", [normed, g.ints(0, 0, heads * d)])[0]


def wkv7(g: GraphBuilder, x: Wkv7Names, seq: Sequence, heads: int, d: int) -> str:
    """One token at a time by its formula, several in chunks: an If on the number of tokens."""
    with g.body("step") as step:
        _step7(g, x, step, heads, d)
    with g.body("chunks") as chunks:
        _chunks7(g, x, seq, chunks, heads, d)
    outputs = [g.fresh("wkv7"), f"next.{x.state}"]
    g.node("If", [seq.one], outputs, then_branch=step.graph(), else_branch=chunks.graph())
    return outputs[0]


def _step7(g: GraphBuilder, x: Wkv7Names, body: Body, heads: int, d: int) -> None:
    """Given what the token removes, `u = -c S`, the rule is `S' = diag(w) S + (c a)' u + k' v`:
    two steps of LinearAttention, of which the second does not decay. (The same from products
    and elementwise ops: 60 us instead of 44 at 12 heads of 64.)"""
    width, state = heads * d, f"state.{x.state}"
    unit = g.node("Reshape", [x.unit, g.ints(1, heads, 1, d)])[0]
    removed = g.microsoft("FusedMatMul", [unit, state], alpha=-1.0)[0]
    removed = g.node("Reshape", [removed, g.ints(1, 1, width)])[0]
    written = g.node("Mul", [x.unit, x.rate])[0]
    nats = g.constant("nats", np.asarray(-DECAY_NATS, np.float32))
    none = g.fixed(f"zeros.{width}", np.zeros((1, 1, width), np.float32))
    pairs = [(x.r, x.r), (written, x.k), (removed, x.v), (g.node("Mul", [x.gate, nats])[0], none)]
    q, k, v, decay = (g.node("Concat", list(pair), axis=1)[0] for pair in pairs)
    inputs = [q, k, v, state, decay]
    y, after = _linear_attention(g, inputs, heads, g.fresh("after"))
    last = g.node("Slice", [y, g.ints(1), g.ints(2), g.ints(1)])[0]
    body.output(last, [1, "seq", width])
    body.output(after, [1, heads, d, d])


def _chunks7(g: GraphBuilder, x: Wkv7Names, seq: Sequence, body: Body, heads: int, d: int) -> None:
    """The WY form over chunks of L tokens, states `Z` (keys, values) at their starts.

    With W the product of the decays up to a token, inside its chunk: at = -c W_before,
    rt = r W, bt = c a / W, kt = k / W; G = [at; rt] [bt; kt]' masked to the past is
    [Ab Ak; Rb Rk]. What each token removes is U = at Z + Ab U + Ak v, so
    U = (I - Ab)^-1 (at Z + Ak v) = M1 Z + M2; then y = rt Z + Rb U + Rk v and
    Z' = W_L (Z + bt' U + kt' v). All but what needs Z is done for all chunks at once.
    """
    width, size = heads * d, CHUNK

    def padded(name: str) -> str:
        full = g.node("Pad", [name, seq.padding])[0]
        return g.node("Reshape", [full, g.ints(-1, size, width)])[0]

    def by_head(*parts: str, columns: bool = False) -> str:
        """Parts `(n, L, C)` one below the other, `(n, heads, len(parts) * L, d)`, or as columns."""
        rows = g.node("Concat", list(parts), axis=1)[0] if len(parts) > 1 else parts[0]
        split = g.node("Reshape", [rows, g.ints(0, 0, heads, d)])[0]
        return g.node("Transpose", [split], perm=[0, 2, 3, 1] if columns else [0, 2, 1, 3])[0]

    gate, unit, r, k, v = (padded(n) for n in (x.gate, x.unit, x.r, x.k, x.v))
    written = padded(g.node("Mul", [x.unit, x.rate])[0])
    nats = g.constant("nats", np.asarray(-DECAY_NATS, np.float32))
    logs = g.node("Mul", [gate, nats])[0]
    total = g.node("CumSum", [logs, g.constant("axis", np.asarray(1, np.int64))])[0]
    before = g.node("Exp", [g.node("Sub", [total, logs])[0]])[0]
    upto = g.node("Exp", [total])[0]
    inverse = g.node("Reciprocal", [upto])[0]
    at = g.node("Neg", [g.node("Mul", [unit, before])[0]])[0]
    rt = g.node("Mul", [r, upto])[0]
    bt, kt = (g.node("Mul", [n, inverse])[0] for n in (written, k))
    # Keys as columns: the product inside the Scan takes 45 us instead of 60.
    queries, keys, values = by_head(at, rt), by_head(bt, kt, columns=True), by_head(v)
    last = g.node("Slice", [upto, g.ints(-1), g.ints(1 << 62), g.ints(1)])[0]
    last = g.node("Reshape", [last, g.ints(-1, heads, d, 1)])[0]

    past = g.node("MatMul", [queries, keys])[0]
    past = g.node("Mul", [past, g.fixed(f"past.{size}", _past(size))])[0]
    past_a, past_r = g.node("Split", [past, g.ints(size, size)], 2, axis=2)
    ab, ak = g.node("Split", [past_a, g.ints(size, size)], 2, axis=3)
    at, rt = g.node("Split", [queries, g.ints(size, size)], 2, axis=2)
    # (I - Ab)^-1 = (I + Ab)(I + Ab^2)(I + Ab^4)...: Ab^L = 0.
    power = ab
    solve = g.node("Add", [ab, g.fixed(f"eye.{size}", np.eye(size, dtype=np.float32))])[0]
    for _ in range((size - 1).bit_length() - 1):
        power = g.node("MatMul", [power, power])[0]
        solve = g.node("Add", [g.node("MatMul", [power, solve])[0], solve])[0]
    m1 = g.node("MatMul", [solve, at])[0]
    m2 = g.node("MatMul", [g.node("MatMul", [solve, ak])[0], values])[0]
    reads = g.node("Concat", [m1, rt], axis=2)[0]

    with g.body("chunk") as chunk:
        z = chunk.input("z", [heads, d, d])
        read = chunk.input("reads", [heads, 2 * size, d])
        extra = chunk.input("m2", [heads, size, d])
        value = chunk.input("values", [heads, size, d])
        weights = chunk.input("past_r", [heads, size, 2 * size])
        key = chunk.input("keys", [heads, d, 2 * size])
        decay = chunk.input("last", [heads, d, 1])
        both = g.node("MatMul", [read, z])[0]
        removed, y = g.node("Split", [both, g.ints(size, size)], 2, axis=1)
        removed = g.node("Add", [removed, extra])[0]
        sources = g.node("Concat", [removed, value], axis=1)[0]
        y = g.node("Add", [y, g.node("MatMul", [weights, sources])[0]])[0]
        grown = g.node("Add", [z, g.node("MatMul", [key, sources])[0]])[0]
        chunk.output(g.node("Mul", [grown, decay])[0], [heads, d, d])
        chunk.output(y, [heads, size, d])
    z = g.node("Squeeze", [f"state.{x.state}", g.ints(0)])[0]
    inputs = [z, reads, m2, values, past_r, keys, last]
    z, y = g.node("Scan", inputs, 2, body=chunk.graph(), num_scan_inputs=6)
    y = g.node("Transpose", [y], perm=[0, 2, 1, 3])[0]
    y = g.node("Reshape", [y, g.ints(1, -1, width)])[0]
    y = g.node("Slice", [y, g.ints(0), seq.length, g.ints(1)])[0]
    body.output(y, [1, "seq", width])
    body.output(g.node("Unsqueeze", [z, g.ints(0)])[0], [1, heads, d, d])


def _past(size: int) -> NDArray[np.float32]:
    """1 where a source lies before (rows of at) or not after (rows of rt) the token."""
    strict = np.tril(np.ones((size, size), np.float32), -1)
    within = np.tril(np.ones((size, size), np.float32))
    return np.block([[strict, strict], [within, within]]).astype(np.float32)
