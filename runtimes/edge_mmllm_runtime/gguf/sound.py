"""What mtmd's encoder of sound is given between its steps, so that it hears what the model does.

mtmd makes its own spectrum of 30 seconds, rounds both convolutions to float16, and lets every row
see the silence behind a recording, where Qwen2-Audio looks away. So the convolutions are computed
here, over our own features, and rows behind the end get no attention.

Source: `whisper-enc.cpp` and `clip.cpp` of llama.cpp (of llama-cpp-python 0.3.36).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edge_mmllm.errors import SessionError
from edge_mmllm_runtime.engine import Float32
from edge_mmllm_runtime.gguf.exact import VIEWS, gelu, ggml, set_tensor, tensor_values

#: Tensors of the file that are needed on this side.
TENSORS = tuple(f"a.conv1d.{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias"))
#: Samples of the recording that mtmd is told of: it makes 30 seconds of any.
SAMPLES = 1600
_WIDE, _STRIDE = 3, 2


def convolved(mel: Float32, tensors: Mapping[str, Float32]) -> Float32:
    """Features `(mels, frames)` -> what the second convolution gives before its bias,
    `(width, frames / 2)`."""
    bias = tensors["a.conv1d.1.bias"]
    first = tensors["a.conv1d.1.weight"].reshape(len(bias), -1)
    second = tensors["a.conv1d.2.weight"].reshape(len(bias), -1)
    x = gelu(first @ _windows(mel, 1) + bias[:, None])
    out: Float32 = second @ _windows(x, _STRIDE)
    return out


def _windows(x: Float32, stride: int) -> Float32:
    """`(channels, frames)` -> the three frames around every `stride`th, `(channels * 3, n)`."""
    padded = np.pad(x, ((0, 0), (1, 1)))
    frames = np.lib.stride_tricks.sliding_window_view(padded, _WIDE, axis=1)[:, ::stride]
    return np.ascontiguousarray(frames.transpose(0, 2, 1)).reshape(-1, frames.shape[1])


def look_away(tensor: int, positions: int, valid: int) -> None:
    """Takes the attention of the first `valid` rows away from those behind them.

    Args:
        tensor: attention after the softmax, float32 `(heads, positions, positions)`.
    """
    size = ggml().ggml_nbytes(tensor)
    head = 4 * positions**2
    rows = np.empty((valid, positions), np.float32)
    for offset in range(0, size, head):
        ggml().ggml_backend_tensor_get(tensor, rows.ctypes.data, offset, rows.nbytes)
        rows[:, valid:] = 0
        rows /= rows.sum(axis=1, keepdims=True)
        ggml().ggml_backend_tensor_set(tensor, rows.ctypes.data, offset, rows.nbytes)


class Sound:
    """One recording on its way through the graph.

    Args:
        convolved: what the second convolution gives, see `convolved`.
        positions, valid: rows, and how many of them hold sound.
    """

    def __init__(self, convolved: Float32, positions: int, valid: int) -> None:
        self._convolved, self._positions, self._valid = convolved, positions, valid
        self._before, self._products = b"", 0

    def between(self, tensor: int, step: bytes, ask: bool) -> bool:
        """See `Projector._between`."""
        if ask:
            before, self._before = self._before, self._before if step in VIEWS else step
            if step == b"MUL_MAT" and before == b"IM2COL":
                self._products += 1
                return self._products == 2
            return step == b"SOFT_MAX" and self._valid < self._positions
        if step == b"SOFT_MAX":
            look_away(tensor, self._positions, self._valid)
        elif tensor_values(tensor).size == self._convolved.size:
            set_tensor(tensor, self._convolved)
        else:
            raise SessionError("mtmd's convolutions of sound have another shape")
        return True
