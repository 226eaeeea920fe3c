"""Whether the profiler tells the truth: its figures beside those of others, on a real bundle.

Each check has its bound: peak RSS beside `/usr/bin/time -v` of the same child; decode tokens/s
beside a bare loop over the engine and beside the session without the profiler, in turns in one
process; the profiler's own work, over an engine that does none; 5 ms of sleep put into each step;
two sets of runs of the same bundle, taken in turns,
which `compare` must call no difference, and a third with steps that take a tenth longer, which it
must call a regression. Decode checks use one thread unless `--threads` says otherwise: an engine
whose threads went to sleep with ours is slower at the next step.

    python benchmarks/honesty.py [--bundle DIR] [--rounds 5] [--publish]
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import artefacts
import harness

from edge_mmllm.errors import EdgeError
from edge_mmllm.profiling.compare import compare
from edge_mmllm.profiling.job import Job, read_answer
from edge_mmllm.profiling.runner import line_of, run_test
from edge_mmllm.profiling.stats import median, ratio_interval

PROMPT, NEW = 128, 64
SLEEP_MS = 5.0
#: Bounds of the checks: shares, and milliseconds of the sleep.
BOUNDS = {"memory": 0.02, "loop": 0.03, "overhead": 0.01, "sleep_ms": 0.3}
#: Steps of the slow side take so many times as long: a tenth fewer tokens/s.
SLOW = 1 / 0.9

_JOB = "from edge_mmllm.profiling.job import main; main()"
_SLOW_JOB = f"import honesty; honesty.slow_steps({SLOW!r}); {_JOB}"


# -- in children ------------------------------------------------------------------------------


def slow_steps(factor: float) -> None:
    """Has each step of the engine take `factor` as long, computing all the while."""
    from edge_mmllm_runtime.onnx import OnnxEngine

    plain, clock = OnnxEngine.step, time.perf_counter

    def step(self: Any, token: int, position: int) -> Any:
        begun = clock()
        logits = plain(self, token, position)
        until = begun + factor * (clock() - begun)
        while clock() < until:
            pass
        return logits

    OnnxEngine.step = step  # type: ignore[method-assign]


def worker(bundle: str, threads: int, rounds: int) -> None:
    """One process, all ways in turns: prints tokens/s and medians of the time between tokens."""
    import numpy as np

    import edge_mmllm
    from edge_mmllm.profiling.profiler import Profiler

    ids = np.random.default_rng(0).integers(0, 256, PROMPT).tolist()
    session = edge_mmllm.load(bundle, threads=threads, context=PROMPT + NEW + 1)
    engine, clock = session.engine, time.perf_counter

    def bare() -> dict[str, float]:
        session.reset()
        token = int(session.prefill(ids).argmax())
        begun = clock()
        for i in range(NEW):
            token = int(engine.step(token, PROMPT + i).argmax())
        return {"tokens_per_s": NEW / (clock() - begun)}

    def plain() -> dict[str, float]:
        session.reset()
        tokens = session.generate_tokens(ids, NEW + 1, ignore_eos=True)
        next(tokens)
        begun = clock()
        for _ in tokens:
            pass
        return {"tokens_per_s": NEW / (clock() - begun)}

    def profiled() -> dict[str, float]:
        session.reset()
        with Profiler(session) as profiler:
            tokens = session.generate_tokens(ids, NEW + 1, ignore_eos=True)
            next(tokens)
            begun = clock()
            for _ in tokens:
                pass
            outside = NEW / (clock() - begun)
        (told,) = profiler.generations
        assert told.tokens_per_s is not None
        return {
            "tokens_per_s": outside,
            "told_tokens_per_s": told.tokens_per_s,
            "gap_ms": median(told.gaps_ms),
        }

    def sleeping() -> dict[str, float]:
        step = engine.step

        def later(token: int, position: int) -> Any:
            logits = step(token, position)
            time.sleep(SLEEP_MS / 1e3)
            return logits

        engine.step = later  # type: ignore[method-assign]
        try:
            return profiled()
        finally:
            del engine.step

    ways: dict[str, Callable[[], dict[str, float]]] = {
        "bare": bare, "plain": plain, "profiled": profiled, "sleeping": sleeping,
    }  # fmt: skip
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name in list(ways) if number % 2 else reversed(list(ways)):
            measured = ways[name]()
            if number:  # the first round warms up
                found[name].append(measured)
    pause_ms, logits = _pause_ms(), session.engine.step(0, PROMPT).copy()
    engine.step = lambda token, position: logits  # type: ignore[method-assign]
    free = [(plain()["tokens_per_s"], profiled()["tokens_per_s"]) for _ in range(4 * rounds)]
    cost_us = 1e6 * (1 / median([b for _, b in free]) - 1 / median([a for a, _ in free]))
    session.close()
    print(json.dumps({**found, "pause_ms": pause_ms, "cost_us": cost_us}))


def _pause_ms() -> float:
    """What a sleep of `SLEEP_MS` really takes here."""
    took = []
    for _ in range(50):
        begun = time.perf_counter()
        time.sleep(SLEEP_MS / 1e3)
        took.append((time.perf_counter() - begun) * 1e3)
    return median(took)


# -- the checks -------------------------------------------------------------------------------


def _launch(job: Job, *, code: str = _JOB, prefix: tuple[str, ...] = ()) -> dict[str, Any]:
    """Runs a job in a child, as `bench` does; what `prefix` says on stderr is kept."""
    child = subprocess.run(
        [*prefix, sys.executable, "-c", code],
        input=json.dumps(job.to_json()), capture_output=True, text=True, check=False,
        env={**harness.child_env(), "PYTHONPATH": f"{harness.HERE}:{harness.SOURCES}"},
    )  # fmt: skip
    record = read_answer(child.stdout, child.returncode, child.stderr, job)
    return {**record, "said": child.stderr}


def memory(bundle: Path, threads: int) -> tuple[int, int]:
    """Peak RSS as the profiler and as GNU time tell it, of the same process."""
    program = shutil.which("time")
    if program is None:
        raise EdgeError("GNU time is not installed", fix="apt-get install time")
    job = Job(str(bundle), prompt_tokens=PROMPT, new_tokens=NEW, threads=threads)
    record = _launch(job, prefix=(program, "-v"))
    theirs = re.search(r"Maximum resident set size \(kbytes\): (\d+)", record["said"])
    assert theirs
    return record["peak_rss_bytes"], int(theirs[1]) * 1024


def compared(bundle: Path, threads: int, rounds: int, folder: Path) -> list[tuple[str, Any]]:
    """Changes of decode and prefill, of the same bundle twice and of slower steps."""
    job = Job(str(bundle), name=bundle.name, prompt_tokens=PROMPT, new_tokens=NEW, threads=threads)
    sides = {"first": _JOB, "again": _JOB, "slower": _SLOW_JOB}
    files = {name: folder / f"{name}.jsonl" for name in sides}
    for number in range(rounds):
        for name in sorted(sides, reverse=bool(number % 2)):
            record = run_test(job, launch=partial(_launch, code=sides[name]))
            with files[name].open("a") as file:
                file.write(line_of({k: v for k, v in record.items() if k != "said"}))
    found = []
    for name in ("again", "slower"):
        changes = compare(files["first"], files[name]).changes
        found += [(name, c) for c in changes if c.metric.startswith(("decode_t", "prefill_t"))]
    return found


def run(arguments: argparse.Namespace, report: harness.Reporter) -> None:
    """All checks, one table."""
    bundle = arguments.bundle or artefacts.ours("smollm2", arguments.cache, "--quant", "int4")
    threads, rounds = arguments.threads, arguments.rounds
    rows: list[list[str]] = []

    def row(what: str, ours: str, theirs: str, apart: str, bound: str, holds: bool) -> None:
        rows.append([what, ours, theirs, apart, bound, "holds" if holds else "BREACHED"])

    ours, theirs = memory(bundle, threads)
    apart = ours / theirs - 1
    row("peak RSS, MB; /usr/bin/time -v", f"{ours / 1e6:.2f}", f"{theirs / 1e6:.2f}",
        f"{apart:+.2%}", f"{BOUNDS['memory']:.0%}", abs(apart) <= BOUNDS["memory"])  # fmt: skip
    command = [sys.executable, __file__, "--worker", str(bundle), str(threads), str(rounds)]
    child = subprocess.run(
        command, capture_output=True, text=True, check=True, env=harness.child_env(),
        preexec_fn=harness.raise_priority,
    )  # fmt: skip
    found = json.loads(child.stdout)
    told = [r["told_tokens_per_s"] for r in found["profiled"]]
    for what, values, other, key in (
        ("decode tokens/s; bare loop over the engine", told, "bare", "loop"),
        ("decode tokens/s; not profiled", [r["tokens_per_s"] for r in found["profiled"]],
         "plain", "overhead"),
    ):  # fmt: skip
        against = [r["tokens_per_s"] for r in found[other]]
        apart = median(values) / median(against) - 1
        interval = ratio_interval([against], [values])
        spread = f" ({interval[0]:+.1%} to {interval[1]:+.1%})" if interval else ""
        row(what, f"{median(values):.1f}", f"{median(against):.1f}", f"{apart:+.2%}{spread}",
            f"{BOUNDS[key]:.0%}",
            (abs(apart) if key == "loop" else -apart) <= BOUNDS[key])  # fmt: skip
    gaps = {name: median([r["gap_ms"] for r in found[name]]) for name in ("profiled", "sleeping")}
    share = found["cost_us"] / 1e3 / gaps["profiled"]
    row("the profiler's own work, us a token; a token", f"{found['cost_us']:.2f}",
        f"{1e3 * gaps['profiled']:.0f}", f"{share:.3%}", f"{BOUNDS['overhead']:.0%}",
        share <= BOUNDS["overhead"])  # fmt: skip
    shown = gaps["sleeping"] - gaps["profiled"]
    row("5 ms of sleep in each step, ms; a sleep alone", f"{shown:.2f}",
        f"{found['pause_ms']:.2f}", f"{shown - SLEEP_MS:+.2f}", f"{BOUNDS['sleep_ms']}",
        abs(shown - SLEEP_MS) <= BOUNDS["sleep_ms"])  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        changes = compared(bundle, threads, rounds, Path(folder))
    for name, c in changes:
        slower = name == "slower" and c.metric.startswith("decode")
        wanted = "regression" if slower else "no difference"
        interval = "" if c.interval is None else f" ({c.interval[0]:+.1%} to {c.interval[1]:+.1%})"
        what = {"again": "the same bundle again", "slower": "steps a tenth slower"}[name]
        metric = "decode" if c.metric.startswith("decode") else "prefill"
        row(f"{what}: {metric} tokens/s", f"{c.after:.1f}", f"{c.before:.1f}",
            f"{c.change:+.2%}{interval}", f"{wanted}: {c.verdict}",
            c.verdict == wanted)  # fmt: skip
    report.record(
        bundle_sha256=harness.tree_sha256(bundle), threads=threads, rounds=rounds, rows=rows,
        turns=found, versions=harness.versions(sys.executable, ("edge-mmllm", "onnxruntime")),
    )  # fmt: skip
    report.table(
        f"{bundle.name}, {PROMPT} tokens read and {NEW} made, {threads} thread(s), {rounds} rounds",
        ["what; beside", "ours", "theirs", "apart", "bound", ""],
        rows,
    )


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
        return
    parser = harness.parser(__doc__)
    parser.add_argument("--bundle", type=Path, help="an ONNX bundle; default: SmolLM2 int4")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    report = harness.Reporter("honesty", "Honesty of the profiler", arguments)
    run(arguments, report)
    report.close()


if __name__ == "__main__":
    main()
