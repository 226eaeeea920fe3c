"""The parameters of a model library, made of a bundle's weight files when it is loaded.

All lie in one block of memory, each at a multiple of 64 bytes; the block asks for large pages,
since a step reads every weight once.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_mmllm.errors import CorruptBundle, EdgeError, UnsupportedBundle
from edge_mmllm_runtime.mlc.packing import Packing, pack_float, pack_q4
from edge_mmllm_runtime.mlc.weights import WeightFiles
from edge_mmllm_runtime.state import ALIGNMENT

_FLOAT32 = "float32"


def load_parameters(
    listed: Iterable[Mapping[str, Any]], files: WeightFiles
) -> dict[str, NDArray[Any]]:
    """Reads and packs every parameter of a library.

    Args:
        listed: of the library's metadata.

    Raises:
        CorruptBundle: the weight files do not hold what the library wants.
    """
    listed = list(listed)
    sizes = [
        int(np.prod(p["shape"], dtype=np.int64)) * np.dtype(p["dtype"]).itemsize for p in listed
    ]
    block = _block(sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes))
    out, start = {}, 0
    for parameter, size in zip(listed, sizes, strict=True):
        place = block[start : start + size].view(parameter["dtype"]).reshape(parameter["shape"])
        start += -(-size // ALIGNMENT) * ALIGNMENT
        try:
            place[...] = packed(parameter, files.read)
        except (ValueError, KeyError, EdgeError) as error:
            raise CorruptBundle(
                "the weight files do not fit the model library",
                where=str(parameter["name"]),
                expected=f"{parameter['layout']} {parameter['size']}",
                found=str(error)[:300],
                fix="export the model again",
            ) from error
        out[parameter["name"]] = place
    return out


def packed(parameter: Mapping[str, Any], read: Callable[[str], NDArray[Any]]) -> NDArray[Any]:
    """The value of one parameter.

    Args:
        read: the value of a tensor by its name: uint32, float16 or float32.

    Raises:
        UnsupportedBundle, ValueError: the tensors do not fit.
    """
    parts = [read(name) for name in parameter["tensors"]]
    size = tuple(parameter["size"])
    if parameter["layout"] == _FLOAT32:
        return np.asarray(parts[0], np.float32).reshape(size)
    packing = Packing.of(parameter["layout"], *size)
    if packing.kind == "q4":
        return pack_q4(packing, *parts)
    return pack_float(packing, parts[0].reshape(size))


def _block(size: int) -> NDArray[np.uint8]:
    if hasattr(mmap, "MAP_PRIVATE"):  # Linux gives large pages to private memory only
        memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    else:
        memory = mmap.mmap(-1, max(size, 1))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without large pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


def library_path(
    engine_format: Mapping[str, Any], runnable: Callable[[Mapping[str, Any]], bool]
) -> str:
    """The library for this machine, by `engine_format.libraries` and `.needs`: of those that run
    here the one that asks for most.

    Raises:
        CorruptBundle: none are listed.
        UnsupportedBundle: none is for this machine.
    """
    libraries, needs = engine_format.get("libraries"), engine_format.get("needs")
    if not isinstance(libraries, dict) or not isinstance(needs, dict):
        raise CorruptBundle(
            "the bundle names no model libraries",
            where="engine_format",
            expected="libraries, needs",
        )
    fitting = [name for name in libraries if runnable(_object(needs.get(name)))]
    if not fitting:
        raise UnsupportedBundle(
            "the bundle has no model library for this machine",
            where="engine_format.libraries",
            found=", ".join(libraries),
            fix="export the model with --target native here, or with this device's --target",
        )
    best = max(fitting, key=lambda name: len(_object(needs.get(name)).get("flags", [])))
    return str(libraries[best])


def _object(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
