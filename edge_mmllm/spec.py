"""What a model is, said once: its state contract, its stages, its text settings.

These dataclasses are what the exporter writes into `manifest.json` and what every engine
adapter reads back. `ModelSpec.from_json` trusts nothing: what it returns is well-typed and
consistent in itself, or it raises.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, cast, get_args

from edge_mmllm._fields import Fields
from edge_mmllm.errors import CorruptBundle
from edge_mmllm.modality import MODALITIES, Component, Modality

StateKind = Literal["kv", "cross_kv", "conv", "recurrent", "shift", "place", "opaque"]
Dtype = Literal["float32", "float16", "int8", "int64", "uint8"]
TokenizerKind = Literal["tokenizers", "rwkv-world", "bytes", "gguf", "none"]

#: The file that a tokenizer of each kind needs in the bundle.
TOKENIZER_FILES = {"tokenizers": "tokenizer.json", "rwkv-world": "rwkv_vocab.txt"}

_DTYPE_BYTES = {"float32": 4, "float16": 2, "int8": 1, "int64": 8, "uint8": 1}

#: Stands for the session's capacity (tokens) in a kv state's shape.
CAPACITY = -1
#: Stands for the number of rows that a cross_kv state was filled from (encoder tokens, patches),
#: and for the bytes of an opaque one.
MEMORY = -2


@dataclass(frozen=True)
class StateSpec:
    """One tensor a model carries from token to token.

    Attributes:
        name: e.g. `layers.0.attn.k`; the graph has `state.<name>` in and `next.<name>` out.
        shape: fixed, but for `CAPACITY` (-1), the session's capacity in tokens. kv states are
            `(1, kv_heads, CAPACITY, head_dim)`; cross_kv ones `(1, kv_heads, MEMORY, head_dim)`,
            of as many rows as were read, with none at first; recurrent ones keep a constant
            size for ever.
        dtype: element type.
        kind: `kv` states may share one buffer between past and present; `cross_kv` states are
            written by the stage that lists them in `fills`, and only read by the decoder (no
            `next.<name>`); `place` is int64 `(1,)`, the first rotary position behind all tokens,
            which lies before the number of tokens once a picture was read (the decoder then has
            an input `places`); `opaque` is uint8 `(MEMORY,)`, an engine's own bytes, and never in
            a manifest; the others are written whole in each forward.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Dtype
    kind: StateKind

    def at(self, capacity: int, memory: int = 0) -> tuple[int, ...]:
        """The shape with `capacity` tokens and `memory` rows filled in."""
        sizes = {CAPACITY: capacity, MEMORY: memory}
        return tuple(sizes.get(d, d) for d in self.shape)

    def size_bytes(self, tokens: int, memory: int = 0) -> int:
        """Bytes held for `tokens` tokens and `memory` rows (the same for any count unless `kv`
        or `cross_kv`)."""
        size = _DTYPE_BYTES[self.dtype]
        for d in self.at(tokens, memory):
            size *= d
        return size

    @property
    def grows(self) -> bool:
        """Whether the state grows with the context."""
        return CAPACITY in self.shape

    @classmethod
    def from_json(cls, fields: Fields) -> StateSpec:
        """Reads one entry of `model.states`. Raises: CorruptBundle."""
        kinds = tuple(k for k in get_args(StateKind) if k != "opaque")
        kind = cast(StateKind, fields.one_of("kind", kinds))
        shape = fields.integers("shape", least=MEMORY)
        free = [d for d in shape if d < 0]
        wanted = {"kv": [CAPACITY], "cross_kv": [MEMORY]}.get(kind, [])
        if 0 in shape or (free and free != wanted) or (kind == "cross_kv" and not free):
            raise fields.fail(
                "shape",
                "sizes of at least 1, at most one -1 in a kv state, one -2 in cross_kv",
            )
        dtypes = tuple(d for d in get_args(Dtype) if d != "uint8")
        dtype = cast(Dtype, fields.one_of("dtype", dtypes))
        if kind == "place" and (shape, dtype) != ((1,), "int64"):
            raise fields.fail("shape", "(1,), int64, of a place")
        return cls(fields.text("name"), shape, dtype, kind)


#: The stage that holds the decoder as a program for the native kernels, where there is one.
NATIVE_DECODER = "decoder_native"


@dataclass(frozen=True)
class Stage:
    """One executable part of a bundle, e.g. `decoder` in `decoder.onnx`.

    Attributes:
        file: path inside the bundle, relative, with forward slashes.
        inputs: graph inputs in order, states left out. Of `input_ids` int64 `(seq,)`,
            `inputs_embeds` float32 `(seq, hidden)`, `position` int64 `(1,)` (index of the first
            new token), `places` int64 `(3, seq)` (three positions of each new token, counted from
            the `place` state), `logit_rows` int64 `(rows,)` (which of the `seq` rows get logits);
            an encoder's first is what preprocessing makes (`pixels` float32
            `(channels, height, width)`), a projector's first is `features` float32
            `(rows, width)`.
        outputs: graph outputs in order, states left out: `logits` float32 `(rows, vocab)` for a
            decoder, `inputs_embeds` float32 `(seq, hidden)` for an embedder or a projector,
            `features` float32 `(rows, width)` for an encoder.
        in_place: names of states whose `next.X` may be written over `state.X`, in one buffer,
            because nothing in the graph reads the old value once the new one is being written.
        fills: names of cross_kv states that the stage computes from its input, as `next.X`.
    """

    file: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    in_place: tuple[str, ...] = ()
    fills: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, fields: Fields) -> Stage:
        """Reads one value of `model.stages`. Raises: CorruptBundle."""
        in_place = fields.texts("in_place") if "in_place" in fields.value else ()
        fills = fields.texts("fills") if "fills" in fields.value else ()
        inputs, outputs = fields.texts("inputs"), fields.texts("outputs")
        return cls(fields.text("file"), inputs, outputs, in_place, fills)


@dataclass(frozen=True)
class TextSpec:
    """How text becomes token ids and back.

    Attributes:
        tokenizer: `tokenizers` (a `tokenizer.json` in the bundle), `rwkv-world` (an
            `rwkv_vocab.txt`), `bytes` (id = byte value), `gguf` (the engine's own, of a GGUF file
            from elsewhere) or `none` (token ids only).
        bos_id: prepended once to a raw prompt when `add_bos`; never doubled.
        eos_ids: every id that ends a generation.
        add_bos: whether encoding adds BOS. False where `tokenizer.json` itself does.
        chat_template: Jinja source, run in a sandbox; None for a base model.
        bos_token, eos_token: their text, for chat templates that print them.
    """

    tokenizer: TokenizerKind
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    add_bos: bool = False
    chat_template: str | None = None
    bos_token: str | None = None
    eos_token: str | None = None
    pad_id: int | None = None

    @classmethod
    def from_json(cls, fields: Fields) -> TextSpec:
        """Reads `model.text`. Raises: CorruptBundle."""
        return cls(
            tokenizer=cast(TokenizerKind, fields.one_of("tokenizer", get_args(TokenizerKind))),
            bos_id=fields.maybe_integer("bos_id"),
            eos_ids=fields.integers("eos_ids"),
            add_bos=fields.flag("add_bos", default=False),
            chat_template=fields.maybe_text("chat_template"),
            bos_token=fields.maybe_text("bos_token"),
            eos_token=fields.maybe_text("eos_token"),
            pad_id=fields.maybe_integer("pad_id"),
        )


@dataclass(frozen=True)
class ModelSpec:
    """The model of a bundle.

    Attributes:
        architecture: a key of the exporter's `ARCHITECTURES`, e.g. `llama`, `mamba2`.
        vocab_size, hidden_size, layers: sizes.
        parameters: number of parameters (tied weights counted once).
        context_length: the longest context the bundle supports; None = unbounded (recurrent).
        states: the state contract, in graph order.
        stages: name -> Stage; a text model has `decoder`, and `embed` where the decoder takes
            `inputs_embeds`; an encoder-decoder also `encode_text`, which reads the prompt.
        components: the filled slots of a multimodal model; empty for a text model.
        modalities: `image`, `video`, `audio` -> how it reaches the backbone.
        decoder_start_id: of an encoder-decoder: the id that an answer begins from.
        extra_ids: ids after the vocabulary that are understood and never predicted.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    layers: int
    parameters: int
    context_length: int | None
    states: tuple[StateSpec, ...]
    stages: dict[str, Stage]
    text: TextSpec
    details: dict[str, Any] = field(default_factory=dict)
    components: tuple[Component, ...] = ()
    modalities: dict[str, Modality] = field(default_factory=dict)
    decoder_start_id: int | None = None
    extra_ids: int = 0

    def state_bytes(self, tokens: int, memory: int = 0) -> int:
        """Bytes of all states at `tokens` tokens and `memory` rows of cross_kv."""
        return sum(s.size_bytes(tokens, memory) for s in self.states)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types, as stored under `model` in the manifest."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: object, where: str = "model") -> ModelSpec:
        """The inverse of `to_json`, for input that nobody vouches for.

        Args:
            value: what the JSON parser gave.
            where: path of `value`, for messages.

        Raises:
            CorruptBundle: a missing member, a wrong type, or a contradiction (two states of one
                name, a BOS outside the vocabulary); the message names the member.
        """
        fields = Fields(value, where)
        states = tuple(StateSpec.from_json(f) for f in fields.children("states"))
        names = [state.name for state in states]
        if len(set(names)) != len(names):
            raise fields.fail("states", "states with different names")
        stages = fields.child("stages")
        vocab_size = fields.integer("vocab_size", least=1)
        extra = fields.maybe_integer("extra_ids") or 0
        parts = fields.children("components") if "components" in fields.value else []
        spec = cls(
            architecture=fields.text("architecture"),
            vocab_size=vocab_size,
            hidden_size=fields.integer("hidden_size", least=1),
            layers=fields.integer("layers"),
            parameters=fields.integer("parameters"),
            context_length=fields.maybe_integer("context_length", least=1),
            states=states,
            stages={name: Stage.from_json(stages.child(name)) for name in stages.value},
            text=TextSpec.from_json(fields.child("text")),
            details=fields.mapping("details", required=False),
            components=tuple(Component.from_json(f) for f in parts),
            modalities=_modalities(fields, vocab_size + extra),
            decoder_start_id=_start_id(fields, vocab_size, stages.value),
            extra_ids=extra,
        )
        _check_fills(fields, spec)
        bos = spec.text.bos_id
        if bos is not None and bos >= spec.vocab_size:
            raise CorruptBundle(
                "BOS lies outside the vocabulary",
                where=f"{where}.text.bos_id",
                expected=f"an id below vocab_size {spec.vocab_size}",
                found=str(bos),
            )
        return spec


def _start_id(fields: Fields, vocab_size: int, stages: Collection[str]) -> int | None:
    """`model.decoder_start_id`, which goes with a stage `encode_text`. Raises: CorruptBundle."""
    start = fields.maybe_integer("decoder_start_id")
    if (start is not None) != ("encode_text" in stages) or (start or 0) >= vocab_size:
        raise fields.fail(
            "decoder_start_id", f"an id below {vocab_size} where there is `encode_text`, else null"
        )
    return start


def _check_fills(fields: Fields, spec: ModelSpec) -> None:
    """Every cross_kv state is filled by one stage. Raises: CorruptBundle."""
    filled = sorted(name for stage in spec.stages.values() for name in stage.fills)
    memory = sorted(s.name for s in spec.states if s.kind == "cross_kv")
    if filled != memory or sum(bool(stage.fills) for stage in spec.stages.values()) > 1:
        raise fields.fail("stages", "one stage whose `fills` are all cross_kv states")


def _modalities(fields: Fields, vocab_size: int) -> dict[str, Modality]:
    """`model.modalities`, `{}` where absent. Raises: CorruptBundle."""
    if "modalities" not in fields.value:
        return {}
    child, stages = fields.child("modalities"), fields.mapping("stages")
    unknown = sorted(set(child.value) - set(MODALITIES))
    if unknown:
        raise fields.fail("modalities", "members of " + ", ".join(MODALITIES))
    # llama.cpp embeds tokens itself.
    own = isinstance(stages.get("decoder"), dict) and str(stages["decoder"].get("file"))
    wanted = {"decoder"} if own and own.endswith(".gguf") else {"embed", "decoder"}
    if child.value and not wanted <= stages.keys():
        raise fields.fail("stages", "`embed` and `decoder`, since there are modalities")
    return {name: Modality.from_json(child.child(name), vocab_size, stages) for name in child.value}
