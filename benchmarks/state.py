"""States set aside: how large, how long to restore, how far the continuation drifts.

Sizes and times are of models with the published dimensions of 0.1B (random weights, int4). A
restore is timed alone; from a file it reads, checks and restores. Before timing, the continuation
from each is compared with the one without a snapshot, token for token.

Drift is of the small trained models and SmolLM2: read 512 tokens of held-out text, set the state
aside in each storage, restore it, read the next 64 tokens; Kullback-Leibler divergence of their
next-token distributions from those of the untouched state, over 16 places of the text. An int4
model rounds its activations to int8, where the least change of a state rounds some the other way:
its drift has a floor that the float32 model's has not.

    python benchmarks/state.py [--runs 21] [--publish]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import artefacts
import harness
import numpy as np
import zoo

import edge_mmllm
from edge_mmllm_runtime.divergence import divergence
from edge_mmllm_runtime.storage import Storage

STORAGES: tuple[Storage, ...] = get_args(Storage)
READ, CONTINUED, PLACES = 512, 64, 16
#: Models of 0.1B.
SMALL = ("rwkv7-0.1b", "mamba-130m", "mamba2-130m")
DRIFT = (*((name, quant) for name in zoo.MODELS for quant in ("f32", "int4")), ("smollm2", "int4"))


def timed_ms(call: Callable[[], object], runs: int) -> dict[str, Any]:
    """Milliseconds of a call, after one that is not counted."""
    times = []
    for _ in range(runs + 1):
        started = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - started))
    return harness.summary(times[1:])


def restoring(
    name: str, arguments: argparse.Namespace, report: harness.Reporter
) -> list[list[str]]:
    """Rows of one 0.1B model."""
    out = artefacts.ours(name, arguments.cache, "--quant", "int4")
    rows = []
    with (
        tempfile.TemporaryDirectory() as scratch,
        edge_mmllm.load(out, threads=arguments.threads) as session,
    ):
        path = Path(scratch) / "s.state"
        session.prefill(np.arange(READ) * 37 % session.spec.vocab_size)
        exact = session.snapshot()
        expected = list(session.generate_tokens(None, 32, ignore_eos=True))
        for storage in STORAGES:
            session.restore(exact)
            kept = session.snapshot(storage)
            saved = kept.save(path, everything=True)
            agree = []
            for back in (lambda kept=kept: session.restore(kept), lambda: session.load_state(path)):
                back()
                found = list(session.generate_tokens(None, 32, ignore_eos=True))
                agree.append(found == expected)
            saved = kept.save(path)
            session.restore(exact)
            measured = {
                "snapshot_ms": timed_ms(lambda s=storage: session.snapshot(s), arguments.runs),
                "restore_ms": timed_ms(lambda kept=kept: session.restore(kept), arguments.runs),
                "save_ms": timed_ms(lambda kept=kept: kept.save(path), arguments.runs),
                "load_ms": timed_ms(lambda: session.load_state(path), arguments.runs),
            }
            report.record(
                model=name, storage=storage, state_bytes=kept.size_bytes, file_bytes=saved,
                same_tokens_memory=agree[0], same_tokens_file=agree[1], threads=arguments.threads,
                bundle_sha256=session.bundle_sha256, versions=arguments.versions, **measured,
            )  # fmt: skip
            rows.append([
                name if storage == "f32" else "", storage, f"{kept.size_bytes:,}",
                f"+{saved - kept.size_bytes:,}",
                *(f"{m['median']:.2f}" for m in measured.values()),
                f"{measured['restore_ms']['max']:.2f}", f"{measured['load_ms']['max']:.2f}",
                "yes" if all(agree) else "no",
            ])  # fmt: skip
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def drift(
    name: str, quant: str, arguments: argparse.Namespace, report: harness.Reporter
) -> list[list[str]]:
    """Rows of one trained model."""
    if name == "smollm2":
        bundle: Path | None = artefacts.ours(name, arguments.cache, "--quant", quant)
    else:
        bundle = zoo.bundle(name, arguments, quant)
    if bundle is None:
        return []
    rows = []
    with edge_mmllm.load(bundle, threads=arguments.threads, context=None) as session:
        ids = np.asarray(session.text.encode(zoo.text(arguments)), np.int64)
        starts = np.linspace(0, max(0, len(ids) - READ - CONTINUED), PLACES).astype(int)
        exact, found = [], {storage: [] for storage in STORAGES}
        sizes = {}
        for start in np.unique(starts):
            head, tail = np.split(ids[start : start + READ + CONTINUED], [READ])
            session.reset()
            session.prefill(head)
            kept = {storage: session.snapshot(storage) for storage in STORAGES}
            exact.append(session.prefill(tail, logits="all"))
            for storage, snapshot in kept.items():
                sizes[storage] = snapshot.size_bytes
                session.restore(snapshot)
                found[storage].append(session.prefill(tail, logits="all"))
        for storage in STORAGES:
            whole = divergence(np.concatenate(exact), np.concatenate(found[storage]))
            first = divergence(
                *(np.stack([x[0] for x in side]) for side in (exact, found[storage]))
            )
            report.record(
                model=name, quant=quant, storage=storage, state_bytes=sizes[storage],
                figures=whole.figures(),
                first_token=first.figures(), bundle_sha256=session.bundle_sha256,
                versions=arguments.versions, threads=arguments.threads,
            )  # fmt: skip
            rows.append([
                f"{name} {quant}" if storage == "f32" else "", storage, f"{sizes[storage]:,}",
                f"{whole.kl_mean:.2e}", f"{whole.kl_p99:.2e}", f"{first.kl_mean:.2e}",
                f"{100 * whole.top1_agreement:.2f} %",
            ])  # fmt: skip
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def main() -> None:
    parser = harness.parser(__doc__)
    zoo.options(parser, (*SMALL, *zoo.MODELS, "smollm2"))
    parser.add_argument("--runs", type=int, default=21)
    arguments = parser.parse_args()
    report = harness.Reporter("state", "State", arguments)
    arguments.versions = harness.versions(sys.executable, ("edge-mmllm", "onnxruntime", "numpy"))
    chosen = arguments.only
    rows = [r for n in SMALL if n in chosen for r in restoring(n, arguments, report)]
    report.table(
        f"Models of 0.1B: a state set aside and put back, ms (median of {arguments.runs}; highest "
        "of them for restore and load). The file is the states and what `file` says; same: greedy "
        "continuation of 32 tokens from memory and from the file",
        ["model", "storage", "state bytes", "file", "snapshot", "restore", "save", "load",
         "restore max", "load max", "same"],
        rows,
    )  # fmt: skip
    rows = [r for n, q in DRIFT if n in chosen for r in drift(n, q, arguments, report)]
    report.table(
        f"Drift of the {CONTINUED} tokens after a restored state, nats",
        ["model", "storage", "state bytes", "KL mean", "KL p99", "KL of the first", "top-1"],
        rows,
    )
    report.close()


if __name__ == "__main__":
    main()
