"""A part of a checkpoint, seen as a checkpoint of its own: another config, other names.

A multimodal checkpoint holds a language model under a prefix. Through a view, the definition of
that language model reads its own config and its own names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_mmllm_export.checkpoints.base import Checkpoint, Float32, Layout, TensorInfo, TextAssets


@dataclass(frozen=True)
class Renames:
    """How a component's own names are written in a checkpoint.

    Attributes:
        pairs: (its own prefix, the checkpoint's prefix), the first that fits counts.
    """

    pairs: tuple[tuple[str, str], ...]

    def theirs(self, name: str) -> str:
        """The checkpoint's name; a pattern that begins with `*` stays."""
        if not name.startswith("*"):
            for own, their in self.pairs:
                if name.startswith(own):
                    return their + name[len(own) :]
        return name

    def ours(self, name: str) -> str | None:
        """The component's own name of a checkpoint's tensor; None for another's tensor."""
        for own, their in self.pairs:
            if name.startswith(their):
                return own + name[len(their) :]
        return None


class CheckpointView:
    """See the module.

    Args:
        whole: the checkpoint.
        config: the part's config.
        renames: its names.
    """

    def __init__(self, whole: Checkpoint, config: dict[str, Any], renames: Renames) -> None:
        self._whole, self._config, self._renames = whole, config, renames
        self.source: Path = whole.source
        self.layout: Layout = whole.layout
        named = ((renames.ours(name), info) for name, info in whole.tensors.items())
        self._tensors = {name: info for name, info in named if name is not None}

    @property
    def config(self) -> dict[str, Any]:
        """The part's config."""
        return self._config

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The part's tensors by its own names."""
        return self._tensors

    @property
    def files(self) -> tuple[Path, ...]:
        """The weight files of the whole."""
        return self._whole.files

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Float32:
        """See `Checkpoint.read`."""
        return self._whole.read(self._renames.theirs(name), start, stop)

    def text(self) -> TextAssets:
        """The whole's text settings."""
        return self._whole.text()

    def close(self) -> None:
        """Closes nothing: the whole is its owner's."""
