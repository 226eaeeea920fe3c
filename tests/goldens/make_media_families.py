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
import wave
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from make_families import CLIP, FOLDER, opened
from make_references import TRANSFORMER, VOCAB, randomize
from PIL import Image
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
    placeholders: tuple[str, ...]
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


# -- Qwen2-VL ---------------------------------------------------------------------------------

PADS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def qwen2_vl(videos: bool = False) -> Family:
    vision = {
        "depth": 1 if videos else 2, "embed_dim": 32, "hidden_size": 48, "mlp_ratio": 2,
        "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2,
    }  # fmt: skip
    sizes = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}

    def model() -> Any:
        text = {k: v for k, v in TRANSFORMER.items() if k != "pad_token_id"}
        text["rope_parameters"] = {
            "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3],
        }  # fmt: skip
        ids = {n: id_of(PADS, f"<|{n}|>") for n in ("vision_start", "vision_end")}
        config = transformers.Qwen2VLConfig(
            text_config=text, vision_config=vision,
            **{f"{name}_token_id": number for name, number in ids.items()},
            image_token_id=id_of(PADS, PADS[2]), video_token_id=id_of(PADS, PADS[3]),
        )  # fmt: skip
        return transformers.Qwen2VLForConditionalGeneration(config)

    def processors() -> dict[str, Any]:
        edges = {"shortest_edge": 16 * 16, "longest_edge": 32 * 32}
        large = {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
        return {
            "image": transformers.Qwen2VLImageProcessorPil(size=edges, **sizes),
            "video": transformers.Qwen2VLVideoProcessor(size=large, num_frames=4, **sizes),
        }

    def inputs(made: dict[str, Any], folder: Path) -> Inputs:
        if videos:
            given = made["video"](videos=[sampled(folder, n, 4) for n in (0, 1)], **SAMPLED)
            marks = [PADS[3] * (int(grid.prod()) // 4) for grid in given["video_grid_thw"]]
            return Inputs({k: given[k] for k in ("pixel_values_videos", "video_grid_thw")}, marks)
        pictures = [opened(folder / "pictures", n) for n in (0, 1)]
        given = made["image"](pictures, return_tensors="pt")
        marks = [PADS[2] * (int(grid.prod()) // 4) for grid in given["image_grid_thw"]]
        return Inputs({k: given[k] for k in ("pixel_values", "image_grid_thw")}, marks)

    mark = PADS[2 + videos]
    return Family(
        model, processors, inputs, (mark, mark), PADS,
        {"videos" if videos else "pictures": (0, 1)},
        types={PADS[2]: 1, PADS[3]: 2},
        prompt="w11 w12 w13 <|vision_start|> {0} <|vision_end|> w16 <|vision_start|> {1} "
        "<|vision_end|> w18 w19 w20 w21",
    )  # fmt: skip


# -- LLaVA-NeXT, Video-LLaVA ------------------------------------------------------------------

SEEN = ("<image>", "<video>")


def llava_next(text: Callable[[], Any], grids: list[list[int]], **settings: Any) -> Family:
    tower = {**CLIP, "num_hidden_layers": 2, "image_size": 16, "patch_size": 4}

    def model() -> Any:
        config = transformers.LlavaNextConfig(
            text_config=text(), vision_config=transformers.CLIPVisionConfig(**tower),
            image_token_index=id_of(SEEN, "<image>"), image_grid_pinpoints=grids, **settings,
        )  # fmt: skip
        return transformers.LlavaNextForConditionalGeneration(config)

    def processors() -> dict[str, Any]:
        return {
            "image": transformers.LlavaNextImageProcessorPil(
                size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16},
                image_grid_pinpoints=grids,
            )
        }  # fmt: skip

    def inputs(made: dict[str, Any], folder: Path) -> Inputs:
        pictures = [opened(folder / "pictures", n) for n in (0, 1)]
        given = made["image"](pictures, return_tensors="pt")
        owner = transformers.LlavaNextProcessor
        words = SimpleNamespace(
            image_token=SEEN[0], vision_feature_select_strategy="default", patch_size=4,
            num_additional_image_tokens=1, image_processor=made["image"],
        )  # fmt: skip
        for name in ("_get_number_of_features", "_get_unpadded_features"):
            setattr(words, name, getattr(owner, name).__get__(words))
        marks = [owner.replace_image_token(words, given, i) for i in (0, 1)]
        return Inputs({k: given[k] for k in ("pixel_values", "image_sizes")}, marks)

    return Family(model, processors, inputs, (SEEN[0], SEEN[0]), SEEN, {"pictures": (0, 1)})


def video_llava() -> Family:
    tower = {
        **CLIP, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "image_size": 32, "patch_size": 16,
    }  # fmt: skip

    def model() -> Any:
        config = transformers.VideoLlavaConfig(
            text_config=transformers.LlamaConfig(**TRANSFORMER | {"num_hidden_layers": 1}),
            vision_config=transformers.CLIPVisionConfig(**tower),
            image_token_index=id_of(SEEN, "<image>"), video_token_index=id_of(SEEN, "<video>"),
        )  # fmt: skip
        return transformers.VideoLlavaForConditionalGeneration(config)

    def processors() -> dict[str, Any]:
        from transformers.models.video_llava.image_processing_video_llava import (
            VideoLlavaImageProcessor,
        )

        edges = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
        video = transformers.VideoLlavaVideoProcessor(**edges)
        return {"video": video, "image": VideoLlavaImageProcessor(**edges)}

    def inputs(made: dict[str, Any], folder: Path) -> Inputs:
        picture = made["image"](images=[opened(folder / "pictures", 0)], return_tensors="pt")
        clips = [sampled(folder, n, 8) for n in (0, 1)]
        videos = made["video"](videos=clips, **SAMPLED)
        pixels = picture.get("pixel_values_images", picture.get("pixel_values"))
        given = {"pixel_values": pixels, "pixel_values_videos": videos["pixel_values_videos"]}
        return Inputs(given, [SEEN[1] * 8 * 5, SEEN[0] * 4, SEEN[1] * 8 * 5])

    return Family(
        model, processors, inputs, (SEEN[1], SEEN[0], SEEN[1]), SEEN,
        {"videos": (0, 1), "pictures": (0,)}, prompt="w11 w12 {0} w14 {1} w16 w17 {2} w20 w21",
    )  # fmt: skip


# -- Qwen2-Audio ------------------------------------------------------------------------------

HEARD = ("<|audio_bos|>", "<|audio_eos|>", "<|AUDIO|>")


def qwen2_audio() -> Family:
    tower = {
        "num_mel_bins": 16, "encoder_layers": 2, "encoder_attention_heads": 2,
        "encoder_ffn_dim": 40, "d_model": 32, "max_source_positions": 50,
    }  # fmt: skip

    def model() -> Any:
        config = transformers.Qwen2AudioConfig(
            audio_config=transformers.Qwen2AudioEncoderConfig(**tower),
            text_config=transformers.Qwen2Config(**TRANSFORMER),
            audio_token_index=id_of(HEARD, "<|AUDIO|>"),
        )
        return transformers.Qwen2AudioForConditionalGeneration(config)

    def processors() -> dict[str, Any]:
        return {"audio": transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=1)}

    def inputs(made: dict[str, Any], folder: Path) -> Inputs:
        sounds = [samples(folder / "sounds" / f"{n}.wav") for n in (0, 1)]
        given = made["audio"](
            sounds, sampling_rate=16000, padding="max_length", return_attention_mask=True,
            return_tensors="pt",
        )  # fmt: skip
        mask = given["attention_mask"]
        # Source of the count: `_process_audio` of transformers 5.23.
        counts = [(((n - 1) // 2 + 1) - 2) // 2 + 1 for n in mask.sum(-1).tolist()]
        features = {"input_features": given["input_features"], "feature_attention_mask": mask}
        return Inputs(features, [HEARD[2] * count for count in counts])

    return Family(
        model, processors, inputs, (HEARD[2], HEARD[2]), HEARD, {"sounds": (0, 1)},
        prompt="w11 w12 <|audio_bos|> {0} <|audio_eos|> w14 <|audio_bos|> {1} <|audio_eos|> w20",
    )  # fmt: skip


FAMILIES = {
    "idefics3": idefics3("Idefics3"),
    "smolvlm": idefics3("SmolVLM", tie_word_embeddings=True),
    "qwen2-vl": qwen2_vl(),
    "qwen2-vl-video": qwen2_vl(videos=True),
    "llava-next": llava_next(
        lambda: transformers.MistralConfig(**TRANSFORMER),
        [[16, 32], [32, 16], [16, 48]],
    ),
    "llava-next-llama": llava_next(
        lambda: transformers.LlamaConfig(**TRANSFORMER), [[16, 32], [48, 16]]
    ),
    "qwen2-audio": qwen2_audio(),
    "video-llava": video_llava(),
}


# -- files ------------------------------------------------------------------------------------

#: How a video processor is called with frames that were sampled already.
SAMPLED = {"return_tensors": "pt", "do_sample_frames": False}
FRAMES = 12


def write_videos(folder: Path) -> None:
    """GIFs of 12 frames, 40 x 32 pixels: a disc that moves over a slope, one the other way."""
    folder.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[:32, :40]
    for number in (0, 1):
        frames = []
        for i in range(FRAMES):
            slope = np.stack([x * 6, y * 7, np.full_like(x, 20 * i)], axis=-1).astype(np.uint8)
            at = 3 * i if number == 0 else 36 - 3 * i
            slope[(y - 16) ** 2 + (x - at) ** 2 < 40] = (240, 200, 40 + 160 * number)
            frames.append(Image.fromarray(slope).quantize(64))
        frames[0].save(
            folder / f"{number}.gif", save_all=True, append_images=frames[1:], duration=100
        )


def sampled(folder: Path, number: int, count: int) -> np.ndarray:
    """`count` frames of a video, evenly spread: `(count, height, width, 3)` uint8."""
    frames = []
    with Image.open(folder / "videos" / f"{number}.gif") as file:
        assert file.n_frames == FRAMES
        for i in np.arange(0, FRAMES, FRAMES / count).astype(int):
            file.seek(int(i))
            frames.append(np.asarray(file.convert("RGB")))
    return np.stack(frames)


def write_sounds(folder: Path) -> None:
    """WAVs of 16 kHz, 16 bits: a rising tone of 0.6 s, and one longer than the second heard."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, seconds in ((0, 0.6037), (1, 1.1)):
        t = np.arange(int(16000 * seconds)) / 16000
        tone = 0.5 * np.sin(2 * np.pi * (200 + 300 * number + 400 * t) * t) * np.exp(-t)
        with wave.open(str(folder / f"{number}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(16000)
            file.writeframes((tone * 32767).astype("<i2").tobytes())


def samples(path: Path) -> np.ndarray:
    with wave.open(str(path), "rb") as file:
        data = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    return data.astype(np.float32) / 32768


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
    write_videos(arguments.out / "videos")
    write_sounds(arguments.out / "sounds")
    for name in arguments.names:
        make(name, arguments.out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
