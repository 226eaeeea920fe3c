"""The generation loop under a constraint. See `generation.py` for the one without.

Tokens that the grammar forces are given out one after another and read together, before the next
logits are needed. When the loop ends, or is dropped, the state holds all tokens given out but the
last, as after any generation; while it pauses within a forced run, the state may lack more of
them: `Session.tokens` says what it has.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from edge_mmllm.errors import SessionClosed
from edge_mmllm_runtime.constrained import Guide
from edge_mmllm_runtime.engine import Float32
from edge_mmllm_runtime.sampling import Sampler, Sampling

if TYPE_CHECKING:
    from edge_mmllm_runtime.session import Session


def constrained_loop(
    session: Session,
    logits: Float32,
    seen: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
    guide: Guide,
    stop_ids: frozenset[int],
) -> Iterator[int]:
    """New ids.

    Args:
        logits: of the last token of the prompt.
        seen: ids before the answer, for the repetition penalty.

    Raises:
        UsageError: the session was used for something else.
        SessionError: the engine failed, or the grammar became too complex.
    """
    from edge_mmllm_runtime.generation import moved_on

    matching = guide.start()
    session.constraint_cost = cost = matching.cost
    sampler = Sampler(sampling, session.spec.vocab_size, seen)
    forced, unread = deque(matching.forced()), list[int]()
    version = session.version
    try:
        for _ in range(max_new_tokens):
            if not forced and matching.ended:
                break
            if unread and _full(session, len(unread)):
                session.finish_reason = "context"
                return
            if forced:
                token = forced.popleft()
                sampler.saw(token)
                cost.forced += 1
            else:
                if unread:
                    logits = _read_on(session, unread)
                    version = session.version
                    unread.clear()
                masked = matching.masked(logits)
                if masked is None:
                    session.finish_reason = "grammar"
                    return
                token = sampler.pick(masked)
                if token in stop_ids:
                    session.finish_reason = "eos"
                    return
                forced.extend(matching.accept(token))
            cost.tokens += 1
            session.drop_logits()
            unread.append(token)
            yield token
            if session.version != version:
                raise moved_on()
        session.finish_reason = "length" if forced or not matching.ended else "grammar"
    finally:
        _catch_up(session, unread, version)


def _full(session: Session, unread: int) -> bool:
    return session.context is not None and session.position + unread > session.context


def _read_on(session: Session, unread: Sequence[int]) -> Float32:
    """Reads tokens; logits of the last."""
    if len(unread) == 1:
        return session.step(unread[0])
    before = session.perception.timings.prefill_ms  # which is of the prompt
    logits = session.prefill(unread)
    session.perception.timings.prefill_ms = before
    return logits


def _catch_up(session: Session, unread: Sequence[int], version: int) -> None:
    """Reads what was given out, but for the last, unless the session went elsewhere."""
    try:
        if len(unread) > 1 and session.version == version and session.engine is not None:
            _read_on(session, unread[:-1])
            session.drop_logits()
    except SessionClosed:
        return
