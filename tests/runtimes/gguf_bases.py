"""Sound tiny GGUF files of several architectures and tokenizers, for tests to damage."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from gguf import GGUFWriter
from gguf_mutations import put_together, take_apart

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

VOCAB = 300
RECURRENT = {"mamba": 32, "mamba2": 64, "rwkv6": 128, "rwkv7": 128}
TOKENIZERS = ("gpt2", "llama", "rwkv", "none")


def _bytes_as_letters() -> list[str]:
    """The letters that byte-level BPE writes bytes as."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    strange = [b for b in range(256) if b not in plain]
    return [*map(chr, plain), *(chr(256 + i) for i in range(len(strange)))]


def _add_tokenizer(writer: GGUFWriter, name: str) -> None:
    writer.add_tokenizer_model("no_vocab" if name == "none" else name)
    if name == "none":
        writer.add_vocab_size(VOCAB)
        return
    if name == "gpt2":
        tokens = ["<s>", "</s>", *_bytes_as_letters(), "ab", "Ġa"]
        types = [3, 3] + [1] * (len(tokens) - 2)
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_merges(["a b", "Ġ a"])
    elif name == "llama":
        tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "▁a"]
        types = [2, 3, 3] + [6] * 256 + [1] * 3
        writer.add_token_scores([-float(i) for i in range(VOCAB)])
        writer.add_add_bos_token(True)
    else:
        tokens = ["<s>", *(repr(bytes([i]))[2:-1] for i in range(256)), "ab"]
        types = [3] + [1] * 257
    rest = VOCAB - len(tokens)
    writer.add_token_list([*tokens, *(f"[PAD{i}]" for i in range(rest))])
    writer.add_token_types([*types, *[5] * rest])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    if name == "llama":
        writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")


def _llama(path: Path, tokenizer: str) -> None:
    """Two layers of width 32."""
    rng = np.random.default_rng(0)
    writer = GGUFWriter(str(path), "llama")
    width, inner = 32, 64
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_block_count(2)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    _add_tokenizer(writer, tokenizer)
    shapes = {"token_embd": (VOCAB, width), "output_norm": (width,), "output": (VOCAB, width)}
    for i in range(2):
        b = f"blk.{i}"
        shapes |= {f"{b}.attn_norm": (width,), f"{b}.ffn_norm": (width,)}
        shapes |= {f"{b}.attn_q": (width, width), f"{b}.attn_output": (width, width)}
        shapes |= {f"{b}.attn_k": (width // 2, width), f"{b}.attn_v": (width // 2, width)}
        shapes |= {f"{b}.ffn_gate": (inner, width), f"{b}.ffn_up": (inner, width)}
        shapes |= {f"{b}.ffn_down": (width, inner)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.standard_normal(shape).astype("f4") / 8)
    _finish(writer)


def _finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tokenizer_pairs(folder: Path, name: str) -> list[bytes]:
    path = folder / "words.gguf"
    writer = GGUFWriter(str(path), "x")
    _add_tokenizer(writer, name)
    _finish(writer)
    return [p for p in take_apart(path.read_bytes()).pairs if b"general.architecture" not in p]


def make_bases(folder: Path) -> dict[str, bytes]:
    """Name -> a sound file."""
    import random_gguf
    import random_models

    made = {}
    for tokenizer in TOKENIZERS:
        path = folder / "llama.gguf"
        _llama(path, tokenizer)
        made[f"llama {tokenizer}"] = path.read_bytes()
    for i, (name, width) in enumerate(RECURRENT.items()):
        inside = folder / name
        random_models.write(getattr(random_models, name)(width, 2, VOCAB), inside)
        random_gguf.write(inside, inside / "model.gguf")
        sound = take_apart((inside / "model.gguf").read_bytes())
        words = "rwkv" if name.startswith("rwkv") else TOKENIZERS[i % 2]
        pairs = [p for p in sound.pairs if b"tokenizer." not in p]
        pairs += _tokenizer_pairs(folder, words)
        made[f"{name} {words}"] = put_together(pairs, sound.tensors, sound.data)
    return made
