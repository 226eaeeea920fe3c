"""Writes what transformers 5 computes with tiny encoders of every kind.

Run it in an environment with the `reference` extra (torch, transformers 5, safetensors):

    python tests/goldens/make_encoders.py [NAME ...]

For each name `encoders/NAME.json` holds the config and the tensors (name -> shape) that
`save_pretrained` writes, and `encoders/NAME.npz` outputs `(rows, width)` computed in float32. All
values, the inputs' too, come from names: see `tests/export/encoder_files.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import safe_open
from transformers.models.idefics3 import modeling_idefics3
from transformers.models.qwen2_vl import modeling_qwen2_vl

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "export"))
import encoder_files

Outputs = dict[str, torch.Tensor]
#: hidden 48 and MLP 80: K is not a multiple of 32, so that blocks end short.
VIT = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 30,
    "patch_size": 7,  # 30 pixels leave an edge of 2
}
DINO = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 28,
    "patch_size": 7,
    "mlp_ratio": 2,
}
AUDIO = {
    "num_mel_bins": 10,
    "encoder_layers": 2,
    "encoder_attention_heads": 3,
    "encoder_ffn_dim": 80,
    "d_model": 48,
    "max_source_positions": 18,
}


def pixels(size: int) -> torch.Tensor:
    return torch.from_numpy(encoder_files.noise("pixels", 1, 3, size, size))


def tower(model: Any) -> Outputs:
    """Hidden states as LLaVA reads them, and the last one after the final norm."""
    out = model(pixels(model.config.image_size), output_hidden_states=True)
    states = {f"state{i}": x[0] for i, x in enumerate(out.hidden_states)}
    return {**states, "last": out.last_hidden_state[0]}


def siglip(model: Any) -> Outputs:
    out = model(pixels(model.config.image_size), output_hidden_states=True)
    states = {"state2": out.hidden_states[2][0], "last": out.last_hidden_state[0]}
    return {**states, "pooled": out.pooler_output}


def last(model: Any) -> Outputs:
    return {"last": model(pixels(model.config.image_size)).last_hidden_state[0]}


def dinov2(model: Any) -> Outputs:
    return {
        f"last{size}": model(pixels(size)).last_hidden_state[0]
        for size in (model.config.image_size, 44, 16)
    }


def whisper(model: Any) -> Outputs:
    mel = torch.from_numpy(encoder_files.noise("mel", 1, 10, 36))
    return {"last": model.get_encoder()(mel).last_hidden_state[0]}


def qwen2_audio(model: Any) -> Outputs:
    """The whole recording, and its first 22 frames (odd: the last row goes into no pair)."""
    mel = torch.from_numpy(encoder_files.noise("mel", 1, 10, 36))
    out = {"last": model(mel).last_hidden_state[0]}
    rows = (21 - 1) // 2 + 1  # as Qwen2AudioForConditionalGeneration masks a short recording
    mask = torch.zeros(1, 1, 18, 18)
    mask[..., rows:] = -torch.inf
    short = model(mel, attention_mask=mask).last_hidden_state[0]
    return out | {"short": short[: (rows - 2) // 2 + 1]}


def qwen2_vl(model: Any) -> Outputs:
    """A picture of 4 x 6 patches, and a video of 2 x 2 x 4."""
    out = {}
    for name, grid in (("image", (1, 4, 6)), ("video", (2, 2, 4))):
        rows = torch.from_numpy(encoder_files.noise(name, int(np.prod(grid)), 3 * 2 * 4 * 4))
        out[name] = model(rows, grid_thw=torch.tensor([grid])).pooler_output
    return out


def mllama(model: Any) -> Outputs:
    """A picture of 1 x 3 tiles (the third shape), and one of a single tile."""
    out = {}
    for name, ratio, used in (("three", 3, 3), ("one", 1, 1), ("four", 6, 4)):
        tiles = torch.from_numpy(encoder_files.noise("tiles", 1, 1, 4, 3, 28, 28))
        mask = (torch.arange(4) < used).long()[None, None]
        y = model(tiles, torch.tensor([[ratio]]), mask).last_hidden_state
        out[name] = y[0, 0, :used].reshape(-1, y.shape[-1])
    return out


CASES: dict[str, tuple[Callable[[], Any], Callable[[Any], Outputs]]] = {
    "clip": (
        lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VIT)),
        tower,
    ),
    "siglip": (
        lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VIT)),
        siglip,
    ),
    "idefics3": (
        lambda: modeling_idefics3.Idefics3VisionTransformer(
            modeling_idefics3.Idefics3VisionConfig(**VIT | {"image_size": 49})
        ),
        last,
    ),
    "eva": (
        lambda: transformers.Blip2VisionModel(
            transformers.Blip2VisionConfig(**VIT | {"image_size": 28})
        ),
        last,
    ),
    "dinov2": (lambda: transformers.Dinov2Model(transformers.Dinov2Config(**DINO)), dinov2),
    "dinov2-swiglu": (
        lambda: transformers.Dinov2Model(
            transformers.Dinov2Config(**DINO, use_swiglu_ffn=True, qkv_bias=False)
        ),
        dinov2,
    ),
    "whisper": (
        lambda: transformers.WhisperModel(
            transformers.WhisperConfig(
                **AUDIO,
                decoder_layers=1,
                decoder_attention_heads=1,
                decoder_ffn_dim=8,
                vocab_size=8,
                max_target_positions=8,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                decoder_start_token_id=1,
            )
        ),
        whisper,
    ),
    "qwen2-audio": (
        lambda: transformers.Qwen2AudioEncoder(transformers.Qwen2AudioEncoderConfig(**AUDIO)),
        qwen2_audio,
    ),
    "qwen2-vl": (
        lambda: modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel(
            modeling_qwen2_vl.Qwen2VLVisionConfig(
                depth=2, embed_dim=64, hidden_size=48, num_heads=4, mlp_ratio=2, patch_size=4
            )
        ),
        qwen2_vl,
    ),
    "mllama": (
        lambda: transformers.MllamaVisionModel(
            transformers.models.mllama.configuration_mllama.MllamaVisionConfig(
                hidden_size=48,
                intermediate_size=80,
                num_hidden_layers=3,
                num_global_layers=2,
                attention_heads=3,
                image_size=28,
                patch_size=7,
                intermediate_layers_indices=[0, 2],
                vision_output_dim=144,
            )
        ),
        mllama,
    ),
}


def make(name: str) -> tuple[int, Outputs]:
    """Writes one reference: its bytes, and its outputs."""
    build, run = CASES[name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = build()
        model.save_pretrained(folder)
        with safe_open(folder / "model.safetensors", "np") as file:
            tensors = {n: file.get_slice(n).get_shape() for n in file.keys()}  # noqa: SIM118
        config = json.loads((folder / "config.json").read_text())
        encoder_files.write(folder, config, tensors, "")
        loaded, info = type(model).from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        with torch.no_grad():
            outputs = run(loaded.eval())
    target = encoder_files.FOLDER / name
    entry = {"config": config, "tensors": tensors}
    target.with_suffix(".json").write_text(json.dumps(entry, indent=1, sort_keys=True) + "\n")
    np.savez_compressed(
        target.with_suffix(".npz"), **{n: x.numpy().astype("f") for n, x in outputs.items()}
    )
    return sum(target.with_suffix(s).stat().st_size for s in (".json", ".npz")), outputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(CASES))
    torch.set_num_threads(1)
    for name in parser.parse_args().names:
        size, outputs = make(name)
        spread = ", ".join(f"{n} {tuple(x.shape)} {x.std():.2f}" for n, x in outputs.items())
        print(f"{name:16} {size / 1024:5.0f} KiB  {spread}")


if __name__ == "__main__":
    main()
