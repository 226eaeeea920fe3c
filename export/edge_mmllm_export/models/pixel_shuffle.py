"""The connector of Idefics3 and SmolVLM: squares of rows side by side, then one linear layer.

Source: Idefics3 (arXiv 2408.12637) section 4.1; `Idefics3Connector` of transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from edge_mmllm.errors import CheckpointError
from edge_mmllm_export.checkpoints.base import Layout
from edge_mmllm_export.ops.base import Ops
from edge_mmllm_export.weights import Parameter, Source, Weight

T = TypeVar("T")


@dataclass(frozen=True)
class PixelShuffleConfig:
    """Sizes.

    Attributes:
        side: rows and columns of features in a tile.
        factor: edge of a square that becomes one row.
        width: of the features.
        hidden_size: of the backbone.
    """

    side: int
    factor: int
    width: int
    hidden_size: int


class PixelShuffle:
    """A projector: features `(side^2, width)` -> `(side^2 / factor^2, hidden)`.

    Raises:
        CheckpointError: the squares do not fill the tile.
    """

    name = "pixel_shuffle"

    def __init__(self, config: PixelShuffleConfig, where: str = "scale_factor") -> None:
        if config.side % config.factor:
            raise CheckpointError(
                "the connector's squares do not fill the encoder's grid",
                where=where,
                expected=f"a divisor of {config.side}",
                found=str(config.factor),
            )
        self.config, self.hidden_size = config, config.hidden_size
        self._wide = config.width * config.factor**2

    def tokens(self, count: int) -> int:
        """Rows that `count` features become."""
        return count // self.config.factor**2

    def parameters(self) -> list[Parameter]:
        return [Parameter("proj", (self.hidden_size, self._wide))]

    def sources(self, layout: Layout, prefix: str) -> dict[str, Source]:
        """Our name to the hub's, after e.g. `model.connector.`."""
        return {"proj": Source(f"{prefix}modality_projection.proj.weight")}

    def ignored(self, prefix: str) -> tuple[str, ...]:
        return ()

    def project(self, op: Ops[T], w: Mapping[str, Weight], features: T) -> T:
        """See the class."""
        side = self.config.side
        return op.linear(op.pixel_shuffle(features, (side, side), self.config.factor), w["proj"])[0]
