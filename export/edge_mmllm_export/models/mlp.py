"""Projectors made of linear layers: one (LLaVA, Qwen2-Audio), or two and more (LLaVA-1.5).

Source: LLaVA (arXiv 2304.08485) section 4.1, LLaVA-1.5 (2310.03744) section 3.3, and
`LlavaMultiModalProjector` of transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

from edge_mmllm_export.checkpoints.base import Layout
from edge_mmllm_export.ops.base import Activation, Ops
from edge_mmllm_export.weights import Parameter, Source, Weight

T = TypeVar("T")

#: `projector_hidden_act` of published configs -> the op's name.
ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
}


@dataclass(frozen=True)
class MlpConfig:
    """Sizes of the layers.

    Attributes:
        widths: of the input and of each layer's output.
        names: the checkpoint's name of each layer.
        activation: between layers.
    """

    widths: tuple[int, ...]
    names: tuple[str, ...]
    activation: Activation = "gelu"
    bias: bool = True


class Mlp:
    """Linear layers with an activation between them."""

    def __init__(self, config: MlpConfig) -> None:
        self.config = config
        self.name = "linear" if len(config.names) == 1 else "mlp"
        self.width, self.hidden_size = config.widths[0], config.widths[-1]

    def tokens(self, count: int) -> int:
        """Rows that `count` rows become."""
        return count

    def parameters(self) -> list[Parameter]:
        out = []
        for i, (width, wider) in enumerate(pairwise(self.config.widths)):
            out.append(Parameter(f"{i}", (wider, width)))
            if self.config.bias:
                out.append(Parameter(f"{i}.bias", (wider,), "vector"))
        return out

    def sources(self, layout: Layout, prefix: str) -> dict[str, Source]:
        """`linear_1.weight`, ... after the family's prefix."""
        out = {}
        for i, name in enumerate(self.config.names):
            stem = f"{prefix}{name}." if name else prefix
            out[f"{i}"] = Source(f"{stem}weight")
            if self.config.bias:
                out[f"{i}.bias"] = Source(f"{stem}bias")
        return out

    def ignored(self, prefix: str) -> tuple[str, ...]:
        return ()

    def project(self, op: Ops[T], w: Mapping[str, Weight], x: T) -> T:
        """`(tokens, width)` -> `(tokens, hidden)`."""
        for i in range(len(self.config.names)):
            if i:
                x = op.activation(x, self.config.activation)
            bias = (w[f"{i}.bias"],) if self.config.bias else ()
            (x,) = op.linear(x, w[f"{i}"], bias=bias)
        return x


class MlpWithNewline(Mlp):
    """LLaVA-NeXT's: behind the rows of each tile comes the row that ends a line of the picture."""

    def parameters(self) -> list[Parameter]:
        return [*super().parameters(), Parameter("newline", (self.hidden_size,), "vector")]

    def sources(self, layout: Layout, prefix: str) -> dict[str, Source]:
        """`image_newline` stands beside the projector."""
        beside = prefix.removesuffix("multi_modal_projector.")
        return super().sources(layout, prefix) | {"newline": Source(f"{beside}image_newline")}

    def project(self, op: Ops[T], w: Mapping[str, Weight], x: T) -> T:
        """`(tokens, width)` -> `(tokens + 1, hidden)`."""
        return op.concat_rows(super().project(op, w, x), op.table(w["newline"]))
