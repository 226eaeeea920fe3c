"""Matrices of MLC bundles as the compiled kernels read them: 16 rows side by side.

MLC's files keep a matrix row by row; a kernel that multiplies 16 rows at once wants theirs side by
side, so that one load feeds every lane. The same bytes serve every instruction set, since 16 rows
are one, two or four vectors. Repacked once, when a bundle is loaded (or by the writer of a
standalone library), by numpy alone.

Layout of a matrix `(N, K)`, little-endian, in groups of 16 rows (the last one padded with zeros):

- `f32`, `f16`: for each k, 16 values.
- `q4`: for each block along K, 16 scales (float16, bfloat16 or float32), then its codes: for each
  8 along K, 16 words of 4 bytes, one a row; byte i of a word holds code i in its low nibble and
  code i + 4 in its high one. `w = (code - zero) * scale`. K is padded to whole blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edge_mmllm.errors import UnsupportedBundle

#: Rows side by side: the lanes of the widest vectors (512 bits of float32).
ROWS = 16
#: Rows repacked at a time: what bounds the memory that packing takes.
_TILE_ROWS = 1024

Kind = Literal["q4", "f16", "f32"]
ScaleType = Literal["f16", "bf16", "f32"]
_SCALE_BYTES = {"f16": 2, "bf16": 2, "f32": 4}


@dataclass(frozen=True)
class Packing:
    """How a matrix is packed.

    Attributes:
        block: weights along K that share a scale; a multiple of 8.
        zero: the code that stands for 0.
    """

    kind: Kind
    rows: int
    columns: int
    block: int = 32
    zero: int = 7
    scale: ScaleType = "f16"

    @property
    def id(self) -> str:
        """Its name without the sizes, e.g. `q4-b32-z7-bf16` or `f16`."""
        if self.kind != "q4":
            return self.kind
        return f"q4-b{self.block}-z{self.zero}-{self.scale}"

    @staticmethod
    def of(name: str, rows: int, columns: int) -> Packing:
        """The packing of that id. Raises: UnsupportedBundle."""
        if name in ("f16", "f32"):
            return Packing(name, rows, columns)  # type: ignore[arg-type]
        parts = name.split("-")
        if len(parts) == 4 and parts[0] == "q4" and parts[3] in _SCALE_BYTES:
            block, zero = parts[1].removeprefix("b"), parts[2].removeprefix("z")
            if block.isdigit() and zero.isdigit() and int(block) % 8 == 0 and 0 < int(block) <= 256:
                return Packing("q4", rows, columns, int(block), int(zero), parts[3])  # type: ignore[arg-type]
        raise UnsupportedBundle(
            "a matrix is packed in a way that this version does not know",
            expected="f32, f16 or q4-bBLOCK-zZERO-SCALE",
            found=name[:80],
            fix="update edge-mmllm",
        )

    @staticmethod
    def of_scheme(scheme: str, rows: int, columns: int) -> Packing:
        """The packing of an MLC quantization's matrices, e.g. `q4f16_1`.

        Raises: UnsupportedBundle.
        """
        scales: dict[str, ScaleType] = {"f16": "f16", "f32": "bf16"}
        bits, kind = scheme[:2], scheme[2:5]
        if kind in scales and bits in ("q0", "q3", "q4"):
            if bits == "q0":
                return Packing("f16" if kind == "f16" else "f32", rows, columns)
            block, zero = (32, 7) if bits == "q4" else (40, 3)
            return Packing("q4", rows, columns, block, zero, scales[kind])
        raise UnsupportedBundle(
            "an MLC quantization without kernels", expected="q0, q3 or q4", found=scheme[:80]
        )

    @property
    def groups(self) -> int:
        return -(-self.rows // ROWS)

    @property
    def blocks(self) -> int:
        """Along K; 1 where nothing is quantized."""
        return -(-self.columns // self.block) if self.kind == "q4" else 1

    @property
    def scale_bytes(self) -> int:
        """Of the 16 scales that begin a block."""
        return ROWS * _SCALE_BYTES[self.scale] if self.kind == "q4" else 0

    @property
    def block_bytes(self) -> int:
        """Of one group of rows and one block."""
        if self.kind == "q4":
            return self.scale_bytes + ROWS * self.block // 2
        return ROWS * self.columns * (2 if self.kind == "f16" else 4)

    @property
    def size_bytes(self) -> int:
        return self.groups * self.blocks * self.block_bytes


def pack_float(packing: Packing, weight: NDArray[Any]) -> NDArray[np.uint8]:
    """A float matrix `(N, K)` -> its packed bytes `(size_bytes,)`."""
    _check(packing, weight.shape, (packing.rows, packing.columns))
    dtype = np.dtype("<f2" if packing.kind == "f16" else "<f4")
    out = np.zeros((packing.groups, packing.columns, ROWS), dtype)
    for start, stop in _tiles(packing.rows):
        tile = np.zeros((-(-(stop - start) // ROWS) * ROWS, packing.columns), dtype)
        tile[: stop - start] = weight[start:stop]
        first = start // ROWS
        parts = tile.reshape(-1, ROWS, packing.columns).transpose(0, 2, 1)
        out[first : first + len(parts)] = parts
    return out.reshape(-1).view(np.uint8)


def pack_q4(
    packing: Packing, q_weight: NDArray[np.uint32], q_scale: NDArray[Any]
) -> NDArray[np.uint8]:
    """MLC's words and scales -> packed bytes `(size_bytes,)`.

    Args:
        q_weight: uint32 `(N, words)`, eight codes of 4 bits each, or ten of 3 bits (a zero
            below 7), lowest K in the lowest bits.
        q_scale: `(N, blocks)`, float16 or float32; those of a `bf16` packing are exactly bfloat16,
            as MLC's files hold them.

    Layouts with K first (`_0`) are handed in transposed.
    """
    narrow = packing.zero < 7
    words = packing.block // (10 if narrow else 8)
    blocks = packing.blocks
    _check(packing, q_weight.shape, (packing.rows, blocks * words))
    _check(packing, q_scale.shape, (packing.rows, blocks))
    out = np.zeros((packing.groups, blocks, packing.block_bytes), np.uint8)
    for start, stop in _tiles(packing.rows):
        groups = -(-(stop - start) // ROWS)
        tile = np.zeros((groups * ROWS, blocks * words), np.uint32)
        tile[: stop - start] = q_weight[start:stop]
        scales = np.zeros((groups * ROWS, blocks), np.float32)
        scales[: stop - start] = q_scale[start:stop]
        target = out[start // ROWS : start // ROWS + groups]
        side = scales.reshape(groups, ROWS, blocks).transpose(0, 2, 1)
        target[:, :, : packing.scale_bytes] = _scales(packing, side)
        codes = _interleaved(_nibbles(tile) if narrow else tile)
        side_codes = codes.reshape(groups, ROWS, blocks, -1).transpose(0, 2, 3, 1)
        target[:, :, packing.scale_bytes :] = (
            np.ascontiguousarray(side_codes).reshape(groups, blocks, -1).view(np.uint8)
        )
    return out.reshape(-1)


def unpack(packing: Packing, data: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Packed bytes -> float32 `(N, K)`: for tests, and for what is read by rows."""
    if packing.kind != "q4":
        dtype = np.dtype("<f2" if packing.kind == "f16" else "<f4")
        values = data.view(dtype).reshape(packing.groups, packing.columns, ROWS)
        whole = values.transpose(0, 2, 1).reshape(-1, packing.columns).astype(np.float32)
        return np.ascontiguousarray(whole[: packing.rows])
    parts = data.reshape(packing.groups, packing.blocks, packing.block_bytes)
    stored = np.ascontiguousarray(parts[:, :, : packing.scale_bytes])
    if packing.scale == "bf16":
        scale = (stored.view("<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        scale = stored.view("<f2" if packing.scale == "f16" else "<f4").astype(np.float32)
    codes = parts[:, :, packing.scale_bytes :].reshape(packing.groups, packing.blocks, -1, ROWS, 4)
    both = np.stack([codes & 15, codes >> 4], axis=4)  # (groups, blocks, eights, rows, half, 4)
    ordered = both.transpose(0, 3, 1, 2, 4, 5).reshape(packing.groups, ROWS, packing.blocks, -1)
    values = (ordered.astype(np.float32) - packing.zero) * scale.transpose(0, 2, 1)[..., None]
    whole = values.reshape(packing.groups * ROWS, -1)
    return np.ascontiguousarray(whole[: packing.rows, : packing.columns])


def _tiles(rows: int) -> list[tuple[int, int]]:
    return [(i, min(i + _TILE_ROWS, rows)) for i in range(0, rows, _TILE_ROWS)]


def _scales(packing: Packing, scale: NDArray[np.float32]) -> NDArray[np.uint8]:
    """`(groups, blocks, 16)` -> bytes `(groups, blocks, scale_bytes)`.

    Raises: UnsupportedBundle.
    """
    whole = np.ascontiguousarray(scale)
    if packing.scale == "bf16":
        bits = whole.view(np.uint32)
        if (bits & 0xFFFF).any():
            raise UnsupportedBundle(
                "scales of a float32 quantization are not bfloat16",
                expected="values as MLC's files hold them (f32-to-bf16)",
            )
        return (bits >> 16).astype("<u2").view(np.uint8)
    return whole.astype("<f2" if packing.scale == "f16" else "<f4").view(np.uint8)


def _interleaved(words: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Eight nibbles, lowest first -> four bytes: nibble i low and nibble i + 4 high in byte i."""
    low, high = _spread(words & np.uint32(0xFFFF)), _spread(words >> np.uint32(16))
    return low | high << np.uint32(4)


def _spread(x: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Four nibbles to the low halves of four bytes."""
    x = (x | x << np.uint32(8)) & np.uint32(0x00FF00FF)
    return (x | x << np.uint32(4)) & np.uint32(0x0F0F0F0F)


def _nibbles(words: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Ten codes of 3 bits a word -> eight nibbles a word, in the same order."""
    shifts = np.arange(0, 30, 3, dtype=np.uint32)
    codes = (words[:, :, None] >> shifts & np.uint32(7)).astype(np.uint32)
    eights = codes.reshape(len(words), -1, 8) << np.arange(0, 32, 4, dtype=np.uint32)
    joined: NDArray[np.uint32] = np.bitwise_or.reduce(eights, axis=-1)
    return joined


def _check(packing: Packing, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if tuple(found) != expected:
        raise UnsupportedBundle(
            f"a matrix to be packed as {packing.id} has another shape",
            expected=str(expected),
            found=str(tuple(found)),
        )
