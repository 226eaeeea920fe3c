"""Writes what the published processors make of some pictures, sounds and videos.

Run it in an environment with the `reference` extra, Pillow, soxr and, for the videos, torchvision:

    python tests/goldens/make_preprocessing.py [--out tests/goldens/preprocessing]

    configs.json   each processor's published form (`preprocessor_config.json`)
    images.npz     CASE.PICTURE: evenly spaced values of the pixels, float32; CASE.PICTURE.shape;
                   CASE.PICTURE.more: grid or masks; picture.NAME: uint8 pictures used as they are
    audio.npz      mel.MELS.SECONDS, its .shape and .valid; wav2vec2; resample.RATE (soxr "HQ")
    videos.npz     CASE.COUNT: values, .shape, .grid

The image processors are those of transformers 5 that it calls "pil" (what it runs where torchvision
is not installed); its video processors exist on torchvision only.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "core"))
from media import PICTURES, frames, picture, spaced, speech

#: name -> (module, class, settings): what each family publishes, at sizes that keep tests fast.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "clip": ("clip", "CLIPImageProcessor", {}),
    "llava15": (
        "clip",
        "CLIPImageProcessor",
        {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}},
    ),
    "siglip": ("siglip", "SiglipImageProcessor", {}),
    "blip": ("blip", "BlipImageProcessor", {"size": {"height": 224, "width": 224}}),
    "dinov2": ("bit", "BitImageProcessor", {"size": {"shortest_edge": 256}}),
    "llava_pad": ("llava", "LlavaImageProcessor", {"do_pad": True}),
    "llava_next": (
        "llava_next",
        "LlavaNextImageProcessor",
        {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}},
    ),
    "idefics": ("idefics", "IdeficsImageProcessor", {}),
    "idefics3": ("idefics3", "Idefics3ImageProcessor", {}),
    "idefics3_whole": ("idefics3", "Idefics3ImageProcessor", {"do_image_splitting": False}),
    "smolvlm": (
        "smolvlm",
        "SmolVLMImageProcessor",
        {"size": {"longest_edge": 1024}, "max_image_size": {"longest_edge": 256}},
    ),
    "qwen2_vl": ("qwen2_vl", "Qwen2VLImageProcessor", {"max_pixels": 100352}),
    "mllama": ("mllama", "MllamaImageProcessor", {"size": {"height": 280, "width": 280}}),
    "video_llava": ("video_llava", "VideoLlavaImageProcessor", {}),
}


def publishing(module: str, name: str, settings: dict[str, Any]) -> Any:
    if module == "video_llava":
        found = import_module("transformers.models.video_llava.image_processing_video_llava")
        return found.VideoLlavaImageProcessor(**settings)
    found = import_module(f"transformers.models.{module}.image_processing_pil_{module}")
    return getattr(found, f"{name}Pil")(**settings)


def published(processor: Any) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(processor.to_json_string())
    return config


def _pictures(data: Path) -> dict[str, NDArray[np.uint8]]:
    """Pictures that nobody drew with a formula, small enough to be kept with the goldens."""
    from PIL import Image

    with gzip.open(data / "fashion_mnist" / "t10k-images-idx3-ubyte.gz") as file:
        digits = np.frombuffer(file.read(16 + 10 * 784)[16:], np.uint8).reshape(10, 28, 28)
    zoo = np.asarray(Image.open(data / "zoo" / "tiny-llava" / "image_1.png").convert("RGB"))
    return {"gray28": digits[3].copy(), "zoo56": zoo}


def images(out: Path, data: Path) -> None:
    from PIL import Image

    kept = _pictures(data)
    pictures = {name: Image.fromarray(picture(*size)) for name, size in PICTURES.items()}
    pictures |= {name: Image.fromarray(array) for name, array in kept.items()}
    arrays: dict[str, NDArray[Any]] = {f"picture.{name}": array for name, array in kept.items()}
    configs = {}
    for case, (module, name, settings) in CASES.items():
        processor = publishing(module, name, settings)
        configs[case] = published(processor)
        for label, image in pictures.items():
            if case == "qwen2_vl" and max(image.size) > 200 * min(image.size):
                continue
            extra = {"return_row_col_info": True} if module in ("idefics3", "smolvlm") else {}
            done = processor(images=[image], return_tensors="np", **extra)
            found = done if module == "idefics" else done.get("pixel_values")
            if found is None:
                found = done["pixel_values_images"]
            pixels = np.asarray(found, np.float32)
            more: list[int] = []
            if module == "mllama":
                mask = done["aspect_ratio_mask"][0, 0]
                pixels = pixels[:, 0, : int(mask.sum())]
                more = [int(done["aspect_ratio_ids"][0, 0]), *(int(v) for v in mask)]
            elif module in ("idefics3", "smolvlm"):
                more = [int(np.ravel(done["rows"])[0]), int(np.ravel(done["cols"])[0])]
                if not np.asarray(done["pixel_attention_mask"]).all():
                    raise SystemExit(f"{case}.{label}: a mask that is not all ones")
            elif module == "llava_next":
                more = [int(v) for v in done["image_sizes"][0]]
            elif module == "qwen2_vl":
                more = [int(v) for v in done["image_grid_thw"][0]]
            nested = module in ("mllama", "idefics3", "smolvlm", "llava_next")
            pixels = pixels[0] if nested else pixels
            arrays[f"{case}.{label}"] = spaced(pixels)
            arrays[f"{case}.{label}.shape"] = np.array(pixels.shape)
            arrays[f"{case}.{label}.more"] = np.array(more, np.int64)
    np.savez_compressed(out / "images.npz", **arrays)
    (out / "configs.json").write_text(json.dumps(configs, indent=1, sort_keys=True) + "\n")


def audio(out: Path) -> None:
    import soxr
    from transformers import Wav2Vec2FeatureExtractor, WhisperFeatureExtractor

    arrays: dict[str, NDArray[Any]] = {}
    for mels in (80, 128):
        whisper = WhisperFeatureExtractor(feature_size=mels)
        for seconds in (0.003, 1.2345, 30.0, 31.0):
            done = whisper(
                speech(16000, seconds),
                sampling_rate=16000,
                return_attention_mask=True,
                return_tensors="np",
            )
            name, features = f"mel.{mels}.{seconds}", done["input_features"][0]
            arrays[name] = spaced(features[:, : max(4, int(seconds * 100))], 1021)
            arrays[f"{name}.shape"] = np.array(features.shape)
            arrays[f"{name}.valid"] = np.array(done["attention_mask"].sum())
    wav2vec2 = Wav2Vec2FeatureExtractor()
    done = wav2vec2(speech(16000, 0.5), sampling_rate=16000, return_tensors="np")
    arrays["wav2vec2"] = spaced(done["input_values"][0], 509)
    for rate in (8000, 22050, 44100, 48000):
        arrays[f"resample.{rate}"] = soxr.resample(speech(rate, 0.2), rate, 16000, "HQ")[::3]
    np.savez_compressed(out / "audio.npz", **arrays)


def videos(out: Path) -> None:
    from transformers import Qwen2VLVideoProcessor, VideoLlavaVideoProcessor

    arrays: dict[str, NDArray[Any]] = {}
    clip = np.stack(frames(7))
    for name, processor in (
        ("qwen2_vl", Qwen2VLVideoProcessor()),
        ("video_llava", VideoLlavaVideoProcessor()),
    ):
        for count in (7, 4):
            done = processor(videos=[clip[:count]], return_tensors="np", do_sample_frames=False)
            pixels = np.asarray(done["pixel_values_videos"], np.float32)
            pixels = pixels[0] if name == "video_llava" else pixels
            arrays[f"{name}.{count}"] = spaced(pixels)
            arrays[f"{name}.{count}.shape"] = np.array(pixels.shape)
            if name == "qwen2_vl":
                arrays[f"{name}.{count}.grid"] = np.array(done["video_grid_thw"][0])
    np.savez_compressed(out / "videos.npz", **arrays)


def main() -> None:
    here = Path(__file__).resolve()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=here.parent / "preprocessing")
    parser.add_argument("--data", type=Path, default=here.parents[3] / "shared" / "data")
    parser.add_argument("what", nargs="*", default=["images", "audio", "videos"])
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if "images" in options.what:
        images(options.out, options.data)
    if "audio" in options.what:
        audio(options.out)
    if "videos" in options.what:
        videos(options.out)


if __name__ == "__main__":
    main()
