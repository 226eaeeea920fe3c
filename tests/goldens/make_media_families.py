"""Writes tiny multimodal checkpoints whose items vary: tiles, any size, videos, sounds.

Run it in an environment with the `reference` extra (torch, transformers 5, safetensors, pillow):

    python tests/goldens/make_media_families.py [--out tests/goldens/families] [NAME ...]

As `make_families.py`; each folder also has a `tokenizer.json` of words and the family's special
tokens, and `golden.npz` has `prompt` (the text, a placeholder for each item), `input_ids` (what
the published processor makes of it), `logits` of one whole forward, `greedy` (what follows, each
token by a whole forward), and `pictures`, `videos`, `sounds` (numbers of the files).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from make_families import FOLDER, opened
from make_references import TRANSFORMER, VOCAB, randomize
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Sequence, Split

GREEDY = 8
#: Before, between and behind two items.
PROMPT = "w11 w12 w13 {0} w14 w15 w16 w17 {1} w18 w19 w20 w21"


@dataclass(frozen=True)
class Inputs:
    """What a processor makes: the model's inputs, and what each placeholder becomes."""

    given: dict[str, Any]
    marks: list[str]


@dataclass(frozen=True)
class Family:
    """One checkpoint.

    Attributes:
        model: makes the model.
        processors: make its processors; each is saved, under the name of its kind.
        inputs: (processors, folder of the files) -> what they make of the items.
        placeholders: of the items, in the order of the prompt.
        special: the special tokens; they get the last ids.
        media: name of an array in `golden.npz` -> numbers of the files.
        types: placeholder -> its id in `mm_token_type_ids`, where the model wants them.
    """

    model: Callable[[], Any]
    processors: Callable[[], dict[str, Any]]
    inputs: Callable[[dict[str, Any], Path], Inputs]
    placeholders: tuple[str, str]
    special: tuple[str, ...]
    media: dict[str, tuple[int, ...]]
    types: dict[str, int] = field(default_factory=dict)
    prompt: str = PROMPT


def tokenizer(special: tuple[str, ...]) -> Tokenizer:
    words = ["<unk>", "<s>", "</s>", "\n"]
    count = VOCAB - len(special)
    words += [f"w{i}" for i in range(len(words), count)]
    made = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    made.pre_tokenizer = Sequence(
        [Split(Regex(" "), "removed"), Split(Regex("\n"), "isolated")]  # type: ignore[arg-type]
    )
    made.add_special_tokens(list(special))
    assert made.get_vocab_size() == VOCAB
    return made


def id_of(special: tuple[str, ...], token: str) -> int:
    return VOCAB - len(special) + special.index(token)


# -- Idefics3, SmolVLM ------------------------------------------------------------------------

TILES = (
    "<fake_token_around_image>", "<global-img>",
    *(f"<row_{i}_col_{j}>" for i in (1, 2) for j in (1, 2)), "<image>",
)  # fmt: skip


def idefics3(kind: str, **settings: Any) -> Family:
    vision = {
        "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 4, "image_size": 16, "patch_size": 4,
    }  # fmt: skip

    def model() -> Any:
        config = getattr(transformers, f"{kind}Config")(
            text_config=transformers.LlamaConfig(**TRANSFORMER), vision_config=vision,
            image_token_id=id_of(TILES, "<image>"), **settings,
        )  # fmt: skip
        return getattr(transformers, f"{kind}ForConditionalGeneration")(config)

    def processors() -> dict[str, Any]:
        cls = getattr(transformers, f"{kind}ImageProcessorPil")
        edge = {"longest_edge": 16}
        return {"image": cls(size={"longest_edge": 32}, max_image_size=edge)}

    def inputs(made: dict[str, Any], folder: Path) -> Inputs:
        pictures = [opened(folder / "pictures", n) for n in (0, 1)]
        given = made["image"]([pictures], return_tensors="pt", return_row_col_info=True)
        replace = getattr(transformers, f"{kind}Processor").replace_image_token
        names = SimpleNamespace(
            fake_image_token=TILES[0], global_image_tag=TILES[1], global_image_token=TILES[1],
            image_token=TILES[-1], image_seq_len=4,
        )  # fmt: skip
        marks = [replace(names, given, i) for i in (0, 1)]
        return Inputs({k: given[k] for k in ("pixel_values", "pixel_attention_mask")}, marks)

    return Family(model, processors, inputs, ("<image>", "<image>"), TILES, {"pictures": (0, 1)})


FAMILIES = {
    "idefics3": idefics3("Idefics3"),
    "smolvlm": idefics3("SmolVLM", tie_word_embeddings=True),
}


# -- files ------------------------------------------------------------------------------------


def make(name: str, out: Path) -> None:
    """Writes one folder."""
    family = FAMILIES[name]
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    model = family.model()
    randomize(model, generator)
    model.tie_weights()
    folder = out / name
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    processors = family.processors()
    for processor in processors.values():
        processor.save_pretrained(folder)
    words = tokenizer(family.special)
    words.save(str(folder / "tokenizer.json"), pretty=False)

    model = (
        type(model).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    )
    made = family.inputs(processors, out)
    text = family.prompt.format(*made.marks)
    ids = words.encode(text).ids
    assert 0 not in ids, text
    whole, greedy = list(ids), []
    for _ in range(GREEDY + 1):
        given = dict(made.given)
        if family.types:
            kinds = {words.token_to_id(t): kind for t, kind in family.types.items()}
            given["mm_token_type_ids"] = torch.tensor([[kinds.get(i, 0) for i in whole]])
        with torch.no_grad():
            found = model(torch.tensor([whole]), use_cache=False, **given).logits[0].numpy()
        if len(whole) == len(ids):
            logits = found
        greedy.append(int(found[-1].argmax()))
        whole.append(greedy[-1])
    np.savez_compressed(
        folder / "golden.npz",
        prompt=family.prompt.format(*family.placeholders),
        input_ids=np.array(ids),
        logits=logits,
        greedy=np.array(greedy[:GREEDY]),
        **{kind: np.array(numbers) for kind, numbers in family.media.items()},
    )
    size = sum(p.stat().st_size for p in folder.iterdir())
    spread = f"{logits.std():.2f} +- {abs(logits).max():.1f}"
    print(f"{name:20} {size / 1024:6.0f} KiB  {len(ids)} ids  logits {spread}  greedy {greedy}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("names", nargs="*", default=list(FAMILIES))
    arguments = parser.parse_args()
    for name in arguments.names:
        make(name, arguments.out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
