"""Writes the tiny reference checkpoints and what transformers 5 computes with them.

Run it in an environment with the `reference` extra (torch, transformers 5, safetensors):

    python tests/goldens/make_references.py [--out tests/goldens/references] [NAME ...]
    python tests/goldens/make_references.py --logits FOLDER IDS.npy OUT.npy
    python tests/goldens/make_references.py --again OUT.npz

Each folder holds a random model in the published hub layout (`config.json`, `model.safetensors`,
as `save_pretrained` writes them) and `golden.npz`: `input_ids` int64 `(seq,)` and `logits` float32
`(seq, vocab)` of one whole forward, computed in float32 from the stored weights. Where a config
has another form in transformers 4 it lies beside, as `config.transformers4.json`.

Nothing is left at its default: norm weights, biases, decays and skips are random too, so that a
wrong or forgotten one shows. Logits have a spread of a few units. Same versions, same bytes.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

SEQ = 40
VOCAB = 96
#: hidden 48 and MLP 80: K is not a multiple of 32, so that blocks end short.
TRANSFORMER = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
MAMBA2 = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "state_size": 16,
    "num_hidden_layers": 2,
    "num_heads": 6,
    "head_dim": 16,
    "expand": 2,
    "conv_kernel": 4,
    "chunk_size": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
#: dt_rank 3 and d_state 8: x_proj's parts have different widths, none a power of two times 16.
MAMBA = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "state_size": 8,
    "num_hidden_layers": 2,
    "expand": 2,
    "conv_kernel": 4,
    "time_step_rank": "auto",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
#: Keys wider than the hidden size; activations are halved once, before the last layer.
RWKV = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "attention_hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "context_length": 128,
    "rescale_every": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
#: Weights tied and embeddings as wide as the model, as all sizes of OPT but 350m have them.
OPT = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "word_embed_proj_dim": 48,
    "ffn_dim": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 128,
    "bos_token_id": 2,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # Of 8 wavelengths the first is below 64 / 4, the second between, the rest above 64.
    "original_max_position_embeddings": 64,
}


@dataclass(frozen=True)
class Reference:
    """One checkpoint: class stem in transformers, what differs from the base config, dtype."""

    family: str
    changes: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.bfloat16

    def config(self) -> Any:
        base = {"Mamba": MAMBA, "FalconMamba": MAMBA, "Mamba2": MAMBA2, "Rwkv": RWKV, "OPT": OPT}
        config = base.get(self.family, TRANSFORMER) | self.changes
        return getattr(transformers, f"{self.family}Config")(**config)


REFERENCES = {
    "llama": Reference("Llama", {"num_attention_heads": 6, "num_key_value_heads": 2}),
    "llama-tied-llama3": Reference(
        "Llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}
    ),
    "llama-linear": Reference(
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
        torch.float16,
    ),
    "llama-bias": Reference(
        "Llama",
        {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu_pytorch_tanh"},
    ),
    "mistral-window": Reference("Mistral", {"sliding_window": 9, "num_key_value_heads": 3}),
    "qwen2": Reference(
        "Qwen2",
        {
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        },
    ),
    "qwen2-window": Reference(
        "Qwen2",
        {
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 1,
        },
    ),
    "qwen3": Reference(
        "Qwen3", {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    ),
    "olmo2": Reference("Olmo2", {"num_key_value_heads": 3}),
    "opt": Reference("OPT"),
    "opt-350m": Reference(
        "OPT",
        {"do_layer_norm_before": False, "word_embed_proj_dim": 32, "num_hidden_layers": 3},
    ),
    "opt-untied": Reference(
        "OPT",
        {"enable_bias": False, "tie_word_embeddings": False, "activation_function": "gelu"},
    ),
    "rwkv": Reference("Rwkv"),
    "mamba": Reference("Mamba", {"tie_word_embeddings": True}),
    "mamba-bias": Reference(
        "Mamba",
        {
            "use_bias": True,
            "use_conv_bias": False,
            "conv_kernel": 3,
            "state_size": 5,
            "time_step_rank": 7,
            "tie_word_embeddings": False,
        },
    ),
    "falcon-mamba": Reference("FalconMamba", {"mixer_rms_eps": 0.02, "tie_word_embeddings": False}),
    "mamba2": Reference("Mamba2", {"n_groups": 1, "tie_word_embeddings": True}, torch.float32),
    "mamba2-groups": Reference(
        "Mamba2", {"n_groups": 2, "use_bias": True, "tie_word_embeddings": False}
    ),
    "mamba2-limits": Reference(
        "Mamba2",
        {
            "n_groups": 3,
            "use_conv_bias": False,
            "time_step_limit": [0.05, 0.4],
            "tie_word_embeddings": True,
        },
    ),
}


def randomize(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Gives every parameter values that matter."""
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        last = name.rsplit(".", 1)[-1]
        if "time_mix" in last:  # the token's own share
            value = torch.rand(p.shape, generator=generator)
        elif last in ("time_decay", "time_first"):
            value = (-1 if last == "time_decay" else 0.5) + noise
        elif last == "A_log":
            value = torch.log(1 + 7 * torch.rand(p.shape, generator=generator))
        elif last == "dt_bias" or name.endswith("dt_proj.bias"):
            value = -2 + noise
        elif last == "D" or (p.ndim == 1 and last == "weight"):
            value = 1 + 0.3 * noise
        elif p.ndim == 1:
            value = 0.3 * noise
        elif "conv1d" in name:
            value = 0.5 * noise
        elif "embed" in name or "head" in name:
            value = noise * 3 / math.sqrt(p.shape[1])
        else:
            value = noise * 1.3 / math.sqrt(p.shape[1])
        p.data.copy_(value)


def make(name: str, out: Path) -> None:
    """Writes one reference folder."""
    reference = REFERENCES[name]
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    cls = getattr(transformers, f"{reference.family}ForCausalLM")
    model = cls(reference.config())
    randomize(model, generator)
    folder = out / name
    model.to(reference.dtype).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)

    ids = torch.randint(0, VOCAB, (1, SEQ), generator=generator)
    np.savez_compressed(
        folder / "golden.npz", input_ids=ids[0].numpy(), logits=logits(folder, ids[0].numpy())
    )
    old = transformers4(json.loads((folder / "config.json").read_text()))
    if old is not None:
        text = json.dumps(old, indent=2, sort_keys=True)
        (folder / "config.transformers4.json").write_text(text + "\n")


def logits(folder: Path, ids: np.ndarray) -> np.ndarray:
    """Float32 `(seq, vocab)` of transformers for a checkpoint folder and ids `(seq,)`."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        out = model(torch.from_numpy(ids)[None], use_cache=False)
    return out.logits[0].numpy()


def transformers4(config: dict[str, Any]) -> dict[str, Any] | None:
    """The same config as transformers 4 wrote it; None where there is no rope in it."""
    rope = config.pop("rope_parameters", None)
    if rope is None:
        return None
    config["rope_theta"] = rope.pop("rope_theta")
    if rope["rope_type"] == "linear":  # and in its older form still
        rope["type"] = rope.pop("rope_type")
    config["rope_scaling"] = rope if rope.get("rope_type") != "default" else None
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.46.0"
    config.pop("layer_types", None)
    return config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "references")
    parser.add_argument("names", nargs="*", default=list(REFERENCES))
    parser.add_argument(
        "--logits",
        nargs=3,
        metavar=("FOLDER", "IDS.npy", "OUT.npy"),
        help="only write what transformers computes for a checkpoint and some ids",
    )
    parser.add_argument(
        "--again",
        metavar="OUT.npz",
        help="only write what transformers computes for the committed references",
    )
    arguments = parser.parse_args()
    if arguments.again:
        folders = [arguments.out / name for name in arguments.names]
        np.savez(
            arguments.again,
            **{f.name: logits(f, np.load(f / "golden.npz")["input_ids"]) for f in folders},
        )
        return
    if arguments.logits:
        folder, ids, target = arguments.logits
        np.save(target, logits(Path(folder), np.load(ids)))
        return
    for name in arguments.names:
        make(name, arguments.out)
        size = sum(p.stat().st_size for p in (arguments.out / name).iterdir())
        golden = np.load(arguments.out / name / "golden.npz")["logits"]
        spread = f"{golden.std():.2f} +- {abs(golden).max():.1f}"
        print(f"{name:20} {size / 1024:6.0f} KiB  logits {spread}")


if __name__ == "__main__":
    main()
