"""Results in, comparisons and reports out: honest figures, bad and hostile input."""

from __future__ import annotations

import html.parser
import json
import random
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_mmllm.errors import MissingDependency, UsageError
from edge_mmllm.profiling.charts import bars, lines, number, text, ticks
from edge_mmllm.profiling.compare import METRICS, compare, judge
from edge_mmllm.profiling.report import report, write_html
from edge_mmllm.profiling.results import read_results
from edge_mmllm.profiling.runner import line_of
from edge_mmllm.profiling.stats import bootstrap_interval, ratio_interval
from edge_mmllm.profiling.view import chosen, pareto

EVIL = "</title><script>document.title='owned'</script><img src=x onerror=alert(1)>'\"`|\n# x\u202e"


def record(name: str = "tiny.int4", rate: float = 100.0, seed: int = 0, **more: Any) -> Any:
    """One test of five repetitions, 1 % apart."""
    draw = random.Random(seed)
    rates = [rate * draw.uniform(0.99, 1.01) for _ in range(5)]
    gaps = [1e3 / r * draw.uniform(0.9, 1.3) for r in rates for _ in range(8)]
    return {
        "schema_version": 2, "tool": "edge-mmllm", "name": name, "test": "64+8", "status": "ok",
        "run": "r", "threads": 2, "prompt_tokens": 64, "new_tokens": 8, "quantization": "int4",
        "decode_tokens_per_s": sorted(rates)[2], "decode_tokens_per_s_values": rates,
        "decode_tokens_per_s_ci95": [min(rates), max(rates)],
        "prefill_tokens_per_s": 900.0, "prefill_tokens_per_s_values": [890.0, 900.0, 910.0],
        "ttft_ms": 71.0, "ttft_ms_values": [70.0, 71.0, 72.0], "itl_ms_p50": 10.0,
        "itl_ms_p99": 12.0, "itl_ms_values": gaps, "load_ms": 50.0, "peak_rss_bytes": 10**8,
        "size_bytes": 5 * 10**6, "phases_ms": {"load": 50.0, "prefill": 71.0, "decode": 80.0},
        "memory": {"runtime_bytes": 10**7, "packed_bytes": 10**6, "state_bytes": 5},
        "memory_over_time": {"points": [[0.0, 10**7], [1.0, 10**8]], "marks": []},
        "sustained": {"points": [[0.5, 100.0, None, None], [1.0, 90.0, 50.0, 1500.0]]},
        "gate": {"verdict": "passed", "figures": {"kl_mean": 0.01, "top1_agreement": 0.99}},
        "machine": {"cpu_model": "A CPU", "affinity_cpus": 2}, "noise": [], **more,
    }  # fmt: skip


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    def write(name: str, *records: Any) -> Path:
        path = tmp_path / name
        path.write_text("".join(r if isinstance(r, str) else line_of(r) for r in records))
        return path

    return write


# -- statistics -----------------------------------------------------------------------------


def test_a_bootstrap_interval_covers_the_median_as_often_as_it_says() -> None:
    draw, hits, trials = random.Random(1), 0, 60
    for trial in range(trials):
        values = [draw.gauss(10, 1) for _ in range(25)]
        low, high = bootstrap_interval(values, seed=trial) or (0, 0)
        hits += low <= 10 <= high
    assert hits >= 0.85 * trials
    assert bootstrap_interval([1.0, 2.0]) is None
    assert bootstrap_interval([3.0] * 5) == (3.0, 3.0)
    assert bootstrap_interval([1, 2, 3, 4, 5]) == bootstrap_interval([5, 4, 3, 2, 1])
    with pytest.raises(UsageError, match="confidence"):
        bootstrap_interval([1, 2, 3], confidence=1.0)


def test_the_interval_of_a_ratio() -> None:
    assert ratio_interval([[0, 0, 0]], [[1, 2, 3]]) is None
    low, high = ratio_interval([[10, 10.1, 9.9, 10, 10.05]], [[9, 9.1, 8.9, 9, 9.05]]) or (0, 0)
    assert -0.13 < low < -0.1 < high < -0.07


def test_rounds_that_differ_widen_the_interval() -> None:
    """Processes of one bundle at 100, 98 and 96, then at 97, 95 and 93: nothing is shown yet."""
    before, after = (
        [[rate + 0.02 * i for i in range(15)] for rate in rates]
        for rates in ((100, 98, 96), (97, 95, 93))
    )
    low, high = ratio_interval(before, after) or (0, 0)
    assert low < -0.05 < 0 < high
    pooled = ([[v for values in side for v in values]] for side in (before, after))
    low, high = ratio_interval(*pooled) or (0, 0)
    assert -0.04 < low < high < -0.02  # one process would have called it real


# -- compare --------------------------------------------------------------------------------


def test_two_runs_of_the_same_are_no_difference(save: Callable[..., Path]) -> None:
    for seed in range(20):
        a = save("a.jsonl", record(seed=seed))
        b = save("b.jsonl", record(seed=100 + seed))
        found = compare(a, b)
        assert {c.verdict for c in found.changes} == {"no difference"}
        assert {c.metric for c in found.changes} == set(METRICS)


def test_a_slowdown_of_10_percent_is_a_regression(
    save: Callable[..., Path], cli: Callable[..., Any]
) -> None:
    a, b = save("a.jsonl", record(rate=100)), save("b.jsonl", record(rate=90, seed=3))
    found = compare(a, b)
    (worst,) = found.regressions
    assert worst.metric == "decode_tokens_per_s"
    assert worst.interval is not None
    assert worst.interval[1] < 0
    assert cli("compare", a, b).status == 0
    assert cli("compare", a, b, "--fail-on-regression", "5%").status == 1
    assert cli("compare", a, b, "--fail-on-regression", "20%").status == 0
    assert cli("compare", b, a, "--fail-on-regression", "5%").status == 0  # faster
    assert cli("compare", a, a, "--fail-on-regression", "5%").status == 0
    told = cli("compare", a, b, "--json").json
    assert told["regressions"] == 1
    assert "regression" in cli("compare", a, b).stderr


def test_memory_can_be_a_regression(save: Callable[..., Path]) -> None:
    a, b = save("a.jsonl", record()), save("b.jsonl", record(peak_rss_bytes=11 * 10**7))
    assert [c.metric for c in compare(a, b).regressions] == ["peak_rss_bytes"]
    assert compare(b, a).regressions == ()


def test_verdicts() -> None:
    def told(change: float, interval: tuple[float, float] | None, more: bool = True) -> str:
        return judge(change, interval, more_is_better=more, threshold=0.05)

    assert told(-0.10, (-0.12, 0.01)) == "no difference"  # may be chance
    assert told(-0.01, (-0.015, -0.005)) == "no difference"  # real, and too small to matter
    assert told(-0.03, (-0.04, -0.02)) == "worse"
    assert told(-0.10, (-0.12, -0.08)) == "regression"
    assert told(0.10, (0.08, 0.12)) == "better"
    assert told(0.10, (0.08, 0.12), more=False) == "regression"
    assert told(0.10, None, more=False) == "regression"


def test_what_has_no_partner(save: Callable[..., Path], cli: Callable[..., Any]) -> None:
    a = save("a.jsonl", record("one"), record("two"))
    b = save("b.jsonl", record("one"), record("three"))
    found = compare(a, b)
    assert [n.split()[0] for n in (*found.only_before, *found.only_after)] == ["two", "three"]
    done = cli("compare", a, save("c.jsonl", record("three")))
    assert done.status == 2
    assert "no test in common" in done.stderr
    for wrong in ("x", "0%", "-5"):
        assert cli("compare", a, b, f"--fail-on-regression={wrong}").status == 2


# -- reading --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "no results"),
        ("\n \n", "no results"),
        ("{", "not JSON"),
        ("[]", "no results"),
        ("3\n", "an object"),
        ('{"name": "x"}\n', "no figure"),
        ('{"schema_version": 99, "ttft_ms": 1}\n', "later version"),
        ('{"schema_version": "2", "ttft_ms": 1}\n', "version is not one"),
        ('{"schema_version": true, "ttft_ms": 1}\n', "version is not one"),
        ('{"ttft_ms": NaN}\n', "no figure"),
        ('{"ttft_ms": 1e999}\n', "no figure"),
        ("[" * 3000 + "\n", "not JSON"),
    ],
)
def test_bad_files_are_refused_by_line(
    save: Callable[..., Path], cli: Callable[..., Any], content: str, says: str
) -> None:
    path = save("bad.jsonl", content)
    with pytest.raises(UsageError, match=says):
        read_results([path])
    assert cli("report", path).status == 2


def test_the_bad_line_is_named(save: Callable[..., Path]) -> None:
    path = save("mixed.jsonl", record(), "{broken\n")
    with pytest.raises(UsageError) as caught:
        read_results([path])
    assert caught.value.where == "mixed.jsonl:2"


def test_versions_may_be_mixed(save: Callable[..., Path]) -> None:
    old = {"name": "old", "decode_tokens_per_s": 5, "prompt_tokens": 8, "new_tokens": 2}
    found = read_results([save("mixed.jsonl", old, record())])
    assert [r.test for r in found] == ["8+2", "64+8"]
    assert [r.source for r in found] == ["mixed.jsonl:1", "mixed.jsonl:2"]
    assert found[0].values("decode_tokens_per_s") == [5]


def test_a_pretty_document_and_many_results(tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    path.write_text(json.dumps(record(), indent=2))
    assert len(read_results([path])) == 1
    path.write_text(json.dumps({"results": [record(), record("b")]}))
    assert [r.name for r in read_results([path])] == ["tiny.int4", "b"]
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="UTF-8"):
        read_results([path])
    with pytest.raises(UsageError, match="cannot be read"):
        read_results([tmp_path / "missing"])


LLAMA = {
    "build_commit": "abc", "build_number": 6000, "cpu_info": "A CPU", "n_threads": 2,
    "model_filename": "/models/smol.gguf", "model_type": "llama 0.1B Q4_0", "model_size": 90,
    "model_n_params": 134, "n_prompt": 512, "n_gen": 0, "n_depth": 0, "avg_ts": 400.0,
    "samples_ts": [390.0, 400.0, 410.0], "test_time": "2026-01-01T00:00:00Z",
}  # fmt: skip


def test_llama_bench_stands_in_the_same_table(tmp_path: Path) -> None:
    path = tmp_path / "llama.json"
    made = {**LLAMA, "n_prompt": 0, "n_gen": 64, "avg_ts": 50.0, "samples_ts": [49.0, 50.0, 52.0]}
    deep = {**made, "n_depth": 512, "samples_ts": [40.0, 41.0, 42.0]}
    path.write_text(json.dumps([LLAMA, made, deep], indent=1))
    first, second = read_results([path])
    assert (first.name, first.test) == ("smol.gguf", "512+64")
    assert first.number("prefill_tokens_per_s") == 400
    assert first.number("decode_tokens_per_s") == 50
    assert first.values("decode_tokens_per_s") == [49, 50, 52]
    assert first.number("ttft_ms") is None  # it does not measure it
    assert first.number("peak_rss_bytes") is None
    assert second.number("depth") == 512
    assert "not measured" in report_html([path], tmp_path)
    hostile = [{**LLAMA, "samples_ts": "x", "avg_ts": -1}, {"n_prompt": 1}, 3]
    path.write_text(json.dumps(hostile))
    with pytest.raises(UsageError):
        read_results([path])


GOLDENS = Path(__file__).resolve().parents[1] / "goldens" / "llama_bench"


def test_what_llama_bench_really_prints(tmp_path: Path) -> None:
    first, second = read_results([GOLDENS / "real.json"])
    assert (first.name, first.test, second.test) == ("tiny-llama.gguf", "16+8", "32+?")
    assert (first.record["architecture"], first.record["quantization"]) == ("llama", "F32")
    assert first.values("prefill_tokens_per_s") == [95318.1, 111224, 112107]
    assert first.number("decode_tokens_per_s") == 41220.5
    assert second.number("decode_tokens_per_s") is None
    assert (first.record["size_bytes"], first.record["parameters"]) == (151168, 37792)
    lines = read_results([GOLDENS / "real.jsonl"])
    assert [(r.test, r.record["threads"]) for r in lines] == [("16+8", 1), ("16+8", 2)]
    assert "tiny-llama.gguf" in report_html([GOLDENS / "real.json"], tmp_path)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("llama ?B (guessed) all F32", ("llama", "F32")),
        ("qwen2 1B Q4_K - Medium", ("qwen2", "Q4_K")),
        ("llama 135M IQ2_XXS - 2.0625 bpw", ("llama", "IQ2_XXS")),
        ("mamba 0.1B Q4_0", ("mamba", "Q4_0")),
        ("", ("?", "?")),
    ],
)
def test_model_types_of_llama_bench(said: str, expected: tuple[str, str]) -> None:
    from edge_mmllm.profiling.llama_bench import from_llama_bench

    (found,) = from_llama_bench([{**LLAMA, "model_type": said}])
    assert (found["architecture"], found["quantization"]) == expected


# -- reports --------------------------------------------------------------------------------


def report_html(paths: list[Path], folder: Path) -> str:
    report(paths, html=folder / "r.html", markdown=folder / "r.md", title="t")
    return (folder / "r.html").read_text()


class Page(html.parser.HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_a_page_has_every_part(save: Callable[..., Path], tmp_path: Path) -> None:
    longer = {"test": "256+8", "prompt_tokens": 256}
    path = save(
        "r.jsonl",
        record("a.int4"), record("a.int8", 80, size_bytes=9 * 10**6),
        record("a.int4", 90, **longer), record("a.int8", 70, noise=["busy <b>"], **longer),
        record("a.int4", operators=[{"what": "decode", "by_layer": [], "by_type": [
            {"name": "MatMulNBits", "calls": 3, "us": 5.0, "percent": 100.0}]}]),
        {"schema_version": 2, "name": "broken", "test": "64+8", "status": "failed",
         "error": {"type": "ContextFull", "what": "no room"}},
    )  # fmt: skip
    content = report_html([path], tmp_path)
    page = Page(content)
    for words in ("Decode", "Prefill", "Where the time goes", "Latency", "Memory over time",
                  "Speed against context", "Quality against size", "Throttling", "Quality gate",
                  "Device", "MatMulNBits", "failed: no room", "busy <b>", "r.jsonl:6"):  # fmt: skip
        assert any(words in part for part in page.words), words
    assert page.tags.count("svg") == content.count("</svg>")
    for svg in content.split("<svg")[1:]:
        ET.fromstring("<svg" + svg.split("</svg>")[0] + "</svg>")  # noqa: S314 - our own
    assert page.tags.count("caption") == page.tags.count("table")
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert not [v for n, v in page.attributes if n in ("src", "href")]
    assert ("lang", "en") in page.attributes
    assert "prefers-color-scheme:dark" in content
    markdown = (tmp_path / "r.md").read_text()
    assert markdown.count("\n|") >= 8
    assert "r.jsonl:1" in markdown


def test_a_hostile_name_is_text(save: Callable[..., Path], tmp_path: Path) -> None:
    evil = record(
        EVIL, test=EVIL, quantization=EVIL, noise=[EVIL], machine={"cpu_model": EVIL},
        gate={"verdict": EVIL, "figures": {"kl_mean": 1}}, engine=EVIL, device=EVIL,
        operators=[{"what": EVIL, "by_type": [{"name": EVIL, "us": 1}]}], threads=EVIL,
        phases_ms={"prefill": 1, EVIL: 2}, split={EVIL: 1},
    )  # fmt: skip
    path = save("r.jsonl", evil, record(EVIL + "2", prompt_tokens=128))
    report([path], html=tmp_path / "r.html", markdown=tmp_path / "r.md", title=EVIL)
    content = (tmp_path / "r.html").read_text()
    page = Page(content)
    assert not {"script", "img"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "default-src 'none'" in content
    assert any("document.title='owned'" in words for words in page.words)
    assert "\u202e" not in content
    markdown = (tmp_path / "r.md").read_text()
    assert "<script" not in markdown
    assert "<img" not in markdown
    assert "\n# x" not in markdown


@pytest.mark.parametrize("wrong", [None, "x", [], {}, [["a"]], -1, 10**400, True, [[None, 1]]])
def test_fields_of_a_wrong_type_do_not_break_a_report(
    save: Callable[..., Path], tmp_path: Path, wrong: Any
) -> None:
    good = record()
    for name in good:
        if name in ("schema_version", "ttft_ms", "status"):
            continue
        path = save("r.jsonl", {**good, name: wrong}, record("b"))
        report_html([path], tmp_path)
    bare = save("bare.jsonl", {"ttft_ms": 1}, {"decode_tokens_per_s": 0, "size_bytes": 0})
    assert "not measured" in report_html([bare], tmp_path)


def test_figures_as_pictures(
    save: Callable[..., Path], cli: Callable[..., Any], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    from PIL import Image

    longer = {"test": "256+8", "prompt_tokens": 256}
    hostile = "$\\frac{<script>"
    path = save("r.jsonl", record("a.int4"), record(hostile, 80), record("a.int4", 90, **longer))
    folder = tmp_path / "new" / "pictures"
    assert cli("report", path, "--png", folder).status == 0
    names = {p.stem for p in folder.iterdir()}
    assert {"decode", "prefill", "phases", "latency", "context"} <= names
    content = report_html([path], tmp_path)
    assert len(names) == content.count("<figure>")
    for picture in folder.iterdir():
        with Image.open(picture) as opened:
            assert opened.width > 500
            assert len(opened.convert("RGB").getcolors(1 << 20) or ()) > 20


def test_pictures_without_matplotlib(
    save: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependency, match=r"edge-mmllm\[png\]"):
        report([save("r.jsonl", record())], png=tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_one_test_for_each_bundle_is_drawn(save: Callable[..., Path]) -> None:
    more = {"test": "256+8"}
    path = save("r.jsonl", record("a", **more), record("b"), record("a", 5), record("b", **more))
    found = chosen(read_results([path]))
    assert [(r.name, r.test) for r in found] == [("a", "256+8"), ("b", "256+8")]


def test_the_command(save: Callable[..., Path], cli: Callable[..., Any], tmp_path: Path) -> None:
    path, out = save("r.jsonl", record()), tmp_path / "out.html"
    told = cli("report", path, "--html", out, "--json").json
    assert told == {"results": 1, "failed": 0, "html": str(out), "markdown": None, "png": None}
    assert cli("report", path).stdout.startswith("# edge-mmllm results\n\n| bundle |")
    done = cli("report", path, "--html", path)
    assert done.status == 2
    assert path.read_text().startswith("{")


def test_a_picture_stands_beside_its_note(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"\x89PNG data")
    out, notes = tmp_path / "r.html", [("asked", "an <answer>")]
    write_html(out, "t", [record()], notes=notes, pictures={"asked": tmp_path / "x.png"})
    page = Page(out.read_text())
    assert [v[:22] for n, v in page.attributes if n == "src"] == ["data:image/png;base64,"]
    assert "an <answer>" in page.words
    (tmp_path / "x.png").write_bytes(b"<svg>")
    with pytest.raises(UsageError, match="PNG"):
        write_html(out, "t", [record()], notes=notes, pictures={"asked": tmp_path / "x.png"})


def test_charts() -> None:
    assert ticks(0, 97) == [0, 20, 40, 60, 80, 100]
    assert ticks(5, 5)[-1] > 5
    assert [number(v) for v in (0, 0.0123, 1.234, 12.34, 123.4, float("nan"))] == [
        "0", "0.0123", "1.23", "12.3", "123", "?"
    ]  # fmt: skip
    assert text("a\x1b[31m<") == "a\ufffd[31m&lt;"
    assert lines("t", "x", "y", []) == ""
    assert "<rect" not in bars("t", [], "u")
    assert pareto([(3, 1), (1, 3), (2, 2), (2, 4), (3, 3)]) == [(1, 3), (2, 2), (3, 1)]
