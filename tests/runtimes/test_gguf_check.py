"""What is refused before llama.cpp sees a GGUF file; `tests/full/test_gguf_hostile.py` goes on."""

from __future__ import annotations

import contextlib
import re
import struct
from pathlib import Path

import pytest
from gguf_bases import make_bases
from gguf_mutations import mutate, put_together, take_apart

from edge_mmllm.errors import BundleError, CorruptBundle
from edge_mmllm_runtime.gguf.check import check_file

SEEDS = range(800)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    made = make_bases(tmp_path_factory.mktemp("bases"))
    return {name: take_apart(raw) for name, raw in made.items()}


@pytest.fixture
def write(tmp_path):
    path = tmp_path / "model.gguf"

    def write_(raw: bytes) -> Path:
        path.write_bytes(raw)
        return path

    return write_


def test_sound_files(bases, write) -> None:
    for sound in bases.values():
        check_file(write(sound.raw), exact=True).require_same()


def test_damage_is_an_error_or_harmless(bases, write) -> None:
    names, refused = list(bases), 0
    for seed in SEEDS:
        raw, _ = mutate(bases[names[seed % len(names)]], seed)
        with contextlib.suppress(BundleError):
            check_file(write(raw))
            refused -= 1
        refused += 1
    assert len(SEEDS) / 2 < refused < len(SEEDS)


def test_every_header_cut_short(bases, write) -> None:
    sound = bases["llama llama"]
    header = len(sound.raw) - len(sound.data)
    for size in [*range(4, header, 61), header - 1, header, len(sound.raw) - 1]:
        with pytest.raises(BundleError):
            check_file(write(sound.raw[:size]))


def _key(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _set(sound, key: str, value: bytes) -> bytes:
    """The file with another value (type and all) of a key; added where it is not there."""
    pairs = [p for p in sound.pairs if not p.startswith(_key(key))]
    return put_together([*pairs, _key(key) + value], sound.tensors, sound.data)


def _u32(value: int) -> bytes:
    return struct.pack("<II", 4, value)


def _f32(value: float) -> bytes:
    return struct.pack("<If", 6, value)


def _texts(*items: str) -> bytes:
    return struct.pack("<IIQ", 9, 8, len(items)) + b"".join(map(_key, items))


BREACHES = {
    "layers": ("llama gpt2", "llama.block_count", _u32(513), "block_count is absurd"),
    "no layer": ("llama gpt2", "llama.block_count", _u32(0), "block_count is absurd"),
    "layers of 64 bits": ("llama gpt2", "llama.block_count", struct.pack("<IQ", 10, 2), "type"),
    "width": ("llama gpt2", "llama.embedding_length", _u32(0), "embedding_length is absurd"),
    "heads": ("llama gpt2", "llama.attention.head_count_kv", _u32(3), "does not divide the heads"),
    "epsilon": ("rwkv6 rwkv", "rwkv6.attention.layer_norm_epsilon", _f32(-1), "epsilon is absurd"),
    "nan": ("llama gpt2", "llama.rope.freq_base", _f32(float("nan")), "not finite"),
    "scaling": (
        "llama gpt2",
        "llama.rope.scaling.type",
        struct.pack("<I", 8) + _key("x"),
        "scaling.type is unknown",
    ),
    "experts": ("llama gpt2", "llama.expert_used_count", _u32(2), "expert_used_count is absurd"),
    "head size": ("rwkv7 rwkv", "rwkv7.wkv.head_size", _u32(48), "head_size does not divide"),
    "rwkv heads": ("rwkv7 rwkv", "rwkv7.attention.head_count", _u32(1), "no attention heads"),
    "alignment": ("llama gpt2", "general.alignment", _u32(48), "general.alignment is absurd"),
    "architecture": ("llama gpt2", "general.architecture", _u32(1), "architecture is missing"),
    "one token twice": ("llama gpt2", "tokenizer.ggml.tokens", _texts("a", "a"), "appear twice"),
    "twice in C": ("llama gpt2", "tokenizer.ggml.tokens", _texts("a", "a\0b"), "appear twice"),
    "few scores": (
        "llama llama",
        "tokenizer.ggml.scores",
        struct.pack("<IIQf", 9, 6, 1, 0),
        "scores is too short",
    ),
    "types as bytes": (
        "llama llama",
        "tokenizer.ggml.token_type",
        struct.pack("<IIQ", 9, 0, 300) + bytes(300),
        "wrong type",
    ),
    "bytes without tokens": (
        "llama rwkv",
        "tokenizer.ggml.tokens",
        _texts("<s>", *(repr(bytes([i]))[2:-1] for i in range(256) if i != 97), "ab"),
        "no token for some bytes.*\n.*\n.*\n.*none for 97",
    ),
    "pieces without bytes": (
        "llama gpt2",
        "tokenizer.ggml.model",
        struct.pack("<I", 8) + _key("llama"),
        "no token for some bytes",
    ),
}


@pytest.mark.parametrize("case", BREACHES)
def test_breaches(bases, write, case) -> None:
    name, key, value, message = BREACHES[case]
    with pytest.raises(CorruptBundle, match=message):
        check_file(write(_set(bases[name], key, value)))


def test_tensors_lie_one_behind_the_other(bases, write) -> None:
    sound = bases["llama gpt2"]
    first, second, *rest = sound.tensors
    for tensors, message in (
        ([second, first, *rest], "misplaced"),
        ([first, first, second, *rest], "appears twice"),
        ([first, *rest], "misplaced"),
    ):
        with pytest.raises(CorruptBundle, match=message):
            check_file(write(put_together(sound.pairs, tensors, sound.data)))
    last_gone = put_together(sound.pairs, sound.tensors[:-1], sound.data)
    check_file(write(last_gone))
    with pytest.raises(CorruptBundle, match="belong to no tensor"):
        check_file(write(last_gone), exact=True)


def test_rwkv6_without_mixes(bases, write) -> None:
    raw = bases["rwkv6 rwkv"].raw.replace(
        b"blk.1.time_mix_lerp_fused", b"blk.1.time_mix_lerp_fuses"
    )
    with pytest.raises(CorruptBundle, match="no mixes"):
        check_file(write(raw))


def test_norms_in_float16(bases, write) -> None:
    sound = bases["llama gpt2"]
    tensors = [
        re.sub(rb"(?<=output_norm\.weight.{12})\0\0\0\0", b"\1\0\0\0", t, flags=re.S)
        for t in sound.tensors
    ]
    assert tensors != sound.tensors
    with pytest.raises(CorruptBundle, match="not in float32"):
        check_file(write(put_together(sound.pairs, tensors, sound.data)))


def test_parts(bases, tmp_path) -> None:
    sound = bases["llama gpt2"]
    count = _key("split.count") + struct.pack("<IH", 2, 2)
    first = tmp_path / "m-00001-of-00002.gguf"
    first.write_bytes(put_together([*sound.pairs, count], sound.tensors, sound.data))
    with pytest.raises(CorruptBundle, match="cannot open m-00002-of-00002"):
        check_file(first)
    second = tmp_path / "m-00002-of-00002.gguf"
    second.write_bytes(put_together([count], sound.tensors, sound.data))
    with pytest.raises(CorruptBundle, match="appears twice"):
        check_file(first)
    second.write_bytes(put_together([count], [], b""))
    assert check_file(first).paths == (first, second)
    other = first.rename(tmp_path / "other.gguf")
    with pytest.raises(CorruptBundle, match="not named like the first"):
        check_file(other)


def test_a_file_that_changes(bases, write) -> None:
    path = write(bases["llama gpt2"].raw)
    checked = check_file(path)
    path.rename(path.with_name("old"))
    write(bases["llama gpt2"].raw)
    with pytest.raises(CorruptBundle, match="changed while"):
        checked.require_same()


def test_a_damaged_file_in_a_bundle_of_ours(tmp_path) -> None:
    """Its size still fits the manifest, so that only its header tells."""
    from edge_mmllm.bundle import open_bundle
    from edge_mmllm_export.exporter import ExportOptions, export
    from edge_mmllm_export.quantize.schemes import QuantPlan
    from edge_mmllm_runtime.engine import EngineOptions
    from edge_mmllm_runtime.gguf.engine import open_engine

    source = Path(__file__).resolve().parents[1] / "goldens" / "references" / "llama"
    out = tmp_path / "out"
    export(source, out, ExportOptions(QuantPlan("f32"), format="gguf", gate=False))
    path = out / "model.gguf"
    raw = path.read_bytes()
    at = raw.index(b"llama.block_count") + len("llama.block_count") + 4
    path.write_bytes(raw[:at] + b"\xff\xff" + raw[at + 2 :])
    with pytest.raises(CorruptBundle, match="block_count is absurd"):
        open_engine(open_bundle(out), EngineOptions(1, 16))
