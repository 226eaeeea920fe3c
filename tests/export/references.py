"""The reference checkpoints of `tests/goldens/references`, bound, exported and opened."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_mmllm.spec import ModelSpec, Stage, TextSpec
from edge_mmllm.text import Text
from edge_mmllm_export.checkpoints import open_checkpoint
from edge_mmllm_export.models import build
from edge_mmllm_export.onnx import Inputs, write_stages
from edge_mmllm_export.ops.base import Architecture
from edge_mmllm_export.oracle import Oracle
from edge_mmllm_export.quantize.schemes import QuantPlan
from edge_mmllm_export.weights import Weight, bind
from edge_mmllm_runtime.onnx import OnnxEngine
from edge_mmllm_runtime.session import Session

Float32 = NDArray[np.float32]
ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "tests" / "goldens" / "references"
#: The data that the repository does not carry; tests that need it name what they miss.
DATA = Path(os.environ.get("EDGE_MMLLM_DATA", ROOT.parent / "shared" / "data"))
NAMES = tuple(sorted(p.name for p in FOLDER.iterdir() if p.is_dir()))
F32 = QuantPlan("f32")


@dataclass(frozen=True)
class Loaded:
    """A checkpoint's definition and weights."""

    model: Architecture
    weights: dict[str, Weight]

    def oracle(self, weights: dict[str, Weight] | None = None) -> Oracle:
        return Oracle(self.model, weights or self.weights, keep_weights=True)


@dataclass(frozen=True)
class Exported:
    """A definition on disk, as the device sees it."""

    spec: ModelSpec
    folder: Path

    @contextmanager
    def session(self, context: int = 128, *, chunk: int = 512) -> Iterator[Session]:
        limit = context if self.spec.context_length else None
        engine = OnnxEngine(self.spec, lambda f: self.folder / f, threads=1, context=limit)
        session = Session(
            engine, self.spec, "0" * 64, self._text, context=limit, chunk=chunk,
            read_file=lambda name: (self.folder / name).read_bytes(),
        )  # fmt: skip
        try:
            yield session
        finally:
            session.close()

    def _text(self) -> Text:
        return Text(self.spec.text, (self.folder / "tokenizer.json").read_bytes())

    def logits(self, ids: NDArray[np.int64]) -> Float32:
        """All rows of one whole forward."""
        with self.session() as session:
            return session.prefill(ids, logits="all")


def load(source: Path | str, plan: QuantPlan = F32, context: int | None = None) -> Loaded:
    checkpoint = open_checkpoint(source)
    model = build(checkpoint, context)
    weights = bind(
        checkpoint,
        model.parameters(),
        model.sources(checkpoint.layout),
        ignored=model.ignored(),
        schemes=plan.of,
    )
    return Loaded(model, weights)


def export(loaded: Loaded, folder: Path, inputs: Inputs = "ids") -> Exported:
    model = loaded.model
    stages: dict[str, Stage] = write_stages(model, loaded.weights, folder, inputs=inputs)
    spec = ModelSpec(
        architecture=model.name,
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        layers=model.layers,
        parameters=sum(w.size for w in loaded.weights.values()),
        context_length=model.context_length,
        states=model.states(),
        stages=stages,
        text=TextSpec("none"),
        decoder_start_id=getattr(getattr(model, "backbone", model), "decoder_start_id", None),
        extra_ids=getattr(getattr(model, "backbone", model), "extra_ids", 0),
    )
    return Exported(spec, folder)


class Exports:
    """References as ONNX, each written once.

    Args:
        root: where they are written.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._known: dict[tuple[str, QuantPlan, Inputs], tuple[Loaded, Exported]] = {}

    def __call__(
        self, name: str, plan: QuantPlan = F32, inputs: Inputs = "ids"
    ) -> tuple[Loaded, Exported]:
        key = (name, plan, inputs)
        if key not in self._known:
            loaded = load(FOLDER / name, plan)
            folder = self._root / str(len(self._known))
            folder.mkdir()
            self._known[key] = loaded, export(loaded, folder, inputs)
        return self._known[key]


@cache
def golden(name: str) -> tuple[NDArray[np.int64], Float32]:
    """Ids `(seq,)` and transformers' logits `(seq, vocab)`."""
    with np.load(FOLDER / name / "golden.npz") as data:
        return data["input_ids"], data["logits"]


@cache
def oracle_logits(name: str) -> Float32:
    """The oracle's logits for the golden ids."""
    return load(FOLDER / name).oracle().forward(golden(name)[0])
