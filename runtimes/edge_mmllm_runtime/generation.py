"""The generation loop, over any session.

After a generation the state holds the prompt and every token but the last one picked, which the
model has not read yet; `Session.tokens` says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from edge_mmllm.errors import ContextFull, UsageError
from edge_mmllm_runtime.engine import Float32
from edge_mmllm_runtime.inputs import common_prefix
from edge_mmllm_runtime.placing import Media, place_ids, place_messages, place_text, question
from edge_mmllm_runtime.prompted import Prompted
from edge_mmllm_runtime.sampling import Sampler, Sampling

if TYPE_CHECKING:
    from edge_mmllm.text import StopMatcher
    from edge_mmllm_runtime.constrained import Guide
    from edge_mmllm_runtime.reading import Progress
    from edge_mmllm_runtime.session import Session

#: Text; chat messages (`{"role": ..., "content": ...}`); token ids; or None, to go on from
#: the session's state. (Within the runtime also what `encode_prompt` made of one of these.)
Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int] | Prompted | None

#: Why a generation ended: an end-of-sequence token, a stop string, `max_new_tokens` reached, or
#: no room left in the context; `grammar`: its constraint lets nothing follow.
FinishReason = Literal["eos", "stop", "length", "context", "grammar"]


def encode_prompt(session: Session, prompt: Prompt, media: Media | None = None) -> Prompted | None:
    """Token ids of a prompt, with what `media` holds in its places; None for None.

    Raises:
        UsageError: no tokens, ids outside the vocabulary, a bundle without a tokenizer, or media
            that the prompt has no places for.
    """
    given = {name: items for name, items in (media or {}).items() if items is not None}
    if isinstance(prompt, Prompted):
        return prompt
    session.perception.restart()
    if given and (prompt is None or not session.spec.modalities):
        name, items = next(iter(given.items()))
        if session.spec.modalities:
            raise UsageError(f"{name} without a prompt", fix="give a prompt with them")
        session.perception.item(name, items)  # says what the bundle understands
    if prompt is None:
        return None
    if isinstance(prompt, str):
        asked = question(session, prompt, given) if given else prompt
        if isinstance(asked, str):
            if session.spec.modalities:
                return place_text(session, asked, given)
            whole = session.spec.decoder_start_id is not None
            return Prompted(session.check_ids(session.text.encode(asked, whole=whole)))
        prompt = asked
    if isinstance(prompt, Mapping):
        raise UsageError("messages come in a list", expected="[{'role': ..., 'content': ...}]")
    if isinstance(prompt, (bytes, bytearray)) or not isinstance(prompt, (Sequence, np.ndarray)):
        raise UsageError(
            "a prompt is text, a list of messages, or a list of token ids",
            found=type(prompt).__name__,
        )
    if len(prompt) and isinstance(prompt[0], Mapping):
        messages = cast("Sequence[Mapping[str, Any]]", prompt)
        if session.spec.modalities:
            return place_messages(session, messages, given)
        return Prompted(session.check_ids(session.text.encode_chat(messages)))
    ids = session.check_ids(prompt)
    return place_ids(session, ids, given) if given else Prompted(ids)


def tokens(
    session: Session,
    prompt: Prompt,
    max_new_tokens: int,
    sampling: Sampling,
    *,
    stop_ids: frozenset[int],
    reuse: bool,
    progress: Progress | None,
    media: Media | None = None,
    guide: Guide | None = None,
) -> Iterator[int]:
    """Checks everything, then returns an iterator over the new ids. See `generate_tokens`."""
    _ = session.engine  # closed: say so now
    ids = encode_prompt(session, prompt, media)
    if not isinstance(max_new_tokens, Integral) or max_new_tokens < 0:
        raise UsageError(
            "max_new_tokens must be a whole number, 0 or more", found=repr(max_new_tokens)[:80]
        )
    if ids is None and session.logits is None:
        raise UsageError(
            "there is nothing to go on from",
            fix="give a prompt, or decode() a token first (after a generation: its last)",
        )
    taken = 0 if ids is None or session.spec.decoder_start_id is not None else len(ids)
    if session.context is not None and taken > session.context:
        raise ContextFull(0, taken, session.context)
    return _loop(session, ids, max_new_tokens, sampling, stop_ids, reuse, progress, guide)


def _loop(
    session: Session,
    ids: Prompted | None,
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: frozenset[int],
    reuse: bool,
    progress: Progress | None,
    guide: Guide | None,
) -> Iterator[int]:
    session.finish_reason, session.constraint_cost = None, None
    logits = session.logits if ids is None else _read(session, ids, reuse, progress)
    if logits is None:
        raise moved_on()
    if ids is None or session.spec.decoder_start_id is not None:
        seen: Sequence[int] = session.tokens or ()
    else:
        seen = ids.ids.tolist()
    if guide is not None:
        from edge_mmllm_runtime.constrained_loop import constrained_loop

        yield from constrained_loop(
            session, logits, seen, max_new_tokens, sampling, guide, stop_ids
        )
        return
    sampler = Sampler(sampling, session.spec.vocab_size, seen)
    version, token = session.version, None
    for _ in range(max_new_tokens):
        if token is not None:
            if session.context is not None and session.position >= session.context:
                session.finish_reason = "context"
                return
            logits = session.step(token)
            version = session.version
        token = sampler.pick(logits)
        if token in stop_ids:
            session.finish_reason = "eos"
            return
        session.drop_logits()  # the state lacks this token: they are not what comes next
        yield token
        if session.version != version:
            raise moved_on()
    session.finish_reason = "length"


def moved_on() -> UsageError:
    """The error of a generation whose session was used meanwhile."""
    return UsageError(
        "the session was used for something else during this generation",
        fix="finish or drop one generation before the next call, or take a snapshot first",
    )


def _read(session: Session, ids: Prompted, reuse: bool, progress: Progress | None) -> Float32:
    """Makes the state that of `ids` and returns the logits of the last one; of an
    encoder-decoder, those of the answer's first token."""
    if session.spec.decoder_start_id is not None:
        session.start(ids)
        return session.prefill([session.spec.decoder_start_id])
    if reuse and session.tokens is not None:
        known = common_prefix(session.tokens, ids.ids)
        if known == len(ids) == session.position and session.logits is not None:
            return session.logits
        cached = session.prompt_cache.longest(ids.ids)
        better = cached is not None and cached.position > known
        if known and not better and session.rewind(min(known, len(ids) - 1)):
            return session.prefill(ids[session.position :], progress=progress)
    session.reset()
    return session.prefill(ids, progress=progress)


def pieces(session: Session, ids: Iterator[int], stop: StopMatcher) -> Iterator[str]:
    """Turns ids into text that can be shown at once: whole characters, no part of a stop string."""
    stream = session.text.stream()
    for token in ids:
        piece, stopped = stop.push(stream.push(token))
        if piece:
            yield piece
        if stopped:
            session.finish_reason = "stop"
            return
    piece, stopped = stop.push(stream.flush())
    if stopped:
        session.finish_reason = "stop"
    if piece := piece + stop.flush():
        yield piece
