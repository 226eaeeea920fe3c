"""Sounds: WAV read with distrust, mixed to one channel, resampled, and turned into features.

numpy only.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from edge_mmllm.audio.features import log_mel, unit_variance
from edge_mmllm.audio.resample import resample
from edge_mmllm.audio.settings import AudioSettings, LogMel, Waveform
from edge_mmllm.audio.wav import Wav, read_wav
from edge_mmllm.errors import CorruptMedia, MediaTooLarge, UnsupportedMedia, UsageError

__all__ = [
    "AudioSettings",
    "LogMel",
    "PreparedAudio",
    "Wav",
    "Waveform",
    "open_audio",
    "prepare_audio",
    "read_wav",
    "resample",
]


@dataclass(frozen=True)
class PreparedAudio:
    """A sound as its encoder takes it.

    Attributes:
        features: float32, log-mel `(mels, frames)`, or the samples `(samples,)`.
        valid: frames (or samples) that hold sound; those behind are padding. Qwen2-Audio's
            `feature_attention_mask` is 1 for the first `valid` frames.
        seconds: length of the whole sound.
        dropped_s: seconds at its end that did not fit into `features` and were left out.
    """

    features: npt.NDArray[np.float32]
    valid: int
    seconds: float
    dropped_s: float = 0.0


def open_audio(
    source: str | os.PathLike[str] | bytes | BinaryIO | npt.NDArray[Any],
    rate: int,
    *,
    source_rate: int | None = None,
    most_seconds: float = 600.0,
) -> npt.NDArray[np.float32]:
    """A sound as one channel at `rate` Hz, float32 `(samples,)`; channels are averaged.

    Args:
        source: a WAV file as a path, bytes or a binary file, or an array `(samples,)` or
            `(samples, channels)`, int16 or float within -1..1.
        rate: Hz of the result.
        source_rate: Hz of an array; a file says its own.
        most_seconds: a longer sound is refused.

    Raises:
        MediaError: as `read_wav`.
        UsageError: an array without its rate, or a source of another type.
    """
    return _mono(_open(source, source_rate, most_seconds, None), rate)


def prepare_audio(
    source: str | os.PathLike[str] | bytes | BinaryIO | npt.NDArray[Any],
    settings: AudioSettings,
    *,
    source_rate: int | None = None,
) -> PreparedAudio:
    """Opens a sound (as `open_audio` does) and prepares it.

    What goes beyond the length a LogMel layout takes is left out (and not read), as the
    published processors do; `dropped_s` says how much, so that a caller can tell its user.

    Raises:
        MediaError, UsageError: as `open_audio`.
    """
    layout = settings.layout
    # One second more than is kept: the resampling filter looks ahead.
    first = layout.seconds + 1.0 if isinstance(layout, LogMel) else None
    sound = _open(source, source_rate, settings.most_seconds, first)
    samples = _mono(sound, settings.rate)
    if isinstance(layout, Waveform):
        features = unit_variance(samples) if layout.normalise else samples
        return PreparedAudio(features, len(samples), sound.seconds)
    length = layout.seconds * settings.rate
    features = log_mel(
        samples,
        length,
        mels=layout.mels,
        n_fft=layout.n_fft,
        hop=layout.hop,
        rate=settings.rate,
    )
    valid = min(-(-min(len(samples), length) // layout.hop), features.shape[1])
    dropped = max(0.0, sound.seconds - layout.seconds)
    return PreparedAudio(features, valid, sound.seconds, dropped)


def _open(
    source: str | os.PathLike[str] | bytes | BinaryIO | npt.NDArray[Any],
    source_rate: int | None,
    most_seconds: float,
    first_seconds: float | None,
) -> Wav:
    if not isinstance(source, np.ndarray):
        return read_wav(source, most_seconds=most_seconds, first_seconds=first_seconds)
    if source_rate is None or not 1000 <= source_rate <= 768_000:
        raise UsageError(
            "an array of samples says nothing of its rate",
            expected="source_rate from 1000 to 768000 Hz",
            found=str(source_rate),
            fix="source_rate=..., in Hz",
        )
    seconds = len(source) / source_rate
    if seconds > most_seconds:
        raise MediaTooLarge(
            "the sound is too long",
            expected=f"at most {most_seconds:g} s",
            found=f"{seconds:.1f} s",
            fix="cut it",
        )
    if first_seconds is not None:
        source = source[: math.ceil(first_seconds * source_rate)]
    return Wav(_from_array(source), source_rate, seconds)


def _mono(sound: Wav, rate: int) -> npt.NDArray[np.float32]:
    samples = sound.samples
    mono = samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1, dtype=np.float32)
    return resample(np.ascontiguousarray(mono), sound.rate, rate)


def _from_array(array: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    good = array.dtype == np.int16 or np.issubdtype(array.dtype, np.floating)
    if array.ndim not in (1, 2) or not good or (array.ndim == 2 and array.shape[1] > 64):
        raise UnsupportedMedia(
            "this array is not a sound",
            expected="int16 or float, of shape (samples,) or (samples, channels)",
            found=f"{array.dtype} of shape {array.shape}",
        )
    if array.size == 0:
        raise CorruptMedia("the sound has no samples", found=f"shape {array.shape}")
    samples = array.astype(np.float32)
    if array.dtype == np.int16:
        samples /= 32768
    if not np.isfinite(samples).all():
        raise CorruptMedia("the sound holds NaN or infinity")
    return samples[:, None] if samples.ndim == 1 else samples
