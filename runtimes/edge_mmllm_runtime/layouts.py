"""How the rows of one item (a picture, a video, a recording) are arranged: what the manifest's
`modalities.NAME.layout` says, interpreted.

A layout knows two things: the text that a placeholder becomes before it is tokenized, in which
every token `token_id` stands for one row, and the order of the rows. A further family adds a
class and a line in `LAYOUTS`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from edge_mmllm._fields import Fields
from edge_mmllm.errors import UnsupportedBundle
from edge_mmllm.modality import Modality
from edge_mmllm_runtime.engine import Float32
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


#: No token lies so far: a picture that every later token sees.
_EVER = 1 << 62


class Beside(Plain):
    """Rows that stand beside the tokens, in cross_kv states; the placeholder stays a token.

    Key `sees`: `latest`: a token sees the last picture before it (Idefics). `run`: the same, but
    pictures in a row are seen together (Llama-3.2-Vision). Key `fence`: a text before and after
    each placeholder, once between two in a row. Key `until`: an id that ends sight of all pictures
    before it.
    """

    def __init__(self, modality: Modality, fields: Fields) -> None:
        super().__init__(modality, fields)
        self._sees = fields.one_of("sees", ("latest", "run"))
        self._fence = fields.maybe_text("fence") or ""
        self._until = fields.maybe_integer("until")

    def text(self, item: Prepared) -> str:
        return self._fence + self._placeholder + self._fence

    def tidy(self, text: str) -> str:
        """The text of a whole prompt, with one fence between two pictures, and where it had its
        own."""
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


#: `layout.kind` -> what interprets it: `(modality, fields of the layout) -> Layout`.
LAYOUTS: dict[str, Any] = {
    "plain": Plain,
    "beside": Beside,
    "tiles": Tiles,
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
