"""`mmproj` files from elsewhere: mtmd prepares an item and says what surrounds it in the prompt, as
llama.cpp's own programs have it. Nobody knows what the model's authors showed it; for a bundle of
ours they are known (`gguf/media.py`).

As with a model's file, nobody vouches for it: it is checked, and a child process loads it and
encodes a picture (a sound) before this one does.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_mmllm._children import die_with_parent
from edge_mmllm.errors import EdgeError, SessionError, UnsupportedBundle
from edge_mmllm.modality import Modality
from edge_mmllm.spec import ModelSpec, Stage, TextSpec
from edge_mmllm_runtime.engine import Float32, Int64
from edge_mmllm_runtime.gguf.llama import Model
from edge_mmllm_runtime.gguf.media import Projector
from edge_mmllm_runtime.media import Prepared, Reader, reader_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

#: Stands for an item in a prompt, and for each of its rows.
MARK = "<__media__>"
_TEXT = 0
_MOST_SECONDS = 600.0


@dataclass(frozen=True)
class Piece:
    """A part of what an item becomes in the prompt: text, or rows.

    Attributes:
        columns, lines: of rows that stand in a grid; 1 line where they do not.
    """

    text: str = ""
    rows: int = 0
    columns: int = 0
    lines: int = 1


class NativeProjector(Projector):
    """mtmd as it comes, but for the class token's place. See `Projector`.

    Raises:
        UnsupportedBundle: rows of a picture that see those behind them.
    """

    fitted = False

    def __init__(self, spec: ModelSpec, path: Path, model: Model, *, threads: int) -> None:
        super().__init__(spec, path, model, threads=threads)
        self._model = model
        if self._api.mtmd_decode_use_non_causal(self._context, None):
            self.close()
            raise UnsupportedBundle(
                "rows of a picture that see those behind them are not supported yet",
                where=str(path),
                found="mtmd wants attention both ways",
            )

    @property
    def modalities(self) -> dict[str, bool]:
        """What the file is for."""
        return {
            "image": bool(self._api.mtmd_support_vision(self._context)),
            "audio": bool(self._api.mtmd_support_audio(self._context)),
        }

    @property
    def rate(self) -> int:
        """Samples a second of sounds."""
        return int(self._api.mtmd_get_audio_sample_rate(self._context))

    def plan(self, item: NDArray[Any]) -> tuple[Piece, ...]:
        """What an item becomes in the prompt."""
        return self._chunked(self._bitmaps(item), self._planned)

    def encode(self, inputs: Mapping[str, NDArray[Any]]) -> Float32:
        """All rows of an item, in their order."""
        self._embedded = []
        return self._chunked(self._bitmaps(inputs["item"]), self._all)

    def _bitmaps(self, item: NDArray[Any]) -> Any:
        bitmaps = (ctypes.c_void_p * 1)()
        if item.ndim == 1:
            data = item.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            bitmaps[0] = self._api.mtmd_bitmap_init_from_audio(len(item), data)
        else:
            pixels = item.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
            bitmaps[0] = self._api.mtmd_bitmap_init(item.shape[1], item.shape[0], pixels)
        return bitmaps

    def _planned(self, chunks: Sequence[tuple[int, Any]]) -> tuple[Piece, ...]:
        api, out = self._api, []
        for kind, chunk in chunks:
            if kind == _TEXT:
                count = ctypes.c_size_t()
                ids = api.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
                known = [i for i in ids[: count.value] if 0 <= i < self._model.vocab_size]
                text = self._model.detokenize(known, special=True).decode("utf-8", "replace")
                out.append(Piece(text))
                continue
            rows = int(api.mtmd_input_chunk_get_n_tokens(chunk))
            columns, lines = rows, 1
            tokens = api.mtmd_input_chunk_get_tokens_image(chunk)
            if tokens and self._model.streams:
                columns = int(api.mtmd_image_tokens_get_nx(tokens))
                lines = int(api.mtmd_image_tokens_get_ny(tokens))
            out.append(Piece("", rows, columns, lines))
        return tuple(out)

    def _all(self, chunks: Sequence[tuple[int, Any]]) -> Float32:
        found = [self._encoded(chunk) for kind, chunk in chunks if kind != _TEXT]
        if not found:
            raise SessionError("mtmd made nothing of the item")
        return np.concatenate(found)


class NativeLayout:
    """A `Layout` out of a plan."""

    def text(self, item: Prepared) -> str:
        return "".join(piece.text + MARK * piece.rows for piece in item.shape)

    def count(self, item: Prepared) -> int:
        return sum(piece.rows for piece in item.shape)

    def arrange(self, parts: Sequence[Float32], item: Prepared) -> Float32:
        return parts[0]

    def places(self, item: Prepared) -> Int64 | None:
        rows = [piece for piece in item.shape if piece.rows]
        if len(rows) != 1 or rows[0].columns == rows[0].rows:
            return None
        return np.indices((1, rows[0].lines, rows[0].columns), np.int64).reshape(3, -1)


def reader(modality: str, projector: Callable[[], Projector]) -> Reader:
    """How an item is read: as it is; mtmd prepares it.

    Args:
        projector: the stage, loaded.
    """

    def prepare(source: Any, settings: Any) -> Prepared:
        made = projector()
        assert isinstance(made, NativeProjector)  # noqa: S101 - for the type checker
        item = _picture(source) if modality == "image" else _sound(source, made.rate)
        return Prepared(({"item": item},), made.plan(item))

    return Reader(reader_of(modality).identify, lambda value, where: None, prepare)


def _picture(source: Any) -> NDArray[np.uint8]:
    from edge_mmllm.image import open_image

    return np.ascontiguousarray(np.asarray(open_image(source)), np.uint8)


def _sound(source: Any, rate: int) -> Float32:
    from edge_mmllm.audio import open_audio

    if isinstance(source, tuple):
        return open_audio(source[0], rate, source_rate=source[1], most_seconds=_MOST_SECONDS)
    return open_audio(source, rate, most_seconds=_MOST_SECONDS)


def with_projector(spec: ModelSpec, told: Mapping[str, bool]) -> ModelSpec:
    """The spec of a model that has a projector beside it; an id behind its vocabulary stands for
    rows."""
    from dataclasses import replace

    names = [name for name in ("image", "audio") if told.get(name)]
    modality = Modality((), MARK, spec.vocab_size, 0, {"kind": "native"}, {})
    return replace(
        spec,
        extra_ids=1,
        stages=spec.stages
        | {f"encode_{n}": Stage("mmproj.gguf", ("item",), ("inputs_embeds",)) for n in names},
        modalities={n: replace(modality, stages=(f"encode_{n}",)) for n in names},
    )


def trial(model: Path, projector: Path) -> str:
    """The code of a child that loads both and uses them."""
    size = model.stat().st_size + projector.stat().st_size
    return (
        "from edge_mmllm_runtime.gguf.native import main; "
        f"main({str(model)!r}, {str(projector)!r}, {size})"
    )


def main(model: str, projector: str, size_bytes: int) -> None:
    """The child: says as JSON what the file is for, under limits of its own."""
    from edge_mmllm_runtime.gguf.trial import _confine

    die_with_parent()
    _confine(size_bytes)
    answer = os.dup(1)
    os.dup2(2, 1)  # llama.cpp may print
    try:
        told: dict[str, Any] = _tried(Path(model), Path(projector))
    except (EdgeError, MemoryError) as error:
        told = {"error": str(error)}
    with os.fdopen(answer, "w") as file:
        json.dump(told, file)


def _tried(path: Path, projector: Path) -> dict[str, Any]:
    model = Model(path)
    text = TextSpec("none")
    spec = ModelSpec("", model.vocab_size, model.hidden_size, 1, 1, None, (), {}, text)
    made = NativeProjector(spec, projector, model, threads=1)
    items: dict[str, NDArray[Any]] = {
        "image": np.full((64, 96, 3), 127, np.uint8), "audio": np.zeros(16000, np.float32)
    }  # fmt: skip
    for name, there in made.modalities.items():
        if there:
            rows = made.encode({"item": items[name]})
            if len(rows) != sum(piece.rows for piece in made.plan(items[name])):
                return {"error": f"another number of rows for {name} than it says"}
    told: dict[str, Any] = made.modalities
    made.close()
    return told
