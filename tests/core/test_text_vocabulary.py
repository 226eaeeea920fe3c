"""The bytes of each token, for every kind of tokenizer that has them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from edge_mmllm.errors import UsageError
from edge_mmllm.spec import TextSpec
from edge_mmllm.text import Text

ROOT = Path(__file__).parents[2]
WORDS = ["Hello world", "naïve é 日本 🎉", '{"a": [1, 22]}\n\t', "<|im_end|> is text here"]


def _joined(text: Text, words: str, size: int) -> bytes:
    vocabulary = text.vocabulary(size)
    ids = text.encode(words, add_bos=False)
    assert not vocabulary.special.intersection(ids)
    return b"".join(vocabulary.tokens[i] for i in ids)


@pytest.mark.parametrize("words", WORDS)
def test_byte_level(words: str) -> None:
    data = (ROOT / "examples/models/tiny-mamba2/tokenizer.json").read_bytes()
    text = Text(TextSpec("tokenizers"), data)
    size = Tokenizer.from_buffer(data).get_vocab_size()
    assert _joined(text, words, size) == words.encode()
    vocabulary = text.vocabulary(size + 5)
    assert vocabulary.tokens[size:] == (b"",) * 5
    added = {t["id"]: t for t in json.loads(data)["added_tokens"]}
    assert vocabulary.special == {i for i, t in added.items() if t["special"]}
    assert vocabulary.special
    assert all(vocabulary.tokens[i] == t["content"].encode() for i, t in added.items())


def _metaspace() -> Tokenizer:
    vocab = {"<unk>": 0, "▁": 1, "▁Hello": 2, "▁world": 3, "é": 4, "!": 5}
    tokenizer = Tokenizer(models.WordLevel(vocab, "<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def _byte_fallback() -> Tokenizer:
    words = ["▁", "▁Hello", "é"]
    vocab = {"<unk>": 0} | {f"<0x{i:02X}>": 1 + i for i in range(256)}
    vocab |= {word: 257 + i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))  # noqa: S106
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens([AddedToken("<0x41>!", special=True)])
    tokenizer.add_tokens([AddedToken("<tool▁>", special=False)])
    return tokenizer


def test_marked_spaces_and_single_bytes() -> None:
    text = Text(TextSpec("tokenizers"), _byte_fallback().to_str().encode())
    vocabulary = text.vocabulary(262)
    assert vocabulary.tokens[1:257] == tuple(bytes([i]) for i in range(256))
    assert vocabulary.tokens[257:260] == (b" ", b" Hello", "é".encode())
    assert vocabulary.tokens[260:] == (b"<0x41>!", "<tool▁>".encode())  # as they are written
    assert vocabulary.special == {260}
    assert _joined(text, "日 é", 262) == "日 é".encode()
    plain = Text(TextSpec("tokenizers"), _metaspace().to_str().encode()).vocabulary(6)
    assert plain.tokens[1:4] == (b" ", b" Hello", b" world")


def test_bytes_and_world() -> None:
    vocabulary = Text(TextSpec("bytes")).vocabulary(258)
    assert vocabulary.tokens[65] == b"A"
    assert vocabulary.special == {256, 257}
    data = (ROOT / "examples/models/tiny-rwkv7/rwkv_vocab_tiny2k.txt").read_bytes()
    text = Text(TextSpec("rwkv-world"), data)
    assert 0 in text.vocabulary(2048).special
    for words in WORDS:
        assert _joined(text, words, 2048) == words.encode()


@pytest.mark.parametrize("decoder", [None, decoders.WordPiece(), decoders.BPEDecoder()])
def test_a_decoder_that_joins_by_rules_of_its_own(decoder: object) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "##b": 1}, "a"))
    if decoder is not None:
        tokenizer.decoder = decoder
    text = Text(TextSpec("tokenizers"), tokenizer.to_str().encode())
    with pytest.raises(UsageError, match="which bytes a token stands for"):
        text.vocabulary(2)
    with pytest.raises(UsageError, match="no tokenizer"):
        Text(TextSpec("none")).vocabulary(2)


def test_an_alphabet_of_its_own() -> None:
    """A byte-level name with a character that stands for no byte is its own text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(alphabet)} | {"日": 256}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.decoder = decoders.ByteLevel()
    text = Text(TextSpec("tokenizers"), tokenizer.to_str().encode())
    vocabulary = text.vocabulary(257)
    assert sorted(vocabulary.tokens[:256]) == [bytes([i]) for i in range(256)]
    assert vocabulary.tokens[256] == "日".encode()
