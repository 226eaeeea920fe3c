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

import numpy as np

from edge_mmllm.errors import ContextFull, UsageError
from edge_mmllm_runtime import generation
from edge_mmllm_runtime.inputs import common_prefix
from edge_mmllm_runtime.prompted import Prompted
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
    if session.spec.decoder_start_id is not None:
        raise UsageError("an encoder reads whole prompts: no beginning of one can be kept")
    if isinstance(prompt, str):
        ids = Prompted(np.array(stable_ids(session.text, prompt), np.int64))
    elif isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
        messages = cast("Sequence[Mapping[str, Any]]", prompt)
        if session.spec.modalities:
            ids = _stable_beginning(session, messages)
        else:
            ids = Prompted(np.array(stable_ids(session.text, messages), np.int64))
    else:
        ids = session.encode(prompt)
    if not len(ids):
        return 0
    if session.context is not None and len(ids) > session.context:
        raise ContextFull(0, len(ids), session.context)
    session.prompt_cache.check_room(_entry_bytes(session, len(ids), storage))
    session.reset()
    session.prefill(ids)
    session.prompt_cache.add(ids.ids, session.snapshot(storage))
    return len(ids)


def _stable_beginning(session: Session, messages: Sequence[Mapping[str, Any]]) -> Prompted:
    """As `stable_ids`, of messages that may have pictures: what every continuation begins with."""
    asked = messages[-1].get("role") == "user"
    whole = session.encode(messages)
    count = len(whole)
    for probe in _PROBES:
        said = [{"role": "assistant", "content": probe}] if asked else []
        longer = session.encode([*messages, *said, {"role": "user", "content": probe}])
        count = min(count, common_prefix(whole.ids, longer.ids))
    return whole[:count]


@contextmanager
def sharing(session: Session, prompts: Sequence[Prompted | None]) -> Iterator[None]:
    """Keeps the state of what all prompts begin with in the prompt cache, if that pays."""
    ids = _worth_sharing(session, prompts)
    if ids is None:
        yield
        return
    session.reset()
    session.prefill(ids)
    session.prompt_cache.add(ids.ids, session.snapshot())
    try:
        yield
    finally:
        session.prompt_cache.discard(ids.ids)


def _worth_sharing(session: Session, prompts: Sequence[Prompted | None]) -> Prompted | None:
    """What all prompts begin with; None where reading it again costs less, or no room is left."""
    if len(prompts) < 2 or session.spec.decoder_start_id is not None:
        return None
    first, *others = (Prompted(np.empty(0, np.int64)) if p is None else p for p in prompts)
    count = min(common_prefix(first.ids, other.ids) for other in others)
    cache = session.prompt_cache
    room = cache.limit_bytes - cache.size_bytes
    if (
        count < WORTH_SHARING
        or first.ids[:count] in cache
        or _entry_bytes(session, count, "f32") > room
    ):
        return None
    return first[:count]


def _entry_bytes(session: Session, count: int, storage: Storage) -> int:
    """What a cached state of `count` tokens takes: states, logits, ids as key and in the state."""
    states = packed_bytes(session.spec.states, count, storage)
    return states + 4 * session.spec.vocab_size + 8 * count
