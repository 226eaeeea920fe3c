"""A session's state set aside: in memory, or in a file bound to its bundle."""

from __future__ import annotations

import os
import zipfile
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_mmllm.errors import StateMismatch
from edge_mmllm_runtime.engine import Arrays, Float32

_FORMAT = 1

#: What numpy and zipfile raise for files that are something else.
_DAMAGE = (ValueError, TypeError, AttributeError, KeyError, EOFError, zipfile.BadZipFile)


@dataclass(frozen=True)
class Snapshot:
    """What `Session.restore` needs. It may be restored any number of times.

    Attributes:
        bundle_sha256: the bundle it belongs to.
        position: tokens in the state.
        states: name -> copy; of states that grow, the first `position` tokens.
        logits: float32 `(vocab,)` of the last token, if it was computed.
        tokens: ids in the state (-1 for an embedding), None where they are no longer known.
    """

    bundle_sha256: str
    position: int
    states: Arrays
    logits: Float32 | None
    tokens: array[int] | None

    @property
    def size_bytes(self) -> int:
        """Bytes of the states."""
        return sum(a.nbytes for a in self.states.values())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes an uncompressed `.npz` archive, whole or not at all."""
        extra: Arrays = {
            "format": np.array(_FORMAT),
            "bundle_sha256": np.array(self.bundle_sha256),
            "position": np.array(self.position),
        }
        if self.logits is not None:
            extra["logits"] = self.logits
        if self.tokens is not None:
            extra["tokens"] = np.array(self.tokens, np.int32)
        path = Path(path)
        partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with partial.open("wb") as file:
                np.savez(
                    file,
                    **{f"state.{n}": a for n, a in self.states.items()},
                    allow_pickle=False,
                    **extra,
                )
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Snapshot:
        """Reads what `save` wrote; nothing is unpickled.

        Raises:
            StateMismatch: the file is not a snapshot of this release.
            OSError: it cannot be read.
        """
        try:
            with Path(path).open("rb") as file, np.load(file, allow_pickle=False) as data:
                if int(data["format"]) != _FORMAT:
                    raise ValueError(f"format {int(data['format'])}")
                tokens = None
                if "tokens" in data:
                    tokens = array("i", np.asarray(data["tokens"], np.int32).tobytes())
                return cls(
                    bundle_sha256=str(data["bundle_sha256"]),
                    position=int(data["position"]),
                    states={n[6:]: data[n] for n in data.files if n.startswith("state.")},
                    logits=data.get("logits"),
                    tokens=tokens,
                )
        except (
            ValueError,
            TypeError,
            AttributeError,
            KeyError,
            EOFError,
            zipfile.BadZipFile,
        ) as error:
            raise StateMismatch(
                "not a snapshot file of this release", where=str(path), found=str(error)
            ) from error
