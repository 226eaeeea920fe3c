"""Reads `ImageSettings` from a checkpoint's `preprocessor_config.json` or `processor_config.json`.

For the exporter. Members that a config leaves out have the value its class gives them in
transformers 5.23. A processor that is not listed is an error, never taken for a similar one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from edge_mmllm._fields import Fields
from edge_mmllm.errors import UnsupportedArchitecture
from edge_mmllm.image.settings import (
    RESAMPLE,
    AnyRes,
    Canvas,
    ImageSettings,
    Layout,
    Patches,
    Size,
    Split,
    Whole,
    rescale_of,
)

_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_LANCZOS, _BILINEAR, _BICUBIC = 1, 2, 3


@dataclass(frozen=True)
class _Class:
    """A processor's class: how its layout is read, and its defaults.

    Attributes:
        size: default of `size`.
        square: a `size` that is one number means a square, not the shortest edge.
        crop: default edge of the centre crop; None where the class has none.
    """

    layout: Callable[[Fields, _Class], Layout]
    size: Mapping[str, int]
    square: bool = False
    crop: int | None = None
    statistics: tuple[tuple[float, float, float], tuple[float, float, float]] = _CLIP
    resample: int = _BICUBIC


def read_image_settings(
    config: Mapping[str, Any], where: str = "preprocessor_config.json"
) -> ImageSettings:
    """The settings of a published image processor.

    Args:
        config: the parsed file; of a `processor_config.json` its `image_processor` is read.
        where: its name, for errors.

    Raises:
        UnsupportedArchitecture: a processor, or a use of one, that is not defined here.
        CorruptBundle: a member of a wrong type or out of bounds.
    """
    fields = Fields(config, where)
    if isinstance(config.get("image_processor"), Mapping):
        fields = fields.child("image_processor")
    name = _class_name(fields)
    if name not in CLASSES:
        raise UnsupportedArchitecture(
            f"no preprocessing is defined for the image processor {name!r}",
            where=fields.where,
            expected="one of " + ", ".join(sorted(CLASSES)),
            found=name,
            fix="an issue, with the checkpoint's name",
        )
    kind = CLASSES[name]
    if fields.value.get("do_convert_rgb") is False:
        raise _unsupported(fields, "do_convert_rgb", "true")
    number = fields.maybe_integer("resample")
    number = kind.resample if number is None else number
    if number >= len(RESAMPLE):
        raise fields.fail("resample", f"an integer from 0 to {len(RESAMPLE) - 1}")
    rescale = 1 / 255 if fields.value.get("rescale_factor") is None else None
    if rescale is None:
        rescale = rescale_of(fields, "rescale_factor")
    mean = _channels(fields, "image_mean", kind.statistics[0])
    std = _channels(fields, "image_std", kind.statistics[1])
    normalise = _flag(fields, "do_normalize")
    settings = ImageSettings(
        layout=kind.layout(fields, kind),
        resample=RESAMPLE[number],
        rescale=rescale if _flag(fields, "do_rescale") else None,
        mean=mean if normalise else None,
        std=std if normalise else None,
    )
    # The bounds of a manifest hold for a config too.
    return ImageSettings.from_json(settings.to_json(), where)


def _class_name(fields: Fields) -> str:
    name = fields.maybe_text("image_processor_type") or fields.maybe_text("feature_extractor_type")
    if name is None:
        raise fields.fail("image_processor_type", "the name of an image processor")
    if name.endswith("FeatureExtractor"):  # their name before transformers 4.26
        name = name.removesuffix("FeatureExtractor") + "ImageProcessor"
    return name.removesuffix("Fast").removesuffix("Pil")


def _whole(fields: Fields, kind: _Class) -> Whole:
    size, shortest, longest = _size(fields, kind)
    if not _flag(fields, "do_resize"):
        size = shortest = longest = None
    crop = None
    if kind.crop is not None and _flag(fields, "do_center_crop"):
        crop = _crop(fields, kind.crop)
    return Whole(size, shortest, longest, crop)


def _llava(fields: Fields, kind: _Class) -> Whole:
    whole = _whole(fields, kind)
    return Whole(
        whole.size,
        whole.shortest_edge,
        whole.longest_edge,
        whole.crop,
        square=fields.flag("do_pad", default=False),
    )


def _idefics(fields: Fields, kind: _Class) -> Whole:
    edge = fields.maybe_integer("image_size", least=1)
    return _whole(fields, kind) if edge is None else Whole(size=(edge, edge))


def _anyres(fields: Fields, kind: _Class) -> AnyRes:
    size, shortest, _ = _size(fields, kind)
    crop = _crop(fields, kind.crop or 0)
    tile = crop[0]
    if crop != (tile, tile) or (size or (shortest, shortest)) != crop:
        raise _unsupported(fields, "size", f"the tile's {crop[1]} x {crop[0]}, as crop_size says")
    for flag in ("do_resize", "do_center_crop", "do_pad"):
        if not _flag(fields, flag):
            raise _unsupported(fields, flag, "true")
    grids = fields.value.get("image_grid_pinpoints")
    if grids is None:
        return AnyRes(tile, ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)))
    name = "image_grid_pinpoints"
    wrapped = [Fields({"pair": pair}, fields.path(name)) for pair in fields.items(name)]
    return AnyRes(tile, tuple(_pair(one) for one in wrapped))


def _split(fields: Fields, kind: _Class) -> Split:
    if not _flag(fields, "do_resize"):
        raise _unsupported(fields, "do_resize", "true")
    longest, tile = kind.size["longest_edge"], 364
    if fields.value.get("size") is not None:
        longest = fields.child("size").integer("longest_edge", least=1)
    if fields.value.get("max_image_size") is not None:
        tile = fields.child("max_image_size").integer("longest_edge", least=1)
    return Split(tile, longest, _flag(fields, "do_image_splitting"))


def _canvas(fields: Fields, kind: _Class) -> Canvas:
    size, _, _ = _size(fields, kind)
    if size is None or size[0] != size[1]:
        raise fields.fail("size", "equal height and width")
    for flag in ("do_resize", "do_pad"):
        if not _flag(fields, flag):
            raise _unsupported(fields, flag, "true")
    return Canvas(size[0], fields.maybe_integer("max_image_tiles", least=1) or 4)


def _patches(fields: Fields, kind: _Class) -> Patches:
    if not _flag(fields, "do_resize"):
        raise _unsupported(fields, "do_resize", "true")
    least, most = kind.size["shortest_edge"], kind.size["longest_edge"]
    if fields.value.get("size") is not None:
        size = fields.child("size")
        least = size.maybe_integer("shortest_edge", least=1) or least
        most = size.maybe_integer("longest_edge", least=1) or most
        least = size.maybe_integer("min_pixels", least=1) or least
        most = size.maybe_integer("max_pixels", least=1) or most
    return Patches(
        patch=fields.maybe_integer("patch_size", least=1) or 14,
        merge=fields.maybe_integer("merge_size", least=1) or 2,
        frames=fields.maybe_integer("temporal_patch_size", least=1) or 2,
        least_pixels=fields.maybe_integer("min_pixels", least=1) or least,
        most_pixels=fields.maybe_integer("max_pixels", least=1) or most,
    )


#: Class of a published processor -> how it is read. Defaults: those of transformers 5.23.
CLASSES: dict[str, _Class] = {
    "CLIPImageProcessor": _Class(_whole, {"shortest_edge": 224}, crop=224),
    "SiglipImageProcessor": _Class(_whole, {"height": 224, "width": 224}, statistics=_HALF),
    "BlipImageProcessor": _Class(_whole, {"height": 384, "width": 384}, square=True),
    "BitImageProcessor": _Class(_whole, {"shortest_edge": 224}, crop=224),
    "LlavaImageProcessor": _Class(_llava, {"shortest_edge": 224}, crop=224),
    "VideoLlavaImageProcessor": _Class(_whole, {"shortest_edge": 224}, crop=224),
    "VideoLlavaVideoProcessor": _Class(_whole, {"shortest_edge": 224}, crop=224),
    "IdeficsImageProcessor": _Class(_idefics, {"height": 224, "width": 224}, square=True),
    "LlavaNextImageProcessor": _Class(_anyres, {"shortest_edge": 224}, crop=224),
    "Idefics3ImageProcessor": _Class(
        _split, {"longest_edge": 4 * 364}, statistics=_HALF, resample=_LANCZOS
    ),
    "SmolVLMImageProcessor": _Class(
        _split, {"longest_edge": 4 * 364}, statistics=_HALF, resample=_LANCZOS
    ),
    "MllamaImageProcessor": _Class(
        _canvas,
        {"height": 224, "width": 224},
        square=True,
        statistics=_HALF,
        resample=_BILINEAR,
    ),
    "Qwen2VLImageProcessor": _Class(
        _patches, {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
    ),
    "Qwen2VLVideoProcessor": _Class(
        _patches, {"shortest_edge": 128 * 28 * 28, "longest_edge": 28 * 28 * 768}
    ),
}


def _size(fields: Fields, kind: _Class) -> tuple[Size | None, int | None, int | None]:
    """Exact size, shortest edge, longest edge; those that do not apply are None."""
    value = fields.value.get("size")
    if isinstance(value, int):
        edge = fields.integer("size", least=1)
        return ((edge, edge), None, None) if kind.square else (None, edge, None)
    size = Fields(kind.size, fields.where) if value is None else fields.child("size")
    known = {"height", "width", "shortest_edge", "longest_edge"}
    if set(size.value) in ({"height", "width"}, {"shortest_edge"}, known - {"height", "width"}):
        if "height" in size.value:
            return (size.integer("height", least=1), size.integer("width", least=1)), None, None
        return (
            None,
            size.integer("shortest_edge", least=1),
            size.maybe_integer("longest_edge", least=1),
        )
    raise fields.fail("size", "height and width, or shortest_edge")


def _crop(fields: Fields, default: int) -> Size:
    value = fields.value.get("crop_size")
    if value is None:
        return default, default
    if isinstance(value, int):
        edge = fields.integer("crop_size", least=1)
        return edge, edge
    crop = fields.child("crop_size")
    return crop.integer("height", least=1), crop.integer("width", least=1)


def _pair(fields: Fields) -> Size:
    values = fields.integers("pair", least=1)
    if len(values) != 2:
        raise fields.fail("pair", "[height, width]")
    return values[0], values[1]


def _channels(
    fields: Fields, name: str, default: tuple[float, float, float]
) -> tuple[float, float, float]:
    """One number, or one for each channel."""
    value = fields.value.get(name)
    if value is None:
        return default
    if not isinstance(value, (list, tuple)):
        number = fields.number(name)
        return number, number, number
    if len(value) != 3:
        raise fields.fail(name, "three numbers")
    parts = Fields({str(i): v for i, v in enumerate(value)}, fields.path(name))
    return parts.number("0"), parts.number("1"), parts.number("2")


def _flag(fields: Fields, name: str) -> bool:
    """A switch, on unless the config turns it off. (Null is the class's default: on.)"""
    return True if fields.value.get(name) is None else fields.flag(name)


def _unsupported(fields: Fields, name: str, expected: str) -> UnsupportedArchitecture:
    return UnsupportedArchitecture(
        "this use of the image processor is not defined",
        where=fields.path(name),
        expected=expected,
        found=repr(fields.value.get(name)),
    )
