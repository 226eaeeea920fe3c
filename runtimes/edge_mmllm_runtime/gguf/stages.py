"""The stages before the decoder of a GGUF bundle: loaded when used, given back when told."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from edge_mmllm.errors import CorruptBundle
from edge_mmllm.spec import ModelSpec
from edge_mmllm_runtime.engine import Float32
from edge_mmllm_runtime.gguf.llama import Model

if TYPE_CHECKING:
    from edge_mmllm_runtime.gguf.media import Projector


class Stages:
    """The files of the stages, of which one may be loaded.

    Args:
        files: stage -> its file; stages may share one.
        model: the backbone.
    """

    def __init__(
        self, spec: ModelSpec, files: Mapping[str, Path], model: Model, threads: int
    ) -> None:
        self._spec, self._files, self._model = spec, dict(files), model
        self._threads = threads
        self._loaded: dict[Path, Projector] = {}

    def load(self, name: str) -> bool:
        """Loads a stage, if it is not loaded; whether it had to be. Raises: CorruptBundle."""
        path = self._path(name)
        if path in self._loaded:
            return False
        from edge_mmllm_runtime.gguf.media import Projector
        from edge_mmllm_runtime.gguf.native import NativeProjector

        kinds = {m.layout.get("kind") for m in self._spec.modalities.values()}
        made = NativeProjector if kinds == {"native"} else Projector
        self._loaded[path] = made(self._spec, path, self._model, threads=self._threads)
        return True

    def projector(self, name: str) -> Projector:
        """What a stage's file holds, loaded. Raises: CorruptBundle."""
        self.load(name)
        return self._loaded[self._path(name)]

    def run(self, name: str, inputs: Mapping[str, NDArray[Any]]) -> Float32:
        """What a stage gives. Raises: SessionError, CorruptBundle."""
        return self.projector(name).encode(inputs)

    def release(self, name: str) -> bool:
        """Gives a stage's memory back; whether it was loaded."""
        path = self._files.get(name)
        found = None if path is None else self._loaded.pop(path, None)
        if found is not None:
            found.close()
        return found is not None

    def close(self) -> None:
        """Gives all memory back."""
        for name in list(self._files):
            self.release(name)

    def _path(self, name: str) -> Path:
        if name not in self._files:
            known = ", ".join(["decoder", *self._files])
            raise CorruptBundle(f"a GGUF bundle has no stage `{name}`", expected=known)
        return self._files[name]
