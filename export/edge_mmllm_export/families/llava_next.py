"""LLaVA-NeXT (LLaVA 1.6): LLaVA with the tiles of a picture, its padding taken off again.

Source: `modeling_llava_next.py` of transformers 5.23.
"""

from __future__ import annotations

from edge_mmllm.errors import CheckpointError
from edge_mmllm.modality import Modality
from edge_mmllm_export.checkpoints.base import Checkpoint
from edge_mmllm_export.families import hub
from edge_mmllm_export.families.composite import Composite, Part, Pathway
from edge_mmllm_export.families.llava import BACKBONES, PROJECTORS, TOWERS, mlp_of, tower_of
from edge_mmllm_export.models.config import Fields
from edge_mmllm_export.models.mlp import MlpWithNewline


def llava_next(checkpoint: Checkpoint, context: int | None) -> Composite:
    """The model of a LLaVA-NeXT config. Raises: CheckpointError."""
    f = Fields(checkpoint.config, f"{checkpoint.source}, config.json")
    language, renames = hub.backbone(checkpoint, context, BACKBONES)
    tower, settings = tower_of(checkpoint, f), hub.image_settings(checkpoint)
    side = tower.image_size // tower.patch_size
    found = settings["layout"]
    grids = f.get("image_grid_pinpoints", found.get("grids"))
    wanted = {"kind": "anyres", "tile": tower.image_size, "grids": grids}
    if found != wanted or tower.tokens != side**2:
        raise CheckpointError(
            "the model cannot put the tiles of its processor together",
            where=f"{checkpoint.source}, config.json and preprocessor_config.json",
            expected=f"{wanted}, {side**2} rows a tile",
            found=f"{found}, {tower.tokens} rows a tile",
        )
    token_id = f.size("image_token_id", f.get("image_token_index", 32000), least=0)
    image = Modality(
        stages=(),
        placeholder=hub.placeholder(checkpoint, token_id),
        token_id=token_id,
        tokens=side**2,
        layout={"kind": "unpadded", "side": side},
        settings=settings,
    )
    mlp = MlpWithNewline(mlp_of(f, tower.width, language.hidden_size))
    path = Pathway(
        name="image",
        encoder=Part(tower, hub.prefix(checkpoint, *TOWERS)),
        projector=Part(mlp, hub.prefix(checkpoint, *PROJECTORS)),
        modality=image,
    )
    return Composite("llava_next", language, renames, [path])
