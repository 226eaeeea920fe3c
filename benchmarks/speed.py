"""Prefill and decode speed against the peers, on the same weights, bits and threads, in one run.

Each engine sits in a child of its own, loaded once, and blocks on a pipe while the others are
measured (that idle children use no CPU is checked and printed). Commands go round: ours, genai,
llama.cpp, ours, ... so that whatever else the machine does hits all alike.

    python benchmarks/speed.py [--model smollm2] [--threads 2] [--rounds 7] [--quick] [--publish]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import artefacts
import harness

from edge_mmllm.profiling.stats import median

PREFILLS = (128, 512)
PAST, DECODE, CONTEXT = 128, 64, 1024
#: Seconds between commands: spinning threads of the engine before must have gone to sleep.
SETTLE_S = 0.15
PACKAGES = ("edge-mmllm", "onnxruntime", "onnxruntime-genai", "llama-cpp-python", "numpy")
#: Of a round's tokens, at least this many undisturbed ones make a median of their own.
ENOUGH = 8


@dataclass
class Child:
    """A loaded engine."""

    name: str
    artefact: Path
    process: subprocess.Popen[str]
    times: dict[str, list[list[tuple[float, int]]]] = field(default_factory=dict)
    idle_cpu_s: float = 0.0

    def ask(self, **command: Any) -> Any:
        """Send a command, return the answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> Any:
        """The next line it prints."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} exited with {self.process.wait()}")
        return json.loads(line)

    def cpu_s(self) -> float:
        """CPU time used so far. Source: proc(5), fields 14 and 15 of stat."""
        text = Path(f"/proc/{self.process.pid}/stat").read_text()
        fields = text.rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """End the process."""
        if self.process.poll() is None:
            assert self.process.stdin is not None
            self.process.stdin.write('{"exit": true}\n')
            self.process.stdin.close()
            self.process.wait()


def start(engine: str, artefact: Path, python: Path, threads: int, *extra: str) -> Child:
    """Load an engine in a child."""
    command = [
        artefacts.interpreter(engine, python), str(harness.HERE / "engines.py"),
        engine, str(artefact), str(threads), str(CONTEXT), *extra,
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True, env=harness.child_env(), preexec_fn=harness.raise_priority,
    )  # fmt: skip
    child = Child(engine, artefact, process)
    child.answer()
    return child


def measure(children: list[Child], rounds: int, decode: int) -> None:
    """Fill `Child.times`; the first round warms up and is dropped."""
    for number in range(rounds + 1):
        for key, command in [
            *((f"prefill {n}", {"prefill": n}) for n in PREFILLS),
            ("decode", {"decode": decode, "past": PAST}),
        ]:
            for child in children:
                time.sleep(SETTLE_S)
                others = [(c, c.cpu_s()) for c in children if c is not child]
                times = [(t, n) for t, n in child.ask(**command)]
                for other, before in others:
                    other.idle_cpu_s += other.cpu_s() - before
                if number:
                    child.times.setdefault(key, []).append(times)


def seconds(child: Child, key: str) -> list[float]:
    """One figure for each round: the median of its undisturbed tokens where there are enough."""
    out = []
    for times in child.times[key]:
        calm = [t for t, n in times if n == 0]
        out.append(median(calm if len(calm) >= ENOUGH else [t for t, _ in times]))
    return out


def calm_share(child: Child) -> float:
    """Share of decode steps that nobody interrupted."""
    steps = [n for times in child.times["decode"] for _, n in times]
    return sum(n == 0 for n in steps) / len(steps)


def bandwidth(threads: int) -> dict[str, float]:
    """Memory read rate in GB/s by number of threads, in a child."""
    out = subprocess.run(
        [sys.executable, str(harness.HERE / "bandwidth.py"), str(threads)],
        capture_output=True, text=True, check=True, preexec_fn=harness.raise_priority,
    ).stdout  # fmt: skip
    rates: dict[str, float] = json.loads(out)
    return rates


def weight_bytes(child: Child) -> int:
    """Bytes of weights that a decode step reads (tied models: all of them)."""
    if child.name == "ours":
        return (child.artefact / "weights.bin").stat().st_size
    if child.name.startswith("genai"):
        return (child.artefact / "model.onnx.data").stat().st_size
    return child.artefact.stat().st_size


def run(model: str, arguments: argparse.Namespace, report: harness.Reporter) -> None:
    """Measure one model and print its tables."""
    threads, python = arguments.threads, arguments.peers
    paths = {
        e: artefacts.artefact(e, model, arguments.cache, python, refresh=arguments.refresh)
        for e in artefacts.MODELS[model].engines
        if e == "ours" or python.exists()
    }
    rounds, decode = (3, 24) if arguments.quick else (arguments.rounds, DECODE)
    load = harness.wait_quiet(1, arguments.wait)
    before = bandwidth(threads)
    children: list[Child] = []
    try:
        for engine, path in paths.items():
            children.append(start(engine, path, python, threads))
        started = time.monotonic()
        measure(children, rounds, decode)
        wall = time.monotonic() - started
    finally:
        for child in children:
            child.close()
    after = bandwidth(threads)
    rate = max(before[str(threads)], after[str(threads)])
    report.text(
        f"{model}, int4 block 32, {threads} threads, {rounds} rounds of "
        f"{' and '.join(map(str, PREFILLS))} tokens and {decode} decode steps after {PAST}; load "
        f"average {load:.1f} before, {os.getloadavg()[0]:.1f} after. Memory reads: "
        + ", ".join(f"{n} threads {max(before[n], after[n])} GB/s" for n in before)
        + f". CPU used by children while idle: {_idle(children, wall)}."
    )
    _table(model, children, rate, arguments, report)
    if arguments.profile:
        _profile(paths["ours"], arguments, report)


def _idle(children: list[Child], wall: float) -> str:
    return ", ".join(f"{c.name} {100 * c.idle_cpu_s / wall:.1f} %" for c in children)


def _table(
    model: str, children: list[Child], rate: float, arguments: argparse.Namespace,
    report: harness.Reporter,
) -> None:  # fmt: skip
    rows, speeds = [], {}
    found = {
        "ours": harness.versions(sys.executable, PACKAGES),
        "peers": harness.versions(arguments.peers, PACKAGES) if arguments.peers.exists() else {},
    }
    for child in children:
        prefill = {n: [n / s for s in seconds(child, f"prefill {n}")] for n in PREFILLS}
        step_ms = [1e3 * s for s in seconds(child, "decode")]
        size = weight_bytes(child)
        floor_ms = size / rate / 1e6
        speeds[child.name] = {**{n: median(prefill[n]) for n in PREFILLS}, 0: median(step_ms)}
        report.record(
            model=model, engine=child.name, threads=arguments.threads, context=CONTEXT,
            artefact_sha256=harness.tree_sha256(child.artefact), weight_bytes=size,
            prefill_tokens_per_s={n: harness.summary(prefill[n]) for n in PREFILLS},
            decode_ms=harness.summary(step_ms), past=PAST, memory_gb_per_s=rate,
            undisturbed_steps=calm_share(child), idle_cpu_s=child.idle_cpu_s,
            versions=found["ours" if child.name == "ours" else "peers"],
        )  # fmt: skip
        cells = []
        for n in PREFILLS:
            s = harness.summary(prefill[n])
            cells += [f"{s['median']:.0f} ({s['max']:.0f})", harness.percent(s["spread"])]
        s = harness.summary(step_ms)
        cells += [
            f"{s['median']:.2f} ({s['min']:.2f})", harness.percent(s["spread"]),
            f"{1e3 / s['median']:.0f}", f"{100 * calm_share(child):.0f} %",
            f"{size / 1e6:.0f}", f"{s['median'] / floor_ms:.2f}",
        ]  # fmt: skip
        rows.append([child.name, *cells])
    heads = [h for n in PREFILLS for h in (f"prefill {n} tok/s (best)", "spread")]
    report.table(
        f"Speed of {model}: median of rounds (best round)",
        ["engine", *heads, "decode ms/token (best)", "spread", "tok/s", "undisturbed",
         "weights MB", "x memory floor"],
        rows,
    )  # fmt: skip
    mine = speeds["ours"]
    report.table(
        "Ours relative to the peer (more than 1: ours is faster)",
        ["peer", *(f"prefill {n}" for n in PREFILLS), "decode"],
        [
            [name, *(f"{mine[n] / s[n]:.2f}" for n in PREFILLS), f"{s[0] / mine[0]:.2f}"]
            for name, s in speeds.items()
            if name != "ours"
        ],
    )


def _profile(path: Path, arguments: argparse.Namespace, report: harness.Reporter) -> None:
    """Where our time goes, by node type (onnxruntime's profiler, which adds about 1 us a node)."""
    child = start("ours", path, arguments.peers, arguments.threads, "profile")
    try:
        found = child.ask(profile={"prefill": PREFILLS[-1], "decode": 32, "past": PAST})
    finally:
        child.process.kill()
        child.process.wait()
    rows = []
    for op in sorted(found["decode"], key=lambda o: -found["decode"][o][1]):
        count, step_us = found["decode"][op]
        prefill_us = found["prefill"].get(op, [0, 0.0])[1]
        rows.append(
            [op, count, f"{step_us / 1e3:.3f}", f"{step_us / count:.1f}", f"{prefill_us / 1e3:.2f}"]
        )
    report.record(engine="ours", threads=arguments.threads, nodes=found)
    report.table(
        f"Where our time goes: decode at {PAST}, prefill of {PREFILLS[-1]}",
        ["node type", "nodes", "decode ms", "us a node", "prefill ms"],
        rows,
    )


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--model", action="append", choices=artefacts.TIMED)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="3 rounds of 24 steps, no claim")
    parser.add_argument(
        "--wait", type=float, default=60, help="seconds to wait for a quiet machine"
    )
    parser.add_argument("--refresh", action="store_true", help="export our bundle again")
    parser.add_argument("--profile", action=argparse.BooleanOptionalAction, default=True)
    arguments = parser.parse_args()
    report = harness.Reporter("speed", "Speed", arguments)
    for model in arguments.model or artefacts.TIMED:
        run(model, arguments, report)
    report.close()


if __name__ == "__main__":
    main()
