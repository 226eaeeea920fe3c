"""A multimodal model as data: components in slots, joined.

    modality encoder -> input projector -> backbone [-> output projector -> generator]

`Composite` is an `Architecture` like any other: its parameters are those of its components, each
under its slot's prefix (`image.encoder.`, `image.projector.`; the backbone's keep their names).
Source: MM-LLMs (arXiv 2401.13601), section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from typing import Any, Protocol, TypeVar, cast

from edge_mmllm.errors import CheckpointError
from edge_mmllm.modality import Component, Modality, ModalityName, Slot
from edge_mmllm.spec import StateSpec
from edge_mmllm_export.checkpoints.base import Layout
from edge_mmllm_export.checkpoints.view import Renames
from edge_mmllm_export.ops.base import Architecture, Ops
from edge_mmllm_export.weights import Parameter, Source, Weight

T = TypeVar("T")

#: `float32` or `int64`, and sizes (a name for one that is not fixed).
Shape = tuple[int | str, ...]


@dataclass(frozen=True)
class Port:
    """An input of a stage's graph."""

    name: str
    dtype: str
    shape: Shape


class Encoder(Protocol):
    """Makes features of one picture, tile, frame or recording.

    Attributes:
        tokens: rows it gives; 0 where that depends on the input.
        width: of its rows.
    Where its input is not `pixels` float32 `(3, image_size, image_size)`, it has
    `ports() -> tuple[Port, ...]`, and `encode` takes as many inputs.
    """

    name: str

    @property
    def tokens(self) -> int: ...

    @property
    def width(self) -> int: ...

    def parameters(self) -> list[Parameter]: ...

    def sources(self, layout: Layout, prefix: str) -> dict[str, Source]: ...


class Projector(Protocol):
    """Makes rows of the backbone's width of an encoder's features.

    `tokens(count)` says how many rows `count` features become. Where it takes more than the
    features, it has `ports() -> tuple[Port, ...]`, the features' first.
    """

    name: str

    def tokens(self, count: int) -> int: ...

    def parameters(self) -> list[Parameter]: ...

    def sources(self, layout: Layout, prefix: str) -> dict[str, Source]: ...


@dataclass(frozen=True)
class Part:
    """A component in its slot.

    Attributes:
        prefix: what its tensors' names begin with in the checkpoint.
    """

    component: Any
    prefix: str


@dataclass(frozen=True)
class Pathway:
    """How one modality reaches the backbone.

    Attributes:
        encoder, projector: an `Encoder` and a `Projector`, if there is one.
        modality: what the manifest says of it; its `stages` are filled in.
        encoder_of, projector_of: the pathway before it whose encoder (projector) serves here too.
    """

    name: ModalityName
    encoder: Part
    projector: Part | None
    modality: Modality
    encoder_of: ModalityName | None = None
    projector_of: ModalityName | None = None

    @property
    def width(self) -> int:
        """Of the rows."""
        if self.projector is None:
            return cast("int", self.encoder.component.width)
        return cast("int", self.projector.component.hidden_size)

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of its stages, in the order that an item passes them."""
        encoder, projector = self.encoder_of or self.name, self.projector_of or self.name
        names = (f"encode_{encoder}", f"project_{projector}")
        return names if self.projector is not None else names[:1]


@dataclass(frozen=True)
class StageDefinition:
    """A stage's graph: what it takes, what it gives, and how to compute it.

    Attributes:
        name: e.g. `encode_image`; also the stem of its files.
        scope: what its weights' names begin with, e.g. `image.encoder.`.
        output, width: name of its output `(rows, width)`.
        run: (op, weights by the component's own names, inputs) -> `(rows, width)`.
    """

    name: str
    scope: str
    ports: tuple[Port, ...]
    output: str
    width: int
    run: Callable[[Any, Mapping[str, Weight], Sequence[Any]], Any]


class Composite:
    """See the module.

    Args:
        name: the family's `model_type`.
        backbone: its definition, made over a view of the checkpoint.
        renames: how the checkpoint writes the backbone's names.
        output: output projector and generator, where the family has them.
        unused: patterns of checkpoint tensors that no component needs.
        files: what else the bundle carries, by name (`Modality.text_tokenizer`).

    Raises:
        CheckpointError: the components' widths do not fit together, or an id lies outside the
            vocabulary.
    """

    def __init__(
        self,
        name: str,
        backbone: Architecture,
        renames: Renames,
        pathways: Sequence[Pathway],
        *,
        output: Mapping[Slot, Part] | None = None,
        unused: Sequence[str] = (),
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        self.name, self.backbone, self.renames = name, backbone, renames
        self.pathways = tuple(pathways)
        self.output, self._unused = dict(output or {}), tuple(unused)
        self.files = dict(files or {})
        self.vocab_size, self.hidden_size = backbone.vocab_size, backbone.hidden_size
        self.layers, self.context_length = backbone.layers, backbone.context_length
        ids = backbone.vocab_size + getattr(backbone, "extra_ids", 0)
        for path in self.pathways:
            if path.modality.token_id >= ids:
                raise CheckpointError(
                    f"the id that stands for {path.name} lies outside the vocabulary",
                    where="config.json, image_token_index or its like",
                    expected=f"0 to {ids - 1}",
                    found=str(path.modality.token_id),
                )
            wanted = self.hidden_size
            if path.modality.target == "states":
                wanted = getattr(backbone, "memory_width", wanted)
            if path.width != wanted:
                raise CheckpointError(
                    f"the features of {path.name} do not fit the backbone",
                    expected=f"rows of width {wanted}",
                    found=str(path.width),
                )

    # -- as an architecture -----------------------------------------------------------------

    def _scopes(self) -> list[tuple[str, Part]]:
        """Our prefix of each component but the backbone."""
        out = []
        for path in self.pathways:
            if path.encoder_of is None:
                out.append((f"{path.name}.encoder.", path.encoder))
            if path.projector is not None and path.projector_of is None:
                out.append((f"{path.name}.projector.", path.projector))
        return out + [(f"output.{slot}.", part) for slot, part in self.output.items()]

    def parameters(self) -> list[Parameter]:
        out = list(self.backbone.parameters())
        for scope, part in self._scopes():
            out += [replace(p, name=scope + p.name) for p in part.component.parameters()]
        return out

    def sources(self, layout: Layout) -> dict[str, Source]:
        out = {
            name: replace(
                source,
                name=self.renames.theirs(source.name),
                more=tuple(self.renames.theirs(more) for more in source.more),
            )
            for name, source in self.backbone.sources(layout).items()
        }
        for scope, part in self._scopes():
            found = part.component.sources(layout, part.prefix)
            out |= {scope + name: source for name, source in found.items()}
        return out

    def ignored(self) -> tuple[str, ...]:
        out = [self.renames.theirs(pattern) for pattern in self.backbone.ignored()]
        for _, part in self._scopes():
            if hasattr(part.component, "ignored"):
                out += part.component.ignored(part.prefix)
        return (*out, *self._unused)

    def states(self) -> tuple[StateSpec, ...]:
        return self.backbone.states()

    def embed(self, op: Ops[T], w: Mapping[str, Weight], ids: T) -> T:
        return self.backbone.embed(op, w, ids)

    def decode(self, op: Ops[T], w: Mapping[str, Weight], x: T) -> T:
        return self.backbone.decode(op, w, x)

    # -- as a composition -------------------------------------------------------------------

    def stage_definitions(self) -> list[StageDefinition]:
        """The stages of every modality, in the order that an item passes them; then the output
        projector's, from signal tokens' hidden states to a generator's conditioning."""
        out = []
        for path in self.pathways:
            encoder = path.encoder.component
            pixels = Port("pixels", "float32", _pixels(encoder))
            features = Port("features", "float32", ("rows", encoder.width))
            if path.encoder_of is None:
                out.append(
                    StageDefinition(
                        f"encode_{path.name}",
                        f"{path.name}.encoder.",
                        _ports(encoder, pixels),
                        "features",
                        encoder.width,
                        _encode(encoder),
                    )
                )
            if path.projector is None or path.projector_of is not None:
                continue
            projector, beside = path.projector.component, path.modality.target == "states"
            out.append(
                StageDefinition(
                    f"project_{path.name}",
                    f"{path.name}.projector.",
                    _ports(projector, features),
                    "projected" if beside else "inputs_embeds",
                    path.width,
                    _project(projector, encoder.width),
                )
            )
        if "output_projector" in self.output:
            mapper = self.output["output_projector"].component
            signals = Port("signals", "float32", ("rows", mapper.width))
            out.append(
                StageDefinition(
                    "output_projector",
                    "output.output_projector.",
                    _ports(mapper, signals),
                    "conditioning",
                    mapper.hidden_size,
                    _project(mapper, mapper.width),
                )
            )
        return out

    def modalities(self) -> dict[str, Modality]:
        """What the manifest says of them."""
        return {path.name: replace(path.modality, stages=path.stages) for path in self.pathways}

    def components(self) -> tuple[Component, ...]:
        """The filled slots, in the order that data passes them."""
        out = []
        for path in self.pathways:
            if path.encoder_of is None:
                out.append(_described("encoder", path.name, path.encoder))
            if path.projector is not None and path.projector_of is None:
                out.append(_described("input_projector", path.name, path.projector))
        named = Part(self.backbone, self.renames.pairs[0][1] if self.renames.pairs else "")
        out.append(_described("backbone", None, named))
        out += [_described(slot, None, part) for slot, part in self.output.items()]
        return tuple(out)


def scoped(weights: Mapping[str, Weight], scope: str) -> dict[str, Weight]:
    """The weights of one component by its own names."""
    return {n.removeprefix(scope): w for n, w in weights.items() if n.startswith(scope)}


def _ports(component: Any, default: Port) -> tuple[Port, ...]:
    """What a component's graph takes: its own `ports()`, or the one that most take."""
    if hasattr(component, "ports"):
        return cast("tuple[Port, ...]", component.ports())
    return (default,)


def _pixels(encoder: Any) -> Shape:
    size = getattr(encoder, "image_size", "size")  # an encoder without one has ports()
    return 3, size, size


def _encode(encoder: Any) -> Callable[[Any, Mapping[str, Weight], Sequence[Any]], Any]:
    return lambda op, w, inputs: encoder.encode(op, w, *inputs)


def _project(
    projector: Any, width: int
) -> Callable[[Any, Mapping[str, Weight], Sequence[Any]], Any]:
    def run(op: Any, w: Mapping[str, Weight], inputs: Sequence[Any]) -> Any:
        features = op.input_rows(inputs[0], width)
        return projector.project(op, w, features, *inputs[1:])

    return run


def _described(slot: Slot, modality: ModalityName | None, part: Part) -> Component:
    component = part.component
    config = getattr(component, "config", None)
    sizes = asdict(config) if is_dataclass(config) and not isinstance(config, type) else {}
    plain = (bool, int, str)  # sizes; an epsilon says little, and JSON has no infinity
    return Component(
        slot=slot,
        modality=modality,
        name=component.name,
        prefix=part.prefix,
        parameters=sum(_size(p.shape) for p in component.parameters()),
        config={k: v for k, v in sizes.items() if isinstance(v, plain)},
    )


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for d in shape:
        size *= d
    return size
