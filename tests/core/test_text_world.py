"""The RWKV World tokenizer: exact on any bytes, hostile vocabularies refused."""

from __future__ import annotations

import json
import os
import random
import warnings
from pathlib import Path

import pytest

from edge_mmllm.errors import CorruptBundle, UsageError
from edge_mmllm.spec import TextSpec
from edge_mmllm.text import Text
from edge_mmllm.text.world import WorldTokenizer

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("EDGE_MMLLM_DATA", ROOT.parent / "shared" / "data"))
WORLD = DATA / "rwkv" / "rwkv_vocab_v20230424.txt"
ZOO = DATA / "zoo" / "tiny-rwkv7"
WORDS = ["the", "them", "themselves", " t", " the", "é", "日本", "\n\n", "a'b", 'a"b', "\\", "  "]
SPEC = TextSpec("rwkv-world", eos_ids=(0,))


def vocabulary(words=WORDS, extra=()):
    """The 256 bytes, then words, as the published file writes them."""
    lines = [f"{i + 1} {bytes([i])!r} 1" for i in range(256)]
    for word in words:
        raw = word.encode()
        if len(raw) > 1:
            lines.append(f"{len(lines) + 1} {word!r} {len(raw)}")
    lines += extra
    return ("\n".join(lines) + "\n").encode()


def slow(tokenizer, data):
    """Greedy longest match by trying every length."""
    table = {tokenizer.token(i): i for i in range(1, tokenizer.size)}
    longest = max(map(len, table))
    out, at = [], 0
    while at < len(data):
        for length in range(min(longest, len(data) - at), 0, -1):
            if data[at : at + length] in table:
                out.append(table[data[at : at + length]])
                at += length
                break
    return out


def test_the_longest_token_wins():
    tokenizer = WorldTokenizer(vocabulary())
    pieces = [tokenizer.token(i) for i in tokenizer.encode(b"themselvesthem the th")]
    assert pieces == [b"themselves", b"them", b" the", b" t", b"h"]


def test_any_bytes_there_and_back():
    tokenizer, rng = WorldTokenizer(vocabulary()), random.Random(3)
    parts = [w.encode() for w in WORDS] + [b"\xff", b"\xe6", b"\x80", b"\x00", b"th"]
    for _ in range(300):
        data = b"".join(rng.choices(parts, k=rng.randrange(12)))[: rng.randrange(40)]
        ids = tokenizer.encode(data)
        assert ids == slow(tokenizer, data)
        assert tokenizer.decode(ids) == data


def test_text_and_stream():
    text = Text(SPEC, vocabulary())
    written = "them 日本é the \\ \n\n"
    ids = text.encode(written)
    assert text.decode([*ids, 0, 99999, -1]) == written
    stream = text.stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == written
    split = [i + 1 for i in "日é".encode()]  # single bytes
    stream = text.stream()
    assert [stream.push(i) for i in split] == ["", "", "日", "", "é"]
    assert text.decode(split[:2]) == "\ufffd"
    with pytest.raises(UsageError, match="BOS"):
        text.encode("a", add_bos=True)


def test_without_its_file():
    with pytest.raises(UsageError, match=r"rwkv_vocab\.txt"):
        Text(SPEC)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("300 __import__('os') 2", "literal"),
        ("300 'a' 'b' 2", "literal"),
        ("300 ('ab') 2", "literal"),
        ("300 [[[[]]]] 2", "literal"),
        ("300 f'{1}b' 2", "literal"),
        ("300 'a\\qb' 4", "literal"),
        ("300 '\\N{BULLET}' 3", "literal"),
        ("300 b'é' 2", "ASCII|literal"),
        ("300 'abc' 2", "3 bytes where 2"),
        ("300 '' 0", "0 bytes"),
        ("300 '\\ud800x' 4", "surrogates"),
        ("1 'zz' 2", "after"),
        ("-5 'zz' 2", "ID LITERAL LENGTH"),
        ("300 'zz'", "ID LITERAL LENGTH"),
        ("300 'the' 3", "two ids"),
        (f"300 '{'a' * 5000}' 5000", "promised"),
        (f"300 '{'a' * 50000}' 50000", "long"),
    ],
)
def test_hostile_vocabularies(line, why):
    text = Text(SPEC, vocabulary(extra=[line]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(CorruptBundle, match=why):
            text.encode("a")


def test_every_byte_must_be_there():
    lines = vocabulary().split(b"\n")
    with pytest.raises(ValueError, match=r"no token for 1 of the 256 bytes, e\.g\. 0x41"):
        WorldTokenizer(b"\n".join(lines[:65] + lines[66:]))
    with pytest.raises(ValueError, match="256 bytes"):
        WorldTokenizer(b"")


@pytest.mark.skipif(not WORLD.is_file(), reason=f"no {WORLD}")
def test_the_published_vocabulary():
    tokenizer, rng = WorldTokenizer(WORLD.read_bytes()), random.Random(4)
    assert tokenizer.size == 65530
    for _ in range(50):
        ids = [rng.randrange(1, tokenizer.size) for _ in range(6)]
        data = tokenizer.decode(ids)[: -rng.randrange(1, 4)] + bytes(rng.choices(range(256), k=3))
        assert tokenizer.decode(tokenizer.encode(data)) == data
    assert tokenizer.encode("Hello world, 你好".encode()) == slow(
        tokenizer, "Hello world, 你好".encode()
    )


@pytest.mark.skipif(not ZOO.is_dir(), reason=f"no {ZOO}")
def test_the_zoo():
    text = Text(SPEC, (ZOO / "rwkv_vocab_tiny2k.txt").read_bytes())
    for case in json.loads((ZOO / "golden.json").read_text())["cases"]:
        assert text.encode(case["prompt"]) == case["input_ids"]
        assert text.decode(case["greedy_32"]) == case["greedy_text"]
