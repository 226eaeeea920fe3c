"""OPT: decoder-only, learned positions, layer norms and biases.

Source: OPT (arXiv 2205.01068) and `modeling_opt.py` of transformers 5.23. The 350m checkpoint
differs from its family: norms after each block, and embeddings narrower than the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from edge_mmllm.errors import CheckpointError, UnsupportedArchitecture
from edge_mmllm.spec import CAPACITY, StateSpec
from edge_mmllm_export.checkpoints.base import Checkpoint, Layout
from edge_mmllm_export.models.config import MAX_LAYERS, Fields
from edge_mmllm_export.ops.base import Activation, Attention, Ops
from edge_mmllm_export.weights import Parameter, Source, Weight

T = TypeVar("T")

#: Rows of the position table before that of the first token: a leftover of fairseq's padding id.
POSITION_OFFSET = 2
#: torch's LayerNorm default; the config has no such key.
_NORM_EPS = 1e-5
_ACTIVATIONS: dict[str, Activation] = {"relu": "relu", "gelu": "gelu"}


@dataclass(frozen=True)
class OptConfig:
    """Sizes and switches of the family.

    Attributes:
        embed_size: width of the embeddings; where it is not `hidden_size`, projections lead in
            and out.
        pre_norm: norms before attention and MLP, and one after the last layer; else after each
            block, and none at the end (350m).
        final_norm: whether the last layer is followed by a norm.
        root: what the checkpoint puts before `decoder.`; some were saved without a head.
    """

    vocab_size: int
    hidden_size: int
    embed_size: int
    intermediate_size: int
    layers: int
    heads: int
    context_length: int
    positions: int
    tied: bool
    bias: bool
    pre_norm: bool
    final_norm: bool
    activation: Activation
    root: str = "model."


class Opt:
    """Decoder-only transformer of BLIP-2's smaller family."""

    name = "opt"

    def __init__(self, config: OptConfig) -> None:
        c = self.config = config
        self.vocab_size, self.hidden_size, self.layers = c.vocab_size, c.hidden_size, c.layers
        self.context_length: int | None = c.context_length

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, context: int | None = None) -> Opt:
        """Read config.json. Raises: CheckpointError, UnsupportedArchitecture."""
        where = str(checkpoint.source)
        if checkpoint.layout != "hub":
            raise UnsupportedArchitecture(
                "OPT is read from the hub layout only",
                where=where,
                found=checkpoint.layout,
                fix="export from the original release",
            )
        f = Fields(checkpoint.config, f"{where}, config.json")
        hidden, heads = f.size("hidden_size"), f.size("num_attention_heads")
        if hidden % heads:
            raise CheckpointError(
                "the config's head count does not divide its hidden size",
                where=where,
                found=f"{heads} heads, hidden size {hidden}",
            )
        activation = f.text("activation_function", "relu")
        if activation not in _ACTIVATIONS:
            raise UnsupportedArchitecture(
                f"activation {activation!r} has no definition here",
                where=where,
                expected=" | ".join(_ACTIVATIONS),
            )
        if not f.flag("layer_norm_elementwise_affine", True):
            raise UnsupportedArchitecture("layer norms without weights", where=where)
        pre_norm = f.flag("do_layer_norm_before", True)
        positions = f.size("max_position_embeddings", 2048)
        bare = "decoder.embed_tokens.weight" in checkpoint.tensors
        return cls(
            OptConfig(
                vocab_size=f.size("vocab_size"),
                hidden_size=hidden,
                embed_size=f.size("word_embed_proj_dim", hidden),
                intermediate_size=f.size("ffn_dim"),
                layers=f.size("num_hidden_layers", limit=MAX_LAYERS),
                heads=heads,
                context_length=min(positions, context or positions),
                positions=positions,
                tied=f.flag("tie_word_embeddings", True),
                bias=f.flag("enable_bias", True),
                pre_norm=pre_norm,
                final_norm=pre_norm and not f.flag("_remove_final_layer_norm", False),
                activation=_ACTIVATIONS[activation],
                root="" if bare else "model.",
            )
        )

    def parameters(self) -> list[Parameter]:
        c = self.config
        h, e, f = c.hidden_size, c.embed_size, c.intermediate_size
        out = [
            Parameter("embed", (c.vocab_size, e), "embedding"),
            Parameter("positions", (c.positions + POSITION_OFFSET, h), "embedding"),
        ]
        if e != h:
            out += [Parameter("project_in", (h, e)), Parameter("project_out", (e, h))]
        for i in range(c.layers):
            p = f"layers.{i}"
            out += _norm(f"{p}.norm_attn", h)
            for n in "qkvo":
                out += self._linear(f"{p}.attn.{n}", h, h)
            out += _norm(f"{p}.norm_mlp", h)
            out += self._linear(f"{p}.mlp.up", f, h)
            out += self._linear(f"{p}.mlp.down", h, f)
        if c.final_norm:
            out += _norm("norm", h)
        if not c.tied:
            out.append(Parameter("head", (c.vocab_size, e), "head"))
        return out

    def _linear(self, name: str, n: int, k: int) -> list[Parameter]:
        bias = [Parameter(f"{name}_bias", (n,), "vector")] if self.config.bias else []
        return [Parameter(name, (n, k)), *bias]

    def sources(self, layout: Layout) -> dict[str, Source]:
        """Our names to the hub's."""
        out = {}
        for p in self.parameters():
            stem, bias = p.name.removesuffix("_bias"), p.name.endswith("_bias")
            if stem.startswith("layers."):
                _, i, rest = stem.split(".", 2)
                their = f"{self.config.root}decoder.layers.{i}.{_LAYER_NAMES[rest]}"
            elif stem == "head":
                their = "lm_head"
            else:
                their = f"{self.config.root}decoder.{_NAMES[stem]}"
            out[p.name] = Source(their + (".bias" if bias else ".weight"))
        return out

    def ignored(self) -> tuple[str, ...]:
        return ("lm_head.weight",) if self.config.tied else ()

    def states(self) -> tuple[StateSpec, ...]:
        c = self.config
        shape = (1, c.heads, CAPACITY, c.hidden_size // c.heads)
        return tuple(
            StateSpec(f"layers.{i}.attn.{n}", shape, "float32", "kv")
            for i in range(c.layers)
            for n in ("k", "v")
        )

    def embed(self, op: Ops[T], w: Mapping[str, Weight], ids: T) -> T:
        """The projection into the model belongs here, so that embeddings are `(seq, hidden)`."""
        x = op.rows(w["embed"], ids)
        return op.linear(x, w["project_in"])[0] if "project_in" in w else x

    def decode(self, op: Ops[T], w: Mapping[str, Weight], x: T) -> T:
        c = self.config
        x = op.add(x, op.positions(x, w["positions"], offset=POSITION_OFFSET))
        delta: T | None = None  # what the last block adds to the residual stream x
        for i in range(c.layers):
            layer = self._layer if c.pre_norm else self._post_norm_layer
            x, delta = layer(op, w, i, x, delta)
        x = op.logit_rows(x)
        delta = op.logit_rows(delta) if delta is not None else None
        if c.final_norm:
            _, x = op.add_norm(x, delta, w["norm"], eps=_NORM_EPS, bias=w["norm_bias"])
        elif delta is not None:
            x = op.add(x, delta)
        if "project_out" in w:
            x = op.linear(x, w["project_out"])[0]
        return op.linear(x, w["embed"] if c.tied else w["head"])[0]

    def _layer(
        self, op: Ops[T], w: Mapping[str, Weight], i: int, x: T, delta: T | None
    ) -> tuple[T, T | None]:
        """One pre-norm layer: x `(seq, hidden)` and the last block's output, both carried."""
        x, h = self._add_norm(op, w, f"layers.{i}.norm_attn", x, delta)
        h = self._attention(op, w, i, h)
        x, h = self._add_norm(op, w, f"layers.{i}.norm_mlp", x, h)
        return x, self._mlp(op, w, i, h)

    def _post_norm_layer(
        self, op: Ops[T], w: Mapping[str, Weight], i: int, x: T, delta: T | None
    ) -> tuple[T, T | None]:
        h = self._attention(op, w, i, x)
        _, x = self._add_norm(op, w, f"layers.{i}.norm_attn", x, h)
        h = self._mlp(op, w, i, x)
        return self._add_norm(op, w, f"layers.{i}.norm_mlp", x, h)[1], None

    def _add_norm(
        self, op: Ops[T], w: Mapping[str, Weight], name: str, x: T, delta: T | None
    ) -> tuple[T, T]:
        return op.add_norm(x, delta, w[name], eps=_NORM_EPS, bias=w[f"{name}_bias"])

    def _attention(self, op: Ops[T], w: Mapping[str, Weight], i: int, h: T) -> T:
        c, p = self.config, f"layers.{i}.attn"
        q, k, v = op.linear(
            h, *(w[f"{p}.{n}"] for n in "qkv"), bias=self._bias(w, p, "q", "k", "v")
        )
        d = c.hidden_size // c.heads
        spec = Attention(heads=c.heads, kv_heads=c.heads, head_dim=d, scale=d**-0.5, rope=None)
        k_state, v_state = self.states()[2 * i : 2 * i + 2]
        h = op.attention(q, k, v, k_state, v_state, spec)
        return op.linear(h, w[f"{p}.o"], bias=self._bias(w, p, "o"))[0]

    def _mlp(self, op: Ops[T], w: Mapping[str, Weight], i: int, h: T) -> T:
        p = f"layers.{i}.mlp"
        (h,) = op.linear(h, w[f"{p}.up"], bias=self._bias(w, p, "up"))
        h = op.activation(h, self.config.activation)
        return op.linear(h, w[f"{p}.down"], bias=self._bias(w, p, "down"))[0]

    def _bias(self, w: Mapping[str, Weight], p: str, *names: str) -> tuple[Weight | None, ...]:
        return tuple(w[f"{p}.{n}_bias"] for n in names) if self.config.bias else ()


def _norm(name: str, width: int) -> list[Parameter]:
    return [Parameter(name, (width,), "vector"), Parameter(f"{name}_bias", (width,), "vector")]


_NAMES = {
    "embed": "embed_tokens",
    "positions": "embed_positions",
    "project_in": "project_in",
    "project_out": "project_out",
    "norm": "final_layer_norm",
}
_LAYER_NAMES = {
    "norm_attn": "self_attn_layer_norm",
    "norm_mlp": "final_layer_norm",
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.out_proj",
    "mlp.up": "fc1",
    "mlp.down": "fc2",
}
