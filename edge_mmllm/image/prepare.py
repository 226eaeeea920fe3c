"""From a picture to the float32 tiles or patches an encoder takes.

Resizing is Pillow's on 8-bit RGB, as in the processors that transformers 5 calls "pil": with the
same Pillow, the result is theirs to the bit. Pillow 13 filters the axis first that leaves less to
do; Pillow before it, and the "torchvision" processors, go along the rows first. With filters that
overshoot (bicubic, Lanczos) that moves single values beside hard edges, mostly by one level.

Rescaling and normalising go through a table of 256 entries a channel, computed as those
processors compute each pixel.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from edge_mmllm.errors import UnsupportedMedia
from edge_mmllm.image import geometry
from edge_mmllm.image.files import open_image
from edge_mmllm.image.settings import (
    MOST_PIXELS,
    RESAMPLE,
    AnyRes,
    Canvas,
    ImageSettings,
    Patches,
    Size,
    Split,
    Whole,
)

if TYPE_CHECKING:
    from PIL import Image

Pixels = npt.NDArray[np.float32]

#: A resize whose result would have more pixels computes only what the crop keeps.
_WHOLE_RESIZE = 1 << 24


@dataclass(frozen=True)
class Prepared:
    """A picture (or a video) as its encoder takes it. Sizes are (height, width).

    Attributes:
        pixels: float32, `(tiles, 3, height, width)`; of the Patches layout
            `(patches, 3 * frames * patch * patch)`, the patches of a merged group side by side.
        original_size: of the upright picture.
        resized_size: what the picture itself was resized to, padding and crop apart.
        grid: (rows, columns) of the tiles the picture was cut into, row by row; (0, 0) where
            the whole picture is the only tile. AnyRes puts the whole picture before them,
            Split after them, Canvas leaves it out.
        patch_grid: (frames, rows, columns) in patches, of the Patches layout (`image_grid_thw`).
        shape_id: Canvas: the number of the grid among `geometry.canvas_shapes`, from 1
            (`aspect_ratio_ids`).
        tile_mask: Canvas: int64 `(most_tiles,)`, 1 for each tile there is (`aspect_ratio_mask`).
    """

    pixels: Pixels
    original_size: Size
    resized_size: Size
    grid: Size = (0, 0)
    patch_grid: tuple[int, int, int] | None = None
    shape_id: int | None = None
    tile_mask: npt.NDArray[np.int64] | None = None


def prepare_image(
    image: str | os.PathLike[str] | bytes | BinaryIO | Image.Image | npt.NDArray[Any],
    settings: ImageSettings,
) -> Prepared:
    """Opens a picture (as `open_image` does) and prepares it.

    Raises:
        MediaError: as `open_image`; or a shape this layout cannot take.
    """
    picture = open_image(image, pixel_limit=settings.pixel_limit)
    size = (picture.height, picture.width)
    table, resample = lookup(settings), _filter(settings)
    layout = settings.layout
    match layout:
        case Whole():
            pixels, resized = _whole(picture, layout, settings, table)
            return Prepared(pixels, size, resized)
        case AnyRes():
            grid = geometry.best_grid(size, layout.grids)
            resized = geometry.fitted(size, grid)
            fitted = _paste(
                _resize(picture, resized, resample),
                grid,
                ((grid[0] - resized[0]) // 2, (grid[1] - resized[1]) // 2),
            )
            whole = _resize(picture, (layout.tile, layout.tile), resample)
            return Prepared(
                _normalised([whole, *_tiles(fitted, layout.tile)], table),
                size,
                resized,
                (grid[0] // layout.tile, grid[1] // layout.tile),
            )
        case Split():
            tile = (layout.tile, layout.tile)
            first, stretched = geometry.split_sizes(size, layout)
            picture = _resize(picture, first, resample)
            if not layout.split:
                return Prepared(_normalised([_resize(picture, tile, resample)], table), size, first)
            picture = _resize(picture, stretched, resample)
            if stretched == tile:
                return Prepared(_normalised([picture], table), size, stretched)
            return Prepared(
                _normalised(
                    [*_tiles(picture, layout.tile), _resize(picture, tile, resample)], table
                ),
                size,
                stretched,
                (stretched[0] // layout.tile, stretched[1] // layout.tile),
            )
        case Canvas():
            shape = geometry.best_canvas(size, layout)
            resized = geometry.canvas_fit(size, shape, layout.tile)
            canvas = (shape[0] * layout.tile, shape[1] * layout.tile)
            fitted = _paste(_resize(picture, resized, resample), canvas, (0, 0))
            mask = np.zeros(layout.most_tiles, np.int64)
            mask[: shape[0] * shape[1]] = 1
            return Prepared(
                _normalised(_tiles(fitted, layout.tile), table),
                size,
                resized,
                shape,
                shape_id=geometry.canvas_shapes(layout.most_tiles).index(shape) + 1,
                tile_mask=mask,
            )
        case Patches():
            resized = geometry.smart_size(size, layout)
            frame = _normalised([_resize(picture, resized, resample)], table)
            patches, patch_grid = patchify(frame, layout)
            return Prepared(patches, size, resized, patch_grid=patch_grid)


def prepare_frames(frames: Sequence[Image.Image], settings: ImageSettings) -> Prepared:
    """Prepares the frames of a video, RGB pictures of one size, as `open_image` gives them.

    Whole: pixels `(frames, 3, height, width)`. Patches: the frames in groups of
    `layout.frames`, the last one repeated to fill the last group.

    Raises:
        UnsupportedMedia: a layout that cuts a picture into tiles, or no frames.
    """
    layout = settings.layout
    if not frames or not isinstance(layout, (Whole, Patches)):
        raise UnsupportedMedia(
            "these frames cannot be prepared as a video",
            expected="at least one frame, and a model that takes whole pictures or patches",
            found=f"{len(frames)} frames, layout {type(layout).__name__}",
        )
    table = lookup(settings)
    size = (frames[0].height, frames[0].width)
    if isinstance(layout, Whole):
        done = [_whole(frame, layout, settings, table) for frame in frames]
        if len({pixels.shape for pixels, _ in done}) > 1:
            raise UnsupportedMedia("the frames of a video differ in size", found=str(size))
        return Prepared(np.concatenate([pixels for pixels, _ in done]), size, done[0][1])
    resized = geometry.smart_size(size, layout)
    if len(frames) * resized[0] * resized[1] > 4 * MOST_PIXELS:
        raise UnsupportedMedia(
            "the video has too many pixels to prepare",
            expected=f"at most {4 * MOST_PIXELS} in all frames",
            found=f"{len(frames)} frames of {resized[1]} x {resized[0]}",
            fix="sample fewer frames",
        )
    resample = _filter(settings)
    pixels = _normalised([_resize(frame, resized, resample) for frame in frames], table)
    patches, patch_grid = patchify(pixels, layout)
    return Prepared(patches, size, resized, patch_grid=patch_grid)


def lookup(settings: ImageSettings) -> Pixels:
    """What each of the 256 levels becomes in each channel, `(3, 256)`.

    Source: transformers 5.23, image_transforms.rescale (in float64) and normalize (in float32).
    """
    levels = np.arange(256, dtype=np.float64)
    if settings.rescale is not None:
        levels = levels * settings.rescale
    table = np.repeat(levels.astype(np.float32)[None], 3, axis=0)
    if settings.mean is not None and settings.std is not None:
        mean = np.array(settings.mean, np.float32)[:, None]
        table = (table - mean) / np.array(settings.std, np.float32)[:, None]
    return table


def patchify(frames: Pixels, layout: Patches) -> tuple[Pixels, tuple[int, int, int]]:
    """Flattened patches of frames `(n, 3, height, width)`, and (frames, rows, columns) in patches.

    A row holds `(channel, frame, y, x)` of one patch; the merge x merge patches that become one
    token follow each other. Source: transformers 5.23, Qwen2VLImageProcessor.patchify.
    """
    missing = -len(frames) % layout.frames
    if missing:
        frames = np.concatenate([frames, np.repeat(frames[-1:], missing, axis=0)])
    count, channels, height, width = frames.shape
    times, rows, columns = count // layout.frames, height // layout.patch, width // layout.patch
    merge, patch = layout.merge, layout.patch
    blocks = frames.reshape(
        times,
        layout.frames,
        channels,
        rows // merge,
        merge,
        patch,
        columns // merge,
        merge,
        patch,
    ).transpose(0, 3, 6, 4, 7, 2, 1, 5, 8)
    flat = blocks.reshape(times * rows * columns, channels * layout.frames * patch * patch)
    return flat, (times, rows, columns)


def _whole(
    picture: Image.Image, layout: Whole, settings: ImageSettings, table: Pixels
) -> tuple[Pixels, Size]:
    resample = _filter(settings)
    if layout.square and picture.width != picture.height:
        picture = _squared(picture, settings)
    size = (picture.height, picture.width)
    resized = size
    if layout.size is not None:
        resized = layout.size
    elif layout.shortest_edge is not None:
        resized = geometry.shortest(size, layout.shortest_edge, layout.longest_edge)
    crop = layout.crop
    if resized[0] * resized[1] > _WHOLE_RESIZE and crop is not None and resized != size:
        return _normalised([_resize_cropped(picture, resized, crop, resample)], table), resized
    if resized[0] * resized[1] > MOST_PIXELS:
        raise UnsupportedMedia(
            "the picture is too long and thin for this model",
            expected=f"at most {MOST_PIXELS} pixels after resizing",
            found=f"{picture.width} x {picture.height}, resized to {resized[1]} x {resized[0]}",
            fix="cut it into several pictures",
        )
    picture = _resize(picture, resized, resample)
    if crop is not None:
        picture = _cropped(picture, crop)
    return _normalised([picture], table), resized


def _filter(settings: ImageSettings) -> int:
    return RESAMPLE.index(settings.resample)


def _resize(picture: Image.Image, size: Size, resample: int) -> Image.Image:
    from PIL import Image

    if (picture.height, picture.width) == size:
        return picture
    return picture.resize((size[1], size[0]), Image.Resampling(resample))


def _resize_cropped(picture: Image.Image, size: Size, crop: Size, resample: int) -> Image.Image:
    """As `_cropped(_resize(...))`, computing only what the crop keeps (1 x N pictures).

    The filter still sees the pixels around the crop. Pillow may take its two passes in the other
    order, with what that entails (see the module's docstring).
    """
    from PIL import Image

    kept = (min(crop[0], size[0]), min(crop[1], size[1]))
    top, left = (size[0] - kept[0]) // 2, (size[1] - kept[1]) // 2
    high, wide = picture.height / size[0], picture.width / size[1]
    box = (
        left * wide,
        top * high,
        min((left + kept[1]) * wide, picture.width),
        min((top + kept[0]) * high, picture.height),
    )
    part = picture.resize((kept[1], kept[0]), Image.Resampling(resample), box=box)
    return _cropped(part, crop)


def _cropped(picture: Image.Image, crop: Size) -> Image.Image:
    """The centre, surrounded by zeros where the picture is smaller.

    Source: transformers 5.23, image_transforms.center_crop: an odd pixel goes to the top left.
    """
    top, left = (picture.height - crop[0]) // 2, (picture.width - crop[1]) // 2
    return picture.crop((left, top, left + crop[1], top + crop[0]))


def _squared(picture: Image.Image, settings: ImageSettings) -> Image.Image:
    from PIL import Image

    edge = max(picture.size)
    colour = tuple(int(value * 255) for value in settings.mean or (0.0, 0.0, 0.0))
    square = Image.new("RGB", (edge, edge), colour)
    square.paste(picture, ((edge - picture.width) // 2, (edge - picture.height) // 2))
    return square


def _paste(picture: Image.Image, size: Size, at: Size) -> Image.Image:
    """The picture on black, its top left corner at `at`."""
    from PIL import Image

    canvas = Image.new("RGB", (size[1], size[0]))
    canvas.paste(picture, (at[1], at[0]))
    return canvas


def _tiles(picture: Image.Image, tile: int) -> list[Image.Image]:
    """Square tiles, row by row."""
    return [
        picture.crop((left, top, left + tile, top + tile))
        for top in range(0, picture.height, tile)
        for left in range(0, picture.width, tile)
    ]


def _normalised(tiles: Sequence[Image.Image], table: Pixels) -> Pixels:
    """8-bit RGB pictures of one size as float32 `(tiles, 3, height, width)`."""
    out = np.empty((len(tiles), 3, tiles[0].height, tiles[0].width), np.float32)
    for index, tile in enumerate(tiles):
        levels = np.asarray(tile)
        for channel in range(3):
            np.take(table[channel], levels[:, :, channel], out=out[index, channel], mode="clip")
    return out
