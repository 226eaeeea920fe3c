"""Log-mel features as Whisper computes them, in numpy.

Source: "Robust Speech Recognition via Large-Scale Weak Supervision" (Radford et al. 2022), 2.2;
transformers 5.23, WhisperFeatureExtractor; the mel scale is that of Slaney's Auditory Toolbox.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

_BLOCK = 256  # frames transformed at once: 0.8 MB of spectrum


@functools.lru_cache(maxsize=4)
def mel_filters(mels: int, n_fft: int, rate: int) -> Floats:
    """Slaney's triangular filters from 0 to 8000 Hz, of equal area, `(mels, n_fft // 2 + 1)`."""
    corners = _hertz(np.linspace(0.0, _mel(8000.0), mels + 2))
    bins = np.linspace(0, rate // 2, n_fft // 2 + 1)
    width = np.diff(corners)[:, None]
    slopes = corners[:, None] - bins[None]
    rising, falling = -slopes[:-2] / width[:-1], slopes[2:] / width[1:]
    area = 2.0 / (corners[2:] - corners[:-2])
    filters: Floats = (np.maximum(0.0, np.minimum(rising, falling)) * area[:, None]).astype(
        np.float32
    )
    return filters


def _mel(hertz: float) -> float:
    """Linear to 1000 Hz (15 mel), logarithmic above: 27 mel a factor of 6.4."""
    return 3 * hertz / 200 if hertz < 1000 else 15 + 27 * float(np.log(hertz / 1000) / np.log(6.4))


def _hertz(mel: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    above = 1000.0 * np.exp(np.log(6.4) / 27 * (mel - 15))
    return np.where(mel < 15, 200 * mel / 3, above)


def log_mel(samples: Floats, length: int, *, mels: int, n_fft: int, hop: int, rate: int) -> Floats:
    """Log-mel features of the first `length` samples, silence behind them, `(mels, length // hop)`.

    Frames are centred on multiples of `hop`, the signal reflected at both ends, Hann window,
    power, mel filters, log10 of at least 1e-10, at most 8 below the maximum, (x + 4) / 4.
    Frames of pure silence are not transformed.
    """
    samples = samples[:length]
    frames, half = length // hop, n_fft // 2
    signal = np.zeros(length + 2 * half, np.float32)
    signal[half : half + len(samples)] = samples
    signal[:half] = signal[2 * half : half : -1]
    signal[half + length :] = signal[half + length - 2 : length - 2 : -1]
    # A periodic Hann window.
    window = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)).astype(np.float32)
    filters = mel_filters(mels, n_fft, rate)
    out = np.full((mels, frames), -10.0, np.float32)
    heard = min(frames, (len(samples) + half) // hop + 1)
    windows = np.lib.stride_tricks.sliding_window_view(signal, n_fft)[::hop]
    for begin in range(0, heard, _BLOCK):
        end = min(begin + _BLOCK, heard)
        spectrum = np.fft.rfft(windows[begin:end] * window)
        power = (spectrum.real**2 + spectrum.imag**2).astype(np.float32)
        out[:, begin:end] = np.log10(np.maximum(filters @ power.T, 1e-10))
    np.maximum(out, out.max() - 8.0, out=out)
    out += 4.0
    out /= 4.0
    return out


def unit_variance(samples: Floats) -> Floats:
    """Zero mean and unit variance (Wav2Vec2, HuBERT)."""
    scaled: Floats = (samples - samples.mean()) / np.sqrt(samples.var() + 1e-7)
    return scaled.astype(np.float32)
