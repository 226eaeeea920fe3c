"""Writes what transformers 5 computes with tiny random projectors.

Run it in an environment with the `reference` extra (torch, transformers 5):

    python tests/goldens/make_projectors.py [--out tests/goldens/projectors] [NAME ...]

Each `NAME.npz` holds `config` (JSON), `shapes` (JSON: the hub's tensor names to shapes), the
inputs, and `output` in float32. Weights are not stored: `tests/export/seeded.py` makes them again
from names and shapes, here and in the tests.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "export"))
from seeded import seeded

QFORMER = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "encoder_hidden_size": 40,
    "cross_attention_frequency": 2,
    "vocab_size": 64,
    "max_position_embeddings": 32,
    "layer_norm_eps": 1e-5,
}
QUERIES, OUTPUT, FEATURES = 5, 56, 11


def fill(module: Any, prefix: str = "") -> dict[str, tuple[int, ...]]:
    """Gives each parameter its seeded values; the shapes by name."""
    import torch

    shapes = {}
    for name, p in module.named_parameters():
        shapes[prefix + name] = tuple(p.shape)
        p.data.copy_(torch.from_numpy(seeded(prefix + name, tuple(p.shape))))
    module.eval()
    return shapes


def _qformer(instruct: bool) -> dict[str, Any]:
    import torch
    from transformers import Blip2QFormerConfig, InstructBlipQFormerConfig
    from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel
    from transformers.models.instructblip.modeling_instructblip import InstructBlipQFormerModel

    queries = seeded("query_tokens", (1, QUERIES, QFORMER["hidden_size"]))
    projection = torch.nn.Linear(QFORMER["hidden_size"], OUTPUT)
    features = seeded("features", (FEATURES, QFORMER["encoder_hidden_size"])) * 3
    arrays = {"features": features}
    memory = torch.from_numpy(features)[None]
    if instruct:
        model = InstructBlipQFormerModel(InstructBlipQFormerConfig(**QFORMER))
        shapes = fill(model, "qformer.")
        ids = np.random.default_rng(3).integers(0, QFORMER["vocab_size"], 7)
        arrays["text_ids"] = ids
        given = {"input_ids": torch.from_numpy(ids)[None]}
    else:
        model = Blip2QFormerModel(Blip2QFormerConfig(**QFORMER))
        shapes = fill(model, "qformer.")
        given = {}
    shapes |= fill(projection, "language_projection.")
    shapes["query_tokens"] = queries.shape
    with torch.no_grad():
        rows = model(
            **given, query_embeds=torch.from_numpy(queries), encoder_hidden_states=memory
        ).last_hidden_state[:, :QUERIES]
        output = projection(rows)[0].numpy()
    return {"config": QFORMER, "shapes": shapes, "output": output, **arrays}


PERCEIVER = {
    "resampler_n_latents": 6,
    "resampler_depth": 2,
    "resampler_n_heads": 3,
    "resampler_head_dim": 24,
}


def _perceiver(qk_norms: bool) -> dict[str, Any]:
    import torch
    from transformers import IdeficsConfig
    from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

    sizes = PERCEIVER | {"qk_layer_norms_perceiver": qk_norms}
    config = IdeficsConfig(perceiver_config=sizes, vision_config={"embed_dim": 40})
    model = IdeficsPerceiverResampler(config, 40, 2, 3, 24, 6)
    shapes = fill(model)
    features = seeded("features", (FEATURES, 40)) * 3
    with torch.no_grad():
        output = model(torch.from_numpy(features)[None])[0].numpy()
    return {"config": sizes, "shapes": shapes, "output": output, "features": features}


#: With extra vocabulary, kept apart.
IDEFICS = {
    "vocab_size": 91,
    "additional_vocab_size": 5,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "cross_layer_interval": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "use_resampler": True,
    "vision_config": {
        "embed_dim": 40,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "image_size": 28,
    },
    "perceiver_config": PERCEIVER | {"use_resampler": True},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
#: From which token on each of two pictures is seen, and up to which.
SPANS = ((3, 14), (14, 30))


def _idefics(**changes: Any) -> dict[str, Any]:
    """The language model over given resampled pictures: 40 tokens, of which the first three and
    the last ten see none."""
    import torch
    from transformers import IdeficsConfig, IdeficsForVisionText2Text

    config = IDEFICS | changes
    model = IdeficsForVisionText2Text(IdeficsConfig(**config, attn_implementation="eager"))
    shapes = fill(model)
    latents = PERCEIVER["resampler_n_latents"]
    features = seeded("pictures", (len(SPANS), latents, 40)) * 5
    ids = np.random.default_rng(4).integers(0, 96, 40)
    mask = np.zeros((len(ids), len(SPANS)), np.int64)
    for i, (first, end) in enumerate(SPANS):
        mask[first:end, i] = 1
    with torch.no_grad():
        logits = model(
            input_ids=torch.from_numpy(ids)[None],
            perceiver_embeddings=torch.from_numpy(features)[None],
            image_attention_mask=torch.from_numpy(mask)[None],
            use_cache=False,
        ).logits[0]
    text = {n: s for n, s in shapes.items() if "vision_model" not in n and "perceiver" not in n}
    return {
        "config": config | {"model_type": "idefics"},
        "shapes": text,
        "output": logits.numpy(),
        "features": features,
        "ids": ids,
        "spans": np.array(SPANS),
    }


PROJECTORS: dict[str, Callable[[], dict[str, Any]]] = {
    "qformer": lambda: _qformer(instruct=False),
    "qformer-text": lambda: _qformer(instruct=True),
    "perceiver": lambda: _perceiver(qk_norms=False),
    "perceiver-norms": lambda: _perceiver(qk_norms=True),
    "idefics": lambda: _idefics(qk_layer_norms=True, alpha_type="vector"),
    "idefics-float": lambda: _idefics(additional_vocab_size=0, vocab_size=96),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "projectors")
    parser.add_argument("names", nargs="*", default=list(PROJECTORS))
    arguments = parser.parse_args()
    for name in arguments.names:
        made = PROJECTORS[name]()
        text = {k: json.dumps(made.pop(k)) for k in ("config", "shapes")}
        path = arguments.out / f"{name}.npz"
        np.savez_compressed(path, **text, **made)
        spread, size = made["output"].std(), path.stat().st_size / 1024
        print(f"{name:20} {size:6.1f} KiB  output {spread:.2f}")


if __name__ == "__main__":
    main()
