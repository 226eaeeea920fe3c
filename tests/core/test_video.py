"""Frames sampled and prepared against transformers' video processors; odd videos refused."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from media import frames, spaced
from PIL import Image

from edge_mmllm.errors import (
    CorruptBundle,
    CorruptMedia,
    MediaTooLarge,
    UnsupportedArchitecture,
    UnsupportedMedia,
    UsageError,
)
from edge_mmllm.video import Sampling, VideoSettings, frame_indices, open_frames, prepare_video
from edge_mmllm.video.settings import read_video_settings

GOLDENS = Path(__file__).resolve().parents[1] / "goldens" / "preprocessing"
LLAVA = read_video_settings({"video_processor_type": "VideoLlavaVideoProcessor"})
QWEN = read_video_settings({"video_processor_type": "Qwen2VLVideoProcessor"})


def taking(sampling: Sampling, **limits: int) -> VideoSettings:
    return VideoSettings(LLAVA.image, sampling, **limits)


ALL = taking(Sampling())


def animation(kind: str, shades: list[int], duration: int = 40) -> bytes:
    pictures = [Image.new("RGB", (8, 6), (v, v, v)) for v in shades]
    file = io.BytesIO()
    pictures[0].save(
        file, kind, save_all=True, append_images=pictures[1:], duration=duration, lossless=True
    )
    return file.getvalue()


@pytest.mark.parametrize("name", ["qwen2_vl", "video_llava"])
@pytest.mark.parametrize("count", [7, 4])
def test_pixels_equal_the_published_processor(name: str, count: int) -> None:
    settings = (QWEN if name == "qwen2_vl" else LLAVA).image
    made = prepare_video(frames(count), VideoSettings(settings, Sampling()))
    with np.load(GOLDENS / "videos.npz") as golden:
        expected = golden[f"{name}.{count}"]
        assert made.prepared.pixels.shape == tuple(golden[f"{name}.{count}.shape"])
        if name == "qwen2_vl":
            assert made.prepared.patch_grid == tuple(golden[f"{name}.{count}.grid"])
    # The video processors exist on torchvision only, whose resize differs by a level here and
    # there. (A frame, a channel or a patch in the wrong place differs by tens of levels.)
    assert settings.std is not None
    levels = np.abs(spaced(made.prepared.pixels) - expected) * 255 * min(settings.std)
    assert (levels <= 1.1).mean() >= 0.99
    assert levels.max() <= 3


@pytest.mark.parametrize(
    ("total", "fps", "sampling", "expected"),
    [
        (16, None, Sampling(count=8), (0, 2, 4, 6, 8, 10, 12, 14)),
        (100, 25.0, Sampling(count=8), (0, 12, 25, 37, 50, 62, 75, 87)),
        (3, None, Sampling(count=8), (0, 0, 0, 1, 1, 1, 2, 2)),
        (3, None, Sampling(), (0, 1, 2)),
        (10, None, Sampling(most=4), (0, 2, 5, 7)),
        (50, 25.0, Sampling(fps=2.0, least=4, multiple=2), (0, 12, 25, 37)),
        (90, 30.0, Sampling(fps=2.0, least=4, multiple=2), (0, 15, 30, 45, 60, 75)),
        (1, 30.0, Sampling(fps=2.0, least=4, multiple=2), (0,)),
        (9, None, Sampling(fps=2.0, most=768, multiple=2), tuple(range(9))),
        (9, None, Sampling(count=5, multiple=2), (0, 2, 4, 6)),
    ],
)
def test_frames_are_spread_as_the_published_processors_do(
    total: int, fps: float | None, sampling: Sampling, expected: tuple[int, ...]
) -> None:
    assert frame_indices(total, fps, sampling) == expected


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animated_file_gives_its_frames_and_speed(kind: str, tmp_path: Path) -> None:
    data = animation(kind, [0, 50, 100, 150, 200, 250])
    path = tmp_path / "clip"
    path.write_bytes(data)
    for source in (data, path, str(path), io.BytesIO(data)):
        made = open_frames(source, ALL)
        assert [np.asarray(p)[0, 0, 0] for p in made.pictures] == [0, 50, 100, 150, 200, 250]
        assert made.fps == pytest.approx(25)
    halved = open_frames(data, taking(Sampling(fps=12.5)))
    assert halved.indices == (0, 2, 4)
    assert [np.asarray(p)[0, 0, 0] for p in halved.pictures] == [0, 100, 200]


def test_a_folder_is_read_in_the_order_of_its_numbers(tmp_path: Path) -> None:
    for number in (10, 9, 1, 2):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / f"frame{number}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    made = open_frames(tmp_path, ALL, fps=4)
    assert [np.asarray(p)[0, 0, 0] for p in made.pictures] == [1, 2, 9, 10]
    assert (made.total, made.fps) == (4, 4)


def test_only_the_sampled_frames_are_opened() -> None:
    sources: list[Any] = [np.zeros((4, 4, 3), np.uint8), b"damaged"]
    assert open_frames(sources, taking(Sampling(count=1))).indices == (0,)


def test_video_llava_repeats_frames_of_a_short_video() -> None:
    made = prepare_video(frames(3), LLAVA)
    assert made.prepared.pixels.shape == (8, 3, 224, 224)
    assert np.array_equal(made.prepared.pixels[0], made.prepared.pixels[2])


def test_a_single_picture_is_a_video_of_one_frame() -> None:
    file = io.BytesIO()
    Image.new("RGB", (5, 5)).save(file, "PNG")
    assert open_frames(file.getvalue(), ALL).indices == (0,)


def test_what_is_no_video_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorruptMedia, match="holds no pictures"):
        open_frames(tmp_path, ALL)
    with pytest.raises(CorruptMedia, match="no frames"):
        open_frames([], ALL)
    with pytest.raises(UnsupportedMedia, match="ffmpeg"):
        open_frames(b"\0\0\0\x20ftypisom" + bytes(40), ALL)
    file = io.BytesIO()
    Image.new("RGB", (5, 5)).save(file, "JPEG")
    with pytest.raises(UnsupportedMedia, match="not a video"):
        open_frames(file.getvalue(), ALL)
    with pytest.raises(UsageError, match="not a video"):
        open_frames(3, ALL)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="above 0"):
        open_frames(frames(2), ALL, fps=0)
    with pytest.raises(UsageError, match="no such"):
        open_frames(tmp_path / "missing.gif", ALL)


def test_frames_that_differ_in_size_are_refused() -> None:
    mixed = [np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5, 3), np.uint8)]
    with pytest.raises(UnsupportedMedia, match="frame 1"):
        open_frames(mixed, ALL)


def test_too_many_frames_or_pixels_are_refused() -> None:
    data = animation("GIF", [0, 100, 200])
    with pytest.raises(MediaTooLarge, match="too many frames"):
        open_frames(data, taking(Sampling(), frame_limit=2))
    with pytest.raises(MediaTooLarge, match="too many pixels"):
        open_frames(data, taking(Sampling(), pixel_limit=100))


def test_an_animation_cut_short_is_corrupt() -> None:
    data = animation("WEBP", list(range(0, 250, 10)))
    with pytest.raises(CorruptMedia):
        open_frames(data[: len(data) // 2], ALL)


def test_settings_survive_json_and_older_configs() -> None:
    for settings in (LLAVA, QWEN):
        assert VideoSettings.from_json(json.loads(json.dumps(settings.to_json()))) == settings
    assert LLAVA.sampling.count == 8
    assert QWEN.sampling == Sampling(None, 2.0, 4, 768, 2)
    older = {"image_processor_type": "Qwen2VLImageProcessor", "max_pixels": 602112}
    assert read_video_settings(older).sampling == QWEN.sampling
    nested = {"video_processor": {"video_processor_type": "VideoLlavaVideoProcessor"}}
    assert read_video_settings(nested) == LLAVA
    with pytest.raises(UnsupportedArchitecture, match="CLIPImageProcessor"):
        read_video_settings({"image_processor_type": "CLIPImageProcessor"})


@pytest.mark.parametrize(
    ("name", "value"),
    [("count", 10**9), ("fps", 0), ("least", 5000), ("most", 1), ("multiple", 0), ("fps", "2")],
)
def test_a_hostile_manifest_is_refused(name: str, value: object) -> None:
    stored = QWEN.to_json()
    stored["sampling"][name] = value
    with pytest.raises(CorruptBundle, match="video"):
        VideoSettings.from_json(stored)


def test_a_frame_that_outgrows_its_video_is_refused_undecoded() -> None:
    data = animation("GIF", [0, 100, 200])
    second = data.index(b"\x2c", data.index(b"\x2c") + 1)  # an image descriptor
    assert data[second + 5 : second + 9] == struct.pack("<HH", 8, 6)
    for width, height in ((60000, 60000), (60000, 2000)):
        grown = data[: second + 5] + struct.pack("<HH", width, height) + data[second + 9 :]
        with pytest.raises(MediaTooLarge, match="too large to decode"):
            open_frames(grown, ALL)
