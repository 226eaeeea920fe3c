"""What a definition's MLC map is made of.

A map says, for one definition, which of our weights make each parameter of an MLC model, under
which name. For architectures that mlc-llm has, names and fusions are those of its own models; for
the others they are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

from edge_mmllm.errors import UnsupportedArchitecture

#: What mlc-llm's quantizations tell apart: linear layers, the embedding, the head, all else.
Kind = Literal["matrix", "embedding", "head", "plain"]
#: How a plain tensor is made of our values: as they are, transposed (several: stacked), their
#: exponential, or 1 - x.
Change = Literal["same", "transposed", "exp", "one_minus"]
#: What a plain tensor is stored as: the quantization's own type, or another. `exact` is float32 in
#: all its bits, where mlc-llm would shorten it to bfloat16.
Store = Literal["model", "float16", "float32", "exact"]


@dataclass(frozen=True)
class MlcTensor:
    """A parameter of the model, before it is quantized.

    Attributes:
        name: e.g. `model.layers.0.mlp.down_proj.weight`; quantized it becomes two, whose names
            end in `.q_weight` and `.q_scale` instead of `.weight`.
        parts: our names, whose rows follow one another.
        kind: only `plain` ones have a `shape`, `change` or `store` of their own.
        shape: as stored; None where it is that of the only part.
        copied: the checkpoint's own name, of a tensor that no weight of ours is made of.
    """

    name: str
    parts: tuple[str, ...] = ()
    kind: Kind = "plain"
    shape: tuple[int, ...] | None = None
    change: Change = "same"
    store: Store = "model"
    copied: str | None = None

    @property
    def stem(self) -> str:
        return self.name.removesuffix(".weight")


@dataclass(frozen=True)
class MlcMap:
    """A definition in the terms of mlc-llm.

    Attributes:
        model_type: mlc-llm's name of the architecture; ours where it has none.
        config: `model_config` of `mlc-chat-config.json`.
        stock: whether mlc-llm itself can compile and load the model.
        context_length: the longest that mlc-llm computes rightly; None = unbounded.
        remarks: what differs there from here, for people.
    """

    model_type: str
    config: dict[str, Any]
    tensors: Sequence[MlcTensor]
    stock: bool
    context_length: int | None
    remarks: tuple[str, ...] = field(default=())


def refuse(what: str, architecture: str, expected: str | None = None) -> NoReturn:
    """Raises: UnsupportedArchitecture, for what mlc-llm's model of that name cannot compute."""
    raise UnsupportedArchitecture(
        f"mlc-llm cannot run this {architecture}: {what}", expected=expected
    )
