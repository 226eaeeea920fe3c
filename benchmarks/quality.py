"""What each scheme costs in quality, measured through our runtime, beside its size.

Perplexity of SmolLM2 on the first 8 x 512 tokens of WikiText-2 (fresh state for each window, 511
predictions in each), bits a byte of the zoo's Mamba-2 on its held-out text (512 predictions in
each window, after one id of context; as its README does, which has 1.3972 in float32),
and the quality gate's figures, from which `verify.THRESHOLDS` are set.

    python benchmarks/quality.py [--shared DIR] [--only smollm2 mamba2] [--publish]
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import artefacts
import harness
import numpy as np

import edge_mmllm
from edge_mmllm.bundle import open_bundle

#: Label -> options of `edge-mmllm export`.
SCHEMES = {
    "f32": ("--quant", "f32"),
    "f16": ("--quant", "f16"),
    "int8": ("--quant", "int8"),
    "int4-b32": ("--quant", "int4"),
    "int4-b64": ("--quant", "int4", "--block-size", "64"),
    "int4-b128": ("--quant", "int4", "--block-size", "128"),
    "int4-b32-asym": ("--quant", "int4", "--zero", "int"),
    "int4-b32-min": ("--quant", "int4", "--zero", "float"),
}
GATE = ("--gate", "on", "--accept-quality-loss")
FIGURES = ("kl_mean", "kl_p99", "top1_agreement", "top1_agreement_clear", "perplexity_change")


@dataclass(frozen=True)
class Task:
    """A model with its text.

    Attributes:
        title: of the table.
        text: below the shared data.
        windows: how many; None for as many as the text gives.
        ids: in a window; every one but the first is predicted.
        stride: ids from one window's start to the next.
        per_byte: report bits a byte instead of perplexity.
    """

    title: str
    text: str
    windows: int | None
    ids: int
    stride: int
    per_byte: bool


TASKS = {
    "smollm2": Task(
        "SmolLM2-135M-Instruct, WikiText-2, first 8 x 512 tokens (its source is Q4_1)",
        "text/wiki.test.raw", 8, 512, 512, False,
    ),
    "mamba2": Task(
        "zoo/tiny-mamba2, eval/heldout.txt", "zoo/eval/heldout.txt", None, 513, 512, True
    ),
}  # fmt: skip


def losses(bundle: Path, task: Task, text: str, threads: int) -> tuple[float, int, int]:
    """Sum of -log p in nats, number of predictions, bytes of the predicted tokens."""
    total, count, size = 0.0, 0, 0
    with edge_mmllm.load(bundle, threads=threads, context=None) as session:
        ids = np.asarray(session.text.encode(text), np.int64)
        most = (len(ids) - task.ids) // task.stride + 1
        for window in range(most if task.windows is None else task.windows):
            part = ids[window * task.stride :][: task.ids]
            session.reset()
            logits = session.prefill(part[:-1], logits="all")
            total += float(_nats(logits, part[1:]).sum())
            count += len(part) - 1
            if task.per_byte:
                # Of the predicted tokens in their place: some tokenizers trim a text's start.
                whole, context = (session.text.decode(p.tolist()) for p in (part, part[:1]))
                size += len(whole.encode()) - len(context.encode())
    return total, count, size


def _nats(logits: Any, targets: Any) -> Any:
    """-log p of each target, in float64, a few rows at a time."""
    out = np.empty(len(targets))
    for i, (row, target) in enumerate(zip(logits, targets, strict=True)):
        y = row.astype(np.float64) - row.max()
        out[i] = np.log(np.exp(y).sum()) - y[target]
    return out


def run(name: str, arguments: argparse.Namespace, report: harness.Reporter) -> None:
    """One model's table."""
    task = TASKS[name]
    text = (arguments.shared / task.text).read_text(encoding="utf-8")
    rows = []
    base: float | None = None
    versions = harness.versions(sys.executable, ("edge-mmllm", "onnxruntime", "numpy"))
    for label, options in SCHEMES.items():
        bundle = artefacts.ours(name, arguments.cache, *options, *GATE, refresh=arguments.refresh)
        opened = open_bundle(bundle)
        gate = dict(opened.manifest.gate.figures or {})
        total, count, size = losses(bundle, task, text, arguments.threads)
        value = total / np.log(2) / size if task.per_byte else float(np.exp(total / count))
        base = value if base is None else base
        weights = (bundle / "weights.bin").stat().st_size
        report.record(
            model=name, scheme=label, predictions=count, nats_per_token=total / count,
            bits_per_byte=value if task.per_byte else None, text_bytes=size,
            perplexity=float(np.exp(total / count)), weights_bytes=weights,
            bundle_bytes=harness.size_bytes(bundle), gate=gate, threads=arguments.threads,
            bundle_sha256=opened.sha256, versions=versions,
        )  # fmt: skip
        rows.append(
            [
                label, f"{weights / 1e6:.1f}", f"{harness.size_bytes(bundle) / 1e6:.1f}",
                f"{opened.manifest.quantization.bits_per_weight:.2f}",
                f"{value:.4f}", f"{100 * (value / base - 1):+.2f} %",
                *(_figure(gate.get(f)) for f in FIGURES), opened.manifest.gate.verdict,
            ]
        )  # fmt: skip
        print(rows[-1], file=sys.stderr, flush=True)
    unit = "bits a byte" if task.per_byte else "perplexity"
    report.table(
        f"{task.title} ({count} predictions)",
        ["scheme", "weights MB", "bundle MB", "bits/weight", unit, "change",
         "gate: KL mean", "KL p99", "top-1", "top-1 clear", "perplexity", "verdict"],
        rows,
    )  # fmt: skip


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--shared", type=Path, default=harness.ROOT.parent / "shared/data")
    parser.add_argument("--only", nargs="*", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--refresh", action="store_true", help="export the bundles again")
    arguments = parser.parse_args()
    report = harness.Reporter("quality", "Quality by scheme", arguments)
    for name in arguments.only:
        run(name, arguments, report)
    report.close()


if __name__ == "__main__":
    main()
