"""Pictures of many sizes and sounds of many lengths, live against transformers' own processors."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

transformers = pytest.importorskip("transformers")

TESTS = Path(__file__).resolve().parents[1]
for folder in (TESTS / "goldens", TESTS / "core"):
    sys.path.insert(0, str(folder))

from make_preprocessing import CASES, published, publishing  # noqa: E402
from media import noise, picture, speech  # noqa: E402
from PIL import Image  # noqa: E402

from edge_mmllm.audio import prepare_audio  # noqa: E402
from edge_mmllm.audio.settings import read_audio_settings  # noqa: E402
from edge_mmllm.image import prepare_image  # noqa: E402
from edge_mmllm.image.published import read_image_settings  # noqa: E402

pytestmark = pytest.mark.full

#: (height, width), from 3 to 700 pixels, no edge more than 200 times the other.
SIZES = [tuple(int(3 * 233**v) for v in pair) for pair in noise((12, 2), 5)]


def _pixels(done: Any) -> Any:
    if not hasattr(done, "keys"):  # Idefics gives its pixels alone
        return done
    return done["pixel_values" if "pixel_values" in done else "pixel_values_images"]


@pytest.mark.parametrize("case", sorted(CASES))
def test_pixels_are_equal_at_any_size(case: str) -> None:
    processor = publishing(*CASES[case])
    settings = read_image_settings(published(processor))
    for height, width in SIZES:
        if case == "video_llava" and height in (1, 3):
            continue  # it takes such a picture for one with its channels first
        image = Image.fromarray(picture(height, width, seed=width))
        made = prepare_image(image, settings).pixels
        theirs = np.asarray(_pixels(processor(images=[image], return_tensors="np")), np.float32)
        if case == "mllama":
            theirs = theirs[:, :, : len(made)]
        assert np.array_equal(made, theirs.reshape(made.shape)), (height, width)


@pytest.mark.parametrize("mels", [80, 128])
def test_log_mel_agrees_at_any_length(mels: int) -> None:
    whisper = transformers.WhisperFeatureExtractor(feature_size=mels)
    settings = read_audio_settings(whisper.to_dict())
    for seconds in (0.02, *(float(v) * 32 for v in noise((8,), 3))):
        sound = speech(16000, seconds)
        theirs = whisper(sound, sampling_rate=16000, return_tensors="np")["input_features"][0]
        made = prepare_audio(sound, settings, source_rate=16000).features
        assert np.abs(made - theirs).max() <= 1e-4, seconds
