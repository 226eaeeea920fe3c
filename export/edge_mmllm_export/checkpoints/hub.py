"""A hub-layout directory, or any set of weight files beside a `config.json`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from edge_mmllm.errors import CorruptCheckpoint, TensorMismatch

from .base import Float32, Layout, TensorInfo, TextAssets
from .files import TensorFile, lookup, read_json
from .text import hub_text
from .world import world_text


class FilesCheckpoint:
    """Tensors of one file, or of the shards of an index, under one roof.

    Attributes:
        source: what the user named (directory or file).
        layout: `hub` or `pth`.
    """

    def __init__(
        self,
        source: Path,
        layout: Layout,
        parts: Sequence[TensorFile],
        *,
        weight_map: Mapping[str, TensorFile] | None = None,
    ) -> None:
        """Args:
        source: what the user named.
        layout: `hub` or `pth`.
        parts: the opened files, in order.
        weight_map: tensor name -> file, as an index says; None = all tensors of the one file.
        """
        self.source, self.layout = source, layout
        self._parts = tuple(parts)
        self._owner = weight_map or {name: part for part in parts for name in part.tensors}
        self._tensors = {name: part.tensors[name] for name, part in self._owner.items()}

    @property
    def directory(self) -> Path:
        """Where `config.json` and the tokenizer lie."""
        return self._parts[0].path.parent

    @cached_property
    def config(self) -> dict[str, Any]:
        """`config.json` beside the weights, or `{}`."""
        path = self.directory / "config.json"
        return read_json(path) if path.is_file() else {}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by its stored name."""
        return self._tensors

    @property
    def files(self) -> tuple[Path, ...]:
        """The weight files, for hashing."""
        return tuple(part.path for part in self._parts)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Float32:
        """Rows `[start, stop)` of the first axis as float32. Thread-safe."""
        lookup(self._tensors, name, self.source)
        return self._owner[name].read(name, start, stop)

    def text(self) -> TextAssets:
        """Tokenizer and its settings, from the files beside the weights."""
        assets = hub_text(self.directory, self.config)
        if assets.tokenizer_json is None:
            return world_text(self.directory, self.config, self._tensors) or assets
        return assets

    def close(self) -> None:
        """Closes every file."""
        for part in self._parts:
            part.close()


def open_index(index: Path, open_file: Callable[[Path], TensorFile]) -> FilesCheckpoint:
    """A sharded checkpoint: `{"weight_map": {tensor: file name}}`.

    Raises: CorruptCheckpoint for a malformed index or missing shards, TensorMismatch where the
    shards lack tensors the index names; every missing one is listed.
    """
    weight_map = read_json(index).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(file, str) for file in weight_map.values())
    ):
        raise CorruptCheckpoint(
            f"{index.name} has no usable weight_map",
            where=str(index),
            expected='{"weight_map": {tensor name: file name}}',
        )
    names = sorted(set(weight_map.values()))
    outside = [n for n in names if n != Path(n).name or "\\" in n or n in ("", ".", "..")]
    if outside:
        raise CorruptCheckpoint(
            f"{index.name} names files outside its folder",
            where=str(index),
            expected="plain file names",
            found=", ".join(map(repr, outside)),
        )
    missing = [n for n in names if not (index.parent / n).is_file()]
    if missing:
        raise CorruptCheckpoint(
            f"{len(missing)} of {len(names)} shards are missing",
            where=str(index.parent),
            expected="every file of " + index.name,
            found="missing: " + ", ".join(missing),
            fix="download them again",
        )
    opened: dict[str, TensorFile] = {}
    try:
        for name in names:
            opened[name] = open_file(index.parent / name)
        absent = [f"{t} ({f})" for t, f in weight_map.items() if t not in opened[f].tensors]
        if absent:
            raise TensorMismatch(
                f"{len(absent)} tensors of {index.name} are not in their shards",
                where=str(index.parent),
                found="missing: " + ", ".join(absent),
                fix="index and shards belong to different downloads: download both again",
            )
    except BaseException:
        for part in opened.values():
            part.close()
        raise
    owners = {tensor: opened[file] for tensor, file in weight_map.items()}
    return FilesCheckpoint(index.parent, "hub", list(opened.values()), weight_map=owners)
