"""Checkpoint readers: `open_checkpoint(SRC)` for whatever a user calls a checkpoint."""

from __future__ import annotations

from pathlib import Path

from edge_mmllm.errors import CheckpointError

from .base import Checkpoint, Float32, Layout, TensorInfo, TextAssets
from .download import is_hub_id, snapshot

__all__ = ["Checkpoint", "Float32", "Layout", "TensorInfo", "TextAssets", "open_checkpoint"]

#: Weight files by suffix.
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".gguf")

#: Names that make a directory hub layout, best first: a folder with both formats holds the same
#: weights twice, and safetensors need no pickle.
_HUB_NAMES = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)


def open_checkpoint(src: str | Path, lora: str | Path | None = None) -> Checkpoint:
    """Opens a checkpoint; nothing but headers is read.

    Args:
        src: a directory in hub layout (`model.safetensors` or `pytorch_model.bin`, or their
            `.index.json` with shards), a directory with exactly one weight file of another name,
            a weight file (`.safetensors`, `.pth`, `.pt`, `.bin`, `.gguf`), or a hub id `org/name`.
        lora: folder of a LoRA adapter to merge in (see `lora.py`).

    Raises: CheckpointError (absent, ambiguous, unreadable), MissingDependency.
    """
    if lora is not None:
        from .lora import LoraCheckpoint

        return LoraCheckpoint(open_checkpoint(src), Path(lora))
    path = Path(src)
    if not path.exists():
        if isinstance(src, str) and is_hub_id(src):
            return _open_directory(snapshot(src))
        raise CheckpointError(
            f"no such checkpoint: {src}",
            expected="a directory, a weight file or a hub id such as org/name",
            fix="check the path",
        )
    return _open_directory(path) if path.is_dir() else _open_file(path, path)


def _open_directory(directory: Path) -> Checkpoint:
    for names in _HUB_NAMES:
        present = [directory / name for name in names if (directory / name).is_file()]
        if len(present) > 1:
            raise _ambiguous(directory, present)
        if present:
            return _open_hub(directory, present[0])
    candidates = sorted(p for p in directory.iterdir() if p.suffix in SUFFIXES and p.is_file())
    if len(candidates) > 1:
        raise _ambiguous(directory, candidates)
    if not candidates:
        raise CheckpointError(
            f"no weights in {directory}",
            expected="model.safetensors, pytorch_model.bin, their .index.json, "
            "or one .safetensors, .pth or .gguf",
            found=", ".join(sorted(p.name for p in directory.iterdir())[:10]) or "an empty folder",
        )
    return _open_file(candidates[0], directory)


def _ambiguous(directory: Path, candidates: list[Path]) -> CheckpointError:
    return CheckpointError(
        f"{directory} holds several checkpoints",
        found=", ".join(p.name for p in candidates),
        fix="name one of the files, or remove the others",
    )


def _open_hub(directory: Path, weights: Path) -> Checkpoint:
    if not weights.name.endswith(".index.json"):
        return _open_file(weights, directory)
    from .hub import open_index

    if weights.name.startswith("pytorch_model"):
        from .torch_zip import TorchZipFile

        return open_index(weights, TorchZipFile)
    from .safetensors import SafetensorsFile

    return open_index(weights, SafetensorsFile)


def _open_file(path: Path, source: Path) -> Checkpoint:
    """One weight file; `source` is what the user named."""
    if path.suffix == ".gguf":
        from .gguf import GgufCheckpoint

        return GgufCheckpoint(path, source)
    from .hub import FilesCheckpoint

    if path.suffix == ".safetensors":
        from .safetensors import SafetensorsFile

        return FilesCheckpoint(source, "hub", [SafetensorsFile(path)])
    if path.suffix in (".pth", ".pt", ".bin"):
        from .torch_zip import TorchZipFile

        layout: Layout = "hub" if path.suffix == ".bin" else "pth"
        return FilesCheckpoint(source, layout, [TorchZipFile(path)])
    raise CheckpointError(
        f"{path.name} is not a checkpoint this release reads",
        where=str(path),
        expected=", ".join(SUFFIXES),
        found=path.suffix or "no suffix",
    )
