"""A tokenizer as GGUF metadata: the exact inverse of `checkpoints.gguf_text`.

The format names how a byte-level BPE splits text instead of saying it. The name is found by
splitting sample texts; a tokenizer that splits like none of llama.cpp's is refused, since a model
fed other tokens than it was trained on is wrong without a sign.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Regex, Tokenizer, pre_tokenizers

from edge_mmllm.errors import CheckpointError
from edge_mmllm.text.world import WorldTokenizer
from edge_mmllm_export.checkpoints import pretokenizers
from edge_mmllm_export.checkpoints.base import TextAssets
from edge_mmllm_export.checkpoints.text import adds_bos

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

#: Texts on which any two of the known expressions differ.
SAMPLES = (
    "Hello world! I'm sure they'll say it's 12345 or 3.14159, isn't IT'S?\n\n  Two  spaces\t\tx ",
    "def f(x_1):\n    return {'a': [1, 2]} != None  # done!!! @user #tag $100 50% a&b\r\n\r\n",
    "naïve café Ünïcödé ŁódŹ Ελληνικά Русский текст 中文字符 日本語テキスト 한국어",
    "ไทย हिन्दी العربية ١٢٣ ⅷ ½ 1٢3 e\u0301 n\u0303o\u0303 🤗🚀👩\u200d👧 …—“quotes”‘x’",
    "<|tag|> http://a.b/c?d=e&f=g \u00a0x\u3000y\u200bz 1 22 333 4444 55555",
    "CamelCaseWORDS fooBar iPhone15Pro ABCdef'LL We'Re  \n \n\t\n a\n\nb   c",
    "    ",
)


@dataclass
class Vocabulary:
    """What goes into the file. Lists are as long as the model has rows.

    Attributes:
        model: of `tokenizer.ggml.model`.
        settings: further keys below `tokenizer.ggml.`.
    """

    model: str
    tokens: list[str | bytes] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)


def vocabulary(text: TextAssets, rows: int) -> Vocabulary:
    """The metadata of a tokenizer for a model of `rows` embeddings.

    Raises:
        CheckpointError: a tokenizer that the format cannot say.
    """
    spec, content = text.spec, text.tokenizer_json
    if content is None:
        return Vocabulary("no_vocab")
    if spec.tokenizer == "rwkv-world":
        out = _world(content)
    else:
        document = json.loads(content)
        tokenizer = Tokenizer.from_buffer(content)
        unigram = document.get("model", {}).get("type") == "Unigram"
        out = _unigram(document) if unigram else _bpe(document, tokenizer)
        add_bos = spec.add_bos or (spec.bos_id is not None and adds_bos(tokenizer, spec.bos_id))
        out.settings |= {"add_bos_token": add_bos, "add_eos_token": unigram}
    if len(out.tokens) > rows:
        raise CheckpointError(
            "the tokenizer has more ids than the model has embeddings",
            expected=f"ids below {rows}",
            found=str(len(out.tokens)),
        )
    out.tokens += [f"[PAD{i}]" for i in range(len(out.tokens), rows)]
    out.types += [UNUSED] * (rows - len(out.types))
    if out.scores:
        out.scores += [-10000.0] * (rows - len(out.scores))
    ends = dict(zip(("eos", "eot", "eom"), spec.eos_ids, strict=False))
    for name, value in {"bos": spec.bos_id, "padding": spec.pad_id, **ends}.items():
        if value is not None and value < rows:
            out.settings[f"{name}_token_id"] = value
    return out


def _world(content: bytes) -> Vocabulary:
    """Tokens as llama.cpp's reader unescapes them: a Python bytes literal without its quotes."""
    world = WorldTokenizer(content)
    tokens: list[str | bytes] = ["<s>"]
    types = [CONTROL]
    for i in range(1, world.size):
        token = world.token(i)
        tokens.append(repr(token)[2:-1] if token else f"[PAD{i}]")
        types.append(NORMAL if token else UNUSED)
    return Vocabulary("rwkv", tokens, types, settings={"bos_token_id": 0})


def _bpe(document: dict[str, Any], tokenizer: Tokenizer) -> Vocabulary:
    model = document.get("model", {})
    if model.get("type") != "BPE":
        raise _unsayable(f"a model of type {model.get('type')}", "BPE | Unigram")
    byte_level = _byte_level(document.get("pre_tokenizer"))
    size = max([*model["vocab"].values(), *(t["id"] for t in document["added_tokens"]), -1]) + 1
    tokens: list[str | bytes] = [f"[PAD{i}]" for i in range(size)]
    types = [UNUSED] * size
    for token, i in model["vocab"].items():
        tokens[i], types[i] = token, NORMAL
    for added in document["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    merges = [tuple(m) if isinstance(m, list) else _cut(m) for m in model["merges"]]
    if byte_level:
        settings = {"pre": _pre_name(tokenizer, bool(model.get("ignore_merges")))}
        joined = [f"{left} {right}" for left, right in merges]
        return Vocabulary("gpt2", tokens, types, merges=joined, settings=settings)
    return _sentencepiece(document, tokens, types, merges)


def _sentencepiece(
    document: dict[str, Any],
    tokens: list[str | bytes],
    types: list[int],
    merges: list[tuple[str, str]],
) -> Vocabulary:
    """Scores from the order of merges: llama.cpp joins the pair whose token scores best, and a
    converted SentencePiece model lists the merges of better tokens first."""
    model = document["model"]
    if not model.get("byte_fallback"):
        raise _unsayable("a BPE neither of bytes nor with byte tokens", "ByteLevel, byte_fallback")
    index = {token: i for i, token in enumerate(tokens)}
    scores = [0.0] * len(tokens)
    for rank, (left, right) in enumerate(merges):
        i = index.get(left + right)
        if i is None:
            raise _unsayable(f"a merge without a token: {left} {right}", "a token of each merge")
        scores[i] = scores[i] or -float(rank + 1)
    for i in range(256):
        if (at := index.get(f"<0x{i:02X}>")) is not None:
            types[at] = BYTE
    unknown = index.get(model.get("unk_token"))
    settings: dict[str, Any] = {"add_space_prefix": _prefixed(document)}
    if unknown is not None:
        types[unknown] = UNKNOWN
        settings["unknown_token_id"] = unknown
    return Vocabulary("llama", tokens, types, scores, settings=settings)


def _unigram(document: dict[str, Any]) -> Vocabulary:
    """SentencePiece's other kind, of T5: the likeliest pieces by their scores, after a table of
    what characters become (NFKC, mostly)."""
    model, added = document["model"], document["added_tokens"]
    size = max([len(model["vocab"]) - 1, *(t["id"] for t in added)]) + 1
    tokens: list[str | bytes] = [f"[PAD{i}]" for i in range(size)]
    types, scores = [UNUSED] * size, [-10000.0] * size
    for i, (token, score) in enumerate(model["vocab"]):
        tokens[i], types[i], scores[i] = token, NORMAL, float(score)
    for token in added:
        tokens[token["id"]] = token["content"]
        types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    settings: dict[str, Any] = {"pre": "default", "add_space_prefix": _prefixed(document)}
    unknown = model.get("unk_id")
    if unknown is not None:
        types[unknown], settings["unknown_token_id"] = UNKNOWN, unknown
    steps = _steps(document.get("normalizer"), "normalizers")
    for step in steps:
        if step["type"] == "Precompiled":
            settings["precompiled_charsmap"] = base64.b64decode(step["precompiled_charsmap"])
        elif step["type"] not in ("Replace", "Strip"):
            raise _unsayable(f"Unigram behind {step['type']}", "Precompiled")
    splits = _steps(document.get("pre_tokenizer"), "pretokenizers")
    settings["remove_extra_whitespaces"] = any(
        step["type"] in ("WhitespaceSplit", "Replace") for step in (*splits, *steps)
    )
    return Vocabulary("t5", tokens, types, scores, settings=settings)


def _prefixed(document: dict[str, Any]) -> bool:
    """Whether text begins with a space of its own: a `Prepend`, or `Metaspace` not `never`."""
    for step in _steps(document.get("normalizer"), "normalizers"):
        if step["type"] == "Prepend":
            return True
    for step in _steps(document.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "Metaspace":
            return bool(step.get("prepend_scheme", "always") != "never")
    return False


def _cut(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _steps(step: dict[str, Any] | None, of: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    return list(step[of]) if step["type"] == "Sequence" else [step]


def _byte_level(step: dict[str, Any] | None) -> bool:
    found = [s for s in _steps(step, "pretokenizers") if s["type"] == "ByteLevel"]
    if any(s.get("add_prefix_space") for s in found):
        raise _unsayable("bytes with a space put before the text", "add_prefix_space false")
    return bool(found)


def _pre_name(tokenizer: Tokenizer, ignore_merges: bool) -> str:
    """The name whose expressions split as the tokenizer does."""
    split: Callable[[str], list[tuple[str, tuple[int, int]]]]
    split = tokenizer.pre_tokenizer.pre_tokenize_str
    wanted = [split(text) for text in SAMPLES]
    for name in _NAMES:
        known = pretokenizers.find(name)
        if known is None or known.ignore_merges != ignore_merges:
            continue
        steps: list[Any] = [pre_tokenizers.Split(Regex(p), "isolated") for p in known.patterns]
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        candidate = pre_tokenizers.Sequence(steps)
        pieces = [candidate.pre_tokenize_str(text) for text in SAMPLES]
        if [[p for p, _ in t] for t in pieces] == [[p for p, _ in t] for t in wanted]:
            return name
    raise _unsayable("a way to split text that llama.cpp has no name for", ", ".join(_NAMES))


#: One name of each way to split, of those that llama.cpp reads; commonest first.
_NAMES = (
    "llama-bpe", "qwen2", "gpt-2", "smollm", "dbrx", "tekken", "gpt-4o", "deepseek-v3", "falcon",
    "deepseek-llm", "deepseek-coder", "qwen35", "default",
)  # fmt: skip


def _unsayable(found: str, expected: str) -> CheckpointError:
    return CheckpointError(
        "GGUF has no form for this tokenizer",
        expected=expected,
        found=found,
        fix="--tokenizer none writes the model without its tokenizer, or use --format onnx",
    )
