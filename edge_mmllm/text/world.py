"""The RWKV World tokenizer: greedy longest match over bytes, from its vocabulary file.

File format: one line a token, `ID LITERAL LENGTH`, UTF-8: the id in decimal, the token as a
Python string or bytes literal (a string stands for its UTF-8 bytes), and how many bytes it has.
Ids rise; 0 (end of text) has no line. Every single byte is a token, so any input can be encoded.

Source: BlinkDL's `rwkv_vocab_v20230424.txt` and the reference `TRIE_TOKENIZER` beside it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable

#: The end of a text; no bytes.
END_OF_TEXT = 0
#: The published vocabulary has 1.1 MB, 65,529 tokens, the longest of 128 bytes.
MAX_FILE_BYTES = 16 << 20
MAX_TOKEN_BYTES = 1 << 12

#: One plain literal: no nesting, no concatenation, no escape that Python would only warn about.
_LITERAL = re.compile(
    r"""(?x)
    (?: '(?:[^'\\]|\\(?:[\\'"abfnrtv]|[0-3]?[0-7]{1,2}|x[0-9a-fA-F]{2}
            |u[0-9a-fA-F]{4}|U000[0-9a-fA-F]{5}|U0010[0-9a-fA-F]{4}))*'
      | "(?:[^"\\]|\\(?:[\\'"abfnrtv]|[0-3]?[0-7]{1,2}|x[0-9a-fA-F]{2}
            |u[0-9a-fA-F]{4}|U000[0-9a-fA-F]{5}|U0010[0-9a-fA-F]{4}))*"
      | b'(?:[^'\\]|\\(?:[\\'"abfnrtv]|[0-3]?[0-7]{1,2}|x[0-9a-fA-F]{2}))*'
      | b"(?:[^"\\]|\\(?:[\\'"abfnrtv]|[0-3]?[0-7]{1,2}|x[0-9a-fA-F]{2}))*"
    )"""
)
_NUMBER = re.compile(r"[0-9]{1,9}", re.ASCII)


class WorldTokenizer:
    """Bytes to ids and back.

    Args:
        vocabulary: the file's content.

    Raises:
        ValueError: a malformed file; the message names the line.
    """

    def __init__(self, vocabulary: bytes) -> None:
        self._bytes = _parse(vocabulary)
        self._ids = {token: i for i, token in self._bytes.items()}
        lengths: dict[bytes, set[int]] = {}
        for token in self._ids:
            if len(token) > 1:
                lengths.setdefault(token[:2], set()).add(len(token))
        # What to try where a text goes on with these two bytes, longest first.
        self._lengths = {k: tuple(sorted(v, reverse=True)) for k, v in lengths.items()}

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return max(self._bytes) + 1

    def encode(self, data: bytes) -> list[int]:
        """Ids of any bytes, UTF-8 or not: at each place the longest token that fits."""
        ids, lengths, out, at = self._ids, self._lengths, list[int](), 0
        end = len(data)
        while at < end:
            for length in lengths.get(data[at : at + 2], ()):
                found = ids.get(data[at : at + length])
                # At the text's end a slice is shorter than asked for, and may be a token too.
                if found is not None:
                    at = min(at + length, end)
                    break
            else:
                found = ids[data[at : at + 1]]
                at += 1
            out.append(found)
        return out

    def token(self, token_id: int) -> bytes:
        """The bytes of an id; none for the end of a text and for ids that are not there."""
        return self._bytes.get(token_id, b"")

    def decode(self, ids: Iterable[int]) -> bytes:
        """The bytes of ids, one after another."""
        return b"".join(map(self.token, ids))


def _parse(vocabulary: bytes) -> dict[int, bytes]:
    """Id -> bytes. Raises: ValueError."""
    if len(vocabulary) > MAX_FILE_BYTES:
        raise ValueError(f"a vocabulary of {len(vocabulary)} bytes, more than {MAX_FILE_BYTES}")
    found: dict[int, bytes] = {}
    last = END_OF_TEXT
    for number, raw in enumerate(vocabulary.split(b"\n"), 1):
        if not raw.strip():
            continue
        try:
            index, token = _line(raw.rstrip(b"\r"))
        except (ValueError, SyntaxError) as error:
            raise ValueError(f"line {number}: {error}") from error
        if index <= last:
            raise ValueError(f"line {number}: id {index} after {last}")
        last = index
        found[index] = token
    known = set(found.values())
    if len(known) != len(found):
        raise ValueError("two ids for the same bytes")
    missing = [b for b in range(256) if bytes([b]) not in known]
    if missing:
        raise ValueError(f"no token for {len(missing)} of the 256 bytes, e.g. {missing[0]:#04x}")
    return found


def _line(raw: bytes) -> tuple[int, bytes]:
    """`ID LITERAL LENGTH` -> id and bytes. Raises: ValueError."""
    if len(raw) > 8 * MAX_TOKEN_BYTES:
        raise ValueError(f"{len(raw)} bytes long")
    index, _, rest = raw.decode("utf-8").partition(" ")
    literal, _, length = rest.rpartition(" ")
    if not _NUMBER.fullmatch(index) or not _NUMBER.fullmatch(length):
        raise ValueError("not `ID LITERAL LENGTH`")
    if not _LITERAL.fullmatch(literal):
        raise ValueError("not one string or bytes literal")
    if "\\" in literal or literal.startswith("b"):
        value = ast.literal_eval(literal)
    else:
        value = literal[1:-1]
    token = value.encode("utf-8") if isinstance(value, str) else bytes(value)
    if not token or len(token) != int(length) or len(token) > MAX_TOKEN_BYTES:
        raise ValueError(f"{len(token)} bytes where {length} are promised")
    return int(index), token
