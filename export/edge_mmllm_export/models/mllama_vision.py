"""Llama-3.2-Vision's tower: all tiles of a picture at once, then layers that weigh them.

Rows lie tile after tile, the class token first in each; the rows that fill each tile up to a
multiple of 8 come after all tiles. The reference hides padding from padding alone: rows of a tile
in use see everything, rows of an unused tile and the filling see the tiles in use. So attention is
two calls without a mask, which also keeps no scores. All tiles are handed on, those in use first:
a token that sees no picture attends to the others, too (see `mllama.py`).

Source: Llama 3 (arXiv 2407.21783), section 7; `MllamaVisionModel` of transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from edge_mmllm_export.checkpoints.base import Layout
from edge_mmllm_export.families.composite import Port
from edge_mmllm_export.models.config import MAX_LAYERS, Fields
from edge_mmllm_export.models.vit import activation_of, check_heads, picture_sizes
from edge_mmllm_export.ops.base import Activation, Ops
from edge_mmllm_export.weights import Parameter, Source, Weight

T = TypeVar("T")

#: Tokens of a tile are filled up to a multiple of this (which no square plus one is).
_FILL = 8
#: Of the norms before and after the layers; those within have the config's.
_EPS = 1e-5


@dataclass(frozen=True)
class MllamaVisionConfig:
    """Sizes of the tower.

    Attributes:
        tiles: the most a picture is cut into.
        ratios: supported shapes of a picture in tiles; row 0 of the tables is for none.
        layers, global_layers: before and after the second tile embedding; the latter are gated.
        features: of which layers the output is handed on beside the last, in this order.
    """

    image_size: int
    patch_size: int
    channels: int
    tiles: int
    ratios: int
    hidden_size: int
    intermediate_size: int
    heads: int
    layers: int
    global_layers: int
    features: tuple[int, ...]
    norm_eps: float
    activation: Activation


class MllamaVision:
    """`(tiles * tokens_per_tile, (1 + features) * hidden)`."""

    name = "mllama_vision"
    tokens = 0

    def __init__(self, config: MllamaVisionConfig) -> None:
        c = self.config = config
        self.image_size, self.patch_size = c.image_size, c.patch_size
        self.patches = (c.image_size // c.patch_size) ** 2
        self.tokens_per_tile = self.patches + 1
        self.width = c.hidden_size * (1 + len(c.features))
        self._fill = -self.tokens_per_tile % _FILL

    @classmethod
    def from_config(cls, f: Fields) -> MllamaVision:
        """Read a published `vision_config`. Raises: CheckpointError, UnsupportedArchitecture."""
        hidden, heads = f.size("hidden_size", 1280), f.size("attention_heads", 16)
        check_heads(f, hidden, heads)
        picture, patch = picture_sizes(f, 448, 14)
        layers = f.size("num_hidden_layers", 32, limit=MAX_LAYERS)
        features = f.numbers(
            "intermediate_layers_indices", (3, 7, 15, 23, 30), least=0, most=layers - 1
        )
        ratios = f.get("supported_aspect_ratios")
        config = MllamaVisionConfig(
            image_size=picture,
            patch_size=patch,
            channels=f.size("num_channels", 3),
            tiles=f.size("max_num_tiles", 4),
            ratios=len(ratios) if isinstance(ratios, list) else 8,
            hidden_size=hidden,
            intermediate_size=f.size("intermediate_size", 5120),
            heads=heads,
            layers=layers,
            global_layers=f.size("num_global_layers", 8, limit=MAX_LAYERS),
            features=features,
            norm_eps=f.number("norm_eps", 1e-5),
            activation=activation_of(f, "hidden_act", "gelu"),
        )
        return cls(config)

    def ports(self) -> tuple[Port, ...]:
        """`pixels` of all tiles, unused ones as the processor leaves them; `aspect_ratio` the id
        of the picture's shape, from 1; `tiles` how many are in use."""
        c = self.config
        return (
            Port("pixels", "float32", (c.tiles, c.channels, c.image_size, c.image_size)),
            Port("aspect_ratio", "int64", (1,)),
            Port("tiles", "int64", (1,)),
        )

    def parameters(self) -> list[Parameter]:
        c, h, n = self.config, self.config.hidden_size, self.tokens_per_tile
        out = [
            Parameter("patch", (h, c.channels * c.patch_size**2)),
            Parameter("class", (h,), "vector"),
            Parameter("position", (n, h), "vector"),
            Parameter("position_gate", (1,), "vector"),
            Parameter("position_rest", (1,), "vector"),
            Parameter("tile_position", (c.ratios + 1, c.tiles * n * h), "embedding"),
        ]
        for name in ("pre_tile", "post_tile"):
            out.append(Parameter(name, (c.ratios + 1, c.tiles * h), "embedding"))
            out.append(Parameter(f"{name}_gate", (1,), "vector"))
        for name in ("norm_pre", "norm_post"):
            out += [Parameter(n, (h,), "vector") for n in (name, f"{name}_bias")]
        for p, gated in self._layers():
            out += [
                Parameter(f"{p}{name}", shape, "matrix" if len(shape) == 2 else "vector")
                for name, shape in self._layer_shapes(gated).items()
            ]
        return out

    def _layers(self) -> list[tuple[str, bool]]:
        """Our prefix of each layer, and whether it is gated."""
        c = self.config
        first = [(f"layers.{i}.", False) for i in range(c.layers)]
        return first + [(f"global.{i}.", True) for i in range(c.global_layers)]

    def _layer_shapes(self, gated: bool) -> dict[str, tuple[int, ...]]:
        h, f = self.config.hidden_size, self.config.intermediate_size
        shapes: dict[str, tuple[int, ...]] = {n: (h,) for n in ("norm_attn", "norm_attn_bias")}
        shapes |= {f"attn.{n}": (h, h) for n in "qkvo"}
        shapes |= {n: (h,) for n in ("norm_mlp", "norm_mlp_bias")}
        shapes |= {"mlp.up": (f, h), "mlp.up_bias": (f,), "mlp.down": (h, f), "mlp.down_bias": (h,)}
        return shapes | ({"gate_attn": (1,), "gate_mlp": (1,)} if gated else {})

    def sources(self, layout: Layout, prefix: str) -> dict[str, Source]:
        """Our names to the hub's, which begin with `prefix`, e.g. `vision_model.`. Gates are kept
        as their tanh."""
        c, place = self.config, f"{prefix}gated_positional_embedding."
        square = (c.hidden_size, c.channels, c.patch_size, c.patch_size)
        out = {
            "patch": Source(f"{prefix}patch_embedding.weight", stored=square),
            "class": Source(f"{prefix}class_embedding"),
            "position": Source(f"{place}embedding"),
            "position_gate": Source(f"{place}gate", apply=np.tanh),
            "position_rest": Source(f"{place}gate", apply=lambda gate: 1 - np.tanh(gate)),
            "tile_position": Source(f"{place}tile_embedding.weight"),
        }
        for name in ("pre_tile", "post_tile"):
            theirs = f"{prefix}{name}_positional_embedding."
            out[name] = Source(f"{theirs}embedding.weight")
            out[f"{name}_gate"] = Source(f"{theirs}gate", apply=np.tanh)
        for name in ("norm_pre", "norm_post"):
            theirs = f"{prefix}layer{name}."
            out |= {name: Source(f"{theirs}weight"), f"{name}_bias": Source(f"{theirs}bias")}
        for p, gated in self._layers():
            theirs = prefix + p.replace("layers", "transformer.layers")
            theirs = theirs.replace("global.", "global_transformer.layers.")
            for name in self._layer_shapes(gated):
                stem = name.removesuffix("_bias")
                kind = ".bias" if name.endswith("_bias") else ".weight"
                if name.startswith("gate"):
                    out[p + name] = Source(theirs + _HUB_NAMES[name], apply=np.tanh)
                else:
                    out[p + name] = Source(theirs + _HUB_NAMES[stem] + kind)
        return out

    def ignored(self, prefix: str) -> tuple[str, ...]:
        """Every tensor of the tower is used."""
        return ()

    def encode(self, op: Ops[T], w: Mapping[str, Weight], pixels: T, ratio: T, tiles: T) -> T:
        """Tiles `(max, channels, height, width)`, id and count -> `(max * tokens, width)`, those in
        use first."""
        c, n, h = self.config, self.tokens_per_tile, self.config.hidden_size
        shape = (c.tiles, c.channels, c.image_size, c.image_size)
        x = op.linear(op.patches(pixels, shape, c.patch_size), w["patch"])[0]
        tile = self._tile(op, w, "pre_tile", ratio)
        x = op.add(x, op.repeat_rows(tile, self.patches))
        # A row for each tile, so that what is added to each tile is one row.
        first = op.repeat_rows(op.table(w["class"]), c.tiles)
        x = op.concat(first, op.fold_rows(x, self.patches))
        place = op.mul(op.table(w["position"]), op.table(w["position_rest"]))
        x = op.add(x, op.fold_rows(place, n))
        own = op.unfold_rows(op.rows(w["tile_position"], ratio), c.tiles)
        x = op.unfold_rows(op.add(x, op.mul(own, op.table(w["position_gate"]))), n)
        x = op.norm(x, w["norm_pre"], eps=_EPS, bias=w["norm_pre_bias"])
        x = op.concat_rows(x, op.zeros(c.tiles * self._fill, h))
        states = []
        for i in range(c.layers):
            x = self._layer(op, w, f"layers.{i}.", x, tiles, gated=False)
            states.append(x)
        x = op.norm(x, w["norm_post"], eps=_EPS, bias=w["norm_post_bias"])
        tile = self._tile(op, w, "post_tile", ratio)
        added = op.concat_rows(op.repeat_rows(tile, n), op.repeat_rows(tile, self._fill))
        x = op.add(x, added)
        for i in range(c.global_layers):
            x = self._layer(op, w, f"global.{i}.", x, tiles, gated=True)
        x = op.take_rows(x, 0, c.tiles * n)
        if not c.features:
            return x
        # Each channel's values of all features side by side.
        features = op.concat(*(op.take_rows(states[i], 0, c.tiles * n) for i in c.features))
        count = len(c.features)
        return op.concat(x, op.windows(op.unfold_rows(features, count), count, stride=count))

    def _tile(self, op: Ops[T], w: Mapping[str, Weight], name: str, ratio: T) -> T:
        """What a tile's place in the picture adds: `(tiles, hidden)`."""
        rows = op.unfold_rows(op.rows(w[name], ratio), self.config.tiles)
        return op.mul(rows, op.table(w[f"{name}_gate"]))

    def _layer(
        self, op: Ops[T], w: Mapping[str, Weight], p: str, x: T, tiles: T, *, gated: bool
    ) -> T:
        c, n = self.config, self.tokens_per_tile
        h = op.norm(x, w[f"{p}norm_attn"], eps=c.norm_eps, bias=w[f"{p}norm_attn_bias"])
        q, k, v = op.linear(h, w[f"{p}attn.q"], w[f"{p}attn.k"], w[f"{p}attn.v"])
        used, unused = op.split_rows(q, tiles, n)
        scale = (c.hidden_size // c.heads) ** -0.5
        keys, values = op.split_rows(k, tiles, n)[0], op.split_rows(v, tiles, n)[0]
        h = op.concat_rows(
            op.full_attention(used, k, v, heads=c.heads, scale=scale),
            op.full_attention(unused, keys, values, heads=c.heads, scale=scale),
        )
        h = op.linear(h, w[f"{p}attn.o"])[0]
        x = op.add(x, op.mul(h, op.table(w[f"{p}gate_attn"])) if gated else h)
        h = op.norm(x, w[f"{p}norm_mlp"], eps=c.norm_eps, bias=w[f"{p}norm_mlp_bias"])
        h = op.activation(
            op.linear(h, w[f"{p}mlp.up"], bias=(w[f"{p}mlp.up_bias"],))[0], c.activation
        )
        h = op.linear(h, w[f"{p}mlp.down"], bias=(w[f"{p}mlp.down_bias"],))[0]
        return op.add(x, op.mul(h, op.table(w[f"{p}gate_mlp"])) if gated else h)


_HUB_NAMES = {
    "norm_attn": "input_layernorm",
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.o_proj",
    "norm_mlp": "post_attention_layernorm",
    "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
    "gate_attn": "gate_attn",
    "gate_mlp": "gate_ffn",
}
