"""RWKV and Mamba of published dimensions: prefill and decode beside llama.cpp, and the floors.

Random weights (`random_models.py`), int4 in blocks of 32 beside llama.cpp's Q4_0 of the same
weights, all engines of a model by turns (`turns.py`). Ours is measured with the native kernels
(built first where there is a compiler) and with onnxruntime's own; `--blocks` adds native rows for
larger blocks.

Floors, measured in the same run, before and after each model: of a decode step, its bytes of
weights at the rate at which the threads read memory (`bandwidth.py`); of a prefill, the operations
of its products alone at the highest rate at which any kernel here multiplies a large matrix
(`arithmetic.py`).

    python benchmarks/recurrent.py [--only NAME ...] [--rounds 7] [--quick] [--publish]
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from dataclasses import dataclass
from math import prod

import artefacts
import harness
import random_models
import turns
from turns import Child

from edge_mmllm.profiling.stats import median

PREFILL, PAST, DECODE = 512, 128, 64
PEER = "llama.cpp"
FLOORS = ("bandwidth.py", "arithmetic.py")
#: What the native kernels are meant to reach against llama.cpp in prefill; in decode `DECODE_AIM`.
PREFILL_AIMS = {"mamba-": 2.0, "mamba2-": 1.2, "rwkv6-": 1.2, "rwkv7-": 1.2}
DECODE_AIM = 1.1


@dataclass
class Found:
    """What was measured of a model.

    Attributes:
        children: with their times; the processes have ended.
        gflop: operations of a prefill's products, 1e9.
        floors: readings of `bandwidth.py` and `arithmetic.py` before and after.
    """

    children: list[Child]
    gflop: float
    floors: dict[str, list[dict[str, float]]]

    def child(self, label: str) -> Child | None:
        """Who has that label."""
        return next((c for c in self.children if c.name == label), None)

    def ahead(self, ours: Child, other: Child) -> tuple[float, float]:
        """How many times as fast ours is: in prefill, in decode; by medians."""
        prefill, decode = (
            median(other.seconds(key)) / median(ours.seconds(key)) for key in ("prefill", "decode")
        )
        return prefill, decode


def prefill_gflop(name: str, arguments: argparse.Namespace) -> float:
    """Operations of a prefill's products, 1e9: two for each weight of a layer and token, and the
    head's for one token."""
    from edge_mmllm_export.checkpoints import open_checkpoint
    from edge_mmllm_export.models import build

    checkpoint = open_checkpoint(random_models.checkpoint(name, arguments.cache))
    try:
        parameters = build(checkpoint).parameters()
    finally:
        checkpoint.close()
    sizes = Counter[str]()
    for parameter in parameters:
        sizes[parameter.role] += prod(parameter.shape)
    return 2e-9 * (PREFILL * sizes["matrix"] + (sizes["head"] or sizes["embedding"]))


def measure(
    name: str, arguments: argparse.Namespace, missing: str | None, report: harness.Reporter
) -> Found:
    """One model."""
    threads = arguments.threads
    entrants = turns.contenders(name, arguments, missing, arguments.blocks)
    rounds, decode = (2, 16) if arguments.quick else (arguments.rounds, DECODE)
    commands = {"prefill": {"prefill": PREFILL}, "decode": {"decode": decode, "past": PAST}}
    load = harness.wait_quiet(1, arguments.wait)
    floors = {script: [turns.rates(script, threads)] for script in FLOORS}
    with turns.loaded(entrants, arguments.peers, threads) as children:
        wall = turns.measure(children, rounds, commands)
    for script, readings in floors.items():
        readings.append(turns.rates(script, threads))
    gflop = prefill_gflop(name, arguments)
    report.text(
        f"{name}: {1e3 * gflop / 2 / PREFILL:.0f} million weights in products a token; load "
        f"average {load:.1f} before, {os.getloadavg()[0]:.1f} after; CPU used by children idle: "
        f"{turns.idle(children, wall)}."
    )
    return Found(children, gflop, floors)


def floor_rates(found: dict[str, Found], script: str) -> dict[str, float]:
    """Medians of all readings of the run."""
    readings = [r for one in found.values() for r in one.floors[script]]
    return {key: median(r[key] for r in readings) for key in readings[0]}


def speeds(
    found: dict[str, Found], arguments: argparse.Namespace, report: harness.Reporter
) -> None:
    """The table of all models, with the floors."""
    read, product = (floor_rates(found, script) for script in FLOORS)
    gb_per_s, gflop_per_s = read[str(arguments.threads)], max(product.values())
    report.text(
        "Floors, medians of readings before and after each model: memory reads "
        + ", ".join(f"{n} threads {rate:.1f} GB/s" for n, rate in read.items())
        + "; products "
        + ", ".join(f"{kind} {rate:.0f} GFLOP/s" for kind, rate in product.items())
        + "."
    )
    rows = []
    for name, one in found.items():
        for child in one.children:
            engine, artefact = child.contender.engine, child.contender.artefact
            bytes_read = artefacts.step_bytes(engine, artefact)
            floors = one.gflop / gflop_per_s, bytes_read / gb_per_s / 1e9
            report.record(
                model=name, engine=child.name, threads=arguments.threads, prefill_tokens=PREFILL,
                past=PAST, artefact_sha256=harness.tree_sha256(artefact), step_bytes=bytes_read,
                prefill_s=harness.summary(child.seconds("prefill")), prefill_gflop=one.gflop,
                decode_s=harness.summary(child.seconds("decode")), prefill_floor_s=floors[0],
                decode_floor_s=floors[1], memory_gb_per_s=read, product_gflop_per_s=product,
                readings=one.floors, undisturbed_steps=child.calm_share(),
                idle_cpu_s=child.idle_cpu_s,
                kernels=artefacts.kernels_key() if engine == "ours native" else None,
                versions=arguments.versions[engine in artefacts.OURS],
            )  # fmt: skip
            first = name if child is one.children[0] else ""
            rows.append([first, *_cells(child, one.gflop, bytes_read, floors)])
    report.table(
        f"Speed of RWKV and Mamba: prefill of {PREFILL} tokens, decode",
        ["model", "engine", "prefill tok/s", "spread", "GFLOP/s", "x arithmetic floor",
         "decode ms/token", "spread", "tok/s", "undisturbed", "MB read", "x memory floor"],
        rows,
    )  # fmt: skip


def _cells(child: Child, gflop: float, bytes_read: int, floors: tuple[float, float]) -> list[str]:
    rates = harness.summary([PREFILL / s for s in child.seconds("prefill")])
    step = harness.summary([1e3 * s for s in child.seconds("decode")])
    prefill_s = PREFILL / rates["median"]
    return [
        child.name,
        f"{rates['median']:.0f} ({rates['max']:.0f})", harness.percent(rates["spread"]),
        f"{gflop / prefill_s:.0f}", f"{prefill_s / floors[0]:.2f}",
        f"{step['median']:.2f} ({step['min']:.2f})", harness.percent(step["spread"]),
        f"{1e3 / step['median']:.0f}", f"{100 * child.calm_share():.0f} %",
        f"{bytes_read / 1e6:.0f}", f"{step['median'] / 1e3 / floors[1]:.2f}",
    ]  # fmt: skip


def _aim(name: str) -> float | None:
    """What prefill should be ahead by; None without a peer."""
    return next((aim for start, aim in PREFILL_AIMS.items() if name.startswith(start)), None)


def ratios(found: dict[str, Found], report: harness.Reporter) -> None:
    """Ours beside llama.cpp; beside stock where there is no peer."""
    rows = []
    for name, one in found.items():
        peer, aim, first = one.child(PEER), _aim(name), name
        other = peer or one.child("ours stock")
        assert other is not None
        aims = (str(aim or "-"), str(DECODE_AIM)) if peer else ("-", "-")
        for child in one.children:
            if child is other or child.contender.engine not in artefacts.OURS:
                continue
            prefill, decode = one.ahead(child, other)
            pair = f"{child.name} : {other.name}"
            rows.append([first, pair, f"{prefill:.2f}", aims[0], f"{decode:.2f}", aims[1]])
            first = ""
    report.table(
        "Times as fast (more than 1: ours is faster)",
        ["model", "ours : other", f"prefill {PREFILL}", "aim", "decode", "aim"],
        rows,
    )


def worst(found: dict[str, Found]) -> str | None:
    """The model whose native kernels (else stock) are furthest from their aims; None: no peer."""
    shares = {}
    for name, one in found.items():
        ours, peer, aim = one.children[0], one.child(PEER), _aim(name)
        if aim is not None and peer is not None:
            prefill, decode = one.ahead(ours, peer)
            shares[name] = min(prefill / aim, decode / DECODE_AIM)
    return min(shares, key=lambda name: shares[name], default=None)


def profiles(
    found: dict[str, Found], arguments: argparse.Namespace, report: harness.Reporter
) -> None:
    """Where the worst model's time goes; with `--profile all`, every model's."""
    least = worst(found)
    names = {"none": (), "worst": (least,) if least else tuple(found)[:1], "all": tuple(found)}
    for name in names[arguments.profile]:
        for child in found[name].children:
            if child.name in artefacts.OURS:
                what = f"{name}, {child.name}"
                turns.time_table(
                    what, child.contender, arguments, report, prefill=PREFILL, past=PAST
                )


def main() -> None:
    parser = harness.parser(__doc__)
    names = tuple(random_models.MODELS)
    parser.add_argument("--only", nargs="*", choices=names, default=list(names))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--blocks", type=int, nargs="*", default=[64, 128], help="more block sizes")
    parser.add_argument("--quick", action="store_true", help="2 rounds of 16 steps, no claim")
    parser.add_argument(
        "--wait", type=float, default=60, help="seconds to wait for a quiet machine, each model"
    )
    parser.add_argument("--refresh", action="store_true", help="export our bundles again")
    parser.add_argument("--profile", choices=("none", "worst", "all"), default="worst")
    arguments = parser.parse_args()
    report = harness.Reporter("recurrent", "RWKV and Mamba", arguments)
    missing = artefacts.kernels()
    arguments.versions = turns.versions(arguments.peers)
    report.text(
        f"Random weights, int4 (block 32 unless said) beside Q4_0, {arguments.threads} threads, "
        f"medians of {2 if arguments.quick else arguments.rounds} rounds (best), decode after "
        f"{PAST} tokens." + (f" No native kernels: {missing}." if missing else "")
    )
    found = {name: measure(name, arguments, missing, report) for name in arguments.only}
    speeds(found, arguments, report)
    ratios(found, report)
    profiles(found, arguments, report)
    report.close()


if __name__ == "__main__":
    main()
