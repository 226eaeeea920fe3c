"""What a session does, phase by phase: a context around it, whatever it is used for.

    with edge_mmllm.load("model.int4") as session, Profiler(session) as profiler:
        print("".join(session.generate("Once upon a time", max_new_tokens=64)))
    print(profiler.generations[0].ttft_ms, profiler.summary())

It reads a clock twice a token and twice a call of the tokenizer, nothing more.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edge_mmllm.errors import UsageError
from edge_mmllm.profiling.stats import median, percentile

if TYPE_CHECKING:
    from edge_mmllm_runtime.session import Session

#: Phases in the order of their work. All but `load` and `decode`, `detokenize` come before the
#: first token.
PHASES = (
    "load", "tokenize", "preprocess", "encode", "project", "prefill", "decode", "detokenize",
)  # fmt: skip

_clock = time.perf_counter


@dataclass
class Generation:
    """One answer.

    Attributes:
        prompt_tokens: tokens in the state when the first one came out (of an encoder-decoder:
            rows that its encoder gave).
        started: when it was asked for; the clock's seconds.
        times: when each token came out.
        steps: seconds of each of the engine's decode steps.
        phases_ms: see `PHASES`; `load` is what was loaded because this answer needed it.
    """

    started: float
    prompt_tokens: int = 0
    times: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    phases_ms: dict[str, float] = field(default_factory=dict)

    @property
    def ttft_ms(self) -> float:
        """Time to the first token."""
        if not self.times:
            raise UsageError("there was no token")
        return (self.times[0] - self.started) * 1e3

    @property
    def gaps_ms(self) -> list[float]:
        """Time between two tokens."""
        return [(b - a) * 1e3 for a, b in itertools.pairwise(self.times)]

    @property
    def tokens_per_s(self) -> float | None:
        """Of the tokens after the first; None without any."""
        if len(self.times) < 2:
            return None
        return (len(self.times) - 1) / (self.times[-1] - self.times[0])


class Profiler:
    """A context around a session; what is generated inside is recorded.

    Args:
        session: not profiled already.

    Attributes:
        generations: one for each call of `generate` or `generate_tokens`, in order. The time a
            caller spends between two tokens is part of the time between them.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.generations: list[Generation] = []
        self._undo: list[Callable[[], None]] = []
        self._tokenize_s = 0.0
        self._tokenizing = False

    def __enter__(self) -> Profiler:
        if "generate_tokens" in vars(self.session):
            raise UsageError("this session is profiled already")
        self._replace(self.session, "generate_tokens", self._generate_tokens)
        self._replace(self.session.engine, "step", self._step)
        if self.session.spec.text.tokenizer != "none":
            text = self.session.text
            self._replace(text, "encode", self._tokenize)
            self._replace(text, "apply_chat_template", self._tokenize)
            self._replace(text, "stream", self._stream)
        return self

    def __exit__(self, *_: object) -> None:
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()

    def summary(self) -> dict[str, Any]:
        """Medians over the generations: `ttft_ms`, `decode_tokens_per_s`, `itl_ms_p50`, `_p90`,
        `_p99`, `_max`, `phases_ms`; None where nothing was measured."""
        told = [g for g in self.generations if g.times]
        gaps = [gap for g in told for gap in g.gaps_ms]
        rates = [g.tokens_per_s for g in told if g.tokens_per_s is not None]
        return {
            "generations": len(told),
            "ttft_ms": median(g.ttft_ms for g in told) if told else None,
            "decode_tokens_per_s": median(rates) if rates else None,
            **{f"itl_ms_p{p}": percentile(gaps, p) if gaps else None for p in (50, 90, 99)},
            "itl_ms_max": max(gaps, default=None),
            "phases_ms": median_phases(told),
        }

    # -- what stands in for the session's own methods ---------------------------------------

    def _replace(
        self, owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]
    ) -> None:
        """Puts a wrapper into the instance; the class is left alone."""
        before = vars(owner).get(name)
        setattr(owner, name, make(getattr(owner, name)))

        def undo() -> None:
            if before is None:
                delattr(owner, name)
            else:
                setattr(owner, name, before)

        self._undo.append(undo)

    def _generate_tokens(self, plain: Callable[..., Iterator[int]]) -> Callable[..., Iterator[int]]:
        def generate_tokens(*arguments: Any, **named: Any) -> Iterator[int]:
            self._tokenize_s = 0.0
            made = Generation(_clock())
            tokens = plain(*arguments, **named)
            made.phases_ms["tokenize"] = self._tokenize_s * 1e3
            asked = _clock() - made.started
            return self._recorded(made, asked, tokens)

        return generate_tokens

    def _recorded(self, made: Generation, asked_s: float, tokens: Iterator[int]) -> Iterator[int]:
        session = self.session
        self.generations.append(made)
        made.started = _clock() - asked_s  # time until the first token is asked for is nobody's
        clock, times = _clock, made.times
        try:
            for token in tokens:
                times.append(clock())
                if len(times) == 1:
                    self._first(made, session)
                yield token
        finally:
            if len(times) > 1:
                made.phases_ms["decode"] = (times[-1] - times[0]) * 1e3

    def _first(self, made: Generation, session: Session) -> None:
        """What is known when the first token is out."""
        timings = session.perception.timings
        for phase in ("load", "preprocess", "encode", "project", "prefill"):
            made.phases_ms[phase] = getattr(timings, f"{phase}_ms")
        encoder_decoder = session.spec.decoder_start_id is not None
        made.prompt_tokens = session.engine.memory_rows if encoder_decoder else session.position

    def _step(self, plain: Callable[[int, int], Any]) -> Callable[[int, int], Any]:
        clock = _clock
        generations = self.generations

        def step(token: int, position: int) -> Any:
            begun = clock()
            logits = plain(token, position)
            if generations:
                generations[-1].steps.append(clock() - begun)
            return logits

        return step

    def _tokenize(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        def tokenize(*arguments: Any, **named: Any) -> Any:
            if self._tokenizing:
                return plain(*arguments, **named)
            self._tokenizing, begun = True, _clock()
            try:
                return plain(*arguments, **named)
            finally:
                self._tokenizing = False
                self._tokenize_s += _clock() - begun

        return tokenize

    def _stream(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        def stream(*arguments: Any, **named: Any) -> Any:
            made = plain(*arguments, **named)
            push = made.push

            def timed(token: int) -> Any:
                begun = _clock()
                piece = push(token)
                if self.generations:
                    phases = self.generations[-1].phases_ms
                    phases["detokenize"] = phases.get("detokenize", 0.0) + (_clock() - begun) * 1e3
                return piece

            made.push = timed
            return made

        return stream


def median_phases(generations: list[Generation]) -> dict[str, float]:
    """The median of each phase, in order; phases that no generation had are left out."""
    found: dict[str, float] = {}
    for phase in PHASES:
        values = [g.phases_ms[phase] for g in generations if phase in g.phases_ms]
        if values:
            found[phase] = median(values)
    return found


def ttft_split(phases_ms: Mapping[str, float], ttft_ms: float) -> dict[str, float]:
    """The parts of the time to the first token, `<phase>_ms`; `other_ms` is the rest: sampling,
    the session, placing pictures."""
    before = PHASES[: PHASES.index("decode")]
    split = {f"{p}_ms": phases_ms[p] for p in before if phases_ms.get(p)}
    split["other_ms"] = max(ttft_ms - sum(split.values()), 0.0)
    return split
