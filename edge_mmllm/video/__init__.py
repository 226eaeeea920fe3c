"""Videos: frames sampled from pictures in a list or a folder, or from an animated file.

Animated GIF, WebP and PNG are read through Pillow, one frame at a time: only sampled frames stay
in memory. Codecs (MP4 and kin) are not read; the error says how to make frames of them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy.typing as npt

from edge_mmllm.image.prepare import Prepared, prepare_frames
from edge_mmllm.video.frames import Frames, open_frames
from edge_mmllm.video.settings import Sampling, VideoSettings, frame_indices

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

__all__ = [
    "Frames",
    "PreparedVideo",
    "Sampling",
    "VideoSettings",
    "frame_indices",
    "open_frames",
    "prepare_video",
]


@dataclass(frozen=True)
class PreparedVideo:
    """A video as its encoder takes it.

    Attributes:
        prepared: pixels `(frames, 3, height, width)`, or patches and their grid.
        indices: the frames taken, counted from 0.
        total: frames the video has.
        fps: frames a second of the video, where it says so.
    """

    prepared: Prepared
    indices: tuple[int, ...]
    total: int
    fps: float | None


def prepare_video(
    source: str
    | os.PathLike[str]
    | bytes
    | BinaryIO
    | Sequence[str | os.PathLike[str] | bytes | BinaryIO | Image.Image | npt.NDArray[Any]],
    settings: VideoSettings,
    *,
    fps: float | None = None,
) -> PreparedVideo:
    """Samples a video's frames as its checkpoint wants them, and prepares them.

    Args:
        source: a folder of pictures (in the natural order of their names), a list of pictures
            (whatever `open_image` takes), or an animated GIF, WebP or PNG.
        settings: of the checkpoint.
        fps: frames a second of a folder or a list; an animated file says its own.

    Raises:
        MediaError: a frame that cannot be used, no frames, or too many.
    """
    frames = open_frames(source, settings, fps=fps)
    prepared = prepare_frames(frames.pictures, settings.image)
    return PreparedVideo(prepared, frames.indices, frames.total, frames.fps)
