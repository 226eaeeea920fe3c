"""What a loaded int4 bundle holds in memory, and what of it processes share.

Each case runs in children of its own: resident memory after importing the runtime, after loading
SmolLM2's int4 bundle, after a prefill of 512 tokens and after 64 decode steps, split into anonymous
pages and pages of files (smaps_rollup). Cases: as `edge_mmllm.load` does it; with the cache of
prepacked weights (`prepacked_cache`), when it is made and when it is found; and two processes at
once, whose proportional set size shows what they share.

    python benchmarks/memory.py [--runs 5] [--publish]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import artefacts
import harness

from edge_mmllm.profiling.stats import median

PHASES = ("imported", "loaded", "prefilled", "decoded")
CONTEXT = 1024


def worker(bundle: str, cache: str | None) -> None:
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
    session = edge_mmllm.load(bundle, threads=2, context=CONTEXT, prepacked_cache=cache)
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


def watch(bundle: Path, cache: Path | None, processes: int = 1) -> list[list[dict[str, Any]]]:
    """Snapshots of each process at each phase; all processes go from phase to phase together."""
    command = [sys.executable, __file__, "--worker", str(bundle)]
    command += [str(cache)] if cache else []
    children = [
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=harness.child_env(),
        )
        for _ in range(processes)
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
    bundle = artefacts.ours("smollm2", arguments.cache, "--quant", "int4")
    weights = (bundle / "weights.bin").stat().st_size
    versions = harness.versions(sys.executable, ("edge-mmllm", "onnxruntime", "numpy"))
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        cache = Path(scratch)
        watch(bundle, None)  # fills the page cache
        cases: dict[str, tuple[Path | None, int, int]] = {
            "as loaded": (None, 1, arguments.runs),
            "prepacked cache, made": (cache, 1, 1),
            "prepacked cache, found": (cache, 1, arguments.runs),
            "two processes": (None, 2, 1),
            "two processes, prepacked cache": (cache, 2, 1),
        }
        for label, (place, processes, runs) in cases.items():
            found = [watch(bundle, place, processes) for _ in range(runs)]
            one = [run[0] for run in found]
            report.record(
                case=label, bundle_sha256=harness.tree_sha256(bundle), weights_bytes=weights,
                context=CONTEXT, threads=2, versions=versions, runs=found,
            )  # fmt: skip
            for i, phase in enumerate(PHASES):
                if phase == "imported" and label != "as loaded":
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
    )
    report.table(
        f"Memory of SmolLM2 int4, MB, context {CONTEXT}, 2 threads (median of {arguments.runs} "
        "runs; of two processes the first)",
        ["case", "after", "RSS", "PSS", "anonymous", "files", "of it huge pages", "load"],
        rows,
    )


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else None)
        return
    parser = harness.parser(__doc__)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    report = harness.Reporter("memory", "Memory", arguments)
    run(arguments, report)
    report.close()


if __name__ == "__main__":
    main()
