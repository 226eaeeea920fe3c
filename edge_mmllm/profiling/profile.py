"""`profile`: what one bundle costs on this device, in this process.

Fixed token counts, no early stop, one warm-up, then repetitions; medians with their spread. The
prompt is made of random ids (seed 0): what a token is makes no difference to its cost.
"""

from __future__ import annotations

import importlib
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_mmllm.errors import EdgeError, UsageError
from edge_mmllm.profiling import noise
from edge_mmllm.profiling.counters import Used, read_counters, used_between
from edge_mmllm.profiling.machine import Machine, read_machine
from edge_mmllm.profiling.memory import MemoryUse, memory_use, peak_rss_bytes
from edge_mmllm.profiling.operators import operator_profile
from edge_mmllm.profiling.profiler import Generation, Profiler, median_phases, ttft_split
from edge_mmllm.profiling.report_data import Report
from edge_mmllm.profiling.sensors import Climate, Energy, Meter, energy_sensor, read_climate
from edge_mmllm.profiling.stats import bootstrap_interval, iqr, percentile, spread
from edge_mmllm.profiling.sustained import sustained
from edge_mmllm.profiling.watch import MemorySplit, MemoryWatch, mapped_bytes

if TYPE_CHECKING:
    from edge_mmllm_runtime.session import Session

Progress = Callable[[str, int, int], None]

#: Loads timed: the first, which may find a cold page cache, and two more.
_LOADS = 3

#: Values of a distribution that are kept.
_VALUES = 4096


@dataclass(frozen=True)
class ProfileOptions:
    """What to measure.

    Attributes:
        prompt_tokens: tokens read at once, at least 1.
        new_tokens: decode steps timed, at least 1 (the first new token comes from the prompt).
        repetitions: timed generations, after one that is not.
        threads, context, kernels: see `edge_mmllm.load`.
        media: modality (`image`, ...) -> files, which stand before the tokens of the prompt.
        sustained_s: seconds of a long decode afterwards; 0 for none.
        operators: whether to profile operators, in a session of its own afterwards.
    """

    prompt_tokens: int = 512
    new_tokens: int = 64
    repetitions: int = 5
    threads: int | None = None
    context: int | None = None
    kernels: str = "auto"
    media: Mapping[str, Sequence[Any]] | None = None
    sustained_s: float = 0.0
    operators: bool = False

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "new_tokens", "repetitions"):
            count = getattr(self, name)
            if count < 1:
                raise UsageError(f"{name} must be at least 1", found=str(count))


def profile(
    bundle: str | os.PathLike[str],
    options: ProfileOptions | None = None,
    *,
    progress: Progress | None = None,
) -> Report:
    """Measures a bundle in this process. Run it in a fresh one: memory is the process's.

    Args:
        bundle: its folder.
        options: None for the defaults.
        progress: called with ("bench", generations done, generations in all).

    Raises:
        ContextFull: the tokens do not fit the model's context.
        EdgeError: as `edge_mmllm.load`.
    """
    options = options or ProfileOptions()
    import edge_mmllm

    opened = edge_mmllm.open_bundle(bundle)
    machine = read_machine()
    import_ms = _import_engine(opened.manifest.engine)
    before = memory_use()

    def load() -> tuple[Session, float]:
        started = time.perf_counter()
        session = edge_mmllm.load(
            bundle, threads=options.threads, context=options.context, kernels=options.kernels
        )
        if session.spec.modalities:  # else it was loaded with the session
            session.engine.load_stage("decoder")
        return session, (time.perf_counter() - started) * 1e3

    with MemoryWatch() as watch:
        watch.mark("load")
        session, first_load_ms = load()
        with session:
            report = _measure(session, options, watch, opened.root, before, machine, progress)
    loads = [first_load_ms]
    from edge_mmllm_runtime.hugepages import give_back

    for _ in range(_LOADS - 1):
        give_back()  # else what malloc kept of the last one adds to the peak
        session, load_ms = load()
        session.close()
        loads.append(load_ms)
    peak = peak_rss_bytes()
    operators = _operators(str(bundle), options, report) if options.operators else ()
    manifest = opened.manifest
    gate = manifest.gate
    return replace(
        report,
        quantization=manifest.quantization.scheme,
        bits_per_weight=manifest.quantization.bits_per_weight,
        gate={"verdict": gate.verdict, "figures": dict(gate.figures)} if gate else {},
        size_bytes=opened.size_bytes,
        import_ms=import_ms,
        first_load_ms=first_load_ms,
        load_ms=statistics.median(loads),
        load_ms_values=tuple(loads),
        load_spread=spread(loads),
        phases_ms={**report.phases_ms, "load": statistics.median(loads)},
        peak_rss_bytes=peak,
        memory_over_time=watch.to_json(),
        operators=tuple(operators),
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


def _operators(bundle: str, options: ProfileOptions, report: Report) -> Sequence[Any]:
    with suppress(UsageError):  # what cannot be profiled yet stays without
        return operator_profile(
            bundle,
            prompt_tokens=min(report.prompt_tokens, 128),
            threads=options.threads,
            context=options.context,
            kernels=options.kernels,
        )
    return ()


def prompt_ids(session: Session, tokens: int, media: Mapping[str, Sequence[Any]]) -> list[int]:
    """Random ids, behind a placeholder for each item of `media`."""
    import numpy as np

    spec = session.spec
    drawn = np.random.default_rng(0).integers(0, spec.vocab_size, tokens)
    drawn[np.isin(drawn, [m.token_id for m in spec.modalities.values()])] = 0
    known = [(name, files) for name, files in media.items() if name in spec.modalities]
    marks = [spec.modalities[name].token_id for name, files in known for _ in files]
    return [*marks, *drawn.tolist()]


def _measure(
    session: Session,
    options: ProfileOptions,
    watch: MemoryWatch,
    folder: Path,
    before: MemoryUse,
    machine: Machine,
    progress: Progress | None,
) -> Report:
    """Everything that one session tells; `profile` fills in the rest."""
    loaded = memory_use()
    ids = prompt_ids(session, options.prompt_tokens, options.media or {})
    total, peak_pss = options.repetitions + 1, loaded.pss_bytes
    climate, meter = read_climate(), Meter(energy_sensor())

    with Profiler(session) as profiler:

        def once(number: int) -> None:
            nonlocal peak_pss
            watch.mark("warm-up" if not number else f"repetition {number}")
            _generate(session, ids, options)
            seen = memory_use().pss_bytes
            peak_pss = None if seen is None or peak_pss is None else max(peak_pss, seen)
            if progress is not None:
                progress("bench", number + 1, total)

        once(0)
        counters = read_counters()
        with meter:
            for number in range(1, total):
                once(number)
        used = used_between(counters, read_counters())
        runs = profiler.generations[1:]  # the first one warmed up
    ran = memory_use()
    texts = _texts(session, ids, options.new_tokens)
    after = memory_use()
    curve = None
    if options.sustained_s > 0:
        watch.mark("sustained")
        curve = sustained(session, options.sustained_s, options.prompt_tokens, options.new_tokens)
    around = _Around(
        machine=machine,
        before=before,
        loaded=loaded,
        peak_pss_bytes=peak_pss,
        memory=_split(session, folder, (before, loaded, ran, after)),
        used=used,
        energy=meter.energy(sum(run.prompt_tokens + len(run.times) for run in runs)),
        climates=(climate, read_climate()),
        curve=curve,
        split=_picture_split(runs) if options.media else {},
        texts=texts,
    )
    return _report(session, runs, around)


@dataclass(frozen=True)
class _Around:
    """What is known beside the repetitions. Memory before and after loading."""

    machine: Machine
    before: MemoryUse
    loaded: MemoryUse
    peak_pss_bytes: int | None
    memory: MemorySplit
    used: Used
    energy: Energy
    climates: tuple[Climate, Climate]
    curve: dict[str, Any] | None
    split: dict[str, float]
    texts: dict[str, float]


def _generate(session: Session, ids: list[int], options: ProfileOptions) -> None:
    """One generation from an empty context."""
    session.reset()
    session.perception.forget()
    wanted = options.new_tokens + 1
    stream = session.generate_tokens(ids, wanted, ignore_eos=True, media=options.media)
    made = sum(1 for _ in stream)
    if made != wanted:
        raise UsageError(
            "the tokens do not fit the context",
            expected=f"{wanted} new tokens after {session.position - made + 1}",
            found=f"{made}, then the end: {session.finish_reason}",
            fix="fewer --prompt-tokens or --new-tokens, or a larger --context",
        )


def _texts(session: Session, ids: list[int], new_tokens: int) -> dict[str, float]:
    """Milliseconds to tokenize a text of about so many tokens, and to detokenize one by one."""
    if session.spec.text.tokenizer == "none":
        return {}
    text, clock = session.text, time.perf_counter
    words = text.decode(ids)
    took: dict[str, list[float]] = {"tokenize": [], "detokenize": []}
    for _ in range(_LOADS):
        started = clock()
        try:
            text.encode(words)
        except EdgeError:  # random ids can spell what no text holds
            return {}
        middle = clock()
        stream = text.stream()
        for token in (ids * -(-new_tokens // len(ids)))[:new_tokens]:
            stream.push(token)
        stream.flush()
        took["tokenize"].append((middle - started) * 1e3)
        took["detokenize"].append((clock() - middle) * 1e3)
    return {name: statistics.median(values) for name, values in took.items()}


def _split(
    session: Session, folder: Path, moments: tuple[MemoryUse, MemoryUse, MemoryUse, MemoryUse]
) -> MemorySplit:
    """Moments: before loading, after it, after the repetitions, after the tokenizer's use."""
    before, loaded, ran, after = moments

    def grown(a: int | None, b: int | None) -> int | None:
        return None if a is None or b is None else max(b - a, 0)

    mapped = mapped_bytes(folder)
    scratch = grown(loaded.anonymous_bytes, ran.anonymous_bytes)
    return MemorySplit(
        weights_mapped_bytes=mapped and mapped[0],
        weights_resident_bytes=mapped and mapped[1],
        packed_bytes=grown(before.anonymous_bytes, loaded.anonymous_bytes),
        state_bytes=session.state_bytes,
        tokenizer_bytes=grown(ran.anonymous_bytes, after.anonymous_bytes),
        scratch_bytes=None if scratch is None else max(scratch - session.state_bytes, 0),
        runtime_bytes=before.rss_bytes,
        pss_bytes=after.pss_bytes,
    )


def _picture_split(runs: Sequence[Generation]) -> dict[str, float]:
    names = ("preprocess", "encode", "project", "prefill")
    return {f"{n}_ms": statistics.median(run.phases_ms[n] for run in runs) for n in names}


def _report(session: Session, runs: Sequence[Generation], around: _Around) -> Report:
    """The figures of the repetitions; `profile` fills in what concerns the bundle."""
    engine, spec = session.engine, session.spec
    ttfts = [run.ttft_ms for run in runs]
    rates = [rate for run in runs if (rate := run.tokens_per_s) is not None]
    gaps = [gap for run in runs for gap in run.gaps_ms]
    steps = [step * 1e3 for run in runs for step in run.steps]
    outside = statistics.median(gap - step for gap, step in zip(gaps, steps, strict=True))
    prompt, ttft = runs[0].prompt_tokens, statistics.median(ttfts)
    prefills = [prompt * 1e3 / value for value in ttfts]
    phases = median_phases(list(runs))
    cool, hot = (climate.temperature_c for climate in around.climates)
    return Report(
        bundle_sha256=session.bundle_sha256,
        architecture=spec.architecture,
        parameters=spec.parameters,
        quantization="",
        size_bytes=0,
        engine=engine.name,
        engine_version=engine.version,
        threads=engine.threads,
        prompt_tokens=prompt,
        new_tokens=len(runs[0].times) - 1,
        repetitions=len(runs),
        import_ms=0.0,
        load_ms=0.0,
        load_spread=None,
        first_load_ms=0.0,
        ttft_ms=ttft,
        ttft_spread=spread(ttfts),
        prefill_tokens_per_s=prompt * 1e3 / ttft,
        decode_tokens_per_s=statistics.median(rates),
        decode_spread=spread(rates),
        itl_ms_p50=percentile(gaps, 50),
        itl_ms_p99=percentile(gaps, 99),
        python_us_per_token=outside * 1e3,
        python_percent=100 * outside / statistics.median(gaps),
        rss_before_load_bytes=around.before.rss_bytes,
        rss_after_load_bytes=around.loaded.rss_bytes,
        rss_after_load_anonymous_bytes=around.loaded.anonymous_bytes,
        rss_after_load_file_bytes=around.loaded.file_bytes,
        peak_rss_bytes=None,
        state_bytes=session.state_bytes,
        state_capacity_bytes=session.state_capacity_bytes,
        machine=around.machine,
        load_average_after=None,
        split=around.split,
        context=session.context,
        itl_ms_p90=percentile(gaps, 90),
        itl_ms_max=max(gaps),
        itl_ms_values=tuple(gaps[:_VALUES]),
        ttft_ms_values=tuple(ttfts),
        ttft_ms_ci95=bootstrap_interval(ttfts),
        ttft_split=ttft_split(phases, ttft),
        prefill_tokens_per_s_values=tuple(prefills),
        prefill_tokens_per_s_ci95=bootstrap_interval(prefills),
        decode_tokens_per_s_values=tuple(rates),
        decode_tokens_per_s_iqr=iqr(rates),
        decode_tokens_per_s_ci95=bootstrap_interval(rates),
        phases_ms={n: v for n, v in {**phases, **around.texts}.items() if v},
        peak_pss_bytes=around.peak_pss_bytes,
        memory=around.memory,
        used=around.used,
        energy=around.energy,
        climate_before=around.climates[0],
        climate_after=around.climates[1],
        sustained=around.curve,
        noise=noise.reasons(
            around.machine,
            around.used,
            {"decode": spread(rates), "the first token": spread(ttfts)},
            governor=around.climates[1].governor,
            temperature_rise_c=None if cool is None or hot is None else hot - cool,
            sustained_drop=around.curve["drop"] if around.curve else None,
        ),
    )
