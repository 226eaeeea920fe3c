"""Writes tiny multimodal checkpoints, and what transformers 5 says about pictures with them.

Run it in an environment with the `reference` extra (torch, transformers 5, safetensors, pillow):

    python tests/goldens/make_families.py [--out tests/goldens/families] [NAME ...]

Each folder holds a random model in the published hub layout (`config.json`, `model.safetensors`,
`preprocessor_config.json`, as `save_pretrained` writes them) and `golden.npz`: `input_ids` int64
`(seq,)`, with as many placeholder ids as the processor makes, `pictures` (numbers of the files in
`pictures/`, in the order of the prompt) and `logits` float32 `(seq, vocab)` of one whole forward,
computed in float32 from the stored weights and the pictures as the published processor prepares
them. Every parameter is random. Same versions, same bytes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from make_references import TRANSFORMER, VOCAB, randomize
from PIL import Image

FOLDER = Path(__file__).parent / "families"
#: The placeholder's id.
IMAGE = VOCAB - 1
CLIP = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 8,  # four pixels of each edge are left out
    "projection_dim": 16,
}
SIGLIP = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 8,
    "vision_use_head": False,
}


@dataclass(frozen=True)
class Family:
    """One checkpoint.

    Attributes:
        model: makes the model, in its class's own defaults but for sizes.
        processor: makes its image processor.
        prompt: the ids, with `IMAGE` once for each picture; None for a random one with two.
        tokens: ids that each picture takes.
        pictures: numbers of the pictures.
    """

    model: Callable[[], Any]
    processor: Callable[[], Any]
    tokens: int
    pictures: tuple[int, ...] = (0, 1)
    dtype: torch.dtype = torch.bfloat16
    settings: dict[str, Any] = field(default_factory=dict)


def clip_processor(edge: int) -> Any:
    return transformers.CLIPImageProcessorPil(
        size={"shortest_edge": edge}, crop_size={"height": edge, "width": edge}
    )


def llava(text: Any, vision: Any, **settings: Any) -> Callable[[], Any]:
    def make() -> Any:
        config = transformers.LlavaConfig(
            text_config=text(), vision_config=vision(), image_token_index=IMAGE, **settings
        )
        return transformers.LlavaForConditionalGeneration(config)

    return make


FAMILIES = {
    "llava": Family(
        llava(
            lambda: transformers.LlamaConfig(**TRANSFORMER),
            lambda: transformers.CLIPVisionConfig(**CLIP),
        ),
        lambda: clip_processor(28),
        tokens=9,
    ),
    "llava-full-qwen2": Family(
        llava(
            lambda: transformers.Qwen2Config(**TRANSFORMER),
            lambda: transformers.CLIPVisionConfig(**CLIP),
            vision_feature_select_strategy="full",
            vision_feature_layer=[-2, 1],
            projector_hidden_act="relu",
            multimodal_projector_bias=False,
        ),
        lambda: clip_processor(28),
        tokens=10,
    ),
    "llava-siglip": Family(
        llava(
            lambda: transformers.MistralConfig(**TRANSFORMER),
            lambda: transformers.SiglipVisionConfig(**SIGLIP),
            vision_feature_select_strategy="full",
            vision_feature_layer=-1,
        ),
        lambda: transformers.SiglipImageProcessorPil(size={"height": 24, "width": 24}),
        tokens=9,
    ),
}


def pictures(folder: Path) -> None:
    """The picture files: a colourful PNG that is wide, a gray JPEG that is tall."""
    folder.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[:29, :41]
    first = np.stack([x * 6, y * 8, 255 - 3 * x - 3 * y], axis=-1).astype(np.int64)
    first += np.random.default_rng(0).integers(-20, 21, first.shape)
    first[(y - 12) ** 2 + (x - 25) ** 2 < 60] = (240, 30, 60)
    Image.fromarray(np.clip(first, 0, 255).astype(np.uint8)).save(folder / "0.png")
    y, x = np.mgrid[:64, :33]
    second = 128 + 90 * np.sin(x / 5) * np.cos(y / 9) + 30 * (x > 16)
    Image.fromarray(np.clip(second, 0, 255).astype(np.uint8)).save(folder / "1.jpg", quality=90)


def opened(folder: Path, number: int) -> Image.Image:
    (path,) = folder.glob(f"{number}.*")
    return Image.open(path).convert("RGB")


def make(name: str, out: Path) -> None:
    """Writes one folder."""
    family = FAMILIES[name]
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    model = family.model()
    randomize(model, generator)
    folder = out / name
    model.to(family.dtype).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    processor = family.processor()
    processor.save_pretrained(folder)

    model = (
        type(model).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    )
    text = torch.randint(3, IMAGE, (3, 7), generator=generator)
    marks = torch.full((family.tokens,), IMAGE)
    ids = torch.cat([text[0], marks, text[1], marks, text[2]])[None]
    given = processor([opened(out / "pictures", n) for n in family.pictures], return_tensors="pt")
    with torch.no_grad():
        logits = model(ids, use_cache=False, **given).logits[0].numpy()
    np.savez_compressed(
        folder / "golden.npz",
        input_ids=ids[0].numpy(),
        pictures=np.array(family.pictures),
        logits=logits,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("names", nargs="*", default=list(FAMILIES))
    arguments = parser.parse_args()
    pictures(arguments.out / "pictures")
    for name in arguments.names:
        make(name, arguments.out)
        size = sum(p.stat().st_size for p in (arguments.out / name).iterdir())
        golden = np.load(arguments.out / name / "golden.npz")["logits"]
        spread = f"{golden.std():.2f} +- {abs(golden).max():.1f}"
        print(f"{name:20} {size / 1024:6.0f} KiB  logits {spread}")


if __name__ == "__main__":
    main()
