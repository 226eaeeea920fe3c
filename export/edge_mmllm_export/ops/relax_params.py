"""What the compiled functions of a model library take beside inputs and states: its parameters.

A weight of ours is read from the weight files under its own name, or as `NAME.q_weight` and
`NAME.q_scale` (`edge_mmllm_runtime.mlc.weights` finds them, whatever they are called there). A
parameter of the functions is made of it once, when a library is loaded: vectors become float32,
matrices what the kernels read (`edge_mmllm_runtime.mlc.packing`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from edge_mmllm_export.weights import Weight
from edge_mmllm_runtime.mlc.packing import Packing

#: Layout of what is no matrix, or is read number by number.
FLOAT32 = "float32"
#: Weights that `linear` and `rows` read, packed; all others are float32 as they are.
_MATRICES = ("matrix", "embedding", "head")
#: Weight -> `float32` or the id of a packing.
Layouts = Mapping[str, str]


@dataclass(frozen=True)
class Packed:
    """One parameter of the compiled functions, as the library's metadata lists it.

    Attributes:
        name: of the weight.
        layout: `float32`, or a `Packing.id`.
        tensors: what it is made of: `(NAME,)`, or `(NAME.q_weight, NAME.q_scale)`.
        size: of the weight, `(N, K)` for a matrix.
        shape, dtype: of the parameter.
    """

    name: str
    layout: str
    tensors: tuple[str, ...]
    size: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: str

    def to_json(self) -> dict[str, Any]:
        """As in the metadata."""
        return asdict(self)


def layouts_of(
    weights: Mapping[str, Weight], kinds: Mapping[str, str] | None = None, *, half: bool = False
) -> dict[str, str]:
    """The layout of every weight.

    Args:
        kinds: how each is stored: `f32`, `bf16`, `f16`, `q4` or `q3`; None: all in float32.
        half: scales are float16, else bfloat16.
    """
    scale = "f16" if half else "bf16"
    packings = {
        "f32": "f32",
        "bf16": "f32",
        "f16": "f16",
        "q4": f"q4-b32-z7-{scale}",
        "q3": f"q4-b40-z3-{scale}",
    }
    return {
        w.name: packings[kinds[w.name] if kinds else "f32"] if w.role in _MATRICES else FLOAT32
        for w in weights.values()
    }


def packed(weight: Weight, layout: str) -> Packed:
    """The parameter of a weight."""
    if layout == FLOAT32:
        return Packed(weight.name, layout, (weight.name,), weight.shape, weight.shape, FLOAT32)
    packing = Packing.of(layout, weight.shape[0], weight.shape[1])
    names: tuple[str, ...] = (weight.name,)
    if packing.kind == "q4":
        names = (f"{weight.name}.q_weight", f"{weight.name}.q_scale")
    return Packed(weight.name, layout, names, weight.shape, (packing.size_bytes,), "uint8")
