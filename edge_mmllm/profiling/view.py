"""What a report shows of a set of results: the same choice for HTML and Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from edge_mmllm.profiling.profiler import PHASES
from edge_mmllm.profiling.results import Result, as_number

NOT_MEASURED = "not measured"
_MEDIA = ("image", "video", "audio")


@dataclass(frozen=True)
class Column:
    """A column of the table of figures: its title, and a result's cell."""

    title: str
    cell: Callable[[Result], str]


def _figure(field: str, form: str, factor: float = 1) -> Callable[[Result], str]:
    def cell(result: Result) -> str:
        value = result.number(*field.split("."))
        return NOT_MEASURED if value is None else format(value * factor, form)

    return cell


def _decode(result: Result) -> str:
    ends = [as_number(end) for end in result.rows("decode_tokens_per_s_ci95")]
    shown = _figure("decode_tokens_per_s", ".1f")(result)
    if len(ends) == 2 and ends[0] is not None and ends[1] is not None:
        return f"{shown} ({ends[0]:.1f} to {ends[1]:.1f})"
    return shown


def _energy(result: Result) -> str:
    value = result.number("energy", "joules_per_token")
    return NOT_MEASURED if value is None else f"{value * 1e3:.1f}"


def _noise(result: Result) -> str:
    if result.failed:
        return "failed: " + result.text("error", "what")
    if result.rows("noise"):
        return "noisy"
    return "quiet" if "noise" in result.record else "unknown"


COLUMNS = (
    Column("test", lambda r: r.test),
    Column("bits", lambda r: r.text("quantization")),
    Column("engine", lambda r: r.text("engine")),
    Column("threads", lambda r: r.text("threads")),
    Column("bundle MB", _figure("size_bytes", ".1f", 1e-6)),
    Column("load ms", _figure("load_ms", ".0f")),
    Column("first token ms", _figure("ttft_ms", ".1f")),
    Column("prefill tokens/s", _figure("prefill_tokens_per_s", ".0f")),
    Column("decode tokens/s (95 %)", _decode),
    Column("p50 ms", _figure("itl_ms_p50", ".2f")),
    Column("p90 ms", _figure("itl_ms_p90", ".2f")),
    Column("p99 ms", _figure("itl_ms_p99", ".2f")),
    Column("longest ms", _figure("itl_ms_max", ".2f")),
    Column("peak RSS MB", _figure("peak_rss_bytes", ".1f", 1e-6)),
    Column("peak PSS MB", _figure("peak_pss_bytes", ".1f", 1e-6)),
    Column("weights resident MB", _figure("memory.weights_resident_bytes", ".1f", 1e-6)),
    Column("packed MB", _figure("memory.packed_bytes", ".1f", 1e-6)),
    Column("tokenizer MB", _figure("memory.tokenizer_bytes", ".1f", 1e-6)),
    Column("scratch MB", _figure("memory.scratch_bytes", ".1f", 1e-6)),
    Column("state kB", _figure("state_bytes", ".0f", 1e-3)),
    Column("CPUs used", _figure("used.cpus", ".2f")),
    Column("mJ a token", _energy),
    Column("noise", _noise),
    Column("line", lambda r: r.source),
)
#: Those that fit into a README.
SHORT = (
    "test", "bits", "threads", "load ms", "first token ms", "prefill tokens/s",
    "decode tokens/s (95 %)", "p99 ms", "peak RSS MB", "mJ a token", "line",
)  # fmt: skip


def noisy(results: Sequence[Result]) -> list[tuple[str, str, str, str]]:
    """(bundle, test, reasons, line) of each run that was flagged."""
    return [
        (r.name, r.test, "; ".join(str(reason)[:200] for reason in r.rows("noise")), r.source)
        for r in grouped(results)
        if r.rows("noise")
    ]


def names(results: Sequence[Result]) -> list[str]:
    """The bundles' names, each once, in alphabetical order: they ran in any, and those of one
    model begin alike."""
    return sorted({r.name for r in results}, key=lambda name: (name.casefold(), name))


def with_media(result: Result) -> bool:
    """Whether a test has pictures or other items in its prompt."""
    return any(part.partition(":")[0] in _MEDIA for part in result.test.split())


def grouped(results: Sequence[Result]) -> list[Result]:
    """A bundle's results together, its tests from few tokens to many (they ran in any order)."""
    order = names(results)
    return sorted(
        results,
        key=lambda r: (order.index(r.name), r.number("prompt_tokens") or 0, r.test),
    )


def chosen(results: Sequence[Result]) -> list[Result]:
    """One result for each bundle: of the test that most bundles have, the last run of it."""
    works = [r for r in results if not r.failed]
    have = Counter(test for _, test in {(r.name, r.test) for r in works})
    order = list(dict.fromkeys(r.test for r in works))
    order.sort(key=lambda test: -have[test])  # stable: of several, the first in the file
    best: dict[str, Result] = {}
    for result in works:
        before = best.get(result.name)
        if before is None or order.index(result.test) <= order.index(before.test):
            best[result.name] = result
    return [best[name] for name in names(results) if name in best]


def label(result: Result, *, of: Sequence[Result]) -> str:
    """A bundle's name; with its test where the results shown differ in it."""
    differ = len({r.test for r in of}) > 1
    return f"{result.name}, {result.test}" if differ else result.name


def phases(result: Result) -> list[tuple[str, float]]:
    """(phase, ms) in order; loading is apart, as it happens once a process."""
    told = result.table("phases_ms")
    found = [(p, as_number(told.get(p))) for p in PHASES if p != "load"]
    if not any(v for _, v in found):
        found = [("prefill", result.number("ttft_ms"))]
    return [(p, v) for p, v in found if v is not None and v > 0]


def quality(result: Result) -> tuple[str, float] | None:
    """What the gate says about a bundle's loss: (what, value), less is better."""
    figures = result.table("gate", "figures")
    for name, title in (("kl_mean", "KL divergence"),):
        value = as_number(figures.get(name))
        if value is not None:
            return title, value
    return None


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those points that no other beats in both (less is better), in order of x."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(set(points)):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front


def devices(results: Sequence[Result]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Each device once: (its results' lines, [(field, value)])."""
    found: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for result in results:
        machine = result.table("machine")
        if not machine:
            continue
        rows = [("device", result.text("device"))] if result.record.get("device") else []
        rows += [
            (title, result.text("machine", field))
            for title, field in (
                ("processor", "cpu_model"), ("system", "system"), ("architecture", "architecture"),
                ("physical cores", "physical_cores"), ("CPUs to use", "affinity_cpus"),
            )
            if machine.get(field) is not None
        ]  # fmt: skip
        memory = result.number("machine", "memory_bytes")
        rows += [("memory", f"{memory / 2**30:.1f} GiB")] if memory is not None else []
        features = [str(f)[:20] for f in result.rows("machine", "cpu_features")]
        rows += [("CPU features", ", ".join(features))] if features else []
        governor = result.text("climate_after", "governor")
        rows.append(("CPU governor", NOT_MEASURED if governor == "?" else governor))
        found.setdefault(tuple(rows), []).append(result.source)
    return [(_lines(sources), list(rows)) for rows, sources in found.items()]


def _lines(sources: Sequence[str]) -> str:
    return ", ".join(sources[:6]) + (f" and {len(sources) - 6} more" if len(sources) > 6 else "")


def gates(results: Sequence[Result]) -> list[tuple[str, str, dict[str, str]]]:
    """(bundle, verdict, figures) of each bundle that tells."""
    told = []
    wanted: Mapping[str, str] = {
        "top1_agreement": "top-1 agreement", "kl_mean": "mean KL divergence",
        "kl_p99": "99th percentile of KL", "perplexity_change": "change of perplexity",
    }  # fmt: skip
    for result in {r.name: r for r in grouped(results) if r.table("gate")}.values():
        figures = result.table("gate", "figures")
        shown = {
            title: f"{value:+.2%}" if name == "perplexity_change" else f"{value:.4g}"
            for name, title in wanted.items()
            if (value := as_number(figures.get(name))) is not None
        }
        told.append((result.name, result.text("gate", "verdict"), shown))
    return told
