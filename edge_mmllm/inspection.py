"""`inspect` of a bundle: what its manifest says, without loading its engine."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from edge_mmllm.bundle import Bundle, open_bundle
from edge_mmllm.spec import StateSpec


@dataclass(frozen=True)
class StateReport:
    """A state contract in short.

    Attributes:
        kinds: kind -> number of states.
        bytes_at_1k, bytes_at_8k: bytes at 1024 and 8192 tokens; equal where the state is constant.
    """

    kinds: dict[str, int]
    bytes_at_1k: int
    bytes_at_8k: int
    states: tuple[StateSpec, ...]

    @classmethod
    def of(cls, states: tuple[StateSpec, ...]) -> StateReport:
        """Sums up a contract."""
        return cls(
            kinds=dict(Counter(s.kind for s in states)),
            bytes_at_1k=sum(s.size_bytes(1024) for s in states),
            bytes_at_8k=sum(s.size_bytes(8192) for s in states),
            states=states,
        )


@dataclass(frozen=True)
class BundleReport:
    """An opened bundle and what follows from its manifest."""

    bundle: Bundle
    state: StateReport

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; `manifest` is the bundle's own."""
        return {
            "kind": "bundle",
            "bundle_sha256": self.bundle.sha256,
            "size_bytes": self.bundle.size_bytes,
            "state": asdict(self.state),
            "manifest": asdict(self.bundle.manifest),
        }


def inspect_bundle(path: str | os.PathLike[str]) -> BundleReport:
    """Opens a bundle and sums it up; file sizes are checked, hashes are not (`check` does).

    Raises:
        BundleError: as `open_bundle`.
    """
    bundle = open_bundle(path)
    return BundleReport(bundle, StateReport.of(bundle.spec.states))
