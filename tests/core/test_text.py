"""Text: BOS once, ids there and back, whole characters only."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from edge_mmllm.errors import CorruptBundle, UsageError
from edge_mmllm.spec import TextSpec
from edge_mmllm.text import Text

ROOT = Path(__file__).parents[2]
ZOO = ["tiny-llava", "tiny-llava-mamba", "tiny-mamba", "tiny-mamba2"]
SENTENCES = [
    "",
    "Hello, world!",
    " leading and  double   spaces ",
    "tabs\tand\nnewlines\r\n\n",
    "naïve café, Ελληνικά, Русский, עברית, العربية",
    "日本語のテキスト、中文文本，한국어",
    "emoji 😀 👩‍👩‍👧 🏳️‍🌈 e\u0301",
    "a real \ufffd inside, and at the end \ufffd",
]


def _byte_level(*, bos: bool = False, eos: bool = False) -> bytes:
    """A byte-level tokenizer: every byte a token, so every character of 2 bytes is split."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": 0, "</s>": 1, "<|user|>": 2}
    vocab.update({symbol: 3 + i for i, symbol in enumerate(alphabet)})
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in ("<s>", "</s>", "<|user|>")]
    )
    if bos or eos:
        single = ("<s> " if bos else "") + "$A" + (" </s>" if eos else "")
        tokenizer.post_processor = TemplateProcessing(
            single=single, special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return str(tokenizer.to_str()).encode()


def _byte_fallback() -> bytes:
    """A Llama-like tokenizer: words with a marked leading space, bytes for what it lacks."""
    words = ["▁", "▁Hello", "▁world", "!", "é"]
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab.update({f"<0x{i:02X}>": 3 + i for i in range(256)})
    vocab.update({word: 259 + i for i, word in enumerate(words)})
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))  # noqa: S106
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<s>", "</s>")])
    return str(tokenizer.to_str()).encode()


def _text(tokenizer: bytes | None, kind: Any = "tokenizers", **fields: Any) -> Text:
    return Text(TextSpec(kind, **fields), tokenizer)


def _streamed(text: Text, ids: list[int]) -> str:
    stream = text.stream()
    pieces = [stream.push(token_id) for token_id in ids]
    return "".join(pieces) + stream.flush()


@pytest.fixture(params=ZOO)
def zoo(request: pytest.FixtureRequest, shared_data: Path) -> Text:
    path = shared_data / "zoo" / request.param / "tokenizer.json"
    if not path.is_file():
        pytest.skip(f"no {path.parent.name}/tokenizer.json in the shared data")
    return _text(path.read_bytes())


def test_what_follows_a_text_stays_only_where_the_text_is_whole():
    text = Text(TextSpec("tokenizers"), _byte_level(bos=True, eos=True))
    continued, whole = text.encode("ab"), text.encode("ab", whole=True)
    assert whole == [*continued, 1]
    assert continued[0] == 0
    assert text.encode("ab</s>", whole=True) == whole


def test_importing_the_package_imports_no_heavy_one() -> None:
    script = (
        "import sys, edge_mmllm.text, edge_mmllm.bundle, edge_mmllm.spec\n"
        "print([n for n in ('tokenizers', 'jinja2', 'PIL', 'numpy') if n in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout == "[]\n"


# --- BOS ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["post-processor", "spec", "both"])
def test_bos_comes_once(by: str) -> None:
    text = _text(_byte_level(bos=by != "spec"), bos_id=0, add_bos=by != "post-processor")
    plain = text.encode("hi", add_bos=False)
    assert plain[0] != 0
    assert text.encode("hi") == [0, *plain]
    assert text.encode("hi", add_bos=True) == [0, *plain]
    assert text.encode("<s>hi") == [0, *plain]
    assert text.encode("<s>hi", add_bos=True) == [0, *plain]
    assert text.encode("<s>hi", add_bos=False) == [0, *plain]
    assert text.encode("") == [0]


def test_no_bos_unless_wanted() -> None:
    text = _text(_byte_level(), bos_id=0)
    assert 0 not in text.encode("hi")
    assert text.encode("hi", add_bos=True) == [0, *text.encode("hi")]
    with pytest.raises(UsageError, match="no BOS"):
        _text(_byte_level()).encode("hi", add_bos=True)


def test_a_post_processors_bos_needs_no_bos_id() -> None:
    text = _text(_byte_level(bos=True))
    assert text.encode("hi")[0] == text.encode("<s>hi")[0] == 0
    assert text.encode("<s>hi").count(0) == 1


def test_a_prompt_ends_without_eos() -> None:
    assert _text(_byte_level(bos=True, eos=True)).encode("hi") == _text(
        _byte_level(bos=True)
    ).encode("hi")


def test_special_tokens_in_a_text_become_their_ids() -> None:
    assert _text(_byte_level()).encode("<|user|>a</s>")[::2] == [2, 1]


def test_a_template_that_prints_bos_does_not_double_it() -> None:
    for printed in ("{{ bos_token }}", ""):
        template = printed + "{% for m in messages %}{{ m.content }}{% endfor %}"
        text = _text(
            _byte_level(bos=True),
            bos_id=0,
            bos_token="<s>",  # noqa: S106
            chat_template=template,
        )
        ids = text.encode_chat([{"role": "user", "content": "hi"}])
        assert ids == [0, *text.encode("hi", add_bos=False)]


# --- ids to text --------------------------------------------------------------------------------


@pytest.mark.parametrize("sentence", SENTENCES)
@pytest.mark.parametrize("make", [_byte_level, _byte_fallback])
def test_there_and_back_also_as_a_stream(make: Any, sentence: str) -> None:
    text = _text(make())
    ids = text.encode(sentence)
    assert text.decode(ids) == sentence
    assert _streamed(text, ids) == sentence


@pytest.mark.parametrize("sentence", SENTENCES)
def test_real_tokenizers_there_and_back(zoo: Text, sentence: str) -> None:
    ids = zoo.encode(sentence)
    assert _streamed(zoo, ids) == zoo.decode(ids)
    if "e\u0301" not in sentence:  # two of them normalize to NFC
        assert zoo.decode(ids) == sentence


def test_a_real_tokenizer_equals_the_tokenizers_package(zoo: Text, shared_data: Path) -> None:
    plain = Tokenizer.from_buffer(zoo._json)
    for line in (shared_data / "zoo/eval/heldout.txt").read_text("utf-8").splitlines()[:200]:
        assert zoo.encode(line) == plain.encode(line).ids


def test_any_ids_stream_to_what_decode_shows(zoo: Text) -> None:
    draw = random.Random(7)
    for _ in range(50):
        high = draw.choice([150, 260, 2048])  # the low ids are single bytes: much broken UTF-8
        ids = [draw.randrange(3, high) for _ in range(60)]
        assert _streamed(zoo, ids).rstrip("\ufffd") == zoo.decode(ids).rstrip("\ufffd")


@pytest.mark.parametrize("make", [_byte_level, _byte_fallback, None])
def test_a_stream_shows_whole_characters_only(make: Any) -> None:
    text = _text(make()) if make else _text(None, "bytes")
    for character in "é日😀":
        ids = text.encode(character)[-len(character.encode()) :]
        if make is _byte_fallback and character == "é":
            continue  # a token of its own there
        for cut in range(len(ids)):
            stream = text.stream()
            assert [stream.push(i) for i in ids[:cut]] == [""] * cut
            assert stream.flush() == ""
        stream = text.stream()
        assert [stream.push(i) for i in ids] == [""] * (len(ids) - 1) + [character]


def test_a_stream_shows_bytes_that_will_never_be_a_character() -> None:
    text = _text(_byte_level())
    lead, a = text.encode("é")[0], text.encode("a")[0]
    assert _streamed(text, [lead, a]) == text.decode([lead, a]) == "\ufffda"
    stream = text.stream()
    shown = "".join(stream.push(lead) for _ in range(1000))
    assert 980 <= len(shown) < 1000
    assert set(shown) == {"\ufffd"}
    assert stream.push(text.encode("é")[1]) == "é"  # the last lead byte was a start after all


@pytest.mark.parametrize("ids", ["junk", "text", "special"])
def test_a_stream_decodes_a_bounded_window(ids: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = _text(_byte_level())
    longest = 0
    decode = Text.decode

    def watched(self: Text, window: Any, **options: Any) -> str:
        nonlocal longest
        longest = max(longest, len(window))
        return decode(self, window, **options)

    monkeypatch.setattr(Text, "decode", watched)
    token = {"junk": text.encode("é")[0], "text": text.encode("a")[0], "special": 2}[ids]
    _streamed(text, [text.encode("a")[0], *[token] * 500])
    assert 1 <= longest <= 40


def test_a_stream_keeps_the_space_in_front_of_a_word() -> None:
    text = _text(_byte_fallback())
    hello, world = 260, 261
    stream = text.stream()
    assert [stream.push(hello), stream.push(world)] == ["Hello", " world"]
    stream = text.stream()  # a special token in between shows nothing and changes nothing
    assert [stream.push(i) for i in (hello, 2, world)] == ["Hello", "", " world"]


def test_special_and_unknown_ids_show_nothing() -> None:
    text = _text(_byte_level())
    a = text.encode("a")[0]
    odd = [1, a, 10**6, -1, 2**40, 2]
    assert text.decode(odd) == _streamed(text, odd) == "a"
    assert text.decode([a, 1], skip_special_tokens=False) == "a</s>"


# --- kinds --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sentence", SENTENCES)
def test_bytes_are_their_own_ids(sentence: str) -> None:
    text = _text(None, "bytes")
    ids = text.encode(sentence)
    assert bytes(ids).decode() == sentence == text.decode(ids) == _streamed(text, ids)


def test_bytes_with_bos_and_other_ids() -> None:
    text = _text(None, "bytes", bos_id=256, add_bos=True)
    assert text.encode("a") == [256, 97]
    assert text.decode([256, 97, -1, 195]) == "a\ufffd"
    assert _streamed(text, [256, 97, -1, 195]) == "a"


def test_without_a_tokenizer_everything_says_so() -> None:
    text = _text(None, "none", chat_template="{{ messages[0].content }}")
    for call in (
        lambda: text.encode("a"),
        lambda: text.decode([1]),
        lambda: text.stream(),
        lambda: text.encode_chat([{"role": "user", "content": "a"}]),
    ):
        with pytest.raises(UsageError, match=r"no tokenizer[\s\S]*token ids"):
            call()
    assert text.apply_chat_template([{"role": "user", "content": "a"}]) == "a"


def test_kind_tokenizers_needs_its_file() -> None:
    with pytest.raises(UsageError, match=r"tokenizer\.json"):
        Text(TextSpec("tokenizers"))


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b'{"model": {"type": "X"}}'])
def test_a_broken_tokenizer_is_a_corrupt_bundle(content: bytes) -> None:
    with pytest.raises(CorruptBundle, match=r"tokenizer\.json"):
        _text(content).encode("a")


def test_settings_of_the_training_run_are_ignored() -> None:
    document = json.loads(_byte_level())
    document["truncation"] = {
        "direction": "Right",
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    document["padding"] = {
        "strategy": {"Fixed": 8},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 1,
        "pad_type_id": 0,
        "pad_token": "</s>",
    }
    assert len(_text(json.dumps(document).encode()).encode("abc")) == 3


def test_text_that_is_not_unicode_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="Unicode"):
        _text(_byte_level()).encode("\ud800")
