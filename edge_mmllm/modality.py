"""What a multimodal model is made of, and how pictures or sounds reach its backbone: as data.

    modality encoder -> input projector -> backbone [-> output projector -> generator]

The exporter writes these dataclasses into the manifest (`model.components`, `model.modalities`);
the runtime interprets them. Nothing here computes.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

from edge_mmllm._fields import Fields

Slot = Literal["encoder", "input_projector", "backbone", "output_projector", "generator"]
ModalityName = Literal["image", "video", "audio"]
Placement = Literal["text", "front"]
Target = Literal["embeddings", "states"]

#: Every slot of an MM-LLM, in the order that data passes them (arXiv 2401.13601, figure 2).
SLOTS: tuple[Slot, ...] = get_args(Slot)
MODALITIES: tuple[ModalityName, ...] = get_args(ModalityName)

#: No published layout gives one item more rows; beyond it a manifest is hostile.
MAX_ROWS = 1 << 20


@dataclass(frozen=True)
class Component:
    """One filled slot.

    Attributes:
        slot: which one.
        modality: of an encoder or projector; None for the backbone.
        name: the model file that defines it, e.g. `clip`, `mlp`, `llama`.
        prefix: what its tensors' names begin with in the checkpoint, for people.
        parameters: how many it has.
        config: its sizes, for people.
    """

    slot: Slot
    modality: ModalityName | None
    name: str
    prefix: str
    parameters: int
    config: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, fields: Fields) -> Component:
        """Reads one entry of `model.components`. Raises: CorruptBundle."""
        modality = None
        if fields.value.get("modality") is not None:
            modality = cast(ModalityName, fields.one_of("modality", MODALITIES))
        return cls(
            slot=cast(Slot, fields.one_of("slot", SLOTS)),
            modality=modality,
            name=fields.text("name"),
            prefix=fields.text("prefix"),
            parameters=fields.integer("parameters"),
            config=fields.mapping("config", required=False),
        )


@dataclass(frozen=True)
class Modality:
    """How one kind of input reaches the backbone.

    Attributes:
        stages: the stages that an item passes, in order (`encode_image`, `project_image`). Each
            takes the one before's output; the first takes what preprocessing makes.
        placeholder: what stands for one item in a prompt's text, e.g. `<image>`.
        token_id: the id whose positions take the rows; the placeholder's own where the layout
            repeats it.
        tokens: rows that one tile (frame, window) gives; 0 where it depends on the input.
        layout: how rows are arranged and what text surrounds them; `kind` names one of the
            runtime's `LAYOUTS`, the rest is its own.
        settings: preprocessing, as `ImageSettings`, `AudioSettings`, ... read it.
        placement: `text`: where the placeholder stands; `front`: before the whole prompt.
        target: `embeddings`: rows stand in the token stream; `states`: they go into cross_kv
            states that the last stage writes, and the placeholder stays a token.
        text_tokenizer: a `tokenizer.json` of the bundle: the prompt's text goes through it and to
            the stages as `text_ids` (InstructBLIP's Q-Former); None where they read none.
    """

    stages: tuple[str, ...]
    placeholder: str
    token_id: int
    tokens: int
    layout: dict[str, Any]
    settings: dict[str, Any]
    placement: Placement = "text"
    target: Target = "embeddings"
    text_tokenizer: str | None = None

    @classmethod
    def from_json(cls, fields: Fields, vocab_size: int, stages: Collection[str]) -> Modality:
        """Reads one value of `model.modalities`.

        Raises:
            CorruptBundle: a wrong type, an unknown stage, an id outside the vocabulary.
        """
        names = fields.texts("stages")
        if not names or any(name not in stages for name in names):
            raise fields.fail("stages", "names of model.stages, at least one")
        token_id = fields.integer("token_id")
        if token_id >= vocab_size:
            raise fields.fail("token_id", f"an id below vocab_size {vocab_size}")
        tokens = fields.integer("tokens")
        if tokens > MAX_ROWS:
            raise fields.fail("tokens", f"at most {MAX_ROWS}")
        placeholder = fields.text("placeholder")
        if not placeholder:
            raise fields.fail("placeholder", "a text that is not empty")
        return cls(
            stages=names,
            placeholder=placeholder,
            token_id=token_id,
            tokens=tokens,
            layout=fields.mapping("layout"),
            settings=fields.mapping("settings"),
            placement=cast(Placement, fields.one_of("placement", get_args(Placement))),
            target=cast(Target, fields.one_of("target", get_args(Target))),
            text_tokenizer=fields.maybe_text("text_tokenizer"),
        )
