"""What a checkpoint wants done to a picture: frozen, and stored in the bundle's manifest.

`from_json` reads a manifest that nobody vouches for: every length, count and area is bounded, so
that no settings can make `prepare_image` ask for more than `MOST_PIXELS` pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from edge_mmllm._fields import Fields

#: Bounds on what settings may say. No published checkpoint comes near.
MOST_EDGE = 16384  # pixels along one edge
MOST_PIXELS = 1 << 26  # pixels of one prepared picture, all tiles together
MOST_TILES = 256

#: Published factors are at most 1.
MAX_RESCALE = 1e6

#: A picture of more pixels is refused before it is decoded (64 Mpx take 192 MB as RGB).
PIXEL_LIMIT = 64 * 1024 * 1024

#: Names of Pillow's filters, and the numbers that published configs have for them.
RESAMPLE = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")

Size = tuple[int, int]  # (height, width)


@dataclass(frozen=True)
class Whole:
    """The whole picture as one tile: square it, resize it, cut its centre out (CLIP and kin).

    Attributes:
        size: exact (height, width), or None.
        shortest_edge: length the shorter edge gets, aspect ratio kept, or None.
        longest_edge: with `shortest_edge`: what the longer edge may not exceed.
        crop: (height, width) of the centre crop, padded with zeros where the picture is smaller.
        square: pad to a square with the mean colour first (LLaVA's own processor).
    """

    size: Size | None = None
    shortest_edge: int | None = None
    longest_edge: int | None = None
    crop: Size | None = None
    square: bool = False


@dataclass(frozen=True)
class AnyRes:
    """LLaVA-NeXT: the picture resized to one tile, then the tiles of the best of `grids`.

    Attributes:
        tile: edge of a square tile.
        grids: the (height, width) a picture may be fitted and padded to, multiples of `tile`.
    """

    tile: int
    grids: tuple[Size, ...]


@dataclass(frozen=True)
class Split:
    """Idefics3 and SmolVLM: the tiles of the enlarged picture, then the picture as one tile.

    Attributes:
        tile: edge of a square tile.
        longest_edge: length the longer edge gets first.
        split: False: one tile alone, aspect ratio not kept.
    """

    tile: int
    longest_edge: int
    split: bool = True


@dataclass(frozen=True)
class Canvas:
    """Mllama (Llama 3.2 Vision): fitted into the best canvas of at most `most_tiles` tiles.

    Attributes:
        tile: edge of a square tile.
        most_tiles: tiles of the largest canvas.
    """

    tile: int
    most_tiles: int


@dataclass(frozen=True)
class Patches:
    """Qwen2-VL: any size that is a multiple of patch * merge, as flattened patches.

    Attributes:
        patch: edge of a patch.
        merge: patches along each edge of a group that becomes one token.
        frames: frames of a patch; a still picture is repeated.
        least_pixels, most_pixels: area the picture is resized to, between these.
    """

    patch: int
    merge: int
    frames: int
    least_pixels: int
    most_pixels: int


Layout = Whole | AnyRes | Split | Canvas | Patches


@dataclass(frozen=True)
class ImageSettings:
    """Everything `prepare_image` needs to know of a checkpoint.

    Attributes:
        layout: how a picture becomes tiles or patches.
        resample: Pillow's filter, one of `RESAMPLE`.
        rescale: factor applied to 0..255, or None.
        mean, std: of each channel, after rescaling; both or neither.
        pixel_limit: a picture of more pixels is refused undecoded.
    """

    layout: Layout
    resample: str
    rescale: float | None
    mean: tuple[float, float, float] | None
    std: tuple[float, float, float] | None
    pixel_limit: int = PIXEL_LIMIT

    def to_json(self) -> dict[str, Any]:
        """The JSON object that `from_json` reads."""
        return {
            "layout": _layout_to_json(self.layout),
            "resample": self.resample,
            "rescale": self.rescale,
            "mean": None if self.mean is None else list(self.mean),
            "std": None if self.std is None else list(self.std),
            "pixel_limit": self.pixel_limit,
        }

    @staticmethod
    def from_json(value: object, where: str = "image") -> ImageSettings:
        """Reads settings that nobody vouches for.

        Raises:
            CorruptBundle: a member is missing, of a wrong type or out of bounds.
        """
        fields = Fields(value, where)
        mean, std = _triple(fields, "mean"), _triple(fields, "std")
        if (mean is None) != (std is None):
            raise fields.fail("std", "mean and std, or neither")
        if std is not None and min(std) < 1e-6:
            raise fields.fail("std", "numbers above 0")
        return ImageSettings(
            layout=_layout_from_json(fields.child("layout")),
            resample=fields.one_of("resample", RESAMPLE),
            rescale=None if fields.value.get("rescale") is None else rescale_of(fields, "rescale"),
            mean=mean,
            std=std,
            pixel_limit=bounded(fields, "pixel_limit", 1 << 30),
        )


def _layout_to_json(layout: Layout) -> dict[str, Any]:
    match layout:
        case Whole():
            return {
                "kind": "whole",
                "size": None if layout.size is None else list(layout.size),
                "shortest_edge": layout.shortest_edge,
                "longest_edge": layout.longest_edge,
                "crop": None if layout.crop is None else list(layout.crop),
                "square": layout.square,
            }
        case AnyRes():
            return {
                "kind": "anyres",
                "tile": layout.tile,
                "grids": [list(size) for size in layout.grids],
            }
        case Split():
            return {
                "kind": "split",
                "tile": layout.tile,
                "longest_edge": layout.longest_edge,
                "split": layout.split,
            }
        case Canvas():
            return {"kind": "canvas", "tile": layout.tile, "most_tiles": layout.most_tiles}
        case Patches():
            return {
                "kind": "patches",
                "patch": layout.patch,
                "merge": layout.merge,
                "frames": layout.frames,
                "least_pixels": layout.least_pixels,
                "most_pixels": layout.most_pixels,
            }


def _layout_from_json(fields: Fields) -> Layout:
    kind = fields.one_of("kind", ("whole", "anyres", "split", "canvas", "patches"))
    if kind == "whole":
        whole = Whole(
            size=_size(fields, "size"),
            shortest_edge=_maybe(fields, "shortest_edge"),
            longest_edge=_maybe(fields, "longest_edge"),
            crop=_size(fields, "crop"),
            square=fields.flag("square"),
        )
        if whole.size is not None and whole.shortest_edge is not None:
            raise fields.fail("shortest_edge", "null where a size is given")
        if whole.longest_edge is not None and (whole.shortest_edge or 0) > whole.longest_edge:
            raise fields.fail("longest_edge", "at least shortest_edge")
        if whole.longest_edge is not None and whole.shortest_edge is None:
            raise fields.fail("shortest_edge", "an integer where longest_edge is given")
        return whole
    if kind == "anyres":
        tile = bounded(fields, "tile", MOST_EDGE)
        sizes = fields.items("grids")
        if not 1 <= len(sizes) <= MOST_TILES:
            raise fields.fail("grids", f"1 to {MOST_TILES} sizes")
        wrapped = [Fields({"size": s}, f"{fields.path('grids')}[{i}]") for i, s in enumerate(sizes)]
        grids = tuple(_required_size(grid) for grid in wrapped)
        for grid, (height, width) in zip(wrapped, grids, strict=True):
            if height % tile or width % tile or (height // tile) * (width // tile) >= MOST_TILES:
                raise grid.fail("size", f"multiples of the tile {tile}, under {MOST_TILES} tiles")
        return AnyRes(tile, grids)
    if kind == "split":
        split = Split(
            bounded(fields, "tile", MOST_EDGE),
            bounded(fields, "longest_edge", MOST_EDGE),
            fields.flag("split"),
        )
        edge = math.ceil(split.longest_edge / split.tile)
        if edge**2 >= MOST_TILES or (edge * split.tile) ** 2 > MOST_PIXELS:
            raise fields.fail("longest_edge", f"under {MOST_TILES} tiles, {MOST_PIXELS} pixels")
        return split
    if kind == "canvas":
        canvas = Canvas(
            bounded(fields, "tile", MOST_EDGE), bounded(fields, "most_tiles", MOST_TILES)
        )
        if canvas.tile**2 * canvas.most_tiles > MOST_PIXELS:
            raise fields.fail("most_tiles", f"at most {MOST_PIXELS} pixels in all")
        return canvas
    patches = Patches(
        bounded(fields, "patch", 1024),
        bounded(fields, "merge", 64),
        bounded(fields, "frames", 64),
        bounded(fields, "least_pixels", MOST_PIXELS),
        bounded(fields, "most_pixels", MOST_PIXELS),
    )
    if patches.least_pixels > patches.most_pixels:
        raise fields.fail("least_pixels", "at most most_pixels")
    if patches.patch * patches.merge > 1024:
        raise fields.fail("merge", "patch * merge of at most 1024")
    if patches.most_pixels * patches.frames > 4 * MOST_PIXELS:
        raise fields.fail("frames", f"at most {4 * MOST_PIXELS} pixels in all")
    return patches


def bounded(fields: Fields, name: str, most: int) -> int:
    """An integer from 1 to `most`.

    Raises:
        CorruptBundle: anything else.
    """
    value = fields.integer(name, least=1)
    if value > most:
        raise fields.fail(name, f"an integer from 1 to {most}")
    return value


def rescale_of(fields: Fields, name: str) -> float:
    """A factor for 0..255 whose products float32 can hold.

    Raises:
        CorruptBundle: anything else.
    """
    value = fields.number(name)
    if value > MAX_RESCALE:
        raise fields.fail(name, f"a number from 0 to {MAX_RESCALE:g}")
    return value


def _maybe(fields: Fields, name: str) -> int | None:
    return None if fields.value.get(name) is None else bounded(fields, name, MOST_EDGE)


def _size(fields: Fields, name: str) -> Size | None:
    if fields.value.get(name) is None:
        return None
    values = fields.integers(name, least=1)
    if len(values) != 2 or max(values) > MOST_EDGE or values[0] * values[1] > MOST_PIXELS:
        raise fields.fail(name, f"[height, width], edges from 1 to {MOST_EDGE}")
    return values[0], values[1]


def _required_size(fields: Fields) -> Size:
    size = _size(fields, "size")
    if size is None:
        raise fields.fail("size", "[height, width]")
    return size


def _triple(fields: Fields, name: str) -> tuple[float, float, float] | None:
    """Three finite numbers, or null."""
    if fields.value.get(name) is None:
        return None
    values = fields.items(name)
    numbers = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
    if len(values) != 3 or len(numbers) != 3 or not all(abs(v) <= 1e6 for v in numbers):
        raise fields.fail(name, "three numbers")
    return float(numbers[0]), float(numbers[1]), float(numbers[2])
