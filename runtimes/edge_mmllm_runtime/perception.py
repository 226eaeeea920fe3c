"""From pictures (and what else a bundle understands) to rows of features, each computed once.

What was encoded is kept by content hash: a second question on the same picture skips encoding.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_mmllm.errors import CorruptBundle, UsageError
from edge_mmllm.spec import ModelSpec, TextSpec
from edge_mmllm_runtime.engine import Engine, Float32, Int64
from edge_mmllm_runtime.layouts import Layout, layout_of
from edge_mmllm_runtime.media import Prepared, Reader, reader_of

if TYPE_CHECKING:
    from edge_mmllm.text import Text

#: Room for some thirty pictures of LLaVA-1.5 (576 rows of 4096).
DEFAULT_LIMIT_BYTES = 256 << 20


@dataclass
class Timings:
    """Where the time of a prompt went, in ms.

    Attributes:
        load_ms: stages loaded because they were needed for the first time, or after `release`.
        preprocess_ms: opening, resizing, normalising.
        encode_ms, project_ms: the stages of all items.
        prefill_ms: the decoder over the prompt.
        items: pictures, videos and recordings in the prompt.
        encoded: how many of them had to be encoded.
    """

    load_ms: float = 0.0
    preprocess_ms: float = 0.0
    encode_ms: float = 0.0
    project_ms: float = 0.0
    prefill_ms: float = 0.0
    items: int = 0
    encoded: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Item:
    """One picture, video or recording of a prompt.

    Attributes:
        key: of its content, modality and whatever else its rows depend on.
        text: what its placeholder becomes.
        places: positions it takes in the prompt: one for each row, or, where its rows stand
            beside the tokens, the placeholder's own.
        rows: float32 `(rows, width)`; computes them on the first call.
        used: how many of them are seen by those who see it; None: all.
        steps: where its rows stand, see `Layout.places`.
    """

    modality: str
    key: bytes
    text: str
    places: int
    rows: Callable[[], Float32]
    used: int | None = None
    steps: Int64 | None = None


@dataclass(frozen=True)
class _Sense:
    """One modality of a bundle, its settings read."""

    reader: Reader
    settings: Any
    layout: Layout
    stages: tuple[str, ...]
    beside: bool
    text: Text | None


class Perception:
    """The stages before the decoder, and what they gave.

    Args:
        engine: the session's.
        spec: the model.
        read_file: gives a file of the bundle; needed where stages read the prompt's text.

    Attributes:
        timings: since the last `restart`.
        limit_bytes: of kept features; the ones used least recently go first.
        keep_stages: False releases the stages as soon as a prompt's items are encoded, so that
            they are not in memory together with the decoder.
    """

    def __init__(
        self,
        engine: Callable[[], Engine],
        spec: ModelSpec,
        read_file: Callable[[str], bytes] | None = None,
    ) -> None:
        self._engine, self._spec, self.read_file = engine, spec, read_file
        self._senses: dict[str, _Sense] = {}
        self._features: OrderedDict[bytes, Float32] = OrderedDict()
        self._known: dict[bytes, tuple[str, int, Int64 | None]] = {}
        self._used: dict[bytes, int | None] = {}
        self.timings, self.limit_bytes = Timings(), DEFAULT_LIMIT_BYTES
        self.keep_stages = True

    @property
    def size_bytes(self) -> int:
        """Bytes of kept features."""
        return sum(rows.nbytes for rows in self._features.values())

    def restart(self) -> None:
        """A new prompt begins: its times are counted from here."""
        self.timings = Timings()

    def forget(self) -> None:
        """Drops all kept features."""
        self._features.clear()

    def reads_text(self, modality: str) -> bool:
        """Whether the stages of a modality read the prompt's text as well."""
        declared = self._spec.modalities.get(modality)
        return declared is not None and declared.text_tokenizer is not None

    def item(self, modality: str, source: Any, text: str = "") -> Item:
        """Identifies and, where it was not seen before, prepares one item.

        Args:
            text: of the prompt, for stages that read it.

        Raises:
            UsageError: the bundle does not understand this modality; no such file.
            MediaError: the picture cannot be used.
            BundleError: the manifest's settings cannot be used.
        """
        sense = self._sense(modality)
        started = time.perf_counter()
        content, source = sense.reader.identify(source)
        own = hashlib.sha256(modality.encode() + b"\0" + content).digest()
        prepared: Prepared | None = None
        if own not in self._known:
            prepared = sense.reader.prepare(source, sense.settings)
            layout = sense.layout
            self._known[own] = (
                layout.text(prepared),
                layout.count(prepared),
                layout.places(prepared),
            )
            if hasattr(sense.layout, "used"):
                self._used[own] = sense.layout.used(prepared)
        self.timings.items += 1
        self.timings.preprocess_ms += _ms(started)
        mark, count, steps = self._known[own]
        key, text_ids = own, None
        if sense.text is not None:
            text_ids = np.array(sense.text.encode(text, whole=True), np.int64)
            key = hashlib.sha256(own + text_ids.tobytes()).digest()
        held = [prepared]  # its pixels go once they are encoded

        def rows() -> Float32:
            kept = self._features.get(key)
            if kept is not None:
                self._features.move_to_end(key)
                return kept
            made = held.pop() if held else None
            if made is None:
                begun = time.perf_counter()
                made = sense.reader.prepare(source, sense.settings)
                self.timings.preprocess_ms += _ms(begun)
            return self._keep(key, self._encode(own, sense, made, count, text_ids))

        places = 1 if sense.beside else count
        return Item(modality, key, mark, places, rows, used=self._used.get(own), steps=steps)

    def tidy(self, modality: str, text: str) -> str:
        """A prompt in which placeholders have become their text, as its layout wants the whole."""
        layout: Any = self._sense(modality).layout
        return str(layout.tidy(text)) if hasattr(layout, "tidy") else text

    def seen_by(self, modality: str, positions: list[int], ids: list[int]) -> list[tuple[int, int]]:
        """The span of tokens that sees each item, whose placeholders stand at `positions` of the
        prompt `ids`."""
        layout: Any = self._sense(modality).layout
        spans: list[tuple[int, int]] = layout.seen_by(positions, ids)
        return spans

    def adopt(self, modality: str, reader: Reader, layout: Layout) -> None:
        """Items of a modality are read and arranged in an engine's own way."""
        stages = self._spec.modalities[modality].stages
        self._senses[modality] = _Sense(reader, None, layout, stages, beside=False, text=None)

    def is_kept(self, item: Item) -> bool:
        """Whether an item's features are here already."""
        return item.key in self._features

    def settle(self) -> None:
        """A prompt's items are encoded; what comes next is the decoder's."""
        if not self.keep_stages:
            for modality in self._spec.modalities.values():
                for name in modality.stages:
                    self._engine().release(name)
        started = time.perf_counter()
        if self._spec.modalities and self._engine().load_stage("decoder"):
            self.timings.load_ms += _ms(started)

    def release(self, stage: str) -> bool:
        """See `Session.release`."""
        senses = self._spec.modalities.values()
        text = {"embed", "encode_text"} & set(self._spec.stages)
        names = sorted({n for m in senses for n in m.stages} | text)
        if stage not in names:
            raise UsageError(
                "there is no such stage to release", expected=", ".join(names), found=repr(stage)
            )
        return self._engine().release(stage)

    def _sense(self, modality: str) -> _Sense:
        if modality in self._senses:
            return self._senses[modality]
        declared = self._spec.modalities.get(modality)
        if declared is None:
            known = ["text", *self._spec.modalities]
            raise UsageError(
                f"this bundle understands {' and '.join(known)} only",
                where=self._spec.architecture,
                found=modality,
                fix="load a bundle of a model that does",
            )
        where = f"model.modalities.{modality}"
        beside = declared.target == "states"
        remembering = self._spec.stages.get(f"remember_{modality}")
        layout = layout_of(declared, where)
        if beside and (remembering is None or not hasattr(layout, "seen_by")):
            raise CorruptBundle(
                "features that go into states need a stage for it, and who sees them",
                where=f"{where}.target",
                expected=f"a stage remember_{modality}, and layout kind beside",
            )
        reader = reader_of(modality)
        self._senses[modality] = _Sense(
            reader=reader,
            settings=reader.settings(declared.settings, f"{where}.settings"),
            layout=layout,
            stages=declared.stages,
            beside=beside,
            text=self._tokenizer(declared.text_tokenizer, f"{where}.text_tokenizer"),
        )
        return self._senses[modality]

    def _tokenizer(self, file: str | None, where: str) -> Text | None:
        """What makes `text_ids`, where stages read them. Raises: BundleError."""
        if file is None:
            return None
        from edge_mmllm.text import Text

        if self.read_file is None:
            raise CorruptBundle("the stages' tokenizer is missing", where=where, expected=file)
        return Text(TextSpec("tokenizers"), self.read_file(file))

    def _keep(self, key: bytes, rows: Float32) -> Float32:
        self._features[key] = rows
        while len(self._features) > 1 and self.size_bytes > self.limit_bytes:
            self._features.popitem(last=False)
        return rows

    def _encode(
        self, key: bytes, sense: _Sense, item: Prepared, count: int, text_ids: Int64 | None
    ) -> Float32:
        """Runs the stages over an item. Where later ones read the prompt's text too, what the
        first gave is kept, for other questions on the same item."""
        engine = self._engine()
        parts, encoded = [], False
        for n, run in enumerate(item.runs):
            given, value = dict(run), None
            if text_ids is not None:
                given["text_ids"] = text_ids
            for i, name in enumerate(sense.stages):
                stage = self._spec.stages[name]
                first = key + n.to_bytes(4, "little") if i == 0 and text_ids is not None else None
                if first is not None and (value := self._features.get(first)) is not None:
                    given[stage.outputs[0]] = value
                    continue
                started = time.perf_counter()
                if engine.load_stage(name):
                    self.timings.load_ms += _ms(started)
                    started = time.perf_counter()
                if any(n not in given for n in stage.inputs):
                    raise CorruptBundle(
                        f"the stage {name} wants what preprocessing does not make",
                        expected=", ".join(given),
                        found=", ".join(stage.inputs),
                    )
                value = engine.run_stage(name, {n: given[n] for n in stage.inputs})
                given[stage.outputs[0]] = value
                encoded = encoded or not i
                if first is not None:
                    self._keep(first, value)
                if i:
                    self.timings.project_ms += _ms(started)
                else:
                    self.timings.encode_ms += _ms(started)
            fits = value is not None and value.ndim == 2
            if (
                value is None
                or not fits
                or (not sense.beside and value.shape[1] != self._spec.hidden_size)
            ):
                raise CorruptBundle(
                    "the last stage does not give rows of the backbone's width",
                    where=sense.stages[-1],
                    expected=f"(rows, {self._spec.hidden_size})",
                    found=str(None if value is None else value.shape),
                )
            parts.append(value)
        rows = np.ascontiguousarray(sense.layout.arrange(parts, item), np.float32)
        if len(rows) != count:
            raise CorruptBundle(
                "the stages give another number of rows than the layout says",
                where=sense.stages[-1],
                expected=str(count),
                found=str(len(rows)),
            )
        self.timings.encoded += encoded
        return rows


def _ms(started: float) -> float:
    return (time.perf_counter() - started) * 1e3
