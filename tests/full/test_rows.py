"""How many rows a picture of any size becomes, and with which words, live against transformers."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

transformers = pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "core"))

from media import noise  # noqa: E402
from PIL import Image  # noqa: E402

from edge_mmllm.image import ImageSettings, prepare_image  # noqa: E402
from edge_mmllm.image.published import read_image_settings  # noqa: E402
from edge_mmllm.modality import Modality  # noqa: E402
from edge_mmllm_runtime.layouts import layout_of  # noqa: E402
from edge_mmllm_runtime.media import Prepared  # noqa: E402

pytestmark = pytest.mark.full

#: (height, width), from 3 to 700 pixels.
SIZES = [tuple(int(3 * 233**v) for v in pair) for pair in noise((40, 2), 7)]


def _settings(processor: Any) -> ImageSettings:
    return read_image_settings(processor.to_dict() | {"image_processor_type": _name(processor)})


def _name(processor: Any) -> str:
    return type(processor).__name__


def _layout(tokens: int, **kind: Any) -> Any:
    return layout_of(Modality((), "<image>", 9, tokens, kind, {}), "modalities.image")


def _item(size: tuple[int, int], settings: ImageSettings) -> Prepared:
    made = prepare_image(Image.new("RGB", size[::-1]), settings)
    return Prepared(({},) * len(made.pixels), made)


def test_llava_next() -> None:
    """Of the published size: tiles of 336 pixels, 24 by 24 rows each."""
    processor = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
    )
    owner, settings = transformers.LlavaNextProcessor, _settings(processor)
    words = SimpleNamespace(
        patch_size=14, num_additional_image_tokens=1, image_processor=processor
    )  # fmt: skip
    words._get_unpadded_features = owner._get_unpadded_features.__get__(words)
    own = _layout(576, kind="unpadded", side=24)
    for size in SIZES:
        wanted = owner._get_number_of_features(words, *size, 336, 336) - 1
        assert own.count(_item(size, settings)) == wanted, size


@pytest.mark.parametrize("kind", ["Idefics3", "SmolVLM"])
def test_idefics3(kind: str) -> None:
    processor = getattr(transformers, f"{kind}ImageProcessorPil")(
        size={"longest_edge": 256}, max_image_size={"longest_edge": 64}
    )
    settings = _settings(processor)
    replace = getattr(transformers, f"{kind}Processor").replace_image_token
    words = SimpleNamespace(
        fake_image_token="<fake_token_around_image>", global_image_tag="<global-img>",  # noqa: S106
        global_image_token="<global-img>", image_token="<image>", image_seq_len=4,  # noqa: S106
    )  # fmt: skip
    own = _layout(
        4, kind="tiles", fence="<fake_token_around_image>", whole="<global-img>",
        tile="<row_{row}_col_{column}>",
    )  # fmt: skip
    for size in SIZES[:20]:
        given = processor(
            [[Image.new("RGB", size[::-1], (9, 9, 9))]],
            return_tensors="np",
            return_row_col_info=True,
        )
        item = _item(size, settings)
        assert own.text(item) == replace(words, given, 0), size
        assert own.count(item) == 4 * np.asarray(given["pixel_values"]).shape[1]
