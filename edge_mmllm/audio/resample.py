"""Changes a sound's rate: polyphase convolution with a Kaiser-windowed sinc.

Pass band to 91 % of the lower Nyquist frequency, 120 dB down from 100 %, zero delay: as soxr's
"HQ", which librosa and transformers use, and which it was compared with.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

_PASS = 0.913  # of the lower Nyquist frequency, where soxr's HQ begins to roll off
_ATTENUATION = 120.0  # dB
#: Kaiser's formulas (Kaiser 1974): shape and length of the window for an attenuation.
_BETA = 0.1102 * (_ATTENUATION - 8.7)
#: Zero crossings on each side, at a cutoff of 1: (A - 7.95) / (2 * 2.285 * transition).
_HALF_WIDTH = (_ATTENUATION - 7.95) / (2 * 2.285 * math.pi * (1 - _PASS))


def resample(samples: npt.NDArray[np.float32], rate: int, new_rate: int) -> npt.NDArray[np.float32]:
    """Samples `(n,)` at `rate` Hz as `(ceil(n * new_rate / rate),)` at `new_rate` Hz.

    Output i is taken at input position i * rate / new_rate; outside there is silence.
    """
    if rate == new_rate or len(samples) == 0:
        return samples
    common = math.gcd(rate, new_rate)
    up, down = new_rate // common, rate // common
    scale = min(1.0, new_rate / rate)
    cutoff = scale * (1 + _PASS) / 2  # middle of the transition, in input Nyquists
    half = math.ceil(_HALF_WIDTH / scale)
    count = -(-len(samples) * up // down)
    out = np.empty(count, np.float32)
    padded = np.concatenate(
        [np.zeros(half, np.float32), samples, np.zeros(half + down + 1, np.float32)]
    )
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1)
    taps = np.arange(-half, half + 1)
    # Half of a Kaiser window as a table: some rates have 16,000 phases.
    grid = np.linspace(0, 1, 8193)
    kaiser = np.i0(_BETA * np.sqrt(1 - grid**2)) / np.i0(_BETA)
    for phase in range(min(up, count)):
        first, numerator = divmod(phase * down, up)
        distance = taps - numerator / up
        window = np.interp(np.abs(distance) / (half + 1), grid, kaiser)
        kernel = cutoff * np.sinc(cutoff * distance) * window
        rows = len(range(phase, count, up))
        out[phase::up] = windows[first : first + rows * down : down][:rows] @ kernel.astype(
            np.float32
        )
    return out
