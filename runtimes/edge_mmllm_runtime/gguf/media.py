"""Pictures, videos and sounds of a GGUF bundle: `mmproj.gguf` through llama.cpp's mtmd library.

mtmd takes 8-bit pictures and prepares them itself, in its own way. What it is given here is
prepared already, as every other engine's input is: at the size that its own preparation leaves as
it is, each level of each colour recovered from the normalized pixels. So encoders see what
transformers shows them, and mtmd only repeats the normalization.

Steps of its graph are put right on the way, by a callback that the library offers between two of
them (llama-cpp-python 0.3.36):
- The class token of CLIP stands behind the patches, where positions and the choice of rows count on
  it in front: the tower sees every patch at its neighbour's place, and the first one is lost. The
  rows are turned; a library that has them right is left alone.
- Pixels and the matrix that makes patches of them are rounded to float16. The product is computed
  here in float32.
- GELUs come from a table in float16, all of them by tanh. Those that a bundle's manifest names
  (`details.gguf.activations`) are computed here in float32.
What is put in must be close to what was there: a graph of another shape is an error.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from edge_mmllm.errors import CorruptBundle, SessionError
from edge_mmllm.spec import ModelSpec
from edge_mmllm_runtime.engine import Float32
from edge_mmllm_runtime.gguf import sound as gguf_sound
from edge_mmllm_runtime.gguf.exact import (
    EXACT,
    VIEWS,
    GgufParams,
    description,
    ggml,
    put,
    set_tensor,
    tensor_values,
)
from edge_mmllm_runtime.gguf.llama import Model, log

Bytes = NDArray[np.uint8]
T = TypeVar("T")

#: Tensors of the file that are needed on this side.
_CLASS, _NEWLINE = "v.class_embd", "v.image_newline"
_PATCHES = ("v.patch_embd.weight", "v.patch_embd.weight.1")
#: A level of 0..255 found this far from a whole number is no level.
_TOLERANCE = 1e-3
_IMAGE, _SOUND = 1, 2
#: Types of tensors that are read here.
_TYPES = {0: "<f4", 1: "<f2"}
_GELUS = (b"GELU", b"GELU_QUICK")
#: How far sums of products of float16 numbers may lie from exact ones, as a share of the largest.
_NEAR_SUMS = 1e-2


class Projector:
    """One `mmproj.gguf`, loaded: encoder and projector.

    Args:
        spec: the bundle's model, for what its modalities' pixels mean.
        path: the file.
        model: the backbone, whose vocabulary mtmd asks for.
        threads: to compute with.

    Attributes:
        fitted: pictures come prepared.

    Raises:
        CorruptBundle: mtmd refuses the file; the message has its words.
    """

    fitted = True

    def __init__(self, spec: ModelSpec, path: Path, model: Model, *, threads: int) -> None:
        self._spec, self._path, self._api = spec, path, library()
        self._small, self._patch = small_tensors(
            path, (_CLASS, _NEWLINE, *_PATCHES, *gguf_sound.TENSORS)
        )
        self._hidden = model.hidden_size
        self._mean, self._scale = _levels(spec)
        self._activations = _activations(spec)
        self._done, self._sum = 0, cast("Float32 | None", None)
        self._failure: Exception | None = None
        self._embedded: list[Float32] = []
        self._before = b""
        self._sound: gguf_sound.Sound | None = None
        params = self._api.mtmd_context_params_default()
        params.use_gpu, params.print_timings, params.warmup = False, False, False
        params.n_threads, params.flash_attn_type = threads, 0  # flash attention rounds to float16
        fixed = [m.tokens for m in spec.modalities.values() if m.layout.get("kind") == "tiles"]
        if self.fitted:  # no picture is to be fitted into a number of tokens
            params.image_min_tokens = 1
            params.image_max_tokens = fixed[0] if fixed else 1 << 16
        self._callback = model.api.ggml_backend_sched_eval_callback(self._called)
        params.cb_eval = self._callback
        log.restart()
        self._context: Any = self._api.mtmd_init_from_file(os.fsencode(path), model.pointer, params)
        if not self._context:
            raise CorruptBundle(
                "llama.cpp cannot load the encoder", where=str(path), found=str(log)
            )

    def encode(self, inputs: Mapping[str, NDArray[Any]]) -> Float32:
        """Rows `(rows, hidden)` of one run of what preprocessing made.

        Args:
            inputs: `pixels` float32 `(3, height, width)`; with `grid` int64 `(3,)` of flattened
                patches; or `mel` float32 `(mels, frames)` and `frames` int64 `(1,)`, how many of
                them hold sound.

        Raises:
            SessionError: mtmd failed.
            CorruptBundle: pixels that are no picture in 8 bits.
        """
        if "mel" in inputs:
            return self._heard(inputs["mel"], int(inputs["frames"][0]))
        if "grid" in inputs:
            frames = self._unfolded(inputs["pixels"], inputs["grid"])
            return np.concatenate([self._rows(pair) for pair in frames])
        rows = self._rows([inputs["pixels"]])
        newline = self._small.get(_NEWLINE)
        return rows if newline is None else np.concatenate([rows, newline[None]])

    def _level(self, pixels: Float32) -> Bytes:
        """Normalized `(3, height, width)` -> `(height, width, 3)` in 0..255."""
        levels = (pixels - self._mean) * self._scale
        whole = np.rint(levels)
        if np.abs(levels - whole).max() > _TOLERANCE or whole.min() < 0 or whole.max() > 255:
            raise CorruptBundle(
                "mtmd takes pictures in 8 bits, and these pixels are none",
                where="model.modalities, settings",
                fix="export with --format onnx",
            )
        return np.ascontiguousarray(whole.transpose(1, 2, 0), np.uint8)

    def _unfolded(self, patches: Float32, grid: NDArray[np.int64]) -> list[list[Float32]]:
        """Flattened patches -> for each frame of patches, the one or two pictures in it.

        A row holds `(channel, frame, y, x)`; the patches of a square of 2 by 2 follow each other.
        """
        count, rows, columns = (int(n) for n in grid)
        layout = _patch_layout(self._spec)
        merge, frames, patch = layout["merge"], layout["frames"], layout["patch"]
        shape = (
            count, rows // merge, columns // merge, merge, merge, 3, frames, patch, patch
        )  # fmt: skip
        pictures = (
            patches.reshape(shape)
            .transpose(0, 6, 5, 1, 3, 7, 2, 4, 8)
            .reshape(count, frames, 3, rows * patch, columns * patch)
        )
        return [[p[0]] if np.array_equal(p[0], p[1]) else list(p) for p in pictures]

    def _rows(self, given: Sequence[Float32]) -> Float32:
        """What the stages make of normalized pixels `(3, height, width)`, or of two frames."""
        api, pictures = self._api, [self._level(pixels) for pixels in given]
        self._embedded = self._products(given)
        bitmaps = (ctypes.c_void_p * len(pictures))()
        for i, picture in enumerate(pictures):
            height, width = picture.shape[:2]
            data = picture.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
            bitmaps[i] = api.mtmd_bitmap_init(width, height, data)
            api.mtmd_bitmap_set_mergeable(bitmaps[i], len(pictures) > 1)
        return self._run(bitmaps, _IMAGE)

    def _heard(self, mel: Float32, frames: int) -> Float32:
        """What the stages make of a recording, of which `frames` hold sound."""
        layout = self._spec.modalities["audio"].layout
        valid = -(-frames // int(layout["stride"]))
        self._sound = gguf_sound.Sound(
            gguf_sound.convolved(mel, self._small), mel.shape[1] // 2, valid
        )
        silence = np.zeros(gguf_sound.SAMPLES, np.float32)
        data = silence.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        bitmaps = (ctypes.c_void_p * 1)()
        bitmaps[0] = self._api.mtmd_bitmap_init_from_audio(len(silence), data)
        try:
            return self._run(bitmaps, _SOUND)[: valid // int(layout["pooled"])].copy()
        finally:
            self._sound = None

    def _run(self, bitmaps: Any, kind: int) -> Float32:
        """Rows of what is in the bitmaps, which are freed."""

        def last(chunks: Sequence[tuple[int, Any]]) -> Float32:
            # Models that cut pictures into tiles give the tile, and it again as the whole.
            found = [chunk for own, chunk in chunks if own == kind]
            if not found:
                raise SessionError("mtmd made nothing of the item", found=str(log))
            return self._encoded(found[-1])

        return self._chunked(bitmaps, last)

    def _chunked(self, bitmaps: Any, use: Callable[[Sequence[tuple[int, Any]]], T]) -> T:
        """What `use` makes of the chunks (their kinds, and they) that mtmd makes of bitmaps, which
        are freed."""
        api = self._api
        chunks = api.mtmd_input_chunks_init()
        try:
            marker = api.mtmd_default_marker() * len(bitmaps)
            text = api.mtmd_input_text(marker, len(marker), False, True)
            log.restart()
            status = api.mtmd_tokenize(
                self._context, chunks, ctypes.byref(text), bitmaps, len(bitmaps)
            )
            if status:
                raise SessionError("mtmd cannot take the item", found=f"{status}: {log}")
            found = (
                api.mtmd_input_chunks_get(chunks, i)
                for i in range(api.mtmd_input_chunks_size(chunks))
            )
            return use([(api.mtmd_input_chunk_get_type(chunk), chunk) for chunk in found])
        finally:
            api.mtmd_input_chunks_free(chunks)
            for bitmap in bitmaps:
                if bitmap:
                    api.mtmd_bitmap_free(bitmap)

    def _products(self, given: Sequence[Float32]) -> list[Float32]:
        """Pixels times the matrix that makes patches of them, `(width, patches)`, for each such
        product of the graph; none where the file has other types than float32 and float16."""
        matrices = [self._small[n].reshape(-1, 3 * self._patch**2)
                    for n in _PATCHES if n in self._small]  # fmt: skip
        return [
            w @ patches_of(given[min(i, len(given) - 1)], self._patch).T
            for i, w in enumerate(matrices)
        ]

    def _encoded(self, chunk: Any) -> Float32:
        count = self._api.mtmd_input_chunk_get_n_tokens(chunk)
        self._done, self._sum, self._failure, self._before = 0, None, None, b""
        status = self._api.mtmd_encode_chunk(self._context, chunk)
        if status:
            raise SessionError("mtmd failed to encode", found=f"{status}: {log}")
        if self._failure is not None:
            raise self._failure
        found = self._api.mtmd_get_output_embd(self._context)
        return np.ctypeslib.as_array(found, (count, self._hidden)).copy()

    def _called(self, tensor: int, ask: bool, _: object) -> bool:
        """The callback: an exception cannot pass through C, and ends the graph instead."""
        try:
            return self._between(tensor, ask)
        except Exception as error:  # noqa: BLE001 - raised again by `_encoded`
            self._failure = error
            return False

    def _between(self, tensor: int, ask: bool) -> bool:
        """Between two steps of the graph. `ask`: whether the step's result is wanted."""
        step = description(tensor)
        if self._sound is not None:
            return self._sound.between(tensor, step, ask)
        own = self._small.get(_CLASS)
        if ask:
            before = self._before
            if step not in VIEWS:
                self._before = step
            if step == b"MUL_MAT":
                return before == b"IM2COL"
            turned = own is not None and step == b"CONCAT"
            return turned or (bool(self._activations) and step in (b"ADD", *_GELUS))
        if step == b"CONCAT" and own is not None:
            rows = tensor_values(tensor).reshape(-1, len(own))
            if np.array_equal(rows[-1], own):
                set_tensor(tensor, np.roll(rows, 1, axis=0))
        elif step == b"MUL_MAT":
            if self._embedded:
                put(tensor, self._embedded.pop(0), "sums over the pixels of a patch", _NEAR_SUMS)
        elif step == b"ADD":
            self._sum = tensor_values(tensor)
        elif self._done < len(self._activations):
            name, self._done = self._activations[self._done], self._done + 1
            put(tensor, None if self._sum is None else EXACT[name](self._sum), name)
        return True

    def close(self) -> None:
        """Frees the memory. Closing twice is fine."""
        context, self._context = self._context, None
        if context:
            self._api.mtmd_free(context)


@cache
def library() -> Any:
    """llama_cpp's mtmd module, its log going to `log`."""
    import llama_cpp.mtmd_cpp as api

    from edge_mmllm_runtime.gguf.llama import library as llama

    setter = api._libmtmd.mtmd_helper_log_set
    setter.argtypes, setter.restype = [ctypes.c_void_p, ctypes.c_void_p], None
    setter(ctypes.cast(llama().edge_mmllm_log, ctypes.c_void_p), None)
    return api


def small_tensors(path: Path, names: Sequence[str]) -> tuple[dict[str, Float32], int]:
    """Those of the named tensors that a file has in float32 or float16, flat; and the side of its
    patches, 0 where it does not say.

    Raises:
        CorruptBundle: it is no GGUF file.
    """
    api = ggml()
    file = api.gguf_init_from_file(os.fsencode(path), GgufParams(True, None))
    if not file:
        raise CorruptBundle("llama.cpp cannot read the encoder's file", where=str(path))
    out, patch = {}, 0
    try:
        key = api.gguf_find_key(file, b"clip.vision.patch_size")
        if key >= 0:
            patch = api.gguf_get_val_u32(file, key)
        with path.open("rb") as data:
            for name in names:
                at = api.gguf_find_tensor(file, name.encode())
                kind = _TYPES.get(api.gguf_get_tensor_type(file, at)) if at >= 0 else None
                if kind is not None:
                    begin = api.gguf_get_data_offset(file) + api.gguf_get_tensor_offset(file, at)
                    data.seek(begin)
                    content = data.read(api.gguf_get_tensor_size(file, at))
                    out[name] = np.frombuffer(content, kind).astype(np.float32)
    finally:
        api.gguf_free(file)
    return out, patch


def patches_of(pixels: Float32, side: int) -> Float32:
    """Pixels `(3, height, width)` as rows `(patches, 3 * side * side)`; what is left over at the
    right and bottom is dropped."""
    lines, columns = (n // side for n in pixels.shape[1:])
    cut = pixels[:, : lines * side, : columns * side]
    squares = cut.reshape(3, lines, side, columns, side).transpose(1, 3, 0, 2, 4)
    return np.ascontiguousarray(squares, np.float32).reshape(lines * columns, -1)


def _activations(spec: ModelSpec) -> list[str]:
    """The GELUs of encoder and projector in their order; none where the manifest does not say."""
    found = spec.details.get("gguf", {}).get("activations", [])
    names = found if isinstance(found, list) else []
    return [name for name in names if isinstance(name, str) and name in EXACT]


def _picture_settings(spec: ModelSpec) -> dict[str, Any] | None:
    for modality in spec.modalities.values():
        settings = modality.settings.get("image", modality.settings)
        if "mean" in settings:
            return dict(settings)
    return None


def _levels(spec: ModelSpec) -> tuple[Float32, Float32]:
    """What turns normalized pixels into levels: `(x - offset) * scale`, each `(3, 1, 1)`."""
    from edge_mmllm.image import ImageSettings
    from edge_mmllm.image.prepare import lookup

    found = _picture_settings(spec)
    if found is None:
        return np.zeros((3, 1, 1), np.float32), np.ones((3, 1, 1), np.float32)
    table = lookup(ImageSettings.from_json(found, "model.modalities")).astype(np.float64)
    scale = 255 / (table[:, 255] - table[:, 0])
    return table[:, 0, None, None], scale[:, None, None]  # type: ignore[return-value]


def _patch_layout(spec: ModelSpec) -> dict[str, int]:
    settings = _picture_settings(spec) or {}
    return dict(settings.get("layout", {}))
