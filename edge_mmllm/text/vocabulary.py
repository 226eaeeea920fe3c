"""The bytes that each token stands for, as whoever constrains an answer must know them.

A tokenizer turns ids into text by its decoder, not token by token, so a table is read from what
the decoder is made of: byte-level vocabularies write each byte as a printable character (Source:
GPT-2's `encoder.py`), SentencePiece-like ones mark a space (U+2581) and write single bytes as
`<0xE2>`; Fuse puts tokens together as they are. Other decoders join tokens by rules of their own;
for those there is no table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edge_mmllm.errors import UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class Vocabulary:
    """What each id adds to a text.

    Attributes:
        tokens: bytes of each id; none where an id is not in use.
        special: ids that are no text, whatever their bytes: left out when an answer is shown.
    """

    tokens: tuple[bytes, ...]
    special: frozenset[int]

    @classmethod
    def of_bytes(cls, token: Callable[[int], bytes], size: int) -> Vocabulary:
        """A vocabulary whose tokens are bytes already; those without any are special."""
        tokens = tuple(token(i) for i in range(size))
        return cls(tokens, frozenset(i for i, data in enumerate(tokens) if not data))

    @classmethod
    def of_tokenizer(
        cls, tokenizer: Tokenizer, decoder: Mapping[str, Any] | None, size: int
    ) -> Vocabulary:
        """The table of a `tokenizer.json`.

        Args:
            decoder: its member `decoder`.
            size: number of ids; those that the tokenizer lacks stand for nothing.

        Raises:
            UsageError: a decoder that does not work token by token.
        """
        to_bytes = _reader(decoder)
        added = tokenizer.get_added_tokens_decoder()
        tokens = [b""] * size
        for name, index in tokenizer.get_vocab(with_added_tokens=True).items():
            if 0 <= index < size:
                tokens[index] = name.encode("utf-8") if index in added else to_bytes(name)
        special = frozenset(i for i, token in added.items() if token.special and i < size)
        return cls(tuple(tokens), special)


def _reader(decoder: Mapping[str, Any] | None) -> Callable[[str], bytes]:
    """What turns a token's name into its bytes. Raises: UsageError."""
    parts = {part.get("type"): part for part in _parts(decoder)}
    if "ByteLevel" in parts:
        return _byte_level()
    marks = [_mark(part) for part in parts.values()]
    mark = next((m for m in marks if m), None)
    if mark is None and "ByteFallback" not in parts and set(parts) != {"Fuse"}:
        raise UsageError(
            "this tokenizer does not say which bytes a token stands for",
            expected="a decoder ByteLevel, Metaspace, ByteFallback with Replace, or Fuse",
            found=", ".join(str(name) for name in parts) or "no decoder",
            fix="generate without a constraint",
        )

    def marked(name: str) -> bytes:
        if "ByteFallback" in parts and (byte := _BYTE.fullmatch(name)):
            return bytes([int(byte[1], 16)])
        return (name.replace(mark, " ") if mark else name).encode("utf-8")

    return marked


def _parts(decoder: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    if decoder is None:
        return
    members = decoder.get("decoders")
    if members is None:
        yield decoder
        return
    for member in members:
        yield from _parts(member)


def _mark(part: Mapping[str, Any]) -> str | None:
    """The character that a part of a decoder turns into a space."""
    if part.get("type") == "Metaspace":
        return str(part.get("replacement", "\u2581"))
    pattern = part.get("pattern")
    if part.get("type") == "Replace" and part.get("content") == " " and isinstance(pattern, dict):
        return pattern.get("String")
    return None


def _byte_level() -> Callable[[str], bytes]:
    """Printable bytes stand for themselves, the others for the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    table = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}

    def read(name: str) -> bytes:
        known = [table.get(character) for character in name]
        if None in known:  # not a token of this alphabet: its own text
            return name.encode("utf-8")
        return bytes(b for b in known if b is not None)

    return read
