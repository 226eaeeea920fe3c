"""Refuses GGUF files that llama.cpp would abort on, before llama.cpp sees them.

llama.cpp checks much of what it reads and returns an error; some of it ends the process instead.
The rules here are those whose breach is known to do that (`tests/full/test_gguf_hostile.py`
looks for more), and those of the file format. They read the header only: no byte of weights can
end llama.cpp, as far as is known.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_mmllm.errors import CorruptBundle, UnsupportedBundle
from edge_mmllm_runtime.gguf.header import STRING, Faults, GgufHeader, read_header

_FAULTS = Faults(CorruptBundle, UnsupportedBundle)

#: Tensor type -> (elements of a block, its bytes).
#: Source: ggml/src/ggml-common.h of llama.cpp, as llama-cpp-python 0.3.36 has it.
BLOCKS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34),
    9: (32, 36), 10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210),
    15: (256, 292), 16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18),
    21: (256, 110), 22: (256, 82), 23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8),
    28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66), 39: (32, 17), 40: (64, 36),
    41: (128, 18), 42: (64, 18),
}  # fmt: skip

#: Source: GGML_MAX_NAME of ggml.h; LLAMA_MAX_LAYERS and LLAMA_MAX_EXPERTS of llama-hparams.h.
_NAME_BYTES, _MOST_LAYERS, _MOST_EXPERTS = 64, 512, 1024
_ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")
_UINT32, _INT32, _FLOAT32 = 4, 5, 6
_MOST_PARTS = 1000
#: One byte, as llama.cpp reads a token of RWKV's vocabulary.
_WORLD_BYTE = re.compile(r"\\x([0-9a-f]{2})|\\([^x\x80-\U0010ffff])|([^\\\x80-\U0010ffff])", re.S)
#: What llama.cpp's kernels take in float32 only.
_FLOATS = re.compile(
    r"norm\.weight|\.bias|time_mix_lerp\w*\.weight|ssm_conv1d\.weight|\.ssm_[ad](\.weight)?$"
)
_ESCAPES = {"t": "\t", "n": "\n", "r": "\r"}


@dataclass(frozen=True)
class Checked:
    """What was checked: the files, and how they were then.

    Attributes:
        paths: the file, or the parts of a split one, in order.
        stamps: device, inode, size and times of each.
    """

    paths: tuple[Path, ...]
    stamps: tuple[tuple[int, ...], ...]

    def require_same(self) -> None:
        """Raises: CorruptBundle: a file is no longer the one that was checked."""
        for path, before in zip(self.paths, self.stamps, strict=True):
            if _stamp(path) != before:
                raise CorruptBundle(
                    "the GGUF file was changed while it was being loaded",
                    where=str(path),
                    fix="load it again when it is written",
                )


class _File:
    """A file read at positions, for the header's parser."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise CorruptBundle(
                f"cannot open {path.name}: {error.strerror}", where=str(path)
            ) from error
        self.size_bytes = os.fstat(self._file.fileno()).st_size

    def read(self, offset: int, size: int) -> bytes:
        self._file.seek(offset)
        data = self._file.read(size)
        if len(data) != size:
            raise CorruptBundle(f"{self.path.name} ends early", where=str(self.path))
        return data

    def close(self) -> None:
        self._file.close()


def check_file(path: Path, *, exact: bool = False) -> Checked:
    """Checks a file, and the other parts where it is the first of several.

    Args:
        exact: the file ends with its last tensor, as ours do: what was cut out of the table of
            tensors shows.

    Raises:
        CorruptBundle: damaged, or llama.cpp would abort on it; the message says where.
        UnsupportedBundle: a version of the format, or a tensor type, that is unknown here.
    """
    paths: tuple[Path, ...] = (path,)
    names: set[str] = set()
    stamps = [_stamp(path)]
    count = _check(path, names, whole=True, exact=exact)
    if count > 1:
        paths = _parts(path, count)
        for part in paths[1:]:
            stamps.append(_stamp(part))
            _check(part, names, whole=False, exact=exact)
    return Checked(paths, tuple(stamps))


def _stamp(path: Path) -> tuple[int, ...]:
    try:
        s = path.stat()
    except OSError as error:
        raise CorruptBundle(
            f"cannot open {path.name}: {error.strerror}", where=str(path)
        ) from error
    return s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns


def _parts(path: Path, count: int) -> tuple[Path, ...]:
    """The files of a split model, named as llama-gguf-split does."""
    end = f"-00001-of-{count:05d}.gguf"
    if count > _MOST_PARTS or not path.name.endswith(end):
        raise CorruptBundle(
            f"{path.name} is one of {count} parts, and not named like the first",
            where=str(path),
            expected=f"NAME{end}",
            fix="give the first part, or join them: llama-gguf-split --merge FIRST_PART OUT.gguf",
        )
    begin = path.name[: -len(end)]
    return tuple(path.with_name(f"{begin}-{i + 1:05d}-of-{count:05d}.gguf") for i in range(count))


def _check(path: Path, names: set[str], *, whole: bool, exact: bool) -> int:
    """Checks one file; `names` gathers those of its tensors. Returns the number of parts."""
    file = _File(path)
    try:
        header = read_header(file, _FAULTS)
        rules = _Rules(path, header)
        rules.tensors(names, file.size_bytes, exact=exact)
        if whole:
            rules.architecture()
            rules.numbers()
            rules.vocabulary()
        count = header.metadata.get("split.count", 1)
    finally:
        file.close()
    return count if isinstance(count, int) else 1


class _Rules:
    """The rules of one file."""

    def __init__(self, path: Path, header: GgufHeader) -> None:
        self.path, self.header, self.said = path, header, header.metadata

    def bad(self, what: str, expected: str, found: object) -> CorruptBundle:
        return CorruptBundle(
            f"{self.path.name}: {what}",
            where=str(self.path),
            expected=expected,
            found=str(found)[:200],
            fix="not a GGUF file that llama.cpp can use, or damaged: download it again",
        )

    def tensors(self, names: set[str], size_bytes: int, *, exact: bool) -> None:
        """Names, types, shapes and places: one behind the other, each aligned, all in the file."""
        alignment = self.header.alignment
        if alignment & (alignment - 1):
            raise self.bad("general.alignment is absurd", "a power of 2", alignment)
        if self.header.kinds.get("general.alignment", _UINT32) != _UINT32:
            raise self.bad("general.alignment has another type", "uint32", "another")
        place = end = 0
        for tensor in self.header.tensors:
            name, shape = tensor.name, tensor.shape
            label = f"tensor {name[:80]!r}"
            if not 0 < len(name.encode()) < _NAME_BYTES or "\0" in name:
                raise self.bad(f"{label} has an absurd name", "1 to 63 bytes", len(name))
            if name in names:
                raise self.bad(f"{label} appears twice", "each name once", name)
            names.add(name)
            block, block_bytes = BLOCKS.get(tensor.ggml_type, (0, 0))
            if not block:
                raise UnsupportedBundle(
                    f"{self.path.name}: {label} has an unknown type",
                    where=str(self.path),
                    found=str(tensor.ggml_type),
                    fix="the file is damaged, or newer than the installed llama-cpp-python",
                )
            if tensor.ggml_type and _FLOATS.search(name):
                raise self.bad(f"{label} is not in float32", "type 0", tensor.ggml_type)
            if any(not 0 < dim < 1 << 48 for dim in shape) or math.prod(shape) >= 1 << 48:
                raise self.bad(f"{label} has an absurd shape", "1 to 2^48 elements", shape)
            row = shape[-1] if shape else 1
            if row % block:
                raise self.bad(f"{label} has rows of parts of blocks", f"{block}*n", row)
            if tensor.offset != place:
                raise self.bad(f"{label} is misplaced", f"byte {place} of the data", tensor.offset)
            end = place + math.prod(shape) // block * block_bytes
            place = -(-end // alignment) * alignment
            if self.header.data_start + end > size_bytes:
                raise self.bad(
                    f"{label} lies beyond the end of the file",
                    f"{self.header.data_start + end} bytes",
                    f"{size_bytes}; it looks truncated",
                )
        last = self.header.data_start + place
        if exact and not last - alignment < size_bytes <= last:
            raise self.bad("bytes that belong to no tensor", f"{last} bytes", size_bytes)

    def _number(self, key: str, least: int, most: int, *, kind: int | None = _UINT32) -> int | None:
        """A whole number of the architecture's settings."""
        key = f"{self.said['general.architecture']}.{key}"
        value = self.said.get(key)
        if value is None:
            return None
        if type(value) is not int or not least <= value <= most:
            raise self.bad(f"{key} is absurd", f"{least} to {most}", value)
        if kind is not None and self.header.kinds[key] != kind:
            raise self.bad(f"{key} has another type", "uint32", self.header.kinds[key])
        return value

    def architecture(self) -> None:
        """Which graph: numbers that loops and arrays are made of, and how they belong together."""
        name = self.said.get("general.architecture")
        if not isinstance(name, str) or not 0 < len(name) < _NAME_BYTES or not name.isprintable():
            raise self.bad("general.architecture is missing or absurd", "a name", name)
        layers = self._number("block_count", 1, _MOST_LAYERS)
        width = self._number("embedding_length", 1, 1 << 20)
        self._number("context_length", 1, (1 << 31) - 1)
        self._number("vocab_size", 1, 1 << 24)
        self._number("nextn_predict_layers", 0, layers or _MOST_LAYERS)
        self._experts()
        heads = self._each("attention.head_count", layers)
        pairs = zip(heads, self._each("attention.head_count_kv", layers), strict=False)
        if any(kv and (not q or q % kv) for q, kv in pairs):
            raise self.bad("attention.head_count_kv does not divide the heads", "a divisor", heads)
        size = self._number("wkv.head_size", 1, 1 << 12)
        if name.startswith("rwkv"):
            if not size or (width or 0) % size:
                raise self.bad("wkv.head_size does not divide the width", "a divisor", size)
            if any(heads):
                raise self.bad("an RWKV model has no attention heads", "head_count 0", heads)
            self._mixes(name, layers or 0)
        inner = self._number("ssm.inner_size", 1, 1 << 24) or 0
        for key in ("state_size", "time_step_rank", "group_count", "conv_kernel"):
            least = 0 if key == "group_count" else 1
            self._number(f"ssm.{key}", least, max(inner, 1 << 12))
        self._number("attention.key_length", 1, 1 << 16)
        self._number("attention.value_length", 1, 1 << 16)
        self._number("rope.dimension_count", 0, 1 << 16, kind=None)
        scaling = self.said.get(f"{name}.rope.scaling.type", "none")
        if scaling not in _ROPE_SCALINGS:
            raise self.bad("rope.scaling.type is unknown", ", ".join(_ROPE_SCALINGS), scaling)

    def _mixes(self, name: str, layers: int) -> None:
        """RWKV-6 has its five mixes in one tensor or in five; llama.cpp wants either."""
        names = {t.name for t in self.header.tensors}
        for i in range(layers if name == "rwkv6" else 0):
            wanted = [f"blk.{i}.time_mix_lerp_{m}.weight" for m in ("fused", "w")]
            if not names.intersection(wanted):
                raise self.bad("a layer has no mixes", " or ".join(wanted), "neither")

    def _experts(self) -> None:
        experts = self._number("expert_count", 0, _MOST_EXPERTS) or 0
        used = self._each("expert_used_count", None)
        if any(u > experts for u in used) or (experts and not any(used)):
            raise self.bad("expert_used_count is absurd", f"1 to {experts}", used)
        groups = self._number("expert_group_count", 0, max(0, experts - 1)) or 0
        chosen = self._number("expert_group_used_count", 0, max(0, groups - 1)) or 0
        if groups > 1 and (experts % groups or not chosen):
            raise self.bad("expert_group_count is absurd", f"a divisor of {experts}", groups)

    def _each(self, key: str, layers: int | None) -> list[int]:
        """A whole number, or one for each layer."""
        key = f"{self.said['general.architecture']}.{key}"
        value = self.said.get(key, [])
        values = value if isinstance(value, list) else [value]
        if not all(type(v) is int and 0 <= v < 1 << 20 for v in values):
            raise self.bad(f"{key} is absurd", "whole numbers below 2^20", values)
        if isinstance(value, list) and layers and values and len(values) < layers:
            raise self.bad(f"{key} is too short", f"{layers} numbers", len(values))
        return values

    def numbers(self) -> None:
        """Every other number of the architecture: finite, of a size that can be computed with."""
        prefix = f"{self.said['general.architecture']}."
        for key, value in self.said.items():
            if not key.startswith(prefix):
                continue
            values: Iterable[Any] = value if isinstance(value, list) else [value]
            for number in values:
                whole = type(number) is int
                if whole and abs(number) >= 1 << 32:
                    raise self.bad(f"{key} is absurd", "at most 32 bits", number)
                if isinstance(number, float) and not math.isfinite(number):
                    raise self.bad(f"{key} is not finite", "a number", number)
                if key.endswith("epsilon") and not (isinstance(number, float) and 0 <= number < 1):
                    raise self.bad(f"{key} is absurd", "0 to 1", number)

    def vocabulary(self) -> None:
        """Tokens that differ, as many scores and types; and what its tokenizer relies on."""
        model = self.said.get("tokenizer.ggml.model")
        if model in (None, "none", "no_vocab"):
            return
        key = "tokenizer.ggml.tokens"
        if self.header.kinds.get(key) != -1 - STRING:
            raise self.bad(f"{key} is missing or no array of texts", "the vocabulary", "another")
        tokens = self.said[key]
        ends = (token.split("\0", 1)[0] for token in tokens)  # where a C string ends
        known = {token or f"[EMPTY_{i}]" for i, token in enumerate(ends)}
        if len(known) != len(tokens) or not tokens:
            raise self.bad(
                "tokens appear twice in the vocabulary", f"{len(tokens)} tokens", len(known)
            )
        for name, kinds in (("scores", (_FLOAT32, _INT32)), ("token_type", (_INT32,))):
            key = f"tokenizer.ggml.{name}"
            items = self.said.get(key)
            if items is None:
                continue
            if self.header.kinds[key] not in [-1 - kind for kind in kinds]:
                raise self.bad(f"{key} holds items of a wrong type", "numbers", "others")
            if len(items) < len(tokens):
                raise self.bad(f"{key} is too short", f"{len(tokens)} items", len(items))
        wanted = {"llama": _sentencepiece_bytes, "rwkv": _world_bytes}.get(str(model))
        lost = wanted(known) if wanted else []
        if lost:
            raise self.bad(
                "the vocabulary has no token for some bytes: llama.cpp ends, or never does, at "
                "a text with them",
                "a token for each of the 256 bytes",
                f"none for {', '.join(map(str, lost[:8]))}",
            )


def _sentencepiece_bytes(known: set[str]) -> list[int]:
    """Bytes without a token, as SentencePiece writes them."""
    lost = [b for b in range(256) if f"<0x{b:02X}>" not in known]
    return [b for b in lost if b > 127 or chr(b) not in known]


def _world_bytes(known: set[str]) -> list[int]:
    """Bytes without a token, as RWKV's vocabulary escapes them."""
    found = set()
    for match in filter(None, map(_WORLD_BYTE.fullmatch, known)):
        code, escaped, plain = match.groups()
        found.add(int(code, 16) if code else ord(_ESCAPES.get(escaped, escaped or plain)))
    return sorted(set(range(256)) - found)
