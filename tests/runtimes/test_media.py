"""What identifies a picture, a video or a recording, and what the stages get of it."""

from __future__ import annotations

import io
import wave

import numpy as np
import pytest
from PIL import Image

from edge_mmllm.audio import AudioSettings, LogMel, Waveform
from edge_mmllm.errors import UnsupportedBundle, UsageError
from edge_mmllm.image import Canvas, ImageSettings, Patches, Split, Whole
from edge_mmllm.modality import MODALITIES
from edge_mmllm.video import Sampling, VideoSettings
from edge_mmllm_runtime.media import READERS, reader_of


def picture(shade=40, size=(20, 30)):
    y, x = np.mgrid[: size[0], : size[1]]
    return np.stack([x * 4, y * 4, 0 * x + shade], axis=-1).astype(np.uint8)


def png(array):
    out = io.BytesIO()
    Image.fromarray(array).save(out, "PNG")
    return out.getvalue()


def image_settings(layout):
    return ImageSettings(layout, "bilinear", 1 / 255, None, None)


def wav(samples, rate=16000):
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples * 32767).astype("<i2").tobytes())
    return out.getvalue()


def test_every_modality_has_a_reader():
    assert set(READERS) == set(MODALITIES)
    with pytest.raises(UnsupportedBundle):
        reader_of("smell")


@pytest.mark.parametrize(
    ("layout", "shapes"),
    [
        (Whole(size=(16, 16)), [{"pixels": (3, 16, 16)}]),
        (Split(16, 32), [{"pixels": (3, 16, 16)}] * 5),
        (Patches(4, 2, 2, 64, 1024), [{"pixels": (32, 96), "grid": (3,)}]),
        (Canvas(16, 4), [{"pixels": (4, 3, 16, 16), "aspect_ratio": (1,), "tiles": (1,)}]),
    ],
)
def test_what_the_stages_get_of_a_picture(layout, shapes):
    reader, settings = reader_of("image"), image_settings(layout)
    size = (9, 30) if isinstance(layout, Canvas) else (20, 30)
    _, source = reader.identify(picture(size=size))
    item = reader.prepare(source, reader.settings(settings.to_json(), "here"))
    assert [{n: a.shape for n, a in run.items()} for run in item.runs] == shapes
    assert item.shape.original_size == size
    assert item.shape.pixels.size == 0
    if isinstance(layout, Canvas):
        tiles = int(item.runs[0]["tiles"][0])
        assert 0 < tiles < 4
        assert item.runs[0]["pixels"][:tiles].any()
        assert not item.runs[0]["pixels"][tiles:].any()


def test_a_video_is_its_frames(tmp_path):
    sampling = Sampling(count=3)
    reader = reader_of("video")
    settings = VideoSettings(image_settings(Whole(size=(8, 8))), sampling)
    frames = [picture(shade) for shade in (10, 90, 170, 250)]
    key, source = reader.identify(frames)
    item = reader.prepare(source, reader.settings(settings.to_json(), "here"))
    assert [run["pixels"].shape for run in item.runs] == [(3, 8, 8)] * 3
    assert item.shape.total == 4
    assert reader.identify(frames[::-1])[0] != key
    assert reader.identify([frames[0]])[0] != key
    for i, frame in enumerate(frames):
        (tmp_path / f"{i}.png").write_bytes(png(frame))
    folder, _ = reader.identify(tmp_path)
    assert reader.identify(str(tmp_path))[0] == folder
    (tmp_path / "2.png").write_bytes(png(picture(171)))
    assert reader.identify(tmp_path)[0] != folder


@pytest.mark.parametrize(
    ("layout", "name", "shape"),
    [(LogMel(mels=8, seconds=1), "mel", (8, 100)), (Waveform(), "samples", (8000,))],
)
def test_a_recording(layout, name, shape):
    reader, settings = reader_of("audio"), AudioSettings(layout)
    samples = (0.3 * np.sin(np.arange(8000) / 9)).astype(np.float32)
    key, source = reader.identify(wav(samples))
    item = reader.prepare(source, reader.settings(settings.to_json(), "here"))
    (run,) = item.runs
    assert run[name].shape == shape
    assert run["frames"].tolist() == ([50] if name == "mel" else [8000])
    assert reader.identify(io.BytesIO(wav(samples)))[0] == key
    own, source = reader.identify((samples, 16000))
    assert reader.identify((samples, 8000))[0] != own
    again = reader.prepare(source, settings)
    np.testing.assert_allclose(again.runs[0][name], run[name], atol=0.05)


@pytest.mark.parametrize("modality", ["video", "audio"])
def test_what_is_no_file(modality, tmp_path):
    with pytest.raises(UsageError, match="neither a file"):
        reader_of(modality).identify(3.5)
    with pytest.raises(UsageError, match="no such file"):
        reader_of(modality).identify(tmp_path / "none")


@pytest.mark.parametrize("modality", MODALITIES)
def test_the_gates_samples_can_be_read(modality):
    from edge_mmllm_export.verify_media import SAMPLES

    settings = {
        "image": image_settings(Whole(size=(16, 16))),
        "video": VideoSettings(image_settings(Whole(size=(8, 8))), Sampling(count=4)),
        "audio": AudioSettings(LogMel(mels=8, seconds=2)),
    }[modality]
    reader = reader_of(modality)
    key, source = reader.identify(SAMPLES[modality][1]())
    assert key == reader.identify(SAMPLES[modality][1]())[0]
    item = reader.prepare(source, settings)
    assert all(np.isfinite(a).all() for run in item.runs for a in run.values())
    assert np.std(next(iter(item.runs[0].values()))) > 0.05
