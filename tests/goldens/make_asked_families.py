"""Writes tiny multimodal checkpoints with their whole processors, and how transformers 5 answers.

Run it in an environment with the `reference` extra (torch, transformers 5, safetensors, pillow),
after `make_families.py`, which draws the pictures:

    python tests/goldens/make_asked_families.py [--out tests/goldens/families] [NAME ...]

Each folder holds a random model with processor and tokenizer in the published hub layout and
`golden.npz`: `prompt` (a text with the family's placeholders) and `pictures`, what the published
processor makes of them (`input_ids` int64 `(seq,)`), `answer` (ids that the decoder of an
encoder-decoder reads, else empty), `logits` float32 of one whole forward (of the answer, where
there is one), and `greedy`: ids that follow, by the likeliest token of whole forwards. All float32
from the stored weights and the picture files. Every parameter is random. Same versions, same bytes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from make_families import FOLDER, IMAGE, opened
from make_references import TRANSFORMER, VOCAB, randomize
from tokenizers.processors import TemplateProcessing

PAD, BOS, EOS, UNKNOWN = range(4)
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
#: Tokens of the greedy continuation.
GREEDY = 8
EVA = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 8,
}
QFORMER = {
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "encoder_hidden_size": EVA["hidden_size"],
}
QUERIES = 5
OPT = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "ffn_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 48,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
T5 = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_ff": 48,
    "d_kv": 8,
    "num_heads": 4,
    "num_layers": 2,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "decoder_start_token_id": PAD,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
}


@dataclass(frozen=True)
class Family:
    """One checkpoint.

    Attributes:
        model: makes the model.
        processor: makes its processor.
        prompt: a text with the placeholder of each picture, but where those come first.
        ask: what the processor is called with, of processor, prompt and pictures.
        grow: inputs with a row for each token, whose last row goes on.
        answer: ids that the decoder of an encoder-decoder reads.
        seed: another one gives other weights.
        alone: also a text without a picture: `plain_ids`, `plain_logits`.
        quiet: a parameter to make smaller, so that a tied model does not repeat its last token.
    """

    model: Callable[[], Any]
    processor: Callable[[], Any]
    prompt: str
    pictures: tuple[int, ...] = (0,)
    ask: Callable[[Any, str, list[Any]], Any] = field(
        default=lambda processor, prompt, images: processor(
            images=images, text=prompt, return_tensors="pt"
        )
    )
    grow: tuple[str, ...] = ()
    answer: tuple[int, ...] = ()
    quiet: str = "none"
    alone: bool = False
    seed: int = 0


def tokenizer(
    words: int, around: str, special: list[str] = SPECIAL, last: tuple[str, ...] = ("<image>",)
) -> Any:
    """Words `w4`, `w5`, ... split at spaces; `around` as a post-processor's template has it."""
    names = [*special, *(f"w{i}" for i in range(len(special), words - len(last))), *last]
    vocab = {name: i for i, name in enumerate(names)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token=special[-1]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens([tokenizers.AddedToken(n, normalized=False) for n in special])
    made.add_special_tokens([tokenizers.AddedToken(n, normalized=False) for n in last])
    made.post_processor = TemplateProcessing(
        single=around, special_tokens=[(n, vocab[n]) for n in special]
    )
    return made


def fast(
    around: str, last: tuple[str, ...] = ("<image>",), words: int = VOCAB, **settings: Any
) -> Any:
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer(words, around, last=last),
        **{"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        **settings,
    )


def eyes() -> Any:
    return transformers.BlipImageProcessorPil(size={"height": 28, "width": 28})


def blip2(text: Any) -> Callable[[], Any]:
    def make() -> Any:
        config = transformers.Blip2Config(
            vision_config=EVA,
            qformer_config={k: v for k, v in QFORMER.items() if k != "vocab_size"},
            text_config=text.to_dict(),
            num_query_tokens=QUERIES,
            image_token_index=IMAGE,
        )
        return transformers.Blip2ForConditionalGeneration(config)

    return make


def instructblip(text: Any) -> Callable[[], Any]:
    def make() -> Any:
        config = transformers.InstructBlipConfig(
            vision_config=EVA,
            qformer_config=QFORMER,
            text_config=text.to_dict(),
            num_query_tokens=QUERIES,
            image_token_index=IMAGE,
        )
        return transformers.InstructBlipForConditionalGeneration(config)

    return make


def instructed(around: str) -> Callable[[], Any]:
    def make() -> Any:
        special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
        own = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer(QFORMER["vocab_size"], "[CLS] $A [SEP]", special, ()),
            **dict(zip(("pad_token", "cls_token", "sep_token", "unk_token"), special, strict=True)),
        )
        return transformers.InstructBlipProcessor(eyes(), fast(around), own, QUERIES)

    return make


IDEFICS = {
    "vocab_size": VOCAB - 2,
    "additional_vocab_size": 2,
    "hidden_size": 48,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 128,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "vision_config": {k: v for k, v in EVA.items() if k != "hidden_size"} | {"embed_dim": 32},
    "perceiver_config": {
        "resampler_n_latents": 4,
        "resampler_depth": 1,
        "resampler_n_heads": 2,
        "resampler_head_dim": 16,
        "qk_layer_norms_perceiver": True,
    },
}
FENCE = "<fake_token_around_image>"


def idefics(**settings: Any) -> Family:
    return Family(
        lambda: transformers.IdeficsForVisionText2Text(
            transformers.IdeficsConfig(**IDEFICS | settings)
        ),
        lambda: transformers.IdeficsProcessor(
            transformers.IdeficsImageProcessorPil(image_size=28),
            fast("<s> $A", last=(FENCE, "<image>")),
        ),
        "w10 w4 <image> w50 w33 w8 </s> w71 w5 <image> w20 w62 w9",
        (0, 1),
        ask=lambda processor, prompt, images: processor(text=interleaved(prompt, images)),
        grow=("image_attention_mask",),
    )


def interleaved(prompt: str, images: list[Any]) -> list[Any]:
    parts: list[Any] = prompt.split("<image>")
    for i, image in enumerate(images):
        parts.insert(2 * i + 1, image)
    return parts


MLLAMA = {
    "text_config": TRANSFORMER
    | {
        "num_hidden_layers": 3,
        "intermediate_size": 40,
        "cross_attention_layers": [1],
        "pad_token_id": PAD,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 2,
        "image_size": 42,  # one tile of the first picture, two of the second
        "patch_size": 21,
        "vision_output_dim": 32,
        "intermediate_layers_indices": [0],
    },
    "image_token_index": VOCAB,
}


def mllama() -> Any:
    return transformers.MllamaForConditionalGeneration(transformers.MllamaConfig(**MLLAMA))


QUESTION = "w10 w4 w50 w33 w8 w71 w5 w20 w62"
FAMILIES = {
    "blip2-opt": Family(
        blip2(transformers.OPTConfig(**OPT)),
        lambda: transformers.Blip2Processor(eyes(), fast("<s> $A"), QUERIES),
        QUESTION,
        quiet="decoder.embed_tokens.weight",
        seed=1,
    ),
    "blip2-t5": Family(
        blip2(transformers.T5Config(**T5)),
        lambda: transformers.Blip2Processor(eyes(), fast("$A </s>"), QUERIES),
        QUESTION,
        answer=(PAD, 9, 30, 41, 12, 77),
    ),
    "instructblip-llama": Family(
        instructblip(transformers.LlamaConfig(**TRANSFORMER)),
        instructed("<s> $A"),
        QUESTION,
    ),
    "instructblip-t5": Family(
        instructblip(transformers.T5Config(**T5)),
        instructed("$A </s>"),
        QUESTION,
        answer=(PAD, 9, 30, 41, 12, 77),
    ),
    "mllama": Family(
        mllama,
        lambda: transformers.MllamaProcessor(
            transformers.MllamaImageProcessorPil(size={"height": 42, "width": 42}),
            fast("<s> $A", last=("<|image|>",), words=VOCAB + 1),
        ),
        "w10 w4 <|image|> w50 w33 w8 <|image|> w71 w5",
        (0, 1),
        ask=lambda processor, prompt, images: processor(
            images=[images], text=[prompt], return_tensors="pt", add_special_tokens=False
        ),
        grow=("cross_attention_mask",),
        alone=True,
    ),
    "idefics": idefics(
        use_resampler=True, qk_layer_norms=True, alpha_type="vector", cross_layer_interval=2
    ),
    "idefics-plain": idefics(),
}


def make(name: str, out: Path) -> None:
    """Writes one folder."""
    family = FAMILIES[name]
    generator = torch.Generator().manual_seed(sum(map(ord, name)) + family.seed)
    model = family.model()
    randomize(model, generator)
    for key, p in model.named_parameters():
        if key.endswith(family.quiet):
            p.data *= 0.35
    folder = out / name
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    processor = family.processor()
    processor.save_pretrained(folder)

    model = (
        type(model).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    )
    images = [opened(out / "pictures", n) for n in family.pictures]
    given = dict(family.ask(processor, family.prompt, images))
    given.pop("attention_mask", None)
    grown = "decoder_input_ids" if family.answer else "input_ids"
    if family.answer:
        given[grown] = torch.tensor([family.answer])
    with torch.no_grad():
        logits = model(**given, use_cache=False).logits[0].numpy()
        if family.answer:
            given[grown] = given[grown][:, :1]
        ids, greedy = given["input_ids"][0].numpy(), []
        for _ in range(GREEDY):
            best = model(**given, use_cache=False).logits[0, -1].argmax()
            greedy.append(int(best))
            given[grown] = torch.cat([given[grown], best[None, None]], 1)
            for key in family.grow:
                given[key] = torch.cat([given[key], given[key][:, -1:]], 1)
    alone = {}
    if family.alone:
        plain = torch.arange(4, 16)[None]
        with torch.no_grad():
            alone["plain_logits"] = model(plain, use_cache=False).logits[0].numpy()
        alone["plain_ids"] = plain[0].numpy()
    np.savez_compressed(
        folder / "golden.npz",
        **alone,
        prompt=np.array(family.prompt),
        pictures=np.array(family.pictures),
        input_ids=ids,
        answer=np.array(family.answer, np.int64),
        logits=logits,
        greedy=np.array(greedy),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("names", nargs="*", default=list(FAMILIES))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.names:
        make(name, arguments.out)
        size = sum(p.stat().st_size for p in (arguments.out / name).rglob("*") if p.is_file())
        golden = np.load(arguments.out / name / "golden.npz")
        spread = f"{golden['logits'].std():.2f} +- {abs(golden['logits']).max():.1f}"
        print(f"{name:20} {size / 1024:6.0f} KiB  logits {spread}  {golden['greedy'].tolist()}")


if __name__ == "__main__":
    main()
