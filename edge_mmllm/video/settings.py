"""How a checkpoint wants a video's frames sampled and prepared: frozen, stored in the manifest."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edge_mmllm._fields import Fields
from edge_mmllm.errors import CorruptMedia, UnsupportedArchitecture
from edge_mmllm.image.published import read_image_settings
from edge_mmllm.image.settings import ImageSettings, Patches, bounded

_MOST_FRAMES = 4096

#: Video-LLaVA was trained on 8 frames of a video.
_VIDEO_LLAVA_FRAMES = 8
#: Qwen2-VL samples 2 frames a second, 4 to 768 of them (its published tools).
_QWEN_FPS, _QWEN_LEAST, _QWEN_MOST = 2.0, 4, 768


@dataclass(frozen=True)
class Sampling:
    """Which frames are taken.

    Attributes:
        count: exactly so many, evenly spread (repeated where the video has fewer), or None.
        fps: where `count` is None: so many a second of the video, if its speed is known;
            all frames if it is not, as the published processors do with a list of pictures.
        least, most: bounds where `count` is None.
        multiple: what the number of frames is rounded to where `count` or `fps` sets it.
    """

    count: int | None = None
    fps: float | None = None
    least: int = 1
    most: int = _QWEN_MOST
    multiple: int = 1


@dataclass(frozen=True)
class VideoSettings:
    """Everything `prepare_video` needs to know of a checkpoint.

    Attributes:
        image: how each frame is prepared; a layout of whole pictures or patches.
        sampling: which frames are taken.
        frame_limit: a video of more frames is refused.
        pixel_limit: pixels of all the frames taken together (they are in memory at once).
    """

    image: ImageSettings
    sampling: Sampling
    frame_limit: int = 20_000
    pixel_limit: int = 1 << 28

    def to_json(self) -> dict[str, Any]:
        """The JSON object that `from_json` reads."""
        sampling = self.sampling
        return {
            "image": self.image.to_json(),
            "sampling": {
                "count": sampling.count,
                "fps": sampling.fps,
                "least": sampling.least,
                "most": sampling.most,
                "multiple": sampling.multiple,
            },
            "frame_limit": self.frame_limit,
            "pixel_limit": self.pixel_limit,
        }

    @staticmethod
    def from_json(value: object, where: str = "video") -> VideoSettings:
        """Reads settings that nobody vouches for.

        Raises:
            CorruptBundle: a member is missing, of a wrong type or out of bounds.
        """
        fields = Fields(value, where)
        one = fields.child("sampling")
        sampling = Sampling(
            count=None if one.value.get("count") is None else bounded(one, "count", _MOST_FRAMES),
            fps=None if one.value.get("fps") is None else one.number("fps"),
            least=bounded(one, "least", _MOST_FRAMES),
            most=bounded(one, "most", _MOST_FRAMES),
            multiple=bounded(one, "multiple", 64),
        )
        if sampling.least > sampling.most:
            raise one.fail("least", "at most `most`")
        if sampling.fps is not None and not 1e-3 <= sampling.fps <= 1000:
            raise one.fail("fps", "a number from 0.001 to 1000")
        image = ImageSettings.from_json(fields.value.get("image"), fields.path("image"))
        return VideoSettings(
            image,
            sampling,
            bounded(fields, "frame_limit", 1 << 20),
            bounded(fields, "pixel_limit", 1 << 30),
        )


def frame_indices(total: int, fps: float | None, sampling: Sampling) -> tuple[int, ...]:
    """The frames to take of a video of `total` frames at `fps` a second, in order.

    Source: transformers 5.23, default_sample_indices_fn and Qwen2VLVideoProcessor.sample_frames.

    Raises:
        CorruptMedia: a video without frames.
    """
    if total < 1:
        raise CorruptMedia("the video has no frames")
    unit = sampling.multiple
    if sampling.count is not None:
        count = max(round(sampling.count / unit) * unit, unit)
    elif sampling.fps is not None and fps is not None:
        most = math.floor(min(sampling.most, total) / unit) * unit
        wanted = min(max(total / fps * sampling.fps, sampling.least), most, total)
        count = max(math.floor(wanted / unit) * unit, 1)
    else:
        count = min(total, sampling.most)
    return tuple(i * total // count for i in range(count))


def read_video_settings(
    config: Mapping[str, Any], where: str = "preprocessor_config.json"
) -> VideoSettings:
    """The settings of a published video processor (for the exporter).

    Args:
        config: the parsed `video_preprocessor_config.json`; of a `processor_config.json` its
            `video_processor` is read. A `preprocessor_config.json` of Video-LLaVA or Qwen2-VL,
            which have a video processor that reads the same file, will do too.
        where: its name, for errors.

    Raises:
        UnsupportedArchitecture: a processor of another family.
        CorruptBundle: a member of a wrong type or out of bounds.
    """
    fields = Fields(config, where)
    for name in ("video_processor", "image_processor"):
        if isinstance(config.get(name), Mapping):
            fields = fields.child(name)
            break
    name = (
        fields.maybe_text("video_processor_type")
        or fields.maybe_text("image_processor_type")
        or fields.maybe_text("feature_extractor_type")
        or ""
    )
    kinds = {
        "VideoLlavaVideoProcessor": "VideoLlavaVideoProcessor",
        "VideoLlavaImageProcessor": "VideoLlavaVideoProcessor",
        "Qwen2VLVideoProcessor": "Qwen2VLVideoProcessor",
        "Qwen2VLImageProcessor": "Qwen2VLVideoProcessor",
    }
    kind = kinds.get(name.removesuffix("Fast"))
    if kind is None:
        raise UnsupportedArchitecture(
            f"no preprocessing is defined for the video processor {name!r}",
            where=fields.where,
            expected="one of " + ", ".join(kinds),
            found=name or "nothing",
        )
    image = read_image_settings({**fields.value, "image_processor_type": kind}, fields.where)
    count = fields.maybe_integer("num_frames", least=1)
    fps = None if fields.value.get("fps") is None else fields.number("fps")
    if isinstance(image.layout, Patches):
        sampling = Sampling(
            count=count,
            fps=None if count is not None else (fps or _QWEN_FPS),
            least=fields.maybe_integer("min_frames", least=1) or _QWEN_LEAST,
            most=fields.maybe_integer("max_frames", least=1) or _QWEN_MOST,
            multiple=image.layout.frames,
        )
    elif fps is not None and count is None:
        sampling = Sampling(fps=fps)
    else:
        sampling = Sampling(count=count or _VIDEO_LLAVA_FRAMES)
    return VideoSettings.from_json(VideoSettings(image, sampling).to_json(), where)
