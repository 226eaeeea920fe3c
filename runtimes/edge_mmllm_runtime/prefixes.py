"""Beginnings that prompts share: found in text, read once, kept in the session's prompt cache.

A text may tokenize differently at its end once more text follows (`to` + `day`), and a conversation
ends differently once a turn follows, so `stable_ids` gives the ids that a longer prompt shares.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from edge_mmllm.errors import ContextFull, UsageError
from edge_mmllm_runtime import generation
from edge_mmllm_runtime.inputs import common_prefix
from edge_mmllm_runtime.storage import Storage, check_storage, packed_bytes

if TYPE_CHECKING:
    from edge_mmllm.text import Text
    from edge_mmllm_runtime.session import Session

#: Turns that may follow a conversation, with nothing in common.
_PROBES = ("a", "The", "1", "\u4e2d")

#: Where a text has no spaces, its last characters up to this many may tokenize anew.
_LAST_CHARACTERS = 32

#: Below this many common tokens the copies of the state are not worth it: a prefill of as many
#: takes about as long as two copies of the largest state measured (Mamba-2 130m, 19 MB).
WORTH_SHARING = 16


def stable_ids(text: Text, prompt: str | Sequence[Mapping[str, Any]]) -> list[int]:
    """The ids that a longer prompt with this beginning has too: those before its last word.

    Tokenizers split text into words before anything else, so what follows changes the last one at
    most. Where one does not, the cache misses; it is never wrong.

    Args:
        prompt: text, or chat messages. Of messages it is the text that they share with the same
            messages and another user's turn (after an answer, where the last turn is the user's).

    Raises:
        UsageError, TemplateError: as `Text.encode` and `Text.encode_chat`.
    """
    if not isinstance(prompt, str):
        asked = bool(prompt) and prompt[-1].get("role") == "user"
        longer = [text.apply_chat_template(prompt)] if asked else []
        for probe in _PROBES:
            said = [{"role": "assistant", "content": probe}] if asked else []
            turns = [*prompt, *said, {"role": "user", "content": probe}]
            longer.append(text.apply_chat_template(turns))
        prompt = os.path.commonprefix(longer)  # noqa: RUF071 - any strings will do
    whole = text.encode(prompt)
    return whole[: common_prefix(whole, text.encode(_before_last_word(prompt)))]


def _before_last_word(text: str) -> str:
    """`text` without trailing white space or, where it has none, without its last word."""
    end = text.rstrip()
    if end != text:
        return end
    last = re.search(r"\s*\S+$", text[-_LAST_CHARACTERS:])
    return text[: len(text) - len(last[0])] if last else text


def cache_prompt(session: Session, prompt: generation.Prompt, storage: Storage) -> int:
    """See `Session.cache_prompt`."""
    check_storage(storage)
    ids: list[int] | None
    if isinstance(prompt, str):
        ids = stable_ids(session.text, prompt)
    elif isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
        ids = stable_ids(session.text, cast("Sequence[Mapping[str, Any]]", prompt))
    else:
        ids = generation.encode_prompt(session, prompt)
    if ids is None:
        raise UsageError("there is no prompt to cache", expected="text, messages or token ids")
    if not ids:
        return 0
    if session.context is not None and len(ids) > session.context:
        raise ContextFull(0, len(ids), session.context)
    session.prompt_cache.check_room(_entry_bytes(session, len(ids), storage))
    session.reset()
    session.prefill(ids)
    session.prompt_cache.add(ids, session.snapshot(storage))
    return len(ids)


@contextmanager
def sharing(session: Session, prompts: Sequence[list[int] | None]) -> Iterator[None]:
    """Keeps the state of what all prompts begin with in the prompt cache, if that pays."""
    ids = _worth_sharing(session, prompts)
    if ids is None:
        yield
        return
    session.reset()
    session.prefill(ids)
    session.prompt_cache.add(ids, session.snapshot())
    try:
        yield
    finally:
        session.prompt_cache.discard(ids)


def _worth_sharing(session: Session, prompts: Sequence[list[int] | None]) -> list[int] | None:
    """What all prompts begin with; None where reading it again costs less, or no room is left."""
    if len(prompts) < 2:
        return None
    first = prompts[0] or []
    count = min(common_prefix(first, other or []) for other in prompts[1:])
    cache = session.prompt_cache
    room = cache.limit_bytes - cache.size_bytes
    if (
        count < WORTH_SHARING
        or first[:count] in cache
        or _entry_bytes(session, count, "f32") > room
    ):
        return None
    return first[:count]


def _entry_bytes(session: Session, count: int, storage: Storage) -> int:
    """What a cached state of `count` tokens takes: states, logits, ids as key and in the state."""
    states = packed_bytes(session.spec.states, count, storage)
    return states + 4 * session.spec.vocab_size + 8 * count
