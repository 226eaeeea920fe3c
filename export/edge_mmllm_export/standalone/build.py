"""`--standalone`: a language model as a C library without any runtime.

    edge_model.h        the interface (see there)
    edge_model.c        the library around the kernels: files, handles, states, threads
    edge_model_graph.h  sizes, and one step as a list of kernel calls
    kernels.o           the compiled kernels
    libedge_model.so    all of it, linked
    model.weights       header (64 bytes) and packed weights, to be mapped
    generate.c          an example

Weight file, little-endian: magic `EDGEWTS\\0`, format version u32 (1), bytes before the data u32
(64), bytes of the file u64, tensors u32, zero u32, SHA-256 of the data (32 bytes), then the
tensors as `edge_model_graph.h` places them, each at a multiple of 64 bytes, zeros between.
"""

from __future__ import annotations

import hashlib
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from edge_mmllm.errors import ExportError
from edge_mmllm_export.mlc.layout import MlcFiles
from edge_mmllm_export.mlc.library import build_library
from edge_mmllm_export.mlc.link import Linker, find_linker
from edge_mmllm_export.mlc.targets import MlcTarget
from edge_mmllm_export.ops.base import Architecture
from edge_mmllm_export.ops.relax_params import Layouts
from edge_mmllm_export.ops.tir.isa import Isa
from edge_mmllm_export.standalone.kernels import compile_kernels
from edge_mmllm_export.standalone.plan import Program, Slot, plan
from edge_mmllm_export.standalone.source import graph_header
from edge_mmllm_export.weights import Weight
from edge_mmllm_runtime.mlc.parameters import packed
from edge_mmllm_runtime.mlc.weights import WeightFiles

LIBRARY, WEIGHTS, KERNELS = "libedge_model.so", "model.weights", "kernels.o"
GRAPH = "edge_model_graph.h"
#: Copied as they are.
SOURCES = ("edge_model.h", "edge_model.c", "generate.c")
_SOURCE_FOLDER = Path(__file__).parent / "c"
_MAGIC = b"EDGEWTS\0"
_HEADER = struct.Struct("<8sIIQII32s")
_FORMAT = 1
#: What every compiler here takes. No -march: the C code is not where time goes.
_OPTIONS = ("-std=c11", "-O2", "-DEDGE_MODEL_THREADS", "-pthread", "-s")
#: Most tokens that kv states have room for: they are allocated whole. `--context` asks for fewer.
LONGEST_TOKENS = 2048
#: A parameter's array by its name.
ParameterReader = Callable[[str], NDArray[Any]]


@dataclass(frozen=True)
class Standalone:
    """What was written.

    Attributes:
        folder: holds the files named at the top of this module.
        state_bytes, scratch_bytes: what a handle allocates.
    """

    folder: Path
    target: str
    state_bytes: int
    scratch_bytes: int
    weight_bytes: int
    library_bytes: int
    kernels: int
    calls: int

    def to_json(self) -> dict[str, Any]:
        """As in a manifest: the folder by its name in the bundle."""
        return {**asdict(self), "folder": standalone_folder(self.target)}


def standalone_folder(target: str) -> str:
    """Path of a target's library in the bundle."""
    return f"standalone/{target}"


def export_standalone(
    model: Architecture,
    weights: Mapping[str, Weight],
    layouts: Layouts,
    files: MlcFiles,
    target: MlcTarget,
    root: Path,
) -> Standalone:
    """Write `standalone/TARGET/` of a bundle whose weight files lie in `root`.

    Raises: as `write_standalone`.
    """
    isa = Isa.of(target.tvm())
    library = build_library(
        model, weights, layouts, isa, quantization=files.quant.name, functions=("decode",)
    )
    grows = any(s.grows for s in model.states())
    capacity = min(model.context_length or LONGEST_TOKENS, LONGEST_TOKENS) if grows else 0
    with WeightFiles(root, views=files.views) as stored:
        return write_standalone(
            library.module,
            lambda name: packed(library.parameters[name].to_json(), stored.read),
            root / standalone_folder(target.name),
            target,
            name=model.name,
            capacity=capacity,
        )


def write_standalone(
    module: Any,
    read: ParameterReader,
    folder: Path,
    target: MlcTarget,
    *,
    name: str,
    capacity: int = 0,
    linker: Linker | None = None,
) -> Standalone:
    """Compile `decode` of a Relax module into a library of its own.

    Args:
        module: with `decode(input_ids (1,), [position (1,)], state.X..., parameters...)`.
        read: gives a parameter's array, in the shape and dtype that the function takes.
        folder: empty or new.
        name: the architecture.
        capacity: tokens that kv states hold; 0 where the model has none.
        linker: by default what `find_linker` finds.

    Raises:
        UnsupportedArchitecture: the function needs more than kernels over fixed memory.
        ExportError: no linker, or it failed; a parameter of another shape.
    """
    linker = linker or find_linker(target)
    tvm_target = target.tvm()
    program = plan(module, tvm_target, capacity)
    folder.mkdir(parents=True, exist_ok=True)
    for source in SOURCES:
        shutil.copyfile(_SOURCE_FOLDER / source, folder / source)
    digest = write_weights(folder / WEIGHTS, program, read)
    header = graph_header(program, name, _version(), digest)
    (folder / GRAPH).write_text(header, encoding="ascii")
    compile_kernels(program.kernels, tvm_target, folder / KERNELS)
    _link(folder, linker)
    return Standalone(
        folder=folder,
        target=target.name,
        state_bytes=program.state_bytes,
        scratch_bytes=program.arena_bytes,
        weight_bytes=program.weight_bytes,
        library_bytes=(folder / LIBRARY).stat().st_size,
        kernels=len(program.kernels),
        calls=len(program.calls),
    )


def write_weights(path: Path, program: Program, read: ParameterReader) -> bytes:
    """The weight file, one parameter at a time; the SHA-256 of its data."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        file.write(bytes(_HEADER.size))
        for chunk in _data(program, read):
            digest.update(chunk)
            file.write(chunk)
        _finish(file, program, digest.digest())
    return digest.digest()


def _finish(file: BinaryIO, program: Program, digest: bytes) -> None:
    size = _HEADER.size + program.weight_bytes
    if file.tell() != size:
        raise ExportError("the weight file has another size", expected=f"{size}", found=f"{file}")
    file.seek(0)
    count = len(program.parameters)
    file.write(_HEADER.pack(_MAGIC, _FORMAT, _HEADER.size, size, count, 0, digest))


def _data(program: Program, read: ParameterReader) -> Iterator[bytes]:
    at = 0
    for slot in program.parameters:
        content = _bytes(slot, read(slot.name))
        yield bytes(slot.offset - at)
        yield content
        at = slot.offset + len(content)
    yield bytes(program.weight_bytes - at)


def _bytes(slot: Slot, array: NDArray[Any]) -> bytes:
    if array.shape != slot.shape or str(array.dtype) != slot.dtype:
        raise ExportError(
            "a parameter is not what the compiled function takes",
            where=slot.name,
            expected=f"{slot.dtype} {slot.shape}",
            found=f"{array.dtype} {array.shape}",
        )
    little = np.dtype(array.dtype).newbyteorder("<")
    return np.ascontiguousarray(array, dtype=little).tobytes()


def _link(folder: Path, linker: Linker) -> None:
    """Only `edge_model_*` can be seen from outside."""
    with tempfile.TemporaryDirectory() as temporary:
        visible = Path(temporary) / "visible"
        visible.write_text("{ global: edge_model_*; local: *; };\n")
        linker.share(
            [folder / "edge_model.c", folder / KERNELS],
            folder / LIBRARY,
            [*_OPTIONS, f"-Wl,--version-script={visible}", "-lm"],
        )


def _version() -> str:
    try:
        return version("edge-mmllm")
    except PackageNotFoundError:  # run from a source tree
        return "source"
