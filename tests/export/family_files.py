"""The multimodal checkpoints of `tests/goldens/families`, bound, exported and opened."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import numpy as np
import references
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

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

#: Modality -> the folder of its files, and the array of `golden.npz` with their numbers.
KINDS = {"image": "pictures", "video": "videos", "audio": "sounds"}


@dataclass(frozen=True)
class Golden:
    """Ids with placeholder ids, picture files, and transformers' logits.

    Attributes:
        prompt: the text that became the ids, where there is one.
        answer: ids that an encoder-decoder's decoder reads; of no others.
        greedy: what follows the ids, token by token; empty where it was not asked.
    """

    ids: NDArray[np.int64]
    media: dict[str, list[Path]]
    logits: Float32
    prompt: str | None = None
    answer: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    greedy: tuple[int, ...] = ()

    def turned(self) -> dict[str, list[Path]]:
        """Other pictures: in another order, or another one."""
        ((name, own),) = [item for item in self.media.items() if item[1]][:1]
        other = [p for p in sorted((FOLDER / KINDS[name]).iterdir()) if p not in own]
        return {**self.media, name: own[::-1] if len(own) > 1 else other[:1]}

    def read(self, session: Session, prompt: Prompted) -> Float32:
        """All logits of the prompt, or of the answer to it."""
        session.start(prompt)
        return session.prefill(self.answer if len(self.answer) else prompt, logits="all")


@cache
def golden(name: str) -> Golden:
    with np.load(FOLDER / name / "golden.npz") as data:
        media = {
            name: [next((FOLDER / kind).glob(f"{n}.*")) for n in data[kind]]
            for name, kind in KINDS.items()
            if kind in data
        }
        asked = str(data["prompt"]) if "prompt" in data else None
        answer = data["answer"] if "answer" in data else np.empty(0, np.int64)
        greedy = tuple(data["greedy"].tolist()) if "greedy" in data else ()
        ids, logits = data["input_ids"], data["logits"]
        return Golden(ids, media, logits, asked, answer, greedy)


def composite(loaded: references.Loaded) -> Composite:
    assert isinstance(loaded.model, Composite)
    return loaded.model


def export(
    loaded: references.Loaded, folder: Path, text: TextSpec | None = None
) -> references.Exported:
    """As `references.export`, with what the manifest says of the modalities."""
    exported = references.export(loaded, folder, "embeds")
    model = composite(loaded)
    own = next(iter(loaded.weights.values())).checkpoint.text()
    files = {"tokenizer.json": own.tokenizer_json, **model.files}
    for name, content in files.items():
        if content is not None:
            (folder / name).write_bytes(content)
    spec = replace(
        exported.spec,
        components=model.components(),
        modalities=model.modalities(),
        text=text or own.spec,
    )
    return replace(exported, spec=spec)


def oracle_prompt(loaded: references.Loaded, session: Session, given: Golden) -> Prompted:
    """The prompt, with rows that the oracle computes."""
    stages = OracleStages(composite(loaded), loaded.weights)
    own, session.perception = (
        session.perception,
        Perception(lambda: stages, session.spec, session.perception.read_file),  # type: ignore[arg-type,return-value]
    )
    try:
        return session.encode(given.ids, given.media)
    finally:
        session.perception = own


def oracle(loaded: references.Loaded, session: Session, given: Golden) -> Float32:
    prompt = oracle_prompt(loaded, session, given)
    answer = given.answer if len(given.answer) else None
    return oracle_logits(composite(loaded), loaded.weights, prompt, answer)


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
            folder.mkdir(exist_ok=True)  # an export before may have failed
            self._known[name, plan] = loaded, export(loaded, folder)
        return self._known[name, plan]


#: Id of the placeholder of a picture in the `llava` references.
IMAGE = 95


def word_tokenizer() -> bytes:
    """A `tokenizer.json` of whole words for the `llava` references."""
    words = ["<unk>", "user", "bot", "assistant", "what", "is", "this", "that", "and", "?"]
    vocab = {word: i for i, word in enumerate(words)} | {f"w{i}": i for i in range(10, IMAGE)}
    made = Tokenizer(WordLevel(vocab, "<unk>"))
    made.pre_tokenizer = WhitespaceSplit()
    while made.get_vocab_size() < IMAGE:
        made.add_tokens([f"x{made.get_vocab_size()}"])
    made.add_special_tokens(["<image>"])
    assert made.token_to_id("<image>") == IMAGE
    return made.to_str().encode()
