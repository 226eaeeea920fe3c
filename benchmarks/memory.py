"""What a loaded int4 bundle holds in memory, and what of it processes share.

Each case runs in children of its own: resident memory after importing the runtime, after loading
SmolLM2's int4 bundle, after a prefill of 512 tokens and after 64 decode steps, split into anonymous
pages and pages of files (smaps_rollup). Cases: stock onnxruntime as `edge_mmllm.load` does it; with
the cache of prepacked weights (`prepacked_cache`), when it is made and when it is found; the native
kernels (built first where there is a compiler), which pack weights for themselves; and of each two
processes at once, whose proportional set size shows what they share.

    python benchmarks/memory.py [--runs 5] [--publish]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import artefacts
import harness

from edge_mmllm.profiling.stats import median

PHASES = ("imported", "loaded", "prefilled", "decoded")
CONTEXT = 1024


@dataclass(frozen=True)
class Case:
    """How a bundle is loaded, by how many processes, how often."""

    runs: int
    processes: int = 1
    kernels: str = "stock"
    cache: Path | None = None


def worker(bundle: str, kernels: str, cache: str | None) -> None:
    """The child: prints a snapshot for each phase, waiting for a line before each."""
    import time

    import numpy as np

    import edge_mmllm
    import edge_mmllm_runtime.onnx

    def show(phase: str, **more: Any) -> None:
        print(json.dumps({"phase": phase, **_rollup(), **more}), flush=True)
        sys.stdin.readline()

    assert edge_mmllm_runtime.onnx
    show("imported")
    started = time.perf_counter()
    session = edge_mmllm.load(
        bundle, threads=2, context=CONTEXT, prepacked_cache=cache, kernels=kernels
    )
    load_s = time.perf_counter() - started
    show("loaded", load_s=load_s)
    session.prefill(np.arange(500, 1012))
    show("prefilled")
    started = time.perf_counter()
    for token in range(500, 564):
        session.step(token)
    show("decoded", step_ms=1e3 * (time.perf_counter() - started) / 64)


def _rollup() -> dict[str, int]:
    """Bytes by kind. Source: proc(5), smaps_rollup."""
    sizes = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, _, value = line.partition(":")
        sizes[name] = int(value.split()[0]) * 1024
    return {
        "rss": sizes["Rss"],
        "pss": sizes["Pss"],
        "anonymous": sizes["Anonymous"],
        "files": sizes["Rss"] - sizes["Anonymous"],
        "huge": sizes.get("AnonHugePages", 0),
    }


def watch(bundle: Path, case: Case) -> list[list[dict[str, Any]]]:
    """Snapshots of each process at each phase; all processes go from phase to phase together."""
    command = [sys.executable, __file__, "--worker", str(bundle), case.kernels]
    command += [str(case.cache)] if case.cache else []
    children = [
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=harness.child_env(),
        )
        for _ in range(case.processes)
    ]  # fmt: skip
    found: list[list[dict[str, Any]]] = [[] for _ in children]
    try:
        for _ in PHASES:
            for child, snapshots in zip(children, found, strict=True):
                assert child.stdout is not None
                snapshots.append(json.loads(child.stdout.readline()))
            for child in children:
                assert child.stdin is not None
                child.stdin.write("\n")
                child.stdin.flush()
    finally:
        for child in children:
            child.communicate()
    return found


def run(arguments: argparse.Namespace, report: harness.Reporter) -> None:
    """All cases."""
    missing = artefacts.kernels()
    bundle = artefacts.ours("smollm2", arguments.cache, "--quant", "int4")
    weights = (bundle / "weights.bin").stat().st_size
    versions = harness.versions(sys.executable, ("edge-mmllm", "onnxruntime", "numpy"))
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        cache = Path(scratch)
        watch(bundle, Case(1))  # fills the page cache
        runs = arguments.runs
        cases = {
            "stock": Case(runs),
            "stock, prepacked cache, made": Case(1, cache=cache),
            "stock, prepacked cache, found": Case(runs, cache=cache),
            "stock, two processes": Case(1, 2),
            "stock, two processes, prepacked cache": Case(1, 2, cache=cache),
        }
        if missing is None:
            cases["native"] = Case(runs, kernels="native")
            cases["native, two processes"] = Case(1, 2, kernels="native")
        for label, case in cases.items():
            found = [watch(bundle, case) for _ in range(case.runs)]
            one = [run[0] for run in found]
            report.record(
                case=label, bundle_sha256=harness.tree_sha256(bundle), weights_bytes=weights,
                context=CONTEXT, threads=2, versions=versions, runs=found,
                kernels=artefacts.kernels_key() if case.kernels == "native" else None,
            )  # fmt: skip
            for i, phase in enumerate(PHASES):
                if phase == "imported" and label != "stock":
                    continue
                middle = {k: median(s[i][k] for s in one) / 1e6 for k in ("rss", "pss")}
                middle |= {
                    k: median(s[i][k] for s in one) / 1e6 for k in ("anonymous", "files", "huge")
                }
                more = f"{one[0][1]['load_s']:.2f} s" if phase == "loaded" else ""
                rows.append([label if phase in ("imported", "loaded") else "", phase,
                             *(f"{v:.0f}" for v in middle.values()), more])  # fmt: skip
        disk = harness.size_bytes(cache)
    report.text(
        f"Weights file {weights / 1e6:.0f} MB; the prepacked cache takes {disk / 1e6:.0f} MB more."
        + (f" No native kernels: {missing}." if missing else "")
    )
    report.table(
        f"Memory of SmolLM2 int4, MB, context {CONTEXT}, 2 threads (median of {arguments.runs} "
        "runs; of two processes the first)",
        ["case", "after", "RSS", "PSS", "anonymous", "files", "of it huge pages", "load"],
        rows,
    )


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], sys.argv[3], sys.argv[4] if len(sys.argv) > 4 else None)
        return
    parser = harness.parser(__doc__)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    report = harness.Reporter("memory", "Memory", arguments)
    run(arguments, report)
    report.close()


if __name__ == "__main__":
    main()
