"""A stream of one million tokens through one session: does anything grow, does it get slower?

For each model a child reads held-out text over and over in chunks, and notes its resident memory,
the state's bytes and the time of each chunk. The state at 10,000 tokens and at the end is kept;
afterwards both are restored in turn, and the same tokens are timed from each, so that the machine's
own noise meets both alike.

Prints a table, appends to results/streaming.jsonl and draws results/streaming.svg.

    python benchmarks/streaming.py [--tokens 1000000] [--only tiny-rwkv7] [--publish]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import harness
import zoo
from plot import Chart, Line, svg

from edge_mmllm.profiling.stats import median, summarize

EARLY = 10_000
CHUNK = 512
MARKS = 100
#: Tokens timed from each state in a round: by prefill, then one by one.
PREFILLED, STEPPED = 4096, 256

MODELS = ("tiny-mamba2", "tiny-rwkv7", "tiny-mamba")


def worker(arguments: argparse.Namespace) -> None:
    """The child: prints one line for each mark, then one for each round."""
    import numpy as np

    import edge_mmllm

    with edge_mmllm.load(arguments.worker, threads=arguments.threads) as session:
        text = Path(arguments.text).read_text(encoding="utf-8")
        ids = np.asarray(session.text.encode(text), np.int64)
        stream = np.concatenate([ids, ids[:CHUNK]])
        every = max(CHUNK, arguments.tokens // MARKS)
        early, times, noted = None, [], 0
        while session.position < arguments.tokens:
            at = session.position % len(ids)
            chunk = stream[at : at + min(CHUNK, arguments.tokens - session.position)]
            if early is None:
                chunk = chunk[: EARLY - session.position]
            started = time.perf_counter()
            session.prefill(chunk)
            times.append(1e3 * (time.perf_counter() - started) / len(chunk))
            if early is None and session.position >= EARLY:
                early = session.snapshot()
                times = note(session, times)
            elif session.position // every > noted or session.position == arguments.tokens:
                noted = session.position // every
                if early is not None:
                    times = note(session, times)
        late = session.snapshot()
        assert early is not None
        part = stream[:CHUNK]
        for i in range(arguments.rounds + 1):  # the first warms up
            both = {}
            for name in ("early", "late") if i % 2 else ("late", "early"):
                session.restore(early if name == "early" else late)
                started = time.perf_counter()
                for _ in range(PREFILLED // CHUNK):
                    session.prefill(part)
                middle = time.perf_counter()
                for token in part[:STEPPED].tolist():
                    session.step(token)
                ended = time.perf_counter()
                both[name] = {
                    "prefill_ms": 1e3 * (middle - started) / PREFILLED,
                    "decode_ms": 1e3 * (ended - middle) / STEPPED,
                }
            if i:
                print(json.dumps({"round": both}), flush=True)


def note(session: Any, times: list[float]) -> list[float]:
    """Prints a mark; returns a fresh list of times."""
    told = {
        "tokens": session.position,
        "rss": resident_bytes(),
        "state": session.state_bytes,
        "ms": median(times),
    }
    print(json.dumps({"mark": told}), flush=True)
    return []


def resident_bytes() -> int:
    """Source: proc(5), statm."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def measure(name: str, arguments: argparse.Namespace, text: Path) -> dict[str, Any] | None:
    """One model's stream in a child of its own."""
    bundle = zoo.bundle(name, arguments, arguments.quant)
    if bundle is None:
        return None
    command = [sys.executable, __file__, "--worker", str(bundle), "--text", str(text)]
    for option in ("tokens", "rounds", "threads"):
        command += [f"--{option}", str(getattr(arguments, option))]
    done = subprocess.run(
        command, env=harness.child_env(), preexec_fn=harness.raise_priority,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-1500:]}")
    told = [json.loads(line) for line in done.stdout.splitlines()]
    return {
        "bundle_sha256": harness.tree_sha256(bundle),
        "marks": [line["mark"] for line in told if "mark" in line],
        "rounds": [line["round"] for line in told if "round" in line],
    }


def row(name: str, found: dict[str, Any]) -> list[str]:
    """A line of the table."""
    first, last = found["marks"][0], found["marks"][-1]
    cells = [name, f"{last['tokens']:,}", f"{(last['rss'] - first['rss']) / 1e6:+.2f}"]
    highest = max(mark["rss"] for mark in found["marks"])
    cells.append(f"{(highest - first['rss']) / 1e6:+.2f}")
    sizes = {mark["state"] for mark in found["marks"]}
    cells.append(" to ".join(f"{size:,}" for size in sorted(sizes)))
    for kind in ("prefill_ms", "decode_ms"):
        early, late = ([r[w][kind] for r in found["rounds"]] for w in ("early", "late"))
        ratios = summarize([b / a for a, b in zip(early, late, strict=True)])
        cells += [f"{median(early):.4f}", f"{median(late):.4f}"]
        cells.append(f"{100 * (ratios.median - 1):+.1f} %")
    return cells


def draw(everything: dict[str, dict[str, Any]], path: Path) -> None:
    """Memory and time over tokens."""
    growth, pace = [], []
    for name, found in everything.items():
        marks = found["marks"]
        x = [m["tokens"] / 1e3 for m in marks]
        growth.append(Line(name, x, [(m["rss"] - marks[0]["rss"]) / 1e6 for m in marks]))
        pace.append(Line(name, x, [m["ms"] for m in marks]))
    growth_title = f"Resident memory since token {EARLY:,} (MB)"
    charts = [
        Chart(growth_title, "thousand tokens", growth, (-5.0, 5.0)),
        Chart(
            "Time of a token in chunks of 512 (ms, median between marks)", "thousand tokens", pace
        ),
    ]
    path.parent.mkdir(exist_ok=True)
    path.write_text(svg(charts), encoding="utf-8")
    print(f"drawn: {path.name}", file=sys.stderr)


def main() -> None:
    parser = harness.parser(__doc__)
    zoo.options(parser, MODELS)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--quant", default="int4")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--text", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.tokens <= EARLY:
        parser.error(f"--tokens must be more than {EARLY}")
    if arguments.worker:
        worker(arguments)
        return
    report = harness.Reporter("streaming", "Streaming", arguments)
    harness.RESULTS.mkdir(exist_ok=True)
    text = harness.RESULTS / "streaming.txt"
    text.write_text(zoo.text(arguments), encoding="utf-8")
    versions = harness.versions(sys.executable, ("edge-mmllm", "onnxruntime", "numpy"))
    everything, rows = {}, []
    for name in arguments.only:
        found = measure(name, arguments, text)
        if found is not None:
            report.record(
                model=name, quant=arguments.quant, threads=arguments.threads, chunk=CHUNK,
                versions=versions, **found,
            )  # fmt: skip
            everything[name] = found
            rows.append(row(name, found))
            print(rows[-1], file=sys.stderr, flush=True)
    text.unlink()
    report.table(
        f"One stream in chunks of {CHUNK}, {arguments.quant}, {arguments.threads} threads. Memory "
        f"is resident memory since token {EARLY:,}; times are of the same tokens after {EARLY:,} "
        f"and after all, in {arguments.rounds} rounds by turns; change: median ratio",
        ["model", "tokens", "RSS MB", "highest", "state bytes", "prefill ms/token", "at the end",
         "change", "decode ms/token", "at the end", "change"],
        rows,
    )  # fmt: skip
    draw(everything, harness.RESULTS / "streaming.svg")
    report.close()


if __name__ == "__main__":
    main()
