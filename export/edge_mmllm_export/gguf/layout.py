"""What a GGUF file will hold: a type for each tensor of a definition's map.

Types that we write ourselves are decided here. K-quants and I-quants are llama.cpp's: such a
tensor has a `draft`, the type in which it is written for llama.cpp to read, exact where the
checkpoint's own type allows it.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
from numpy.typing import NDArray

from edge_mmllm.bundle import QuantGroup
from edge_mmllm.errors import UsageError
from edge_mmllm_export.checkpoints.base import Float32
from edge_mmllm_export.checkpoints.hub import FilesCheckpoint
from edge_mmllm_export.gguf.maps import GgufMap, GgufTensor, gguf_map
from edge_mmllm_export.gguf.types import (
    BITS,
    BLOCK,
    KINDS,
    MIXES,
    PLAIN,
    GgufType,
    GgufWord,
    Kind,
    block_size,
    row_bytes,
    symmetric,
)
from edge_mmllm_export.ops.base import Architecture
from edge_mmllm_export.quantize.schemes import QuantPlan, Scheme, component
from edge_mmllm_export.weights import Weight

#: The least type of a tensor that is held to so much.
_HELD: dict[str, GgufType] = {
    "float32": "F32", "float16": "F16", "byte": "Q8_0",
}  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """Rows of a stored tensor that come from one of our weights, `first` row on."""

    weight: Weight
    first: int
    width: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as it will lie in the file.

    Attributes:
        shape: in numpy order.
        kind: its type in the end.
        draft: the type in which llama.cpp is given it; None where it is ours to write.
        open: llama.cpp chooses `kind`.
    """

    tensor: GgufTensor
    shape: tuple[int, ...]
    kind: Kind
    role: str
    pieces: tuple[Piece, ...]
    draft: GgufType | None = None
    open: bool = False

    @property
    def written(self) -> GgufType:
        """The type that we write."""
        return self.draft or cast("GgufType", self.kind)

    @property
    def size_bytes(self) -> int:
        return _bytes(self.shape, self.kind)

    @property
    def written_bytes(self) -> int:
        """As `size_bytes`, of what we write."""
        return _bytes(self.shape, self.written)


def _bytes(shape: tuple[int, ...], kind: Kind) -> int:
    return math.prod(shape[:-1]) * row_bytes(kind, shape[-1])


@dataclass(frozen=True)
class GgufFile:
    """What will be written: the definition's map, with a type for each tensor.

    Attributes:
        word: of a file that llama.cpp quantizes; None where all of it is ours.
    """

    map: GgufMap
    tensors: Sequence[StoredTensor]
    word: GgufWord | None = None

    @property
    def size_bytes(self) -> int:
        return sum(t.size_bytes for t in self.tensors)

    @property
    def draft_bytes(self) -> int:
        """Of the file that llama.cpp reads; 0 where there is none."""
        return sum(t.written_bytes for t in self.tensors) if self.word else 0

    @property
    def file_type(self) -> str:
        """What most of the matrices' weights are stored as, e.g. `MOSTLY_Q4_0`."""
        return f"MOSTLY_{self.word}" if self.word else self.written_type

    @property
    def written_type(self) -> str:
        """The same of what we write."""
        sizes: dict[GgufType, int] = {}
        for t in self.tensors:
            if t.role == "matrix":
                sizes[t.written] = sizes.get(t.written, 0) + math.prod(t.shape)
        kind = max(sizes, key=lambda k: sizes[k], default="F32")
        return "ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"

    def groups(self) -> tuple[QuantGroup, ...]:
        """Bytes by role and type, for the manifest."""
        found: dict[tuple[str, Kind], list[StoredTensor]] = {}
        for t in self.tensors:
            found.setdefault((t.role, t.kind), []).append(t)
        return tuple(
            QuantGroup(
                group=role,
                scheme=kind,
                bits=float(BITS[kind]),
                block_size=block_size(kind),
                symmetric=symmetric(kind),
                tensors=len(members),
                size_bytes=sum(t.size_bytes for t in members),
            )
            for (role, kind), members in found.items()
        )

    def with_kinds(self, kinds: Mapping[str, Kind]) -> GgufFile:
        """The file with the types that llama.cpp chose, by name."""
        tensors = []
        for t in self.tensors:
            tensors.append(_kinded(t, kinds[t.tensor.name]) if t.draft else t)
        return replace(self, tensors=tensors)


def _kinded(t: StoredTensor, kind: Kind) -> StoredTensor:
    return replace(t, kind=kind, role=_role(kind, t.role))


def _role(kind: Kind, role: str) -> str:
    return "vector" if kind == "F32" and role != "embedding" else role


@dataclass(frozen=True)
class Wanted:
    """What is asked of a file.

    Attributes:
        plan: `int8` means Q8_0, `int4` Q4_0 or, with a zero point, Q4_1.
        word: what matrices are stored as, where the plan's own word is not the one meant.
        overrides: (pattern over our names, type); the last match wins, over the plan's too.
    """

    plan: QuantPlan
    word: GgufWord | None = None
    overrides: tuple[tuple[str, Kind], ...] = ()

    def of(self, w: Weight) -> Kind | None:
        """A matrix's type; None where it is for llama.cpp to choose.

        Raises: UsageError: a type of llama.cpp's for what it does not quantize.
        """
        beside = component(w.name) is not None
        for pattern, kind in reversed(self.overrides):
            if fnmatch.fnmatchcase(w.name, pattern):
                if beside and kind not in PLAIN:
                    raise UsageError(
                        "llama.cpp quantizes the language model alone",
                        where=w.name, expected=" | ".join(PLAIN), found=f"{pattern}={kind}",
                    )  # fmt: skip
                return kind
        if beside and self.word in MIXES:
            return _type(w.scheme, None)
        named = any(fnmatch.fnmatchcase(w.name, pattern) for pattern, _ in self.plan.overrides)
        named = named or (self.plan.embedding is not None and w.role in ("embedding", "head"))
        if self.word in MIXES:
            return _type(w.scheme, None) if named or not w.scheme.quantized else None
        return _type(w.scheme, cast("GgufType | None", self.word))


def layout(model: Architecture, weights: Mapping[str, Weight], wanted: Wanted) -> GgufFile:
    """Decide what each tensor is stored as, but for what llama.cpp chooses (`open`).

    Raises:
        UnsupportedArchitecture: llama.cpp cannot run the model.
        UsageError: a block size, or a type, that the format does not have.
    """
    return layout_of(gguf_map(model), weights, wanted)


def layout_of(found: GgufMap, weights: Mapping[str, Weight], wanted: Wanted) -> GgufFile:
    """As `layout`, of a map."""
    if wanted.plan.block_size != BLOCK:
        raise UsageError(
            "GGUF's blocks have one size", expected=f"--block-size {BLOCK}",
            found=f"--block-size {wanted.plan.block_size}",
        )  # fmt: skip
    for pattern, kind in wanted.overrides:
        if kind not in KINDS:
            raise UsageError(
                f"the override of {pattern!r} is no type", expected=" | ".join(KINDS), found=kind
            )
        if not any(
            fnmatch.fnmatchcase(n, pattern) and w.role != "vector" for n, w in weights.items()
        ):
            raise UsageError(
                f"the override {pattern!r} matches no tensor that could be quantized",
                expected="a pattern over names as `edge-mmllm inspect` lists them",
            )
    tensors = [_stored(t, weights, wanted) for t in found.tensors]
    word = wanted.word
    if word not in MIXES and any(t.draft for t in tensors):
        # Types of llama.cpp's among ours: it copies ours, and calls the file by the most of them.
        ours = [t for t in tensors if not t.draft and BITS[t.kind] <= 8]
        most = GgufFile(found, ours).written_type
        word = "Q8_0" if most == "ALL_F32" else cast("GgufWord", most.removeprefix("MOSTLY_"))
    return GgufFile(found, tensors, word if any(t.draft for t in tensors) else None)


def _stored(t: GgufTensor, weights: Mapping[str, Weight], wanted: Wanted) -> StoredTensor:
    if t.values is not None:
        return StoredTensor(t, t.values.shape, "F32", "vector", ())
    ours = [weights[name] for name in t.parts]
    first = ours[0]
    shape = t.shape
    if shape is None:
        shape = (sum(w.shape[0] for w in ours), *first.shape[1:])
    pieces = tuple(_pieces(t, ours, shape))
    asked = [kind for kind in map(wanted.of, ours) if kind is not None]
    chosen = max(asked, key=lambda k: BITS[k], default=None)
    if first.role in ("vector", "table") or len(shape) == 1:
        chosen = "F32"
    elif t.hold != "none" and (chosen is None or BITS[chosen] < BITS[_HELD[t.hold]]):
        chosen = _HELD[t.hold]
    if chosen in PLAIN:
        if BITS[chosen] <= 8 and shape[-1] % BLOCK:
            chosen = "F16"
        return StoredTensor(t, shape, chosen, _role(chosen, first.role), pieces)
    draft = _draft(t, ours)
    return StoredTensor(t, shape, chosen or draft, first.role, pieces, draft, chosen is None)


def _draft(t: GgufTensor, ours: Sequence[Weight]) -> GgufType:
    """The smallest type that holds what the checkpoint does, bit for bit."""
    found = set()
    for w in ours:
        exact = isinstance(w.checkpoint, FilesCheckpoint) and w.source.apply is None
        info = w.checkpoint.tensors.get(w.source.name)
        found.add(info.dtype if exact and info is not None else "F32")
    if t.scale == 1.0 and found in ({"BF16"}, {"F16"}):
        return cast("GgufType", found.pop())
    return "F32"


def _type(scheme: Scheme, kind: GgufType | None) -> GgufType:
    """A scheme in the format's words; `kind` is the word for its own number of bits."""
    if not scheme.quantized:
        plain: GgufType = "F32" if scheme.bits == 32 else "F16"
        return "BF16" if kind == "BF16" and scheme.bits == 16 else plain
    if scheme.bits == 8:
        return "Q8_0"
    if kind is not None and BITS[kind] < 8:
        return kind
    return "Q4_0" if scheme.zero == "none" else "Q4_1"


def _pieces(t: GgufTensor, ours: Sequence[Weight], shape: tuple[int, ...]) -> Iterator[Piece]:
    """Each weight with the row of the flat tensor `(rows, K)` that it begins at."""
    width, done = shape[-1], 0
    for w in ours:
        if t.order is not None:
            order = w.source.order
            order = t.order if order is None else order[t.order]
            shape_ = (len(t.order), *w.shape[1:])  # rows may be there several times
            w = replace(w, shape=shape_, source=replace(w.source, order=order))
        if t.columns is not None:
            w = _selected(w, t.columns)
        yield Piece(w, done, width)
        done += w.size // width


def _selected(w: Weight, columns: NDArray[np.int64]) -> Weight:
    """Some columns of a small matrix."""

    def whole(theirs: Float32) -> Float32:
        return theirs.reshape(len(theirs), -1)[:, columns]

    shape = (w.shape[0], len(columns))
    return replace(w, shape=shape, source=replace(w.source, whole=whole))
