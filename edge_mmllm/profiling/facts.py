"""What `fit` needs to know of a model, from a bundle's manifest or from an export's plan."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

from edge_mmllm.bundle import QuantGroup, open_bundle
from edge_mmllm.spec import NATIVE_DECODER, StateSpec

#: Float16 scales beside the codes, as the exporter writes them.
_SCALE_BITS = 16


@dataclass(frozen=True)
class Weights:
    """Stored bytes of a model's language part by what an engine makes of them.

    Attributes:
        int4, int8: codes of matrices that are multiplied with (a tied embedding is one).
        scales: their scales.
        half, single: float16 and float32 matrices and vectors.
        lookup: an embedding of which only rows are read.
        table: a tied embedding, read by rows as well as multiplied with.
        largest: the head or tied embedding, as float32 where it is float16: what stock kernels
            hold once more while they load.
        others: of encoders and projectors, whole.
    """

    int4: int = 0
    int8: int = 0
    scales: int = 0
    half: int = 0
    single: int = 0
    lookup: int = 0
    table: int = 0
    largest: int = 0
    others: int = 0

    @property
    def step_bytes(self) -> int:
        """What a decode step reads."""
        return self.int4 + self.int8 + self.scales + self.half + self.single


@dataclass(frozen=True)
class Facts:
    """A model as it would run.

    Attributes:
        name: of the bundle or checkpoint; `scheme`: how it is stored.
        native: whether the native kernels have a program for it; None: not known before export.
        context_length: the longest; None: unbounded.
        state_constant_bytes, state_bytes_per_token: as the engine holds them (stock onnxruntime
            keeps two of a state that does not grow).
        vocab: ids in the embedding.
        gate: the quality gate's verdict, "not judged" before export.
        quality: its figures.
    """

    name: str
    scheme: str
    architecture: str
    parameters: int
    hidden: int
    layers: int
    vocab: int
    weights: Weights
    disk_bytes: int
    state_constant_bytes: int
    state_bytes_per_token: int
    context_length: int | None
    native: bool | None
    gate: str
    quality: dict[str, float]

    def context(self, asked: int | None) -> int:
        """The context to predict for: the one asked for, at most the model's own."""
        longest = self.context_length or (asked or 1024)
        return min(asked or 1024, longest)

    def state_bytes(self, context: int) -> int:
        """All states with the context full."""
        return self.state_constant_bytes + self.state_bytes_per_token * context


def bundle_facts(path: str | os.PathLike[str]) -> Facts:
    """The facts of a bundle. Raises: BundleError, as `open_bundle`."""
    bundle = open_bundle(path)
    m, spec = bundle.manifest, bundle.spec
    native = NATIVE_DECODER in spec.stages
    constant, per_token = state_sizes(spec.states, spec.stages["decoder"].in_place)
    figures = {k: v for k, v in m.gate.figures.items() if isinstance(v, (int, float))}
    return Facts(
        name=bundle.root.name,
        scheme=_scheme(m.quantization.groups, m.quantization.scheme),
        architecture=_text_architecture(spec.architecture, spec.components),
        parameters=spec.parameters,
        hidden=spec.hidden_size,
        layers=spec.layers,
        vocab=spec.vocab_size + spec.extra_ids,
        weights=sort_weights(m.quantization.groups),
        disk_bytes=bundle.size_bytes,
        state_constant_bytes=constant,
        state_bytes_per_token=per_token,
        context_length=spec.context_length,
        native=native,
        gate=m.gate.verdict,
        quality=figures,
    )


def _text_architecture(name: str, components: Sequence[object]) -> str:
    """Of a multimodal model that of its backbone."""
    for part in components:
        if getattr(part, "slot", None) == "backbone":
            return str(getattr(part, "name", name))
    return name


def _scheme(groups: Sequence[QuantGroup], scheme: str) -> str:
    blocks = {g.block_size for g in groups if g.group == "matrix" and g.block_size}
    return f"{scheme}, block {blocks.pop()}" if len(blocks) == 1 else scheme


def state_sizes(states: Sequence[StateSpec], in_place: Sequence[str]) -> tuple[int, int]:
    """`(constant bytes, bytes a token)` as the engine holds them."""
    constant = sum(
        s.size_bytes(0) * (1 if s.name in in_place else 2)
        for s in states
        if not s.grows and s.kind != "cross_kv"
    )
    return constant, sum(s.size_bytes(1) for s in states if s.grows)


def sort_weights(groups: Sequence[QuantGroup]) -> Weights:
    """Sorts the groups of a manifest or a plan."""
    sizes = dict.fromkeys(Weights.__dataclass_fields__, 0)
    tied = not any(g.group.split()[-1] == "head" for g in groups)
    for g in groups:
        role = g.group.split()[-1]
        if len(g.group.split()) > 1 and g.group.split()[0] != "text":
            sizes["others"] += g.size_bytes
        elif (role == "embedding" and not tied) or role == "table":
            sizes["lookup"] += g.size_bytes
        else:
            if role == "embedding":
                sizes["table"] += g.size_bytes
            if role in ("embedding", "head"):
                sizes["largest"] = g.size_bytes * (2 if g.bits == 16 else 1)
            _add(sizes, g)
    return Weights(**sizes)


def _add(sizes: dict[str, int], group: QuantGroup) -> None:
    if group.block_size is None:
        sizes["single" if group.bits > 16 else "half"] += group.size_bytes
        return
    share = group.bits / (group.bits + _SCALE_BITS / group.block_size)
    codes = math.floor(group.size_bytes * share)
    sizes["int4" if group.bits <= 4 else "int8"] += codes
    sizes["scales"] += group.size_bytes - codes
