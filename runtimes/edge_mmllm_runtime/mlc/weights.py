"""The weight files of MLC: `tensor-cache.json` and `params_shard_N.bin`, read with distrust.

`tensor-cache.json` is one JSON object:

    {"metadata": {...},
     "records": [{"dataPath": "params_shard_0.bin", "format": "raw-shard", "nbytes": ..,
                  "md5sum": "..",
                  "records": [{"name", "shape", "dtype", "format", "nbytes", "byteOffset"}]}]}

A shard is its tensors one after another, row-major, little-endian, without padding. A float32
tensor of format `f32-to-bf16` lies there as bfloat16, the upper half of each float32; `raw` and
every other dtype are plain bytes.

Group quantization `(N, K)`: `q_scale (N, groups)`, one for each `group` weights along K, and
`q_weight` uint32 `(N, words)`, as many whole codes a word as fit, lowest K in the lowest bits:
`w = (code - zero) * scale` with `zero = 2^(bits-1) - 1`. K is padded to whole groups. The layouts
of `q4f16_0` are transposed, but for an embedding's.

Source: mlc-llm, `quantization/group_quantization.py`; tvm 0.27, `contrib/tvmjs.py`.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from edge_mmllm._fields import Fields, parse_object
from edge_mmllm.bundle.paths import check_relative
from edge_mmllm.errors import CorruptBundle, UsageError

INDEX = "tensor-cache.json"
#: The same index under its name before 2025.
OLD_INDEX = "ndarray-cache.json"
#: An index holds about 200 bytes a tensor; a larger one is hostile or broken.
MAX_INDEX_BYTES = 64 << 20

Float32 = NDArray[np.float32]
UInt32 = NDArray[np.uint32]
#: How our values are made of stored ones: as they lie, transposed, their logarithm, or 1 - x.
Undo = Literal["same", "transposed", "log", "one_minus"]

#: Stored dtype -> numpy's; bfloat16 is read as its bits.
_DTYPES = {
    "float32": "<f4",
    "float16": "<f2",
    "bfloat16": "<u2",
    "uint32": "<u4",
    "int32": "<i4",
    "int64": "<i8",
    "uint8": "|u1",
    "int8": "|i1",
}


@dataclass(frozen=True)
class Quantization:
    """One of mlc-llm's names.

    Attributes:
        bits: of a code; 0: nothing is quantized.
        group: weights along K that share a scale.
        half: scales, and what is not quantized, are float16, else float32 (as bfloat16).
        transposed: `q_weight` and `q_scale` of matrices have K first.
        ends: embedding and head are quantized too.
    """

    name: str
    bits: int
    group: int
    half: bool
    transposed: bool = False
    ends: bool = True

    @property
    def zero(self) -> int:
        """The code of 0, also the largest magnitude."""
        return (1 << (self.bits - 1)) - 1

    @property
    def a_word(self) -> int:
        """Codes in a uint32."""
        return 32 // self.bits

    def groups(self, k: int) -> int:
        """Scales of a row of k weights."""
        return -(-k // self.group)

    def words(self, k: int) -> int:
        """uint32 of a row of k weights."""
        return self.groups(k) * self.group // self.a_word


QUANTIZATIONS = {
    q.name: q
    for q in (
        Quantization("q0f16", 0, 1, half=True),
        Quantization("q0f32", 0, 1, half=False),
        Quantization("q3f16_1", 3, 40, half=True),
        Quantization("q4f16_0", 4, 32, half=True, transposed=True),
        Quantization("q4f16_1", 4, 32, half=True),
        Quantization("q4f16_2", 4, 32, half=True, ends=False),
        Quantization("q4f32_1", 4, 32, half=False),
    )
}


def to_bfloat16(values: Float32) -> NDArray[np.uint16]:
    """Float32 -> bits of bfloat16, to nearest, ties to even; what lies beyond its range is cut
    to its largest, as tvm does."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    bias = ((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF)
    bias[(bits & np.uint32(0x7FFFFFFF)) >= np.uint32(0x7F7F0000)] = 0
    return ((bits + bias) >> np.uint32(16)).astype(np.uint16)


def from_bfloat16(bits: NDArray[np.uint16]) -> Float32:
    """Bits of bfloat16 -> float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def dequantize(q_weight: UInt32, q_scale: NDArray[Any], k: int, quant: Quantization) -> Float32:
    """Words `(N, words)` and scales `(N, groups)` -> float32 `(N, k)`."""
    shifts = np.arange(quant.a_word, dtype=np.uint32) * np.uint32(quant.bits)
    codes = (q_weight[..., None] >> shifts) & np.uint32((1 << quant.bits) - 1)
    grouped = codes.reshape(len(q_weight), -1, quant.group).astype(np.float32)
    values = (grouped - np.float32(quant.zero)) * q_scale.astype(np.float32)[..., None]
    return np.ascontiguousarray(values.reshape(len(q_weight), -1)[:, :k])


@dataclass(frozen=True)
class Tensor:
    """A stored tensor.

    Attributes:
        dtype: of its values; a bfloat16 encoding of float32 is no dtype of its own.
        encoded: float32 that lies there as bfloat16.
        shard: index of its file.
        offset, size_bytes: its bytes there.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    encoded: bool
    shard: int
    offset: int
    size_bytes: int


@dataclass(frozen=True)
class Shard:
    """One data file."""

    file: str
    size_bytes: int
    md5: str


@dataclass(frozen=True)
class View:
    """A tensor of ours, made of rows of a stored one.

    Attributes:
        tensor: the stored one.
        start, stop: its rows, along the first axis; of a transposed one after its last two axes
            are swapped back (and what is before them is joined with the first of these).
        shape: of the result.
        undo: what was done to our values when they were stored.
    """

    tensor: str
    start: int
    stop: int
    shape: tuple[int, ...]
    undo: Undo = "same"

    @classmethod
    def from_json(cls, fields: Fields) -> View:
        """Reads one entry of `engine_format.views`. Raises: CorruptBundle."""
        return cls(
            fields.text("tensor"),
            fields.integer("start"),
            fields.integer("stop"),
            fields.integers("shape"),
            cast("Undo", fields.one_of("undo", get_args(Undo))),
        )


class WeightFiles:
    """Opened weight files; tensors are mapped, not loaded.

    Args:
        locate: path of a file of the bundle by its name (`Bundle.file`), or the folder.
        views: our weights, by our names, where they are stored under others.

    Raises:
        CorruptBundle: the index, or a file's size, is not what it should be; the message says
            where.
    """

    def __init__(
        self,
        locate: Callable[[str], Path] | str | os.PathLike[str],
        *,
        index: str = INDEX,
        views: Mapping[str, View] | None = None,
    ) -> None:
        self._locate = locate if callable(locate) else _in_folder(Path(locate))
        self.metadata: dict[str, Any] = {}
        self.shards: list[Shard] = []
        self.tensors: dict[str, Tensor] = {}
        self._maps: list[mmap.mmap | None] = []
        self._read_index(index)
        self.views = dict(views or {})
        for name, view in self.views.items():
            self._check_view(name, view)

    def __enter__(self) -> WeightFiles:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unmaps the files, once no array of `read` is left."""
        self._maps = []

    def read(self, name: str) -> NDArray[Any]:
        """A view or, where there is none of that name, a stored tensor: uint32, float16 or float32
        (bfloat16 expanded), C-contiguous and aligned. What needs no work is a read-only array over
        the mapped file.

        Raises:
            UsageError: there is none of that name.
        """
        if name in self.views:
            return self._view(self.views[name])
        return self._rows(self._tensor(name), 0, None)

    def matrix(self, name: str, k: int, quant: Quantization) -> Float32:
        """The float32 `(N, k)` of a group-quantized matrix, from `NAME.q_weight` and its scales."""
        return dequantize(self.read(f"{name}.q_weight"), self.read(f"{name}.q_scale"), k, quant)

    def check_md5(self) -> None:
        """Compares every file with its md5, which the index gives. Raises: CorruptBundle."""
        for shard in self.shards:
            digest = hashlib.md5(usedforsecurity=False)
            with self._locate(shard.file).open("rb", buffering=0) as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
            if digest.hexdigest() != shard.md5:
                raise CorruptBundle(
                    "a file of weights has changed since it was written",
                    where=shard.file,
                    expected=f"md5 {shard.md5}",
                    found=digest.hexdigest(),
                    fix="copy the bundle again",
                )

    # -- reading ----------------------------------------------------------------------------

    def _tensor(self, name: str) -> Tensor:
        found = self.tensors.get(name)
        if found is None:
            raise UsageError(f"the weight files have no tensor {name!r}", where=INDEX)
        return found

    def _rows(self, t: Tensor, start: int, stop: int | None) -> NDArray[Any]:
        dtype = np.dtype("<u2" if t.encoded else _DTYPES[t.dtype])
        count = math.prod(t.shape)
        data: memoryview | mmap.mmap | bytes = self._map(t.shard) if count else b""
        flat = np.frombuffer(data, np.uint8, t.size_bytes, t.offset if count else 0)
        values: NDArray[Any] = flat.view(dtype).reshape(t.shape)
        if t.shape:
            values = values[start:stop]
        if t.encoded or t.dtype == "bfloat16":
            return from_bfloat16(np.ascontiguousarray(values))
        return values if values.flags.aligned else values.copy()

    def _map(self, shard: int) -> mmap.mmap:
        mapped = self._maps[shard] if self._maps else None
        if mapped is None:
            if not self._maps:
                self._maps = [None] * len(self.shards)
            with self._locate(self.shards[shard].file).open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._maps[shard] = mapped
        return mapped

    def _view(self, view: View) -> NDArray[Any]:
        tensor = self._tensor(view.tensor)
        if view.undo == "transposed":
            swapped = self._rows(tensor, 0, None).swapaxes(-1, -2)
            if swapped.ndim > 2:
                swapped = swapped.reshape(-1, swapped.shape[-1])
            return np.ascontiguousarray(swapped[view.start : view.stop]).reshape(view.shape)
        values = self._rows(tensor, view.start, view.stop).reshape(view.shape)
        if view.undo == "log":
            return np.log(values.astype(np.float32))
        if view.undo == "one_minus":
            return np.asarray(1 - values.astype(np.float32), np.float32)
        return values

    # -- the index --------------------------------------------------------------------------

    def _read_index(self, index: str) -> None:
        path = self._locate(index)
        try:
            if path.stat().st_size > MAX_INDEX_BYTES:
                raise CorruptBundle(
                    "the index of the weights is too large",
                    where=index,
                    expected=f"at most {MAX_INDEX_BYTES} bytes",
                )
            fields = Fields(parse_object(path.read_bytes(), index), index)
        except OSError as error:
            raise CorruptBundle(
                "the index of the weights cannot be read", where=str(path), found=error.strerror
            ) from error
        self.metadata = fields.mapping("metadata", required=False)
        for number, child in enumerate(fields.children("records")):
            child.one_of("format", ("raw-shard",))
            shard = Shard(
                check_relative(child.text("dataPath"), child.path("dataPath")),
                child.integer("nbytes", least=1),
                child.maybe_text("md5sum") or "",
            )
            self._check_size(shard, child)
            self.shards.append(shard)
            for record in child.children("records"):
                tensor = _tensor_record(record, number, shard)
                if tensor.name in self.tensors:
                    raise record.fail("name", "each tensor once")
                self.tensors[tensor.name] = tensor

    def _check_size(self, shard: Shard, child: Fields) -> None:
        try:
            found = self._locate(shard.file).stat().st_size
        except OSError as error:
            raise CorruptBundle(
                "a file of weights is missing", where=shard.file, found=error.strerror
            ) from error
        if found != shard.size_bytes:
            raise CorruptBundle(
                "a file of weights has another size than the index says",
                where=child.path("nbytes"),
                expected=f"{shard.size_bytes} bytes",
                found=f"{found} bytes",
                fix="copy the bundle again",
            )

    def _check_view(self, name: str, view: View) -> None:
        tensor = self.tensors.get(view.tensor)
        shape = tensor.shape if tensor is not None else ()
        if view.undo == "transposed" and len(shape) > 1:
            shape = (math.prod(shape[:-2]) * shape[-1], shape[-2])
        fits = len(shape) > (view.undo == "transposed") and 0 <= view.start < view.stop <= shape[0]
        if not fits or math.prod(shape[1:]) * (view.stop - view.start) != math.prod(view.shape):
            raise CorruptBundle(
                "a view does not fit the tensor it is of",
                where=f"engine_format.views.{name}",
                expected=f"rows of a tensor that make {view.shape}",
                found=f"rows {view.start} to {view.stop} of "
                + (f"{view.tensor} {tensor.shape}" if tensor else f"no tensor {view.tensor!r}"),
            )


def read_views(engine_format: Mapping[str, Any], where: str = "engine_format") -> dict[str, View]:
    """`engine_format.views` of a manifest, `{}` where absent. Raises: CorruptBundle."""
    fields = Fields(engine_format, where)
    if "views" not in fields.value:
        return {}
    views = fields.child("views")
    return {name: View.from_json(views.child(name)) for name in views.value}


def _tensor_record(fields: Fields, shard: int, file: Shard) -> Tensor:
    dtype = fields.one_of("dtype", tuple(_DTYPES))
    encoded = fields.one_of("format", ("raw", "f32-to-bf16")) == "f32-to-bf16"
    encoded = encoded and dtype == "float32"
    shape = fields.integers("shape")
    size = 2 if encoded else np.dtype(_DTYPES[dtype]).itemsize
    if fields.integer("nbytes") != math.prod(shape) * size:
        raise fields.fail("nbytes", f"{math.prod(shape) * size}, for shape {shape} of {dtype}")
    offset, nbytes = fields.integer("byteOffset"), fields.integer("nbytes")
    if offset + nbytes > file.size_bytes:
        raise fields.fail("byteOffset", f"a place inside the {file.size_bytes} bytes of the file")
    return Tensor(fields.text("name"), shape, dtype, encoded, shard, offset, nbytes)


def _in_folder(folder: Path) -> Callable[[str], Path]:
    return lambda name: folder.joinpath(*check_relative(name, "weight files").split("/"))
