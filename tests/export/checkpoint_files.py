"""Writes small checkpoints, sound and hostile, with nothing but the standard library and numpy."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# --- safetensors -----------------------------------------------------------------------------


def safetensors_bytes(header: Mapping[str, Any] | bytes, data: bytes = b"") -> bytes:
    """A safetensors file with any header, also a wrong one."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def entry(dtype: str, shape: Sequence[Any], begin: Any, end: Any) -> dict[str, Any]:
    """One header entry."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


# --- PyTorch zip -----------------------------------------------------------------------------


@dataclass(frozen=True)
class View:
    """A tensor of a state dict: a strided view of the storage `key`, counted in elements."""

    key: str
    numel: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0
    storage: str = "FloatStorage"


def _int(value: int) -> bytes:
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def _ints(values: Sequence[int]) -> bytes:
    return b"(" + b"".join(map(_int, values)) + b"t"


def tensor_pickle(view: View) -> bytes:
    """Opcodes that leave one rebuilt tensor on the stack, as torch.save emits them."""
    storage = (
        b"("
        + _text("storage")
        + b"ctorch\n"
        + view.storage.encode()
        + b"\n"
        + _text(view.key)
        + _text("cpu")
        + _int(view.numel)
        + b"tQ"
    )
    hooks = b"ccollections\nOrderedDict\n)R"
    arguments = storage + _int(view.offset) + _ints(view.shape) + _ints(view.strides)
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"\x89" + hooks + b"tR"


def state_pickle(views: Mapping[str, View]) -> bytes:
    """The pickle of an OrderedDict of tensors with the `_metadata` that modules add."""
    items = b"".join(_text(name) + tensor_pickle(view) for name, view in views.items())
    metadata = b"}" + _text("_metadata") + b"ccollections\nOrderedDict\n)R" + b"s"
    return b"\x80\x02ccollections\nOrderedDict\n)R(" + items + b"u" + metadata + b"b."


def write_torch_zip(
    path: Path,
    pickle: bytes,
    storages: Mapping[str, bytes] | None = None,
    *,
    compression: int = zipfile.ZIP_STORED,
    folder: str = "archive",
) -> Path:
    """A zip as torch.save lays it out."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(f"{folder}/data.pkl", pickle)
        archive.writestr(f"{folder}/byteorder", b"little")
        for key, data in (storages or {}).items():
            archive.writestr(f"{folder}/data/{key}", data)
    return path


# --- GGUF ------------------------------------------------------------------------------------

UINT32, BOOL, STRING, ARRAY = 4, 7, 8, 9


def gguf_string(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def gguf_pair(key: str, kind: int, payload: bytes) -> bytes:
    return gguf_string(key) + struct.pack("<I", kind) + payload


def gguf_tensor(name: str, dims: Sequence[int], ggml_type: int, offset: int) -> bytes:
    """A tensor's header entry; `dims` fastest first, as stored."""
    return (
        gguf_string(name)
        + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        + struct.pack("<IQ", ggml_type, offset)
    )


def gguf_bytes(
    pairs: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    tensor_count: int | None = None,
    pair_count: int | None = None,
) -> bytes:
    """A GGUF file with any counts, also wrong ones."""
    head = b"GGUF" + struct.pack(
        "<IQQ",
        version,
        len(tensors) if tensor_count is None else tensor_count,
        len(pairs) if pair_count is None else pair_count,
    )
    body = head + b"".join(pairs) + b"".join(tensors)
    return body + b"\0" * (-len(body) % 32) + data


def write_vocabulary_gguf(
    path: Path,
    *,
    model: str,
    tokens: Sequence[str],
    token_types: Sequence[int],
    pre: str | None = None,
    merges: Sequence[str] | None = None,
    scores: Sequence[float] | None = None,
    more: Mapping[str, int | bool | str] | None = None,
) -> Path:
    """A GGUF without tensors, for tokenizers; whole enough for llama.cpp's `vocab_only`."""
    from gguf import GGUFWriter

    writer = GGUFWriter(str(path), "llama")
    for key in ("block_count", "context_length", "embedding_length", "feed_forward_length"):
        writer.add_uint32(f"llama.{key}", 32)
    writer.add_uint32("llama.attention.head_count", 4)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tokenizer_model(model)
    writer.add_token_list(list(tokens))
    writer.add_token_types(list(token_types))
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    if merges is not None:
        writer.add_token_merges(list(merges))
    if scores is not None:
        writer.add_token_scores(list(scores))
    for key, value in (more or {}).items():
        add = (
            writer.add_bool
            if isinstance(value, bool)
            else writer.add_uint32
            if isinstance(value, int)
            else writer.add_string
        )
        add(key, value)  # type: ignore[operator]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def bf16_bytes(values: np.ndarray) -> bytes:
    """The upper halves of float32 values (truncated, so exact only for such values)."""
    bits = np.ascontiguousarray(values, "<f4").view("<u4") >> 16
    return bits.astype("<u2").tobytes()
