"""Model libraries compiled by TVM beside llama.cpp's Q4_0 and our own ONNX bundles, in one run.

Random weights of published dimensions (`random_models.py`) and SmolLM2, int4 in groups of 32
(`q4f32_1`), all engines of a model by turns (`turns.py`). Each export runs anew as a whole
process (weights, compiler and linker), which is the time to compile a model. The floor of a
decode step is its bytes of weights at the rate at which the threads read memory, measured before
and after each model. The interpreter with TVM is that of `make test-full`.

    python benchmarks/mlc.py [--only NAME ...] [--rounds 7] [--quick] [--publish]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import artefacts
import harness
import turns
from turns import Child, Contender

from edge_mmllm.profiling.stats import median

PREFILL, PAST, DECODE = 512, 128, 64
PEER, OWN = "llama.cpp", artefacts.MLC
MODELS = ("mamba-130m", "mamba2-130m", "rwkv7-0.1b", "smollm2")
#: What is meant to be reached against llama.cpp; None: reported only.
PREFILL_AIMS = {"mamba-130m": 3.0}
DECODE_AIMS = {"mamba-130m": 1.2, "mamba2-130m": 1.2, "rwkv7-0.1b": 1.2}


@dataclass
class Found:
    """What was measured of a model.

    Attributes:
        children: with their times; the processes have ended.
        export: seconds and peak bytes of the export.
        library_bytes: of the compiled library.
        rates: GB/s by number of threads, before and after.
    """

    children: list[Child]
    export: tuple[float, int]
    library_bytes: int
    rates: list[dict[str, float]]

    def child(self, name: str) -> Child | None:
        """Who has that name."""
        return next((c for c in self.children if c.name == name), None)


def exported(name: str, arguments: argparse.Namespace) -> tuple[Path, tuple[float, int]]:
    """A fresh bundle; seconds and peak memory of making it."""
    path = arguments.cache / "benchmarks" / f"mlc-{name}-q4f32_1"
    source = artefacts.MODELS[name].hub(arguments.cache)
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [
        artefacts.interpreter(OWN, arguments.peers), "-m", "edge_mmllm", "export", str(source),
        "--out", str(path), "--force", "--format", "mlc", "--mlc-quant", "q4f32_1",
        "--target", "native", "--gate", "off",
    ]  # fmt: skip
    wall, peak, _ = harness.measured_run(command)
    return path, (wall, peak)


def measure(
    name: str, arguments: argparse.Namespace, missing: str | None, report: harness.Reporter
) -> Found:
    """One model."""
    threads = arguments.threads
    path, export = exported(name, arguments)
    wanted = (OWN, *artefacts.OURS, PEER)
    others = turns.contenders(name, arguments, missing)
    entrants = [Contender(OWN, OWN, path), *(c for c in others if c.engine in wanted)]
    rounds, decode = (2, 16) if arguments.quick else (arguments.rounds, DECODE)
    commands = {"prefill": {"prefill": PREFILL}, "decode": {"decode": decode, "past": PAST}}
    load = harness.wait_quiet(1, arguments.wait)
    rates = [turns.rates("bandwidth.py", threads)]
    with turns.loaded(entrants, arguments.peers, threads) as children:
        wall = turns.measure(children, rounds, commands)
    rates.append(turns.rates("bandwidth.py", threads))
    report.text(
        f"{name}: load average {load:.1f} before, {os.getloadavg()[0]:.1f} after; CPU used by "
        f"children idle: {turns.idle(children, wall)}."
    )
    library = sum(f.stat().st_size for f in (path / "lib").iterdir())
    return Found(children, export, library, rates)


def speeds(
    found: dict[str, Found], arguments: argparse.Namespace, report: harness.Reporter
) -> None:
    """The table of all models."""
    readings = [r[str(arguments.threads)] for one in found.values() for r in one.rates]
    rate = median(readings)
    report.text(
        f"Memory reads: {rate:.1f} GB/s with {arguments.threads} threads (median of readings "
        f"before and after each model, {min(readings):.1f} to {max(readings):.1f})."
    )
    rows = []
    for name, one in found.items():
        for child in one.children:
            engine, artefact = child.contender.engine, child.contender.artefact
            size = artefacts.step_bytes(engine, artefact)
            prefill = harness.summary([PREFILL / s for s in child.seconds("prefill")])
            step = harness.summary([1e3 * s for s in child.seconds("decode")])
            report.record(
                model=name, engine=child.name, threads=arguments.threads, prefill_tokens=PREFILL,
                past=PAST, artefact_sha256=harness.tree_sha256(artefact), step_bytes=size,
                prefill_tokens_per_s=prefill, decode_ms=step, memory_gb_per_s=readings,
                undisturbed_steps=child.calm_share(), idle_cpu_s=child.idle_cpu_s,
                export_s=one.export[0] if engine == OWN else None,
                versions=arguments.versions[engine],
            )  # fmt: skip
            rows.append([
                name if child is one.children[0] else "", child.name,
                f"{prefill['median']:.0f} ({prefill['max']:.0f})",
                harness.percent(prefill["spread"]),
                f"{step['median']:.2f} ({step['min']:.2f})", harness.percent(step["spread"]),
                f"{1e3 / step['median']:.0f}", f"{100 * child.calm_share():.0f} %",
                f"{size / 1e6:.0f}", f"{step['median'] / (size / rate / 1e6):.2f}",
            ])  # fmt: skip
    report.table(
        f"Compiled libraries beside others: prefill of {PREFILL} tokens, decode after {PAST}",
        ["model", "engine", "prefill tok/s", "spread", "decode ms/token", "spread", "tok/s",
         "undisturbed", "MB read", "x memory floor"],
        rows,
    )  # fmt: skip


def ratios(found: dict[str, Found], report: harness.Reporter) -> None:
    """Ours compiled beside each other engine."""
    rows = []
    for name, one in found.items():
        own, first = one.child(OWN), name
        assert own is not None
        for other in one.children:
            if other is own:
                continue
            cells = []
            for key, aims in (("prefill", PREFILL_AIMS), ("decode", DECODE_AIMS)):
                ahead = median(other.seconds(key)) / median(own.seconds(key))
                aim = aims.get(name) if other.name == PEER else None
                cells += [f"{ahead:.2f}", f"{aim:.1f}" if aim else "-"]
            rows.append([first, f"{own.name} : {other.name}", *cells])
            first = ""
    report.table(
        "Times as fast (more than 1: the compiled library is faster)",
        ["model", "ours : other", f"prefill {PREFILL}", "aim", "decode", "aim"],
        rows,
    )


def costs(found: dict[str, Found], report: harness.Reporter) -> None:
    """What making the libraries takes."""
    report.table(
        "Export of a model to MLC for this machine, whole process (aim: under 180 s)",
        ["model", "wall s", "peak RSS MB", "library KB"],
        [
            [name, f"{one.export[0]:.1f}", f"{one.export[1] / 1e6:.0f}",
             f"{one.library_bytes / 1e3:.0f}"]
            for name, one in found.items()
        ],
    )  # fmt: skip


def versions(arguments: argparse.Namespace) -> dict[str, dict[str, str]]:
    """Package versions by engine."""
    packages = (*turns.PACKAGES, "apache-tvm", "apache-tvm-ffi")
    pythons = {e: artefacts.interpreter(e, arguments.peers) for e in (OWN, *artefacts.OURS, PEER)}
    return {
        engine: harness.versions(python, packages) if Path(python).exists() else {}
        for engine, python in pythons.items()
    }


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add_argument("--only", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="2 rounds of 16 steps, no claim")
    parser.add_argument(
        "--wait", type=float, default=60, help="seconds to wait for a quiet machine, each model"
    )
    parser.add_argument("--refresh", action="store_true", help="export the ONNX bundles again")
    arguments = parser.parse_args()
    if not Path(artefacts.interpreter(OWN, arguments.peers)).exists():
        print("no interpreter with TVM: make .venv-tvm/installed", file=sys.stderr)
        return 1
    report = harness.Reporter("mlc", "Model libraries compiled by TVM", arguments)
    missing = artefacts.kernels()
    arguments.versions = versions(arguments)
    rounds = 2 if arguments.quick else arguments.rounds
    report.text(
        f"int4 in groups of 32, {arguments.threads} threads, medians of {rounds} rounds (best). "
        f"Versions: {json.dumps(arguments.versions[OWN])}."
        + (f" No native kernels: {missing}." if missing else "")
    )
    found = {name: measure(name, arguments, missing, report) for name in arguments.only}
    speeds(found, arguments, report)
    ratios(found, report)
    costs(found, report)
    report.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
