"""The multimodal checkpoints of `tests/goldens/families`, bound, exported and opened."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import references
from numpy.typing import NDArray

from edge_mmllm.spec import TextSpec
from edge_mmllm_export.families.composite import Composite
from edge_mmllm_export.quantize.schemes import QuantPlan
from edge_mmllm_export.verify_media import OracleStages, oracle_logits
from edge_mmllm_runtime.perception import Perception
from edge_mmllm_runtime.prompted import Prompted
from edge_mmllm_runtime.session import Session

Float32 = NDArray[np.float32]
FOLDER = references.ROOT / "tests" / "goldens" / "families"
NAMES = tuple(sorted(p.name for p in FOLDER.iterdir() if (p / "config.json").is_file()))


@dataclass(frozen=True)
class Golden:
    """Ids with placeholder ids, picture files, and transformers' logits."""

    ids: NDArray[np.int64]
    media: dict[str, list[Path]]
    logits: Float32


@cache
def golden(name: str) -> Golden:
    with np.load(FOLDER / name / "golden.npz") as data:
        paths = [next((FOLDER / "pictures").glob(f"{n}.*")) for n in data["pictures"]]
        return Golden(data["input_ids"], {"image": paths}, data["logits"])


def composite(loaded: references.Loaded) -> Composite:
    assert isinstance(loaded.model, Composite)
    return loaded.model


def export(
    loaded: references.Loaded, folder: Path, text: TextSpec | None = None
) -> references.Exported:
    """As `references.export`, with what the manifest says of the modalities."""
    exported = references.export(loaded, folder, "embeds")
    model = composite(loaded)
    spec = replace(
        exported.spec,
        components=model.components(),
        modalities=model.modalities(),
        text=text or exported.spec.text,
    )
    return replace(exported, spec=spec)


def oracle_prompt(loaded: references.Loaded, session: Session, given: Golden) -> Prompted:
    """The prompt, with rows that the oracle computes."""
    stages = OracleStages(composite(loaded), loaded.weights)
    own, session.perception = (
        session.perception,
        Perception(lambda: stages, session.spec),  # type: ignore[arg-type,return-value]
    )
    try:
        return session.encode(given.ids, given.media)
    finally:
        session.perception = own


def oracle(loaded: references.Loaded, session: Session, given: Golden) -> Float32:
    return oracle_logits(composite(loaded), loaded.weights, oracle_prompt(loaded, session, given))


class Exports:
    """Families as ONNX, each written once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._known: dict[tuple[str, QuantPlan], tuple[references.Loaded, references.Exported]] = {}

    def __call__(
        self, name: str, plan: QuantPlan = references.F32
    ) -> tuple[references.Loaded, references.Exported]:
        if (name, plan) not in self._known:
            loaded = references.load(FOLDER / name, plan)
            folder = self._root / str(len(self._known))
            folder.mkdir()
            self._known[name, plan] = loaded, export(loaded, folder)
        return self._known[name, plan]
