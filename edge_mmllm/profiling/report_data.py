"""What a profile says. `docs/results.md` documents the same fields as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from edge_mmllm.profiling.counters import Used
from edge_mmllm.profiling.machine import Machine
from edge_mmllm.profiling.operators import OperatorProfile
from edge_mmllm.profiling.sensors import Climate, Energy
from edge_mmllm.profiling.watch import MemorySplit

#: Of the JSON form. A reader refuses a later one; records without it are version 1.
SCHEMA_VERSION = 2


@dataclass(frozen=True)
class Report:
    """The figures. Times in ms, medians over the repetitions; `*_spread` is IQR / median,
    `*_ci95` a bootstrap confidence interval of the median, `*_values` one for each repetition.

    Attributes:
        import_ms: importing the engine's library, once a process.
        load_ms: median of three; `first_load_ms`: the first of them.
        ttft_ms: from the call to the first token, the whole prompt read.
        ttft_split: its parts, `<phase>_ms` and `other_ms`.
        prefill_tokens_per_s: prompt tokens over `ttft_ms`.
        decode_tokens_per_s: over the tokens after the first.
        itl_ms_p50, itl_ms_p90, itl_ms_p99, itl_ms_max: time between two tokens, over all
            repetitions together; `itl_ms_values`: each of them.
        python_us_per_token: what a token costs outside the engine's step: session, sampling.
        python_percent: the same, of the time between two tokens.
        phases_ms: `profiler.PHASES` of one generation. `tokenize`: of a text of about as many
            tokens, and `detokenize` of the new ones, both outside `ttft_ms`; missing without a
            tokenizer.
        rss_before_load_bytes: Python and the libraries.
        rss_after_load_bytes: with the model loaded, before any token.
        rss_after_load_anonymous_bytes, rss_after_load_file_bytes: its parts, as the kernel
            counts PSS: packed weights and scratch; mapped weights and libraries.
        peak_rss_bytes: the highest of the process (VmHWM), all repetitions and loads included.
        peak_pss_bytes: the highest PSS seen between two repetitions.
        state_bytes: state in use at the end; `state_capacity_bytes`: reserved.
        memory: see `watch.MemorySplit`; `memory_over_time`: see `watch.MemoryWatch.to_json`.
        used: CPU time, faults and switches of the timed repetitions together.
        energy: of the timed repetitions together.
        climate_before, climate_after: temperature, frequency, governor.
        sustained: throughput of a long decode, see `sustained.py`; None if not asked for.
        operators: see `operators.py`; empty if not asked for.
        machine: see `profiling.machine`; its load average is from before the run.
        load_average_after: of the last minute.
        noise: reasons to distrust this run, see `noise.py`; empty for a quiet one.
        split: with pictures, where `ttft_ms` went: `preprocess_ms`, `encode_ms`, `project_ms`,
            `prefill_ms`; medians. The picture is encoded anew each time; its stages are loaded
            by the repetition that warms up. Empty without.
        gate: the bundle's verdict, `verdict` and its figures.
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
    # -- since version 2
    bits_per_weight: float | None = None
    gate: dict[str, Any] = field(default_factory=dict)
    context: int | None = None
    itl_ms_p90: float | None = None
    itl_ms_max: float | None = None
    itl_ms_values: tuple[float, ...] = ()
    ttft_ms_values: tuple[float, ...] = ()
    ttft_ms_ci95: tuple[float, float] | None = None
    ttft_split: dict[str, float] = field(default_factory=dict)
    prefill_tokens_per_s_values: tuple[float, ...] = ()
    prefill_tokens_per_s_ci95: tuple[float, float] | None = None
    decode_tokens_per_s_values: tuple[float, ...] = ()
    decode_tokens_per_s_iqr: float | None = None
    decode_tokens_per_s_ci95: tuple[float, float] | None = None
    load_ms_values: tuple[float, ...] = ()
    phases_ms: dict[str, float] = field(default_factory=dict)
    peak_pss_bytes: int | None = None
    memory: MemorySplit | None = None
    memory_over_time: dict[str, Any] = field(default_factory=dict)
    used: Used | None = None
    energy: Energy = field(default_factory=Energy)
    climate_before: Climate | None = None
    climate_after: Climate | None = None
    sustained: dict[str, Any] | None = None
    operators: tuple[OperatorProfile, ...] = ()
    noise: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        told = asdict(self)
        for name in ("itl_ms_values", "ttft_ms_values"):
            told[name] = [round(value, 4) for value in told[name]]
        return {"schema_version": SCHEMA_VERSION, "tool": "edge-mmllm", **told}
