"""Prefill and decode speed against the peers, on the same weights, bits and threads, in one run.

Each engine sits in a child of its own; commands go round: ours, genai, llama.cpp, ours, ... (see
`turns.py`). Ours is measured twice, with the native kernels (built first where there is a
compiler) and with onnxruntime's own.

    python benchmarks/speed.py [--model smollm2] [--threads 2] [--rounds 7] [--quick] [--publish]
"""

from __future__ import annotations

import argparse
import os

import artefacts
import harness
import turns
from turns import CONTEXT, Child

from edge_mmllm.profiling.stats import median

PREFILLS = (128, 512)
PAST, DECODE = 128, 64


def run(
    model: str, arguments: argparse.Namespace, missing: str | None, report: harness.Reporter
) -> None:
    """Measure one model and print its tables."""
    threads, python = arguments.threads, arguments.peers
    entrants = turns.contenders(model, arguments, missing)
    rounds, decode = (3, 24) if arguments.quick else (arguments.rounds, DECODE)
    commands = {f"prefill {n}": {"prefill": n} for n in PREFILLS}
    commands["decode"] = {"decode": decode, "past": PAST}
    load = harness.wait_quiet(1, arguments.wait)
    before = turns.rates("bandwidth.py", threads)
    with turns.loaded(entrants, python, threads) as children:
        wall = turns.measure(children, rounds, commands)
    rates = turns.highest(before, turns.rates("bandwidth.py", threads))
    report.text(
        f"{model}, int4 block 32, {threads} threads, {rounds} rounds of "
        f"{' and '.join(map(str, PREFILLS))} tokens and {decode} decode steps after {PAST}; load "
        f"average {load:.1f} before, {os.getloadavg()[0]:.1f} after. Memory reads: "
        + ", ".join(f"{n} threads {rate} GB/s" for n, rate in rates.items())
        + f". CPU used by children while idle: {turns.idle(children, wall)}."
        + (f" No native kernels: {missing}." if missing else "")
    )
    _table(model, children, rates[str(threads)], arguments, report)
    if arguments.profile:
        for entrant in entrants:
            if entrant.engine in artefacts.OURS:
                what = f"{model}, {entrant.label}"
                turns.time_table(what, entrant, arguments, report, prefill=PREFILLS[-1], past=PAST)


def _table(
    model: str, children: list[Child], rate: float, arguments: argparse.Namespace,
    report: harness.Reporter,
) -> None:  # fmt: skip
    rows, speeds = [], {}
    found = turns.versions(arguments.peers)
    for child in children:
        prefill = {n: [n / s for s in child.seconds(f"prefill {n}")] for n in PREFILLS}
        step_ms = [1e3 * s for s in child.seconds("decode")]
        size = artefacts.step_bytes(child.name, child.contender.artefact)
        floor_ms = size / rate / 1e6
        speeds[child.name] = {**{n: median(prefill[n]) for n in PREFILLS}, 0: median(step_ms)}
        report.record(
            model=model, engine=child.name, threads=arguments.threads, context=CONTEXT,
            artefact_sha256=harness.tree_sha256(child.contender.artefact), weight_bytes=size,
            prefill_tokens_per_s={n: harness.summary(prefill[n]) for n in PREFILLS},
            decode_ms=harness.summary(step_ms), past=PAST, memory_gb_per_s=rate,
            undisturbed_steps=child.calm_share(), idle_cpu_s=child.idle_cpu_s,
            versions=found[child.name in artefacts.OURS],
            kernels=artefacts.kernels_key() if child.name == "ours native" else None,
        )  # fmt: skip
        cells = []
        for n in PREFILLS:
            s = harness.summary(prefill[n])
            cells += [f"{s['median']:.0f} ({s['max']:.0f})", harness.percent(s["spread"])]
        s = harness.summary(step_ms)
        cells += [
            f"{s['median']:.2f} ({s['min']:.2f})", harness.percent(s["spread"]),
            f"{1e3 / s['median']:.0f}", f"{100 * child.calm_share():.0f} %",
            f"{size / 1e6:.0f}", f"{s['median'] / floor_ms:.2f}",
        ]  # fmt: skip
        rows.append([child.name, *cells])
    heads = [h for n in PREFILLS for h in (f"prefill {n} tok/s (best)", "spread")]
    report.table(
        f"Speed of {model}: median of rounds (best round)",
        ["engine", *heads, "decode ms/token (best)", "spread", "tok/s", "undisturbed",
         "MB read", "x memory floor"],
        rows,
    )  # fmt: skip
    report.table(
        "Ours relative to the others (more than 1: ours is faster)",
        ["", *(f"prefill {n}" for n in PREFILLS), "decode"],
        [
            [f"{ours} : {other}", *(f"{speeds[ours][n] / s[n]:.2f}" for n in PREFILLS),
             f"{s[0] / speeds[ours][0]:.2f}"]
            for ours in artefacts.OURS if ours in speeds
            for other, s in speeds.items()
            if other != ours and other != "ours native"
        ],
    )  # fmt: skip


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
    missing = artefacts.kernels()
    for model in arguments.model or artefacts.TIMED:
        run(model, arguments, missing, report)
    report.close()


if __name__ == "__main__":
    main()
