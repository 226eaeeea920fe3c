"""TIR kernels that hold state, each written for any sequence length.

A kernel reads and writes its state in the buffer the caller owns, so a forward allocates nothing
of a state's size. They are plain loops in the papers' order, made to be right: schedules belong
to the MLC exporter. Arguments come as `call_tir_inplace` passes them: inputs, states, output.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from edge_mmllm_export.ops.base import Attention


def attention(spec: Attention, capacity: int) -> Any:
    """Append k and v at `position`, then causal attention over what the states hold.

    q `(seq, heads * d)`, k and v `(seq, kv_heads * d)` after rope, position int64 `(1,)`, states
    `(1, kv_heads, capacity, d)`, output `(seq, heads * d)`. Fails when the states would overflow.
    """
    heads, kv_heads, d = spec.heads, spec.kv_heads, spec.head_dim
    share, scale = heads // kv_heads, spec.scale
    window = capacity if spec.window is None else spec.window
    softcap = spec.softcap or 0.0

    @T.prim_func(private=True, s_tir=True)  # type: ignore[untyped-decorator]
    def kernel(
        q_: T.handle,
        k_: T.handle,
        v_: T.handle,
        position_: T.handle,
        keys_: T.handle,
        values_: T.handle,
        output_: T.handle,
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        seq = T.int64()
        q = T.match_buffer(q_, (seq, heads * d), "float32")
        k = T.match_buffer(k_, (seq, kv_heads * d), "float32")
        v = T.match_buffer(v_, (seq, kv_heads * d), "float32")
        position = T.match_buffer(position_, (1,), "int64")
        keys = T.match_buffer(keys_, (1, kv_heads, capacity, d), "float32")
        values = T.match_buffer(values_, (1, kv_heads, capacity, d), "float32")
        output = T.match_buffer(output_, (seq, heads * d), "float32")
        scores = T.alloc_buffer((capacity,), "float32")
        largest = T.alloc_buffer((1,), "float32")
        total = T.alloc_buffer((1,), "float32")
        # An AssertStmt of the compiled kernel, not of Python: it holds whoever calls.
        assert position[0] + seq <= capacity, "the kv state is full"  # noqa: S101
        for t, h, j in T.grid(seq, kv_heads, d):
            keys[0, h, position[0] + t, j] = k[t, h * d + j]
            values[0, h, position[0] + t, j] = v[t, h * d + j]
        for t, h in T.grid(seq, heads):
            end = position[0] + t + 1
            first = T.max(end - window, T.int64(0))
            largest[0] = T.min_value("float32")
            for s in T.serial(end - first):
                scores[s] = T.float32(0)
                for j in T.serial(d):
                    scores[s] += q[t, h * d + j] * keys[0, h // share, first + s, j]
                scores[s] = scores[s] * T.float32(scale)
                if softcap > 0.0:
                    scores[s] = T.float32(softcap) * T.tanh(scores[s] / T.float32(softcap))
                largest[0] = T.max(largest[0], scores[s])
            total[0] = T.float32(0)
            for s in T.serial(end - first):
                scores[s] = T.exp(scores[s] - largest[0])
                total[0] += scores[s]
            for j in T.serial(d):
                output[t, h * d + j] = T.float32(0)
            for s, j in T.grid(end - first, d):
                output[t, h * d + j] += scores[s] / total[0] * values[0, h // share, first + s, j]

    return kernel


def causal_conv(channels: int, width: int) -> Any:
    """Depthwise causal convolution.

    x `(seq, C)`, weight `(C, width)`, state `(1, width - 1, C)` (the last inputs, oldest first),
    output `(seq, C)`.
    """

    @T.prim_func(private=True, s_tir=True)  # type: ignore[untyped-decorator]
    def kernel(x_: T.handle, weight_: T.handle, state_: T.handle, output_: T.handle) -> None:
        T.func_attr({"tirx.noalias": True})
        seq = T.int64()
        x = T.match_buffer(x_, (seq, channels), "float32")
        weight = T.match_buffer(weight_, (channels, width), "float32")
        state = T.match_buffer(state_, (1, width - 1, channels), "float32")
        output = T.match_buffer(output_, (seq, channels), "float32")
        for t, c in T.grid(seq, channels):
            output[t, c] = T.float32(0)
            for i in T.serial(width):
                # Input number t + i counts from the oldest of the state.
                if t + i < width - 1:
                    output[t, c] += state[0, t + i, c] * weight[c, i]
                else:
                    output[t, c] += x[t + i - (width - 1), c] * weight[c, i]
        # The state moves by seq; rows are read before they are overwritten, since seq >= 1.
        for i, c in T.grid(width - 1, channels):
            if seq + i < width - 1:
                state[0, i, c] = state[0, seq + i, c]
            else:
                state[0, i, c] = x[seq + i - (width - 1), c]

    return kernel


def gated_linear_attention(heads: int, groups: int, d_k: int, d_v: int) -> Any:
    """The recurrence of `Ops.gated_linear_attention`, one token after another.

    q and k `(seq, groups * d_k)`, v `(seq, heads * d_v)`, dt `(seq, heads)`, decay `(heads,)`,
    state `(1, heads, d_k, d_v)`, output `(seq, heads * d_v)`.
    """
    share = heads // groups

    @T.prim_func(private=True, s_tir=True)  # type: ignore[untyped-decorator]
    def kernel(
        q_: T.handle,
        k_: T.handle,
        v_: T.handle,
        dt_: T.handle,
        decay_: T.handle,
        state_: T.handle,
        output_: T.handle,
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        seq = T.int64()
        q = T.match_buffer(q_, (seq, groups * d_k), "float32")
        k = T.match_buffer(k_, (seq, groups * d_k), "float32")
        v = T.match_buffer(v_, (seq, heads * d_v), "float32")
        dt = T.match_buffer(dt_, (seq, heads), "float32")
        decay = T.match_buffer(decay_, (heads,), "float32")
        state = T.match_buffer(state_, (1, heads, d_k, d_v), "float32")
        output = T.match_buffer(output_, (seq, heads * d_v), "float32")
        gate = T.alloc_buffer((1,), "float32")
        for t, h in T.grid(seq, heads):
            gate[0] = T.exp(dt[t, h] * decay[h])
            for p in T.serial(d_v):
                output[t, h * d_v + p] = T.float32(0)
            for n, p in T.grid(d_k, d_v):
                state[0, h, n, p] = state[0, h, n, p] * gate[0] + (
                    k[t, h // share * d_k + n] * (dt[t, h] * v[t, h * d_v + p])
                )
                output[t, h * d_v + p] += q[t, h // share * d_k + n] * state[0, h, n, p]

    return kernel


def selective_scan(d_inner: int, d_state: int) -> Any:
    """The recurrence of `Ops.selective_scan`, one token after another, without the skip.

    x and dt `(seq, d_inner)`, b and c `(seq, d_state)`, decay `(d_inner, d_state)`, state
    `(1, d_state, d_inner)`, output `(seq, d_inner)`.
    """

    @T.prim_func(private=True, s_tir=True)  # type: ignore[untyped-decorator]
    def kernel(
        x_: T.handle,
        dt_: T.handle,
        b_: T.handle,
        c_: T.handle,
        decay_: T.handle,
        state_: T.handle,
        output_: T.handle,
    ) -> None:
        T.func_attr({"tirx.noalias": True})
        seq = T.int64()
        x = T.match_buffer(x_, (seq, d_inner), "float32")
        dt = T.match_buffer(dt_, (seq, d_inner), "float32")
        b = T.match_buffer(b_, (seq, d_state), "float32")
        c = T.match_buffer(c_, (seq, d_state), "float32")
        decay = T.match_buffer(decay_, (d_inner, d_state), "float32")
        state = T.match_buffer(state_, (1, d_state, d_inner), "float32")
        output = T.match_buffer(output_, (seq, d_inner), "float32")
        for t in T.serial(seq):
            for i in T.serial(d_inner):
                output[t, i] = T.float32(0)
            for n, i in T.grid(d_state, d_inner):
                state[0, n, i] = state[0, n, i] * T.exp(dt[t, i] * decay[i, n]) + (
                    b[t, n] * (dt[t, i] * x[t, i])
                )
                output[t, i] += c[t, n] * state[0, n, i]

    return kernel
