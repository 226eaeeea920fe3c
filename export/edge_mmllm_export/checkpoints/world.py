"""The RWKV World vocabulary beside a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edge_mmllm.errors import CheckpointError, CorruptCheckpoint
from edge_mmllm.spec import TextSpec
from edge_mmllm.text.world import END_OF_TEXT, WorldTokenizer

from .base import TensorInfo, TextAssets

#: Embeddings of RWKV in each layout; their rows bound the ids.
_EMBEDDINGS = ("emb.weight", "model.embeddings.weight", "rwkv.embeddings.weight")


def load_world(content: bytes, where: str, rows: int, *, strict: bool = True) -> TextAssets | None:
    """Settings of a World vocabulary for a model of `rows` embeddings.

    Args:
        strict: False: None where the vocabulary has more ids than that.

    Raises: CorruptCheckpoint.
    """
    try:
        size = WorldTokenizer(content).size
    except ValueError as error:
        raise CorruptCheckpoint(
            "the RWKV vocabulary cannot be read", where=where, found=str(error)
        ) from error
    if size <= rows:
        return TextAssets(TextSpec("rwkv-world", eos_ids=(END_OF_TEXT,)), content)
    if not strict:
        return None
    raise CorruptCheckpoint(
        "the vocabulary has more ids than the model has embeddings",
        where=where,
        expected=f"ids below {rows}",
        found=f"ids up to {size - 1}",
    )


def world_text(
    directory: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> TextAssets | None:
    """`vocab_file` of the config, or the one `rwkv_vocab*.txt` in the folder of an RWKV.

    A vocabulary that only lies there counts if the model has rows for all of it: byte-level
    models lie beside the World vocabulary too.

    Raises: CheckpointError (absent, or several), CorruptCheckpoint.
    """
    rows = next((tensors[n].shape[0] for n in _EMBEDDINGS if n in tensors), None)
    if rows is None:
        return None
    named = config.get("vocab_file")
    if named is not None:
        if not isinstance(named, str) or Path(named).name != named:
            raise CorruptCheckpoint(
                "the config's vocab_file is not a plain file name", found=repr(named)[:200]
            )
        paths = [directory / named]
    else:
        paths = sorted(directory.glob("rwkv_vocab*.txt"))
    if len(paths) > 1:
        raise CheckpointError(
            f"{directory} holds several vocabularies",
            found=", ".join(p.name for p in paths),
            fix="name one with --tokenizer PATH",
        )
    if not paths:
        return None
    try:
        content = paths[0].read_bytes()
    except OSError as error:
        raise CheckpointError(
            "the vocabulary cannot be read", where=str(paths[0]), found=str(error)
        ) from error
    return load_world(content, str(paths[0]), rows, strict=named is not None)
