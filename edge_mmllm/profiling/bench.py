"""`bench`: speed and memory of one bundle on this device.

Fixed token counts, no early stop, one warm-up, then repetitions; medians with their spread. The
prompt is made of random ids (seed 0): what a token is makes no difference to its cost.
"""

from __future__ import annotations

import importlib
import itertools
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from edge_mmllm.errors import UsageError
from edge_mmllm.profiling.machine import Machine, read_machine
from edge_mmllm.profiling.memory import MemoryUse, memory_use, peak_rss_bytes
from edge_mmllm.profiling.stats import percentile, spread

if TYPE_CHECKING:
    from edge_mmllm_runtime.session import Session

Progress = Callable[[str, int, int], None]

#: Loads timed: the first, which may find a cold page cache, and two more.
_LOADS = 3


@dataclass(frozen=True)
class BenchReport:
    """The figures. Times in ms, medians over the repetitions; `*_spread` is IQR / median.

    Attributes:
        import_ms: importing the engine's library, once a process.
        load_ms: median of three; `first_load_ms`: the first of them.
        ttft_ms: from the call to the first token, the whole prompt read.
        prefill_tokens_per_s: prompt tokens over `ttft_ms`.
        decode_tokens_per_s: over the tokens after the first.
        itl_ms_p50, itl_ms_p99: time between two tokens, over all repetitions together.
        python_us_per_token: what a token costs outside the engine's step: session, sampling.
        python_percent: the same, of the time between two tokens.
        rss_before_load_bytes: Python and the libraries.
        rss_after_load_bytes: with the model loaded, before any token.
        rss_after_load_anonymous_bytes, rss_after_load_file_bytes: its parts, as the kernel
            counts PSS: packed weights and scratch; mapped weights and libraries.
        peak_rss_bytes: the highest, after all repetitions.
        state_bytes: state in use at the end; `state_capacity_bytes`: reserved.
        machine: see `profiling.machine`; its load average is from before the run.
        load_average_after: of the last minute.
        split: with pictures, where `ttft_ms` went: `preprocess_ms`, `encode_ms`, `project_ms`,
            `prefill_ms`; medians. The picture is encoded anew each time; its stages are loaded
            by the repetition that warms up. Empty without.
    """

    bundle_sha256: str
    architecture: str
    parameters: int
    quantization: str
    size_bytes: int
    engine: str
    engine_version: str
    threads: int
    prompt_tokens: int
    new_tokens: int
    repetitions: int
    import_ms: float
    load_ms: float
    load_spread: float | None
    first_load_ms: float
    ttft_ms: float
    ttft_spread: float | None
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    decode_spread: float | None
    itl_ms_p50: float
    itl_ms_p99: float
    python_us_per_token: float
    python_percent: float
    rss_before_load_bytes: int | None
    rss_after_load_bytes: int | None
    rss_after_load_anonymous_bytes: int | None
    rss_after_load_file_bytes: int | None
    peak_rss_bytes: int | None
    state_bytes: int
    state_capacity_bytes: int
    machine: Machine
    load_average_after: float | None
    split: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class _Repetition:
    """One timed generation, in seconds."""

    ttft: float
    gaps: tuple[float, ...]
    steps: tuple[float, ...]
    prompt_tokens: int
    split: Mapping[str, float]


def bench(
    bundle: str | os.PathLike[str],
    *,
    prompt_tokens: int = 512,
    new_tokens: int = 64,
    threads: int | None = None,
    context: int | None = None,
    repetitions: int = 5,
    media: Mapping[str, Sequence[Any]] | None = None,
    progress: Progress | None = None,
) -> BenchReport:
    """Measures a bundle in this process. Run it in a fresh one: memory is the process's.

    Args:
        prompt_tokens: tokens read at once, at least 1.
        new_tokens: decode steps timed, at least 1 (the first new token comes from the prompt).
        threads, context: see `edge_mmllm.load`.
        repetitions: timed generations, after one that is not.
        media: modality (`image`, ...) -> files, which stand before the tokens of the prompt.
        progress: called with ("bench", generations done, generations in all).

    Raises:
        UsageError: a count below 1.
        ContextFull: the tokens do not fit the model's context.
        EdgeError: as `edge_mmllm.load`.
    """
    counts = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "repetitions": repetitions}
    for name, count in counts.items():
        if count < 1:
            raise UsageError(f"{name} must be at least 1", found=str(count))
    import edge_mmllm

    opened = edge_mmllm.open_bundle(bundle)
    machine = read_machine()
    import_ms = _import_engine(opened.manifest.engine)
    before = memory_use()

    def load() -> tuple[Session, float]:
        started = time.perf_counter()
        session = edge_mmllm.load(bundle, threads=threads, context=context)
        if session.spec.modalities:  # else it was loaded with the session
            session.engine.load_stage("decoder")
        return session, (time.perf_counter() - started) * 1e3

    session, first_load_ms = load()
    with session:
        loaded = memory_use()
        runs = _repeat(session, prompt_tokens, new_tokens, repetitions, media or {}, progress)
        report = _report(session, runs, loaded, first_load_ms, machine)
    loads = [first_load_ms]
    for _ in range(_LOADS - 1):
        session, load_ms = load()
        session.close()
        loads.append(load_ms)
    return replace(
        report,
        quantization=opened.manifest.quantization.scheme,
        size_bytes=opened.size_bytes,
        import_ms=import_ms,
        load_ms=statistics.median(loads),
        load_spread=spread(loads),
        rss_before_load_bytes=before.rss_bytes,
        load_average_after=read_machine().load_average,
    )


def _import_engine(name: str) -> float:
    """Imports an engine's library beforehand; `load` explains it where it is missing."""
    from edge_mmllm_runtime import ENGINES

    started = time.perf_counter()
    if name in ENGINES:
        try:
            importlib.import_module(ENGINES[name][0])
        except ModuleNotFoundError:
            return 0.0
    return (time.perf_counter() - started) * 1e3


def _repeat(
    session: Session,
    prompt_tokens: int,
    new_tokens: int,
    repetitions: int,
    media: Mapping[str, Sequence[Any]],
    progress: Progress | None,
) -> list[_Repetition]:
    import numpy as np

    spec = session.spec
    drawn = np.random.default_rng(0).integers(0, spec.vocab_size, prompt_tokens)
    drawn[np.isin(drawn, [m.token_id for m in spec.modalities.values()])] = 0
    known = [(name, files) for name, files in media.items() if name in spec.modalities]
    marks = [spec.modalities[name].token_id for name, files in known for _ in files]
    ids = [*marks, *drawn.tolist()]
    runs = []
    for i in range(repetitions + 1):
        runs.append(_once(session, ids, new_tokens, media))
        if progress is not None:
            progress("bench", i + 1, repetitions + 1)
    return runs[1:]  # the first one warmed up


def _once(
    session: Session, ids: list[int], new_tokens: int, media: Mapping[str, Sequence[Any]]
) -> _Repetition:
    """One generation from an empty context."""
    engine = session.engine
    plain_step = engine.step
    steps: list[float] = []
    clock = time.perf_counter

    def timed_step(token: int, position: int) -> Any:
        begun = clock()
        logits = plain_step(token, position)
        steps.append(clock() - begun)
        return logits

    engine.step = timed_step  # type: ignore[method-assign]
    try:
        session.reset()
        session.perception.forget()
        times = [clock()]
        prompt = session.encode(ids, media)
        for _ in session.generate_tokens(prompt, new_tokens + 1, ignore_eos=True):
            times.append(clock())
    finally:
        engine.step = plain_step  # type: ignore[method-assign]
    if len(times) != new_tokens + 2:
        raise UsageError(
            "the tokens do not fit the context",
            expected=f"{new_tokens + 1} new tokens after {len(prompt)}",
            found=f"{len(times) - 1}, then the end: {session.finish_reason}",
            fix="fewer --prompt-tokens or --new-tokens, or a larger --context",
        )
    gaps = tuple(b - a for a, b in itertools.pairwise(times[1:]))
    told = session.perception.timings.to_json()
    names = ("preprocess_ms", "encode_ms", "project_ms", "prefill_ms") if media else ()
    split = {name: told[name] for name in names}
    return _Repetition(times[1] - times[0], gaps, tuple(steps), len(prompt), split)


def _report(
    session: Session,
    runs: list[_Repetition],
    loaded: MemoryUse,
    first_load_ms: float,
    machine: Machine,
) -> BenchReport:
    """The report of a session still open; `bench` fills in the rest."""
    engine, spec = session.engine, session.spec
    ttfts = [run.ttft for run in runs]
    rates = [len(run.gaps) / sum(run.gaps) for run in runs]
    gaps = [gap for run in runs for gap in run.gaps]
    outside = [(gap - step) for run in runs for gap, step in zip(run.gaps, run.steps, strict=True)]
    python_s, gap_s = statistics.median(outside), statistics.median(gaps)
    ttft_s = statistics.median(ttfts)
    return BenchReport(
        bundle_sha256=session.bundle_sha256,
        architecture=spec.architecture,
        parameters=spec.parameters,
        quantization="",
        size_bytes=0,
        engine=engine.name,
        engine_version=engine.version,
        threads=engine.threads,
        prompt_tokens=runs[0].prompt_tokens,
        new_tokens=len(runs[0].gaps),
        repetitions=len(runs),
        import_ms=0.0,
        load_ms=first_load_ms,
        load_spread=None,
        first_load_ms=first_load_ms,
        ttft_ms=ttft_s * 1e3,
        ttft_spread=spread(ttfts),
        prefill_tokens_per_s=runs[0].prompt_tokens / ttft_s,
        decode_tokens_per_s=statistics.median(rates),
        decode_spread=spread(rates),
        itl_ms_p50=percentile(gaps, 50) * 1e3,
        itl_ms_p99=percentile(gaps, 99) * 1e3,
        python_us_per_token=python_s * 1e6,
        python_percent=100 * python_s / gap_s,
        rss_before_load_bytes=None,
        rss_after_load_bytes=loaded.rss_bytes,
        rss_after_load_anonymous_bytes=loaded.anonymous_bytes,
        rss_after_load_file_bytes=loaded.file_bytes,
        peak_rss_bytes=peak_rss_bytes(),
        state_bytes=session.state_bytes,
        state_capacity_bytes=session.state_capacity_bytes,
        machine=machine,
        load_average_after=None,
        split={n: statistics.median(run.split[n] for run in runs) for n in runs[0].split},
    )
