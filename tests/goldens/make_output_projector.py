"""Writes a tiny output projector as GILL lays it out, and what torch computes with it.

Run it in an environment with the `reference` extra: `python tests/goldens/make_output_projector.py`

`model.safetensors` holds `fc`, `tfm` (a `torch.nn.Transformer`, norms first), `query_embs` and
`model`; `golden.npz` holds `signals` float32 `(6, 24)` and `conditioning` `(5, 20)`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from make_references import randomize
from safetensors.numpy import save_file

FOLDER = Path(__file__).parent / "output_projector"
SIGNAL, HIDDEN, OUTPUT, QUERIES = 24, 16, 20, 5


class Mapper(torch.nn.Module):
    """Signal tokens -> conditioning. Source: GILL (arXiv 2305.17216), section 3.2."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(SIGNAL, HIDDEN)
        self.tfm = torch.nn.Transformer(
            d_model=HIDDEN,
            nhead=2,
            num_encoder_layers=2,
            num_decoder_layers=3,
            dim_feedforward=24,
            dropout=0.0,
            norm_first=True,
            batch_first=True,
        )
        self.model = torch.nn.Linear(HIDDEN, OUTPUT)
        self.query_embs = torch.nn.Parameter(torch.zeros(1, QUERIES, HIDDEN))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(self.tfm(self.fc(x), self.query_embs))


def main() -> None:
    generator = torch.Generator().manual_seed(3)
    mapper = Mapper().eval()
    randomize(mapper, generator)
    signals = torch.randn((1, 6, SIGNAL), generator=generator)
    with torch.no_grad():
        conditioning = mapper(signals)
    FOLDER.mkdir(exist_ok=True)
    save_file({k: v.numpy() for k, v in mapper.state_dict().items()}, FOLDER / "model.safetensors")
    np.savez_compressed(
        FOLDER / "golden.npz", signals=signals[0].numpy(), conditioning=conditioning[0].numpy()
    )
    print(conditioning.std())


if __name__ == "__main__":
    main()
