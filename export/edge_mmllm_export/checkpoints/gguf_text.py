"""A GGUF's tokenizer rebuilt as `tokenizer.json`, and its special ids and chat template.

`tokenizer.ggml.model` names the algorithm: `gpt2` is byte-level BPE (tokens and ranked merges,
split first by the regex that `tokenizer.ggml.pre` names), `llama` is SentencePiece BPE (tokens
and scores: the adjacent pair whose concatenation scores best merges first, what stays unknown
falls back to byte tokens). Both become the `BPE` model of the `tokenizers` library.

Source: llama.cpp src/llama-vocab.cpp (`load`, `llm_tokenizer_bpe`, `llm_tokenizer_spm`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edge_mmllm.errors import CheckpointError, CorruptCheckpoint
from edge_mmllm.spec import TextSpec

from . import pretokenizers
from .base import TextAssets
from .text import load_tokenizer

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)

#: Tokens that end a turn or a text by their very name: old files give one `eos_token_id` only.
_END_TOKENS = (
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<｜end▁of▁sentence｜>",
    "<EOT>",
    "[EOT]",
)

#: Tokenizers that become kind `none` for now. The RWKV World tokenizer (greedy longest match over
#: bytes) gets its own kind here and in `TextSpec` when the RWKV models land.
_NO_TEXT = ("", "none", "no_vocab", "rwkv")


def gguf_text(metadata: Mapping[str, Any], path: Path) -> TextAssets:
    """Rebuilds the tokenizer from `metadata`.

    Raises: CheckpointError (a tokenizer or pre-tokenizer unknown here; the message names it),
        CorruptCheckpoint (arrays of the wrong type or length, ids outside the vocabulary).
    """
    return _Source(metadata, path).assets()


class _Source:
    """Typed access to the `tokenizer.*` pairs of one file."""

    def __init__(self, metadata: Mapping[str, Any], path: Path) -> None:
        self.metadata, self.path = metadata, path

    def bad(self, what: str, expected: str, found: object) -> CorruptCheckpoint:
        return CorruptCheckpoint(
            f"{self.path.name}: {what}",
            where=str(self.path),
            expected=expected,
            found=str(found)[:200],
            fix="convert the model again, or export with --tokenizer PATH",
        )

    def text(self, key: str) -> str | None:
        value = self.metadata.get(key)
        if value is not None and not isinstance(value, str):
            raise self.bad(f"{key} is not text", "a string", value)
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.metadata.get(key, default)
        if not isinstance(value, bool):
            raise self.bad(f"{key} is not a flag", "a bool", value)
        return value

    def items(self, key: str, kind: type | tuple[type, ...]) -> list[Any]:
        value = self.metadata.get(key, ())
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise self.bad(f"{key} is not an array", "an array", value)
        found = list(value)
        if not all(isinstance(item, kind) for item in found):
            raise self.bad(f"{key} holds items of a wrong type", str(kind), found[:3])
        return found

    def token_id(self, name: str, vocab: int) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        value = self.metadata.get(key)
        if value is None:
            return None
        if type(value) is not int or value < 0:
            raise self.bad(f"{key} is not a token id", f"0 to {vocab - 1}", value)
        return value if value < vocab else None  # llama.cpp also passes over such ids

    def assets(self) -> TextAssets:
        model = self.text("tokenizer.ggml.model") or ""
        template = self.text("tokenizer.chat_template")
        if model in _NO_TEXT:
            return TextAssets(TextSpec("none", chat_template=template))
        if model not in ("gpt2", "llama"):
            raise CheckpointError(
                f"{self.path.name} has a tokenizer this release cannot rebuild: {model}",
                where=str(self.path),
                expected="tokenizer.ggml.model gpt2 or llama",
                found=model,
                fix="export with --tokenizer PATH to the model's tokenizer.json",
            )
        tokens = self._tokens()
        kinds = self._kinds(tokens)
        if model == "gpt2":
            document, add_bos = self._byte_level(tokens)
        else:
            document, add_bos = self._sentencepiece(tokens, kinds), True
        named = str(self.metadata.get("general.name", "")).lower()
        strip = "phi-3" in named or "phi3" in named
        document["added_tokens"] = _added_tokens(tokens, kinds, strip_right=strip)
        blob = json.dumps(document, ensure_ascii=False).encode()
        load_tokenizer(blob, str(self.path))  # proves that it parses

        vocab = len(tokens)
        bos, eos, pad = (self.token_id(name, vocab) for name in ("bos", "eos", "padding"))
        if model == "llama":  # the format's defaults
            bos = 1 if bos is None and vocab > 1 else bos
            eos = 2 if eos is None and vocab > 2 else eos
        spec = TextSpec(
            "tokenizers",
            bos_id=bos,
            eos_ids=self._eos_ids(eos, tokens, kinds),
            add_bos=bos is not None and self.flag("tokenizer.ggml.add_bos_token", add_bos),
            chat_template=template,
            bos_token=None if bos is None else tokens[bos],
            eos_token=None if eos is None else tokens[eos],
            pad_id=pad,
        )
        return TextAssets(spec, blob)

    def _tokens(self) -> list[str]:
        tokens: list[str] = self.items("tokenizer.ggml.tokens", str)
        if not tokens:
            raise self.bad("tokenizer.ggml.tokens is missing or empty", "the vocabulary", "nothing")
        tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
        if len(set(tokens)) != len(tokens):
            twice = [token for token, count in Counter(tokens).items() if count > 1]
            raise self.bad("tokens appear twice in the vocabulary", "each once", twice[:10])
        return tokens

    def _kinds(self, tokens: list[str]) -> list[int]:
        kinds: list[int] = self.items("tokenizer.ggml.token_type", int) or [_NORMAL] * len(tokens)
        if len(kinds) < len(tokens):
            raise self.bad("tokenizer.ggml.token_type is too short", str(len(tokens)), len(kinds))
        return [
            _CONTROL if token in _END_TOKENS else kind
            for token, kind in zip(tokens, kinds, strict=False)
        ]

    def _eos_ids(self, eos: int | None, tokens: list[str], kinds: list[int]) -> tuple[int, ...]:
        """EOS, end of turn, end of message; without an explicit end of turn, those named so."""
        ids = [eos, self.token_id("eot", len(tokens)), self.token_id("eom", len(tokens))]
        if ids[1] is None:
            index = {token: i for i, token in enumerate(tokens)}
            ids += [index.get(token) for token in _END_TOKENS]
        return tuple(dict.fromkeys(i for i in ids if i is not None))

    def _byte_level(self, tokens: list[str]) -> tuple[dict[str, Any], bool]:
        name = self.text("tokenizer.ggml.pre")
        pre = pretokenizers.find(name) if name else None
        if pre is None:
            raise CheckpointError(
                f"{self.path.name} names a pre-tokenizer unknown here: {name or 'none at all'}",
                where=f"{self.path}, tokenizer.ggml.pre",
                expected=", ".join(pretokenizers.known()),
                found=name or "nothing (a file from before May 2024)",
                fix="export with --tokenizer PATH to the model's tokenizer.json",
            )
        merges = []
        for merge in self.items("tokenizer.ggml.merges", str):
            cut = merge.find(" ", 1)
            if cut < 0:
                raise self.bad("a merge has no two parts", "'left right'", repr(merge))
            merges.append((merge[:cut], merge[cut + 1 :]))
        self._check_merges(tokens, merges)
        split = [
            {"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False}
            for p in pre.patterns
        ]
        byte_level = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        }
        document = _document(tokens, merges, ignore_merges=pre.ignore_merges)
        document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*split, byte_level]}
        document["decoder"] = byte_level
        return document, pre.add_bos

    def _check_merges(self, tokens: list[str], merges: list[tuple[str, str]]) -> None:
        known = set(tokens)
        lost = [
            m for m in merges if m[0] not in known or m[1] not in known or m[0] + m[1] not in known
        ]
        if lost:
            raise self.bad(
                f"{len(lost)} merges use tokens that are not in the vocabulary",
                "tokens of tokenizer.ggml.tokens",
                " ".join(repr(" ".join(m)) for m in lost[:5]),
            )

    def _sentencepiece(self, tokens: list[str], kinds: list[int]) -> dict[str, Any]:
        scores: list[float] = self.items("tokenizer.ggml.scores", (int, float))
        if len(scores) < len(tokens):
            raise self.bad("tokenizer.ggml.scores is too short", str(len(tokens)), len(scores))
        unknown = self.token_id("unknown", len(tokens))
        bytes_known = sum(kind == _BYTE for kind in kinds) == 256
        document = _document(
            tokens,
            _merges_of_scores(tokens, scores),
            unk_token=tokens[unknown if unknown is not None else 0],
            byte_fallback=bytes_known,
        )
        prefix = self.flag("tokenizer.ggml.add_space_prefix", True)
        space: dict[str, Any] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        start = [{"type": "Prepend", "prepend": "▁"}] if prefix else []
        document["normalizer"] = {"type": "Sequence", "normalizers": [*start, space]}
        back: list[dict[str, Any]] = [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ]
        if prefix:
            back.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
        document["decoder"] = {"type": "Sequence", "decoders": back}
        return document


def _merges_of_scores(tokens: list[str], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to cut a token into two others, best-scored token first.

    llama.cpp merges the pair whose concatenation scores best, leftmost of equals. Cuts of the same
    token rank longer left part first, which is leftmost in a run of one character.
    """
    index = {token: i for i, token in enumerate(tokens)}
    order = sorted(range(len(tokens)), key=lambda i: (-scores[i], i))
    return [
        (tokens[i][:cut], tokens[i][cut:])
        for i in order
        for cut in range(len(tokens[i]) - 1, 0, -1)
        if tokens[i][:cut] in index and tokens[i][cut:] in index
    ]


def _document(
    tokens: list[str],
    merges: list[tuple[str, str]],
    *,
    unk_token: str | None = None,
    byte_fallback: bool = False,
    ignore_merges: bool = False,
) -> dict[str, Any]:
    """The skeleton of a `tokenizer.json` with a BPE model."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unk_token,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": unk_token is not None,
            "byte_fallback": byte_fallback,
            "ignore_merges": ignore_merges,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [list(merge) for merge in merges],
        },
    }


def _added_tokens(
    tokens: list[str], kinds: list[int], *, strip_right: bool
) -> list[dict[str, Any]]:
    """Control and unknown tokens as special, user-defined ones as plain added tokens.

    `strip_right`: Phi-3's tokens swallow the space after them; a GGUF cannot say so, hence
    llama.cpp goes by the model's name.
    """
    return [
        {
            "id": i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": strip_right and token not in ("<unk>", "<s>", "<|endoftext|>"),
            "normalized": False,
            "special": kind != _USER_DEFINED,
        }
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (_CONTROL, _UNKNOWN, _USER_DEFINED)
    ]
