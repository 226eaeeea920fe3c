"""Prepared pictures against transformers' own processors, and the settings that say how."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from media import PICTURES, picture, spaced
from numpy.typing import NDArray

from edge_mmllm.errors import (
    CorruptBundle,
    EdgeError,
    UnsupportedArchitecture,
    UnsupportedMedia,
)
from edge_mmllm.image import ImageSettings, Patches, Whole, open_image, prepare_image
from edge_mmllm.image.prepare import _cropped, _resize, _resize_cropped
from edge_mmllm.image.published import CLASSES, read_image_settings

GOLDENS = Path(__file__).resolve().parents[1] / "goldens" / "preprocessing"
CONFIGS: dict[str, dict[str, Any]] = json.loads((GOLDENS / "configs.json").read_text())
CLIP = CONFIGS["clip"]
PILLOW = int(PIL.__version__.partition(".")[0])


@pytest.fixture(scope="module")
def goldens() -> dict[str, NDArray[Any]]:
    with np.load(GOLDENS / "images.npz") as file:
        return dict(file)


def _pictures(goldens: dict[str, NDArray[Any]]) -> dict[str, NDArray[np.uint8]]:
    kept = {n.removeprefix("picture."): a for n, a in goldens.items() if n.startswith("picture.")}
    return {name: picture(*size) for name, size in PICTURES.items()} | kept


@pytest.mark.parametrize("case", sorted(CONFIGS))
def test_pixels_equal_the_published_processor(case: str, goldens: dict[str, NDArray[Any]]) -> None:
    settings = ImageSettings.from_json(read_image_settings(CONFIGS[case]).to_json())
    assert settings.std is not None
    tried = 0
    for name, array in _pictures(goldens).items():
        if f"{case}.{name}" not in goldens:
            continue
        tried += 1
        made = prepare_image(array, settings)
        assert made.pixels.dtype == np.float32
        assert made.pixels.shape == tuple(goldens[f"{case}.{name}.shape"])
        assert made.original_size == array.shape[:2]
        difference = np.abs(spaced(made.pixels) - goldens[f"{case}.{name}"])
        # One level of 255 after normalising is 1 / (255 std). Equal to the bit where these were
        # made; another libm may round a filter's weight elsewhere, and Pillow before 13 filters
        # rows first, always (see edge_mmllm/image/prepare.py).
        levels, equal = (1, 0.99) if PILLOW >= 13 else (24, 0.7)
        assert difference.max() <= levels / (255 * min(settings.std)) + 1e-6, name
        assert (difference <= 1e-6).mean() >= equal, name
        more = [int(v) for v in goldens[f"{case}.{name}.more"]]
        if case.startswith(("idefics3", "smolvlm")):
            assert list(made.grid) == more
        elif case == "mllama":
            assert made.tile_mask is not None
            assert [made.shape_id, *made.tile_mask] == more
        elif case == "llava_next":
            assert list(made.original_size) == more
        elif case == "qwen2_vl":
            assert made.patch_grid == tuple(more)
    assert tried >= 7


def test_every_published_class_reads_its_own_defaults() -> None:
    for name in CLASSES:
        config: dict[str, Any] = {"image_processor_type": name}
        if name == "LlavaNextImageProcessor":  # its default tile of 224 does not fit its grids
            config |= {"size": 336, "crop_size": 336}
        settings = read_image_settings(config)
        assert ImageSettings.from_json(json.loads(json.dumps(settings.to_json()))) == settings


def test_older_and_nested_configs_say_the_same() -> None:
    expected = read_image_settings(CLIP)
    assert read_image_settings({"image_processor": CLIP, "processor_class": "X"}) == expected
    older = {k: v for k, v in CLIP.items() if k != "image_processor_type"}
    older |= {"feature_extractor_type": "CLIPFeatureExtractor", "size": 224, "crop_size": 224}
    assert read_image_settings(older) == expected
    fast = read_image_settings({**CLIP, "image_processor_type": "CLIPImageProcessorFast"})
    assert fast == expected


def test_a_single_size_is_a_square_only_where_the_class_says_so() -> None:
    blip = read_image_settings({"image_processor_type": "BlipImageProcessor", "size": 99})
    assert blip.layout == Whole(size=(99, 99))


def test_qwen_bounds_come_from_any_of_their_names() -> None:
    base = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14}
    named = read_image_settings({**base, "min_pixels": 3136, "max_pixels": 50176}).layout
    nested = {"size": {"min_pixels": 3136, "max_pixels": 50176}}
    assert isinstance(named, Patches)
    assert (named.least_pixels, named.most_pixels) == (3136, 50176)
    assert read_image_settings({**base, **nested}).layout == named


@pytest.mark.parametrize(
    "config",
    [
        {"image_processor_type": "ViTImageProcessor"},
        {"image_processor_type": "PixtralImageProcessor"},
        {**CLIP, "do_convert_rgb": False},
        {**CONFIGS["llava_next"], "do_pad": False},
        {**CONFIGS["llava_next"], "crop_size": {"height": 300, "width": 336}},
        {**CONFIGS["idefics3"], "do_resize": False},
        {**CONFIGS["mllama"], "do_pad": False},
    ],
)
def test_what_is_not_defined_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedArchitecture):
        read_image_settings(config)


@pytest.mark.parametrize(
    "change",
    [
        {"size": {"shortest_edge": -1}},
        {"size": {"shortest_edge": 10**9}},
        {"size": {"edge": 3}},
        {"size": "large"},
        {"image_std": [0, 0.2, 0.2]},
        {"image_mean": [0.1, 0.2]},
        {"resample": 17},
        {"rescale_factor": "x"},
        {"rescale_factor": 1e300},
        {"image_processor_type": 3},
        {"image_processor_type": None},
    ],
)
def test_a_config_out_of_bounds_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(CorruptBundle):
        read_image_settings({**CLIP, **change})


HOSTILE: list[tuple[str, tuple[str, ...], object]] = [
    ("clip", ("layout",), None),
    ("clip", ("layout", "kind"), "exec"),
    ("clip", ("layout", "shortest_edge"), 10**6),
    ("clip", ("layout", "shortest_edge"), True),
    ("clip", ("layout", "crop"), [16384, 16384]),
    ("clip", ("layout", "crop"), [224]),
    ("clip", ("layout", "crop"), [0, 224]),
    ("clip", ("layout", "size"), [3, 3]),
    ("clip", ("layout", "longest_edge"), 5),
    ("clip", ("layout", "square"), 1),
    ("clip", ("resample",), "cubic"),
    ("clip", ("rescale",), -1),
    ("clip", ("rescale",), 1e300),
    ("clip", ("rescale",), float("nan")),
    ("clip", ("mean",), None),
    ("clip", ("mean",), [0, float("inf"), 0]),
    ("clip", ("mean",), [0, "0", 0]),
    ("clip", ("std",), [1, 1, 1e-30]),
    ("clip", ("pixel_limit",), 2**40),
    ("llava_next", ("layout", "grids"), []),
    ("llava_next", ("layout", "grids"), [[336, 672]] * 1000),
    ("llava_next", ("layout", "grids"), [[337, 672]]),
    ("llava_next", ("layout", "tile"), 1),
    ("idefics3", ("layout", "tile"), 2),
    ("idefics3", ("layout", "longest_edge"), 16384),
    ("mllama", ("layout", "most_tiles"), 10**6),
    ("mllama", ("layout", "tile"), 16000),
    ("qwen2_vl", ("layout", "most_pixels"), 2**40),
    ("qwen2_vl", ("layout", "frames"), 64),
    ("qwen2_vl", ("layout", "merge"), 65),
    ("qwen2_vl", ("layout", "patch"), 700),
    ("qwen2_vl", ("layout", "least_pixels"), 2**25),
    ("qwen2_vl", ("layout", "patch"), 0),
]


@pytest.mark.parametrize(("case", "path", "value"), HOSTILE)
def test_a_hostile_manifest_is_refused(case: str, path: tuple[str, ...], value: object) -> None:
    stored = read_image_settings(CONFIGS[case]).to_json()
    if value == 2**25:
        stored["layout"]["most_pixels"] = 2**24
    if path[-1] == "frames":
        stored["layout"]["most_pixels"] = 2**24
    target = stored
    for step in path[:-1]:
        target = target[step]
    target[path[-1]] = value
    with pytest.raises(CorruptBundle) as caught:
        ImageSettings.from_json(stored)
    assert str(caught.value).count("image")


def test_a_missing_member_is_named() -> None:
    stored = read_image_settings(CLIP).to_json()
    del stored["layout"]["crop"], stored["pixel_limit"]
    with pytest.raises(CorruptBundle, match=r"image\.pixel_limit"):
        ImageSettings.from_json(stored)


def test_a_long_thin_picture_costs_no_more_than_its_crop() -> None:
    # The whole of it, 224 x 8,960,000 pixels, would take 6 GB.
    settings = read_image_settings(CLIP)
    made = prepare_image(picture(1, 40_000), settings)
    assert made.pixels.shape == (1, 3, 224, 224)
    assert made.resized_size == (224, 8_960_000)


@pytest.mark.parametrize("size", [(40, 3000), (3000, 40), (400, 300)])
def test_resizing_only_what_the_crop_keeps_changes_nothing_to_speak_of(
    size: tuple[int, int],
) -> None:
    image = open_image(picture(*size))
    target = (224, 224 * size[1] // size[0]) if size[0] < size[1] else (224 * 2, 224)
    for resample in (2, 3, 1):
        whole = np.asarray(_cropped(_resize(image, target, resample), (224, 224)), np.int16)
        part = np.asarray(_resize_cropped(image, target, (224, 224), resample), np.int16)
        difference = np.abs(whole - part)
        assert difference.mean() < 0.5
        if resample == 2:  # the others overshoot, and where they are clipped depends on the order
            assert difference.max() <= 1


def test_a_picture_too_long_for_its_layout_is_refused() -> None:
    qwen = read_image_settings(CONFIGS["qwen2_vl"])
    with pytest.raises(UnsupportedMedia, match="too long and thin"):
        prepare_image(picture(2, 500), qwen)
    uncut = read_image_settings({**CLIP, "do_center_crop": False})
    with pytest.raises(UnsupportedMedia, match="too long and thin"):
        prepare_image(picture(1, 40_000), uncut)


def test_a_picture_smaller_than_its_crop_is_surrounded_by_zeros() -> None:
    settings = read_image_settings({**CLIP, "do_resize": False, "do_normalize": False})
    made = prepare_image(np.full((3, 5, 3), 255, np.uint8), settings).pixels[0, 0]
    assert made.shape == (224, 224)
    rows, columns = np.nonzero(made)
    # An odd pixel of padding goes before the picture, as transformers' PIL processors have it.
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (111, 113, 110, 114)
    assert np.allclose(made[rows, columns], 1)


def test_settings_without_rescaling_keep_the_levels() -> None:
    settings = read_image_settings({**CLIP, "do_rescale": False, "do_normalize": False})
    made = prepare_image(picture(224, 224), settings).pixels
    assert np.array_equal(made[0], picture(224, 224).transpose(2, 0, 1))


def test_every_error_of_the_settings_is_ours() -> None:
    for value in (None, 3, [], {"layout": []}, {"layout": {}}, {"layout": {"kind": "patches"}}):
        with pytest.raises(EdgeError):
            ImageSettings.from_json(value)
