"""Sizes and grids: which size a picture is resized to, and into which tiles it is cut.

All sizes are (height, width). Written to agree with transformers 5.23 to the pixel, whose
roundings differ from one family to the next.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from edge_mmllm.errors import UnsupportedMedia
from edge_mmllm.image.settings import Canvas, Patches, Size, Split


def shortest(size: Size, edge: int, most: int | None = None) -> Size:
    """Shorter edge to `edge`, aspect ratio kept (rounded down); longer edge at most `most`.

    Source: transformers 5.23, get_resize_output_image_size; get_size_with_aspect_ratio with `most`.
    """
    height, width = size
    short, long = min(size), max(size)
    if most is None:
        other = int(edge * long / short)
        return (other, edge) if width <= height else (edge, other)
    ratio: float = edge
    if long / short * edge > most:
        ratio = most * float(short) / float(long)
        edge = round(ratio)
    if edge == short:
        return size
    other = int(ratio * long / short)
    return (other, edge) if width < height else (edge, other)


def best_grid(size: Size, grids: Sequence[Size]) -> Size:
    """The grid that keeps most of the picture's pixels, then wastes fewest (LLaVA-NeXT).

    Source: transformers 5.23, select_best_resolution.
    """
    height, width = size

    def rank(grid: Size) -> tuple[int, int]:
        scale = min(grid[1] / width, grid[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - grid[0] * grid[1]

    return max(grids, key=rank)  # the first of equals


def fitted(size: Size, grid: Size) -> Size:
    """The largest size of the picture's aspect ratio within `grid`, rounded up (LLaVA-NeXT).

    Source: transformers 5.23, get_patch_output_size.
    """
    (height, width), (most_height, most_width) = size, grid
    wide, high = most_width / width, most_height / height
    if wide < high:
        return min(math.ceil(height * wide), most_height), most_width
    return most_height, min(math.ceil(width * high), most_width)


def split_sizes(size: Size, layout: Split) -> tuple[Size, Size]:
    """Size after the first resize, and the multiple of the tile it is then stretched to.

    Source: transformers 5.23, Idefics3ImageProcessor.resize and resize_for_vision_encoder.
    """
    height, width = size
    ratio = width / height
    longest = layout.longest_edge
    if width >= height:
        height, width = int(longest / ratio), longest
        height += height % 2
    else:
        height, width = longest, int(longest * ratio)
        width += width % 2
    height, width = max(height, 1), max(width, 1)
    # Idefics3 caps the longer edge at 4096 once more.
    ratio, cap = width / height, 4096
    if width >= height and width > cap:
        height, width = max(int(cap / ratio), 1), cap
    elif height > width and height > cap:
        height, width = cap, max(int(cap * ratio), 1)
    first = (height, width)
    tile = layout.tile
    ratio = width / height
    if width >= height:
        width = math.ceil(width / tile) * tile
        height = math.ceil(int(width / ratio) / tile) * tile
    else:
        height = math.ceil(height / tile) * tile
        width = math.ceil(int(height * ratio) / tile) * tile
    return first, (height, width)


def canvas_shapes(most_tiles: int) -> list[Size]:
    """The grids of at most `most_tiles` tiles, in Mllama's order; its ids count them from 1."""
    edge = range(1, most_tiles + 1)
    return [(rows, columns) for rows in edge for columns in edge if rows * columns <= most_tiles]


def best_canvas(size: Size, layout: Canvas) -> Size:
    """The grid (rows, columns): least enlargement, else least reduction, then least area.

    Source: transformers 5.23, get_optimal_tiled_canvas.
    """
    height, width = size
    scales = {
        shape: min(shape[0] * layout.tile / height, shape[1] * layout.tile / width)
        for shape in canvas_shapes(layout.most_tiles)
    }
    enlarging = [scale for scale in scales.values() if scale >= 1]
    chosen = min(enlarging) if enlarging else max(scales.values())
    return min((s for s in scales if scales[s] == chosen), key=lambda shape: shape[0] * shape[1])


def canvas_fit(size: Size, shape: Size, tile: int) -> Size:
    """The picture's size in its canvas: no larger than itself, unless that is below a tile.

    Source: transformers 5.23, get_image_size_fit_to_canvas.
    """
    height, width = size
    most_height = min(max(height, tile), shape[0] * tile)
    most_width = min(max(width, tile), shape[1] * tile)
    high, wide = most_height / height, most_width / width
    if wide < high:
        return min(math.floor(height * wide) or 1, most_height), most_width
    return most_height, min(math.floor(width * high) or 1, most_width)


def smart_size(size: Size, layout: Patches, most_pixels: int | None = None) -> Size:
    """Multiples of patch * merge nearest to the picture, the area within the layout's bounds.

    Source: transformers 5.23, smart_resize (Qwen2-VL).

    Raises:
        UnsupportedMedia: one edge is more than 200 times the other.
    """
    height, width = size
    if max(size) > 200 * min(size):
        raise UnsupportedMedia(
            "the picture is too long and thin for this model",
            expected="edges that differ at most 200 times",
            found=f"{width} x {height}",
            fix="cut it into several pictures",
        )
    unit = layout.patch * layout.merge
    most = layout.most_pixels if most_pixels is None else most_pixels
    high, wide = round(height / unit) * unit, round(width / unit) * unit
    if high * wide > most:
        scale = math.sqrt(height * width / most)
        high = max(unit, math.floor(height / scale / unit) * unit)
        wide = max(unit, math.floor(width / scale / unit) * unit)
    elif high * wide < layout.least_pixels:
        scale = math.sqrt(layout.least_pixels / (height * width))
        high = math.ceil(height * scale / unit) * unit
        wide = math.ceil(width * scale / unit) * unit
    return high, wide
