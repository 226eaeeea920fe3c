"""Writes tiny reference checkpoints of encoder-decoders and what transformers 5 makes of them.

Run it in an environment with the `reference` extra (torch, transformers 5, safetensors):

    python tests/goldens/make_encoder_decoders.py [--out tests/goldens/encoder_decoders]

Each folder holds a random model in the published hub layout and `golden.npz`: `prompt` int64
`(seq,)`, which the encoder reads; `answer` int64 `(n,)`, which the decoder reads, from its start
token on; `logits` float32 `(n, vocab)`. `buckets.npz` holds transformers' bucket of each distance
for the published sizes (32 buckets up to distance 128).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from make_references import randomize
from safetensors.torch import save_file
from transformers.models.t5.modeling_t5 import T5Attention

VOCAB = 96
PROMPT, ANSWER = 37, 40
#: Buckets and distance such that a text of 40 tokens reaches the last one; widths of heads and
#: model that do not follow from each other.
T5 = {
    "vocab_size": VOCAB,
    "d_model": 40,
    "d_kv": 16,
    "d_ff": 56,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 2,
    "relative_attention_num_buckets": 12,
    "relative_attention_max_distance": 24,
    "layer_norm_epsilon": 1e-5,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
MODELS: dict[str, dict[str, Any]] = {
    "t5": {"feed_forward_proj": "relu"},
    "flan-t5": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}


def make(name: str, folder: Path) -> np.ndarray:
    """Writes one folder; its logits."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    config = (
        T5 | MODELS[name] | {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}
    )
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**T5, **MODELS[name]))
    untied = MODELS[name].get("tie_word_embeddings") is False
    if untied:  # transformers 5 ties until a checkpoint says otherwise
        model.lm_head.weight = torch.nn.Parameter(torch.empty(VOCAB, T5["d_model"]))
    randomize(model, generator)
    model.shared.weight.data.copy_(3 * torch.randn(VOCAB, T5["d_model"], generator=generator))
    # As published: the head lies beside the embedding only where it is its own.
    tensors = {n: p.to(torch.bfloat16).clone() for n, p in model.named_parameters()}
    assert ("lm_head.weight" in tensors) == untied
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    prompt = torch.randint(0, VOCAB, (1, PROMPT), generator=generator)
    answer = torch.randint(0, VOCAB, (1, ANSWER), generator=generator)
    answer[0, 0] = T5["decoder_start_token_id"]
    loaded = transformers.T5ForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    assert torch.equal(loaded.lm_head.weight, loaded.shared.weight) != untied
    with torch.no_grad():
        logits = loaded(input_ids=prompt, decoder_input_ids=answer).logits[0].numpy()
    np.savez_compressed(
        folder / "golden.npz", prompt=prompt[0].numpy(), answer=answer[0].numpy(), logits=logits
    )
    return logits


def buckets(both_ways: bool) -> np.ndarray:
    """The bucket of each distance (key minus query) from -300 to 300."""
    distances = torch.arange(-300, 301)
    return T5Attention._relative_position_bucket(distances, both_ways, 32, 128).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "encoder_decoders")
    out = parser.parse_args().out
    for name in MODELS:
        logits = make(name, out / name)
        size = sum(p.stat().st_size for p in (out / name).iterdir())
        print(
            f"{name:10} {size / 1024:6.0f} KiB  logits {logits.std():.2f} {abs(logits).max():.1f}"
        )
    np.savez_compressed(out / "buckets.npz", both_ways=buckets(True), behind=buckets(False))


if __name__ == "__main__":
    main()
