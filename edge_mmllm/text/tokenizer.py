"""Text to token ids and back, as a bundle's `TextSpec` and its tokenizer's file say."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from edge_mmllm.errors import CorruptBundle, TemplateError, UsageError
from edge_mmllm.modality import MODALITIES
from edge_mmllm.spec import TOKENIZER_FILES, TextSpec
from edge_mmllm.text.stream import ByteStreamDecoder, StreamDecoder
from edge_mmllm.text.template import ChatTemplate
from edge_mmllm.text.vocabulary import Vocabulary
from edge_mmllm.text.world import WorldTokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

#: `{"role": ..., "content": ...}`; content is a string or a list of parts such as
#: `{"type": "text", "text": ...}` and `{"type": "image"}`.
Message = Mapping[str, Any]

#: Probes whether a template understands a list of parts.
_PROBE = "edgeprobe"

#: U+FFFD, and its bytes EF BF BD as byte-level and byte-fallback vocabularies write them.
_REPLACEMENT_TOKENS = ("\ufffd", "\u00ef\u00bf\u00bd", "<0xEF><0xBF><0xBD>")


class Text:
    """Tokenizer and chat template of one bundle. Loads either on first use; thread-safe after.

    Args:
        spec: the model's text settings.
        tokenizer_json: content of the tokenizer's file, for the kinds of `TOKENIZER_FILES`.

    Raises:
        UsageError: such a kind without its file.
    """

    def __init__(self, spec: TextSpec, tokenizer_json: bytes | None = None) -> None:
        if spec.tokenizer in TOKENIZER_FILES and tokenizer_json is None:
            raise UsageError(
                f"this tokenizer needs its {TOKENIZER_FILES[spec.tokenizer]}",
                expected="its bytes",
                found="None",
            )
        self.spec, self._json = spec, tokenizer_json

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        if self.spec.tokenizer != "tokenizers" or self._json is None:
            raise UsageError(
                "this bundle has no tokenizer",
                fix="pass token ids, or export it again with --tokenizer PATH",
            )
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_buffer(self._json)
        except ValueError as error:
            raise CorruptBundle(
                "the tokenizer cannot be read", where="tokenizer.json", found=str(error)
            ) from error
        # Some checkpoints ship the settings of their training run.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    @cached_property
    def _world(self) -> WorldTokenizer:
        try:
            return WorldTokenizer(self._json or b"")
        except ValueError as error:
            raise CorruptBundle(
                "the tokenizer cannot be read",
                where=TOKENIZER_FILES["rwkv-world"],
                found=str(error),
            ) from error

    @cached_property
    def _around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids that the tokenizer's post-processor puts before and after a text, found by a
        trial."""
        plain = self._tokenizer.encode("a", add_special_tokens=False).ids
        full = self._tokenizer.encode("a", add_special_tokens=True).ids
        for start in range(len(full) - len(plain) + 1):
            if full[start : start + len(plain)] == plain:
                return tuple(full[:start]), tuple(full[start + len(plain) :])
        return (), ()

    @cached_property
    def _special(self) -> frozenset[int]:
        added = self._tokenizer.get_added_tokens_decoder()
        return frozenset(i for i, token in added.items() if token.special)

    def encode(self, text: str, *, add_bos: bool | None = None, whole: bool = False) -> list[int]:
        """Token ids of a prompt.

        Special tokens written out in the text become their ids. BOS comes first once at most: it
        is not added to a text that begins with it. What a post-processor would put after the
        text (EOS) is left out, unless `whole`: a prompt is there to be continued.

        Args:
            text: any text.
            add_bos: None: as the checkpoint does. True or False: with or without BOS.
            whole: nothing follows the text, since an encoder reads it.

        Raises:
            UsageError: no tokenizer; no BOS to add; not Unicode text.
        """
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UsageError("the text is not valid Unicode", found=str(error)) from error
        prefix: tuple[int, ...] = ()
        suffix: tuple[int, ...] = ()
        if self.spec.tokenizer == "bytes":
            ids = list(data)
        elif self.spec.tokenizer == "rwkv-world":
            ids = self._world.encode(data)
        else:
            prefix, suffix = self._around
            ids = list(self._tokenizer.encode(text, add_special_tokens=False).ids)
        bos = self.spec.bos_id
        if add_bos and bos is None:
            raise UsageError("this model has no BOS token", found="add_bos=True")
        if add_bos is False:
            prefix = ()
        elif (add_bos or self.spec.add_bos) and bos is not None and bos not in prefix:
            prefix = (bos, *prefix)
        if ids[: len(prefix)] == list(prefix):
            prefix = ()
        elif bos is not None and ids[:1] == [bos]:
            prefix = tuple(i for i in prefix if i != bos)
        if not whole or (suffix and ids[-len(suffix) :] == list(suffix)):
            suffix = ()
        return [*prefix, *ids, *suffix]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`. Bytes that are not UTF-8 show as U+FFFD; unknown ids as nothing.

        Raises:
            UsageError: no tokenizer.
        """
        if self.spec.tokenizer == "bytes":
            return bytes(i for i in ids if 0 <= i < 256).decode("utf-8", "replace")
        if self.spec.tokenizer == "rwkv-world":
            return self._world.decode(ids).decode("utf-8", "replace")
        tokenizer = self._tokenizer
        known = [i for i in ids if 0 <= i < 1 << 32]
        text: str = tokenizer.decode(known, skip_special_tokens=skip_special_tokens)
        return text

    def stream(self) -> StreamDecoder:
        """A decoder for ids that come one by one, special tokens left out.

        Raises:
            UsageError: no tokenizer.
        """
        if self.spec.tokenizer == "bytes":
            return ByteStreamDecoder()
        if self.spec.tokenizer == "rwkv-world":
            return ByteStreamDecoder(self._world.token)
        tokenizer, special = self._tokenizer, self._special

        def skip(token_id: int) -> bool:
            return (
                token_id in special
                or not 0 <= token_id < 1 << 32
                or tokenizer.id_to_token(token_id) is None
            )

        def complete(ids: Sequence[int]) -> bool:
            tokens = "".join(tokenizer.id_to_token(i) or "" for i in ids[-3:])
            return tokens.endswith(_REPLACEMENT_TOKENS)

        return StreamDecoder(self.decode, skip, complete)

    def vocabulary(self, size: int) -> Vocabulary:
        """The bytes of each of `size` ids. Raises: UsageError: no tokenizer, or no such table."""
        if self.spec.tokenizer == "bytes":
            return Vocabulary.of_bytes(lambda i: bytes([i]) if i < 256 else b"", size)
        if self.spec.tokenizer == "rwkv-world":
            return Vocabulary.of_bytes(self._world.token, size)
        tokenizer = self._tokenizer
        decoder = json.loads(self._json or b"{}").get("decoder")
        return Vocabulary.of_tokenizer(tokenizer, decoder, size)

    @property
    def has_chat_template(self) -> bool:
        """Whether `apply_chat_template` can be used."""
        return self.spec.chat_template is not None

    @cached_property
    def _template(self) -> ChatTemplate:
        if self.spec.chat_template is None:
            raise UsageError(
                "this model has no chat template: it is a base model",
                fix="pass a plain prompt instead of messages; on the command line, chat --raw",
            )
        return ChatTemplate(self.spec.chat_template)

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The prompt for a conversation.

        Args:
            messages: what was said so far.
            add_generation_prompt: end with what makes the model answer.
            tools: JSON schemas of functions, where the template knows them.
            documents: texts to answer from, where the template knows them.

        Raises:
            UsageError: no chat template; a malformed message; an image for a text template.
            TemplateError: the template failed, refused the messages or tried to escape.
        """
        template = self._template
        variables = self._special_tokens()
        variables.update(
            messages=[self._message(i, message) for i, message in enumerate(messages)],
            add_generation_prompt=add_generation_prompt,
            tools=None if tools is None else [dict(tool) for tool in tools],
            documents=None if documents is None else [dict(doc) for doc in documents],
        )
        return template.render(variables)

    def encode_chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Token ids of `apply_chat_template`. BOS once, by the template or as `encode` adds it."""
        text = self.apply_chat_template(
            messages, add_generation_prompt, tools=tools, documents=documents
        )
        return self.encode(text)

    def _special_tokens(self) -> dict[str, Any]:
        tokens = {"bos_token": self.spec.bos_token, "eos_token": self.spec.eos_token}
        return {name: token for name, token in tokens.items() if token is not None}

    def _message(self, index: int, message: Message) -> dict[str, Any]:
        """A message checked, its content in the form that the template understands."""
        where = f"messages[{index}]"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise UsageError(
                "a message is malformed",
                where=where,
                expected="{'role': 'user', 'content': 'Hello'}",
                found=repr(message)[:200],
            )
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            parts = [self._part(part, f"{where}.content[{i}]") for i, part in enumerate(content)]
            content = parts if self.takes_parts else _only_text(parts, where)
        elif content is not None and not isinstance(content, str):
            raise UsageError(
                "a message is malformed",
                where=f"{where}.content",
                expected="a string, or a list of parts",
                found=repr(content)[:200],
            )
        elif isinstance(content, str) and not self._takes_strings:
            content = [{"type": "text", "text": content}]
        return {**message, "content": content}

    def _part(self, part: object, where: str) -> dict[str, Any]:
        good = isinstance(part, Mapping) and isinstance(part.get("type"), str)
        if not isinstance(part, Mapping) or not good:
            raise UsageError(
                "a part of a message is malformed",
                where=where,
                expected="{'type': 'text', 'text': ...} or {'type': 'image'}",
                found=repr(part)[:200],
            )
        kind = part["type"]
        # A template leaves out what it does not know, and the answer would be about nothing.
        if kind not in ("text", *MODALITIES) and kind not in (self.spec.chat_template or ""):
            raise UsageError(
                "the chat template knows no such part of a message",
                where=where,
                expected=" | ".join(("text", *MODALITIES)),
                found=kind[:80],
                fix="{'type': 'image', 'image': path or bytes} for a picture, and so on",
            )
        if kind == "text" and not isinstance(part.get("text"), str):
            raise UsageError("a text part has no text", where=where, found=repr(part)[:200])
        return dict(part)

    @cached_property
    def takes_parts(self) -> bool:
        """Whether the template understands a list of parts, found by a trial."""
        shown = self._try([{"type": "text", "text": _PROBE}])
        return shown is not None and _PROBE in shown and "'type'" not in shown

    @cached_property
    def _takes_strings(self) -> bool:
        """Whether the template understands a string; some multimodal ones want parts only."""
        shown = self._try(_PROBE)
        return (shown is not None and _PROBE in shown) or not self.takes_parts

    def _try(self, content: object) -> str | None:
        variables = self._special_tokens()
        variables.update(
            messages=[{"role": "user", "content": content}],
            add_generation_prompt=False,
            tools=None,
            documents=None,
        )
        try:
            return self._template.render(variables)
        except TemplateError:
            return None


def _only_text(parts: Sequence[Mapping[str, Any]], where: str) -> str:
    """The text of parts, for a template that takes strings."""
    other = sorted({part["type"] for part in parts} - {"text"})
    if other:
        raise UsageError(
            "this model's chat template takes text only",
            where=f"{where}.content",
            expected="parts of type text",
            found=", ".join(other),
        )
    return "\n".join(part["text"] for part in parts)
