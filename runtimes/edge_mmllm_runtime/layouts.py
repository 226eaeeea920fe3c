"""How the rows of one item (a picture, a video, a recording) are arranged: what the manifest's
`modalities.NAME.layout` says, interpreted.

A layout knows two things: the text that a placeholder becomes before it is tokenized, in which
every token `token_id` stands for one row, and the order of the rows. A further family adds a
class and a line in `LAYOUTS`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from edge_mmllm._fields import Fields
from edge_mmllm.errors import UnsupportedBundle, UnsupportedMedia
from edge_mmllm.modality import Modality
from edge_mmllm_runtime.engine import Float32, Int64
from edge_mmllm_runtime.media import Prepared


class Layout(Protocol):
    """One modality's arrangement. `item` is what preprocessing made of it."""

    def text(self, item: Prepared) -> str:
        """What the placeholder becomes; holds the placeholder once for every row."""
        ...

    def count(self, item: Prepared) -> int:
        """Rows of the whole item."""
        ...

    def arrange(self, parts: Sequence[Float32], item: Prepared) -> Float32:
        """The rows `(count, hidden)`, of what each run of the stages gave."""
        ...

    def places(self, item: Prepared) -> Int64 | None:
        """Where the rows stand, `(3, count)`, counted from the item's begin; None: as text does."""
        ...


class Plain:
    """The rows of all tiles, one after another."""

    def __init__(self, modality: Modality, fields: Fields) -> None:
        if not modality.tokens:
            raise fields.fail("kind", "another kind, since the number of rows is not fixed")
        self._placeholder, self._tokens = modality.placeholder, modality.tokens

    def text(self, item: Prepared) -> str:
        return self._placeholder * self.count(item)

    def count(self, item: Prepared) -> int:
        return self._tokens * len(item.runs)

    def arrange(self, parts: Sequence[Float32], item: Prepared) -> Float32:
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def places(self, item: Prepared) -> Int64 | None:
        return None


#: No token lies so far: a picture that every later token sees.
_EVER = 1 << 62


class Beside(Plain):
    """Rows that stand beside the tokens, in cross_kv states; the placeholder stays a token.

    Key `sees`: `latest`: a token sees the last picture before it (Idefics). `run`: the same, but
    pictures in a row are seen together (Llama-3.2-Vision). Key `fence`: a text before and after
    each placeholder, once between two in a row. Key `until`: an id that ends sight of all pictures
    before it. Key `tiles`: rows are of so many tiles, those in use first; the others are for tokens
    that see no picture at all (Llama-3.2-Vision). Key `bos`: a text that comes first in a prompt,
    but for placeholders.
    """

    def __init__(self, modality: Modality, fields: Fields) -> None:
        super().__init__(modality, fields)
        self._sees = fields.one_of("sees", ("latest", "run"))
        self._fence = fields.maybe_text("fence") or ""
        self._until = fields.maybe_integer("until")
        self._tiles = fields.maybe_integer("tiles", least=1)
        self._bos = fields.maybe_text("bos")

    def text(self, item: Prepared) -> str:
        return self._fence + self._placeholder + self._fence

    def count(self, item: Prepared) -> int:
        return self._tokens * self._tiles if self._tiles else super().count(item)

    def used(self, item: Prepared) -> int | None:
        """Rows of the tiles in use, where there are others."""
        if self._tiles is None:
            return None
        tiles = int(item.runs[0]["tiles"][0])
        return self._tokens * tiles if tiles < self._tiles else None

    def tidy(self, text: str) -> str:
        """The text of a whole prompt, with one fence between two pictures, and where it had its
        own; with BOS behind the placeholders that it begins with."""
        if self._bos and self._bos not in text:
            rest = text
            while rest.startswith(self._placeholder):
                rest = rest.removeprefix(self._placeholder)
            text = text[: len(text) - len(rest)] + self._bos + rest
        fences = f"(?:{re.escape(self._fence)})+"
        return re.sub(fences, lambda _: self._fence, text) if self._fence else text

    def seen_by(self, positions: list[int], ids: Sequence[int] = ()) -> list[tuple[int, int]]:
        """For the placeholders at these positions of a prompt: the first token that sees each
        picture, and the first that does not any more."""
        ends = [*positions[1:], _EVER]
        if self._sees == "run":
            for i in reversed(range(len(positions) - 1)):
                if positions[i] + 1 == positions[i + 1]:
                    ends[i] = ends[i + 1]
        for i, first in enumerate(positions if self._until is not None else ()):
            last = min(ends[i], len(ids))
            ends[i] = next((k + 1 for k in range(first, last) if ids[k] == self._until), ends[i])
        return list(zip(positions, ends, strict=False))


class Tiles(Plain):
    """Idefics3: the tiles of a picture row by row, then the whole picture, each introduced by
    words: `fence`, then `tile` (with `{row}` and `{column}`, from 1) or `whole`."""

    def __init__(self, modality: Modality, fields: Fields) -> None:
        super().__init__(modality, fields)
        self._fence, self._whole = fields.text("fence"), fields.text("whole")
        self._tile = fields.text("tile")

    def text(self, item: Prepared) -> str:
        rows, columns = item.shape.grid
        each, out = self._placeholder * self._tokens, ""
        for row in range(1, rows + 1):
            for column in range(1, columns + 1):
                name = self._tile.replace("{row}", str(row)).replace("{column}", str(column))
                out += self._fence + name + each
            out += "\n"
        return out + "\n" * bool(rows) + self._fence + self._whole + each + self._fence


class Grid:
    """Qwen2-VL: as many rows as the picture's grid of patches has squares of `merge` by `merge`.
    They stand in three streams of positions: frame, row, column. What follows stands behind the
    largest of these (Qwen2-VL, arXiv 2409.12191, section 2.1; transformers 5.23 leaves out frames).
    """

    def __init__(self, modality: Modality, fields: Fields) -> None:
        self._placeholder = modality.placeholder
        self._merge = fields.integer("merge", least=1)

    def _grid(self, item: Prepared) -> tuple[int, int, int]:
        frames, rows, columns = getattr(item.shape, "prepared", item.shape).patch_grid
        return frames, rows // self._merge, columns // self._merge

    def text(self, item: Prepared) -> str:
        return self._placeholder * self.count(item)

    def count(self, item: Prepared) -> int:
        return math.prod(self._grid(item))

    def arrange(self, parts: Sequence[Float32], item: Prepared) -> Float32:
        return parts[0]

    def places(self, item: Prepared) -> Int64 | None:
        return np.indices(self._grid(item), np.int64).reshape(3, -1)


class Unpadded(Plain):
    """LLaVA-NeXT: the rows of the whole picture, then those of all tiles line by line, without
    those of the padding, each line ended by a row of its own.

    Key `side`: rows and columns of a tile. Each run of the stages gives the tile's rows, and the
    row that ends a line.
    """

    def __init__(self, modality: Modality, fields: Fields) -> None:
        super().__init__(modality, fields)
        self._side = fields.integer("side", least=1)
        if self._side**2 != self._tokens:
            raise fields.fail("side", f"the square root of the {self._tokens} tokens")

    def _kept(self, item: Prepared) -> tuple[slice, slice]:
        """Which lines and columns of all tiles hold the picture.

        Source: `unpad_image` of transformers 5.23, whose rounding it follows.
        """
        height, width = item.shape.original_size
        lines, columns = (n * self._side for n in item.shape.grid)
        if width / height > columns / lines:
            padding = (lines - int(round(height * (columns / width), 7))) // 2
            return slice(padding, lines - padding), slice(0, columns)
        padding = (columns - int(round(width * (lines / height), 7))) // 2
        return slice(0, lines), slice(padding, columns - padding)

    def count(self, item: Prepared) -> int:
        lines, columns = (kept.stop - kept.start for kept in self._kept(item))
        count: int = self._tokens + lines * (columns + 1)
        return count

    def arrange(self, parts: Sequence[Float32], item: Prepared) -> Float32:
        side, (rows, columns) = self._side, item.shape.grid
        whole, *tiles = (part[:-1] for part in parts)
        end = parts[0][-1]
        squares = np.stack(tiles).reshape(rows, columns, side, side, -1).swapaxes(1, 2)
        lines = squares.reshape(rows * side, columns * side, -1)[self._kept(item)]
        ends = np.broadcast_to(end, (len(lines), 1, len(end)))
        ended = np.concatenate([lines, ends], axis=1).reshape(-1, len(end))
        return np.concatenate([whole, ended])


class Sound:
    """Qwen2-Audio: a row for each `stride` times `pooled` frames that hold sound."""

    def __init__(self, modality: Modality, fields: Fields) -> None:
        self._placeholder = modality.placeholder
        self._stride = fields.integer("stride", least=1)
        self._pooled = fields.integer("pooled", least=1)

    def text(self, item: Prepared) -> str:
        return self._placeholder * self.count(item)

    def count(self, item: Prepared) -> int:
        count = -(-int(item.shape.valid) // self._stride) // self._pooled
        if not count:
            raise UnsupportedMedia("the sound is too short", found=f"{item.shape.seconds:.3f} s")
        return count

    def arrange(self, parts: Sequence[Float32], item: Prepared) -> Float32:
        return parts[0]

    def places(self, item: Prepared) -> Int64 | None:
        return None


#: `layout.kind` -> what interprets it: `(modality, fields of the layout) -> Layout`.
LAYOUTS: dict[str, Any] = {
    "plain": Plain,
    "beside": Beside,
    "tiles": Tiles,
    "grid": Grid,
    "unpadded": Unpadded,
    "sound": Sound,
}


def layout_of(modality: Modality, where: str) -> Layout:
    """The layout of a modality.

    Raises:
        UnsupportedBundle: a kind that this release does not know.
        CorruptBundle: its members are malformed.
    """
    fields = Fields(modality.layout, f"{where}.layout")
    kind = fields.text("kind")
    if kind not in LAYOUTS:
        raise UnsupportedBundle(
            "a layout that this release does not know",
            where=fields.path("kind"),
            expected=" | ".join(LAYOUTS),
            found=kind[:80],
            fix="upgrade edge-mmllm",
        )
    made: Layout = LAYOUTS[kind](modality, fields)
    return made
