"""What the exporter asks of an output format.

A format first lays a bound model out (`Format.layout`: everything decided and checked, nothing
written), which is what `--dry-run` shows; the `Artefact` then writes itself into the bundle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from edge_mmllm.bundle import BundleWriter, QuantGroup
from edge_mmllm.bundle.manifest import Engine
from edge_mmllm.modality import Modality
from edge_mmllm.spec import Stage, StateSpec
from edge_mmllm_export.checkpoints.base import Checkpoint, TextAssets
from edge_mmllm_export.ops.base import Architecture
from edge_mmllm_export.quantize.schemes import QuantPlan
from edge_mmllm_export.weights import Weight

if TYPE_CHECKING:
    from edge_mmllm_export.planning import ExportOptions

#: What a decoder takes: token ids, or embeddings that a stage of its own makes of them.
Inputs = Literal["ids", "embeds"]
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Job:
    """An opened checkpoint with its definition, its weights and their schemes, and its text."""

    checkpoint: Checkpoint
    model: Architecture
    weights: Mapping[str, Weight]
    text: TextAssets
    workers: int


@dataclass(frozen=True)
class Written:
    """What the manifest says of the files an artefact wrote.

    Attributes:
        modalities: where items pass other stages than the definition's; None where they do not.
    """

    stages: dict[str, Stage]
    engine_format: dict[str, Any]
    modalities: dict[str, Modality] | None = None


class Artefact(Protocol):
    """A model in a format's terms.

    Attributes:
        groups: bytes of the weights by role and scheme.
        size_bytes: of all files that it will write, those of passage included.
        child_ram_bytes: memory of its costliest step besides tiles, a child's included; 0: none.
        context_length: the longest that the engine computes rightly; None = unbounded.
        states: the contract; empty where the engine keeps its states to itself.
        details: of `model.details`.
    """

    @property
    def groups(self) -> tuple[QuantGroup, ...]: ...

    @property
    def size_bytes(self) -> int: ...

    @property
    def child_ram_bytes(self) -> int: ...

    @property
    def context_length(self) -> int | None: ...

    @property
    def states(self) -> tuple[StateSpec, ...]: ...

    @property
    def details(self) -> dict[str, Any]: ...

    def write(self, writer: BundleWriter, progress: Advance) -> Written:
        """Write the files; `progress` is called with numbers of weights done.

        Raises: ExportError, NonFiniteWeights, CorruptCheckpoint, OutOfSpace.
        """
        ...


class Format(Protocol):
    """One output format.

    Attributes:
        engine: what runs its bundles.
        packages: whose versions a bundle records, besides ours and numpy's.
    """

    @property
    def engine(self) -> Engine: ...

    @property
    def packages(self) -> tuple[str, ...]: ...

    def variant(self, options: ExportOptions) -> str | None:
        """The format's own word for how weights are stored, where one was given."""
        ...

    def resolved(self, options: ExportOptions) -> ExportOptions:
        """The options with the plan that the format's own word asks for. Raises: UsageError."""
        ...

    def layout(self, job: Job, options: ExportOptions) -> Artefact:
        """Decide how each tensor is stored.

        Raises:
            UnsupportedArchitecture: the format, or its engine, cannot hold the model.
            UsageError: options that the format does not have.
        """
        ...

    def as_stored(
        self,
        model: Architecture,
        weights: Mapping[str, Weight],
        plan: QuantPlan,
        word: str | None,
        folder: Path,
    ) -> dict[str, Weight]:
        """The weights, bound with the plan's schemes, as a reader of the artefact sees them.

        Args:
            word: of `variant`.
            folder: where the artefact lies.
        """
        ...

    def judged_as(self, options: ExportOptions) -> str:
        """Whose thresholds apply: a key of `verify.THRESHOLDS`."""
        ...

    def unjudged(self, options: ExportOptions) -> str | None:
        """Why nothing can judge the artefact here; None where something can."""
        ...
