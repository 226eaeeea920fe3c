"""One prompt, one answer, and what it cost: `run`, and the turns of `chat`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from edge_mmllm.errors import Cancelled, UsageError
from edge_mmllm_runtime import generation, load
from edge_mmllm_runtime.continuation import StateFiles, appended, following, settle
from edge_mmllm_runtime.generation import Prompt
from edge_mmllm_runtime.mlc import peer
from edge_mmllm_runtime.perception import Timings
from edge_mmllm_runtime.placing import Media, placeholders, question
from edge_mmllm_runtime.reading import Progress
from edge_mmllm_runtime.sampling import Sampling
from edge_mmllm_runtime.session import Session

if TYPE_CHECKING:
    from edge_mmllm_runtime.adapters import AdapterLike
    from edge_mmllm_runtime.constrained import Constraint, ConstraintCost

Write = Callable[[str], object]


@dataclass(frozen=True)
class AnswerSettings:
    """How to answer; see `Session.generate`."""

    max_new_tokens: int = 256
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    constraint: Constraint | None = None


@dataclass(frozen=True)
class Answer:
    """An answer and its figures.

    Attributes:
        finish_reason: see `generation.FinishReason`, or `cancelled`.
        ttft_ms: from the call to the first token; None without one.
        decode_tokens_per_s: of the tokens after the first; None where there are none.
        load_ms: time to load the bundle; None for a later answer of the same session.
        restored_tokens: tokens of the state that it went on from.
        saved_state_bytes: size of the state file left behind; None without one.
        timings: where the time to the first token went.
        constraint: what the constraint cost; None without one.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    finish_reason: str
    ttft_ms: float | None
    decode_tokens_per_s: float | None
    load_ms: float | None
    threads: int
    engine: str
    engine_version: str
    bundle_sha256: str
    restored_tokens: int = 0
    saved_state_bytes: int | None = None
    timings: Timings = field(default_factory=Timings)
    constraint: ConstraintCost | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def run(
    path: str | os.PathLike[str],
    prompt: str,
    settings: AnswerSettings | None = None,
    *,
    threads: int | None = None,
    context: int | None = None,
    lora: Sequence[AdapterLike] | None = None,
    mmproj: str | os.PathLike[str] | None = None,
    raw: bool = False,
    media: Media | None = None,
    files: StateFiles | None = None,
    engine: str | None = None,
    write: Write = lambda piece: None,
    progress: Progress | None = None,
) -> Answer:
    """Loads a bundle and answers one prompt.

    Args:
        path: the bundle's folder.
        prompt: text; it goes through the bundle's chat template as a user's message where there
            is one, unless `raw`.
        threads, context, lora, mmproj: see `load`.
        media: modality (`image`, ...) -> files, asked about: see `Session.generate`.
        files: state files to go on from (the prompt is then what comes next) and to leave behind.
        engine: `mlc-llm` for an installed mlc_llm (see `mlc/peer.py`); None for the bundle's own.
        write: gets the answer piece by piece.
        progress: see `Session.prefill`.

    Raises:
        EdgeError: as `load`, `Session.generate`, `Session.load_state` and `Session.save_state`.
        OSError: a state file cannot be read or written.
    """
    files = files or StateFiles()
    files.check()
    if engine is not None:
        pictures = any((media or {}).values())
        if pictures or any((threads, context, lora, mmproj, files.load, files.save)):
            raise UsageError(
                "mlc-llm answers a text and no more",
                expected="no threads, context, adapter, picture or state with --engine",
            )
        return peer.answer(path, prompt, settings or AnswerSettings(), raw=raw, write=write)
    started = time.perf_counter()
    with load(path, threads=threads, context=context, lora=lora, mmproj=mmproj) as session:
        session.perception.keep_stages = False  # there is one prompt
        restored = 0 if files.load is None else session.load_state(files.load)
        load_ms = (time.perf_counter() - started) * 1e3
        given = answer(
            session,
            lambda: _asked(session, prompt, media or {}, raw=raw, after=bool(restored)),
            settings or AnswerSettings(),
            write=write,
            append=bool(restored),
            whole=files.save is not None,
            progress=progress,
            load_ms=load_ms,
        )
        saved = None if files.save is None else session.save_state(files.save, files.storage)
    return replace(given, restored_tokens=restored, saved_state_bytes=saved)


def _asked(session: Session, prompt: str, media: Media, *, raw: bool, after: bool) -> Prompt:
    """The prompt of `run`, with its pictures in their places."""
    media = {name: items for name, items in media.items() if items}
    if after:
        return following(session, prompt, media, raw=raw)
    chat = not raw and session.text.has_chat_template
    if not media:
        return [{"role": "user", "content": prompt}] if chat else prompt
    asked = question(session, prompt, media) if chat else placeholders(session, media) + prompt
    return session.encode(asked, media)


def answer(
    session: Session,
    prompt: Prompt | Callable[[], Prompt],
    settings: AnswerSettings,
    *,
    write: Write = lambda piece: None,
    cancelled: Callable[[], bool] = lambda: False,
    reuse: bool = False,
    append: bool = False,
    whole: bool = False,
    progress: Progress | None = None,
    load_ms: float | None = None,
) -> Answer:
    """Answers in a loaded session.

    Args:
        prompt: or what makes it, so that its time counts.
        cancelled: asked between tokens, and between the chunks of a long prompt; True ends the
            answer there.
        reuse: see `Session.generate`.
        append: read the prompt after the session's state, instead of from an empty context.
        whole: have the last token of the answer read too, so that the state can be kept.

    Raises:
        EdgeError: as `Session.generate`.
    """
    from edge_mmllm.text import StopMatcher

    def between_chunks(done: int, total: int) -> None:
        if cancelled():
            raise Cancelled("the answer was cancelled")
        if progress is not None:
            progress(done, total)

    matcher = StopMatcher(settings.stop)
    started = time.perf_counter()
    ids = generation.encode_prompt(session, prompt() if callable(prompt) else prompt)
    count, sampling = settings.max_new_tokens, settings.sampling
    guide = None if settings.constraint is None else session.guide(settings.constraint)
    if append and ids is not None:
        stream = appended(session, ids, count, sampling, between_chunks, guide)
    else:
        stream = session.generate_tokens(
            ids, count, sampling, reuse=reuse, progress=between_chunks, constraint=guide
        )
    times: list[float] = []
    taken: list[int] = []
    timed = _timed(stream, times, taken, cancelled)
    text = _show(generation.pieces(session, timed, matcher), write)
    if isinstance(stream, Generator):
        stream.close()  # has the state hold what was taken of it
    ended = len(times)
    if whole:
        settle(session, taken[-1] if taken else None)
    decode_s = times[-1] - times[0] if ended > 1 else 0.0
    engine = session.engine
    return Answer(
        text=text,
        prompt_tokens=0 if ids is None else len(ids),
        new_tokens=ended,
        finish_reason=session.finish_reason or "cancelled",
        ttft_ms=(times[0] - started) * 1e3 if times else None,
        decode_tokens_per_s=(ended - 1) / decode_s if decode_s > 0 else None,
        load_ms=load_ms,
        threads=engine.threads,
        engine=engine.name,
        engine_version=engine.version,
        bundle_sha256=session.bundle_sha256,
        timings=session.perception.timings,
        constraint=session.constraint_cost,
    )


def _timed(
    stream: Iterator[int], times: list[float], taken: list[int], cancelled: Callable[[], bool]
) -> Iterator[int]:
    """The stream's ids, noted and each with its time, up to a cancellation."""
    try:
        for token in stream:
            times.append(time.perf_counter())
            taken.append(token)
            yield token
            if cancelled():
                return
    except Cancelled:
        return


def _show(pieces: Iterator[str], write: Write) -> str:
    shown: list[str] = []
    for piece in pieces:
        write(piece)
        shown.append(piece)
    return "".join(shown)
