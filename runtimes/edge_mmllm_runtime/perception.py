"""From pictures (and what else a bundle understands) to rows of features, each computed once.

What was encoded is kept by content hash: a second question on the same picture skips encoding.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from edge_mmllm.errors import CorruptBundle, UsageError
from edge_mmllm.spec import ModelSpec
from edge_mmllm_runtime.engine import Engine, Float32
from edge_mmllm_runtime.layouts import Layout, layout_of
from edge_mmllm_runtime.media import Prepared, Reader, reader_of

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
    """

    modality: str
    key: bytes
    text: str
    places: int
    rows: Callable[[], Float32]


@dataclass(frozen=True)
class _Sense:
    """One modality of a bundle, its settings read."""

    reader: Reader
    settings: Any
    layout: Layout
    stages: tuple[str, ...]
    beside: bool


class Perception:
    """The stages before the decoder, and what they gave.

    Args:
        engine: the session's.
        spec: the model.

    Attributes:
        timings: since the last `restart`.
        limit_bytes: of kept features; the ones used least recently go first.
        keep_stages: False releases the stages as soon as a prompt's items are encoded, so that
            they are not in memory together with the decoder.
    """

    def __init__(self, engine: Callable[[], Engine], spec: ModelSpec) -> None:
        self._engine, self._spec = engine, spec
        self._senses: dict[str, _Sense] = {}
        self._features: OrderedDict[bytes, Float32] = OrderedDict()
        self._known: dict[bytes, tuple[str, int]] = {}
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

    def item(self, modality: str, source: Any) -> Item:
        """Identifies and, where it was not seen before, prepares one item.

        Raises:
            UsageError: the bundle does not understand this modality; no such file.
            MediaError: the picture cannot be used.
            BundleError: the manifest's settings cannot be used.
        """
        sense = self._sense(modality)
        started = time.perf_counter()
        content, source = sense.reader.identify(source)
        key = hashlib.sha256(modality.encode() + b"\0" + content).digest()
        prepared: Prepared | None = None
        if key not in self._known:
            prepared = sense.reader.prepare(source, sense.settings)
            self._known[key] = sense.layout.text(prepared), sense.layout.count(prepared)
        self.timings.items += 1
        self.timings.preprocess_ms += _ms(started)
        text, count = self._known[key]
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
            return self._encode(key, sense, made, count)

        return Item(modality, key, text, 1 if sense.beside else count, rows)

    def seen_by(self, modality: str, positions: list[int]) -> list[tuple[int, int]]:
        """The span of tokens that sees each item, whose placeholders stand at `positions`."""
        layout: Any = self._sense(modality).layout
        spans: list[tuple[int, int]] = layout.seen_by(positions)
        return spans

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
        )
        return self._senses[modality]

    def _encode(self, key: bytes, sense: _Sense, item: Prepared, count: int) -> Float32:
        """Runs the stages over an item and keeps the rows."""
        engine = self._engine()
        parts = []
        for run in item.runs:
            given, value = dict(run), None
            for i, name in enumerate(sense.stages):
                started = time.perf_counter()
                if engine.load_stage(name):
                    self.timings.load_ms += _ms(started)
                    started = time.perf_counter()
                stage = self._spec.stages[name]
                if any(n not in given for n in stage.inputs):
                    raise CorruptBundle(
                        f"the stage {name} wants what preprocessing does not make",
                        expected=", ".join(given),
                        found=", ".join(stage.inputs),
                    )
                value = engine.run_stage(name, {n: given[n] for n in stage.inputs})
                given[stage.outputs[0]] = value
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
        self.timings.encoded += 1
        self._features[key] = rows
        while len(self._features) > 1 and self.size_bytes > self.limit_bytes:
            self._features.popitem(last=False)
        return rows


def _ms(started: float) -> float:
    return (time.perf_counter() - started) * 1e3
