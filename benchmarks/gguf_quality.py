"""What GGUF's types cost in quality, through our runtime, beside ONNX of the same checkpoint.

Perplexity of SmolLM2 on WikiText-2 (fresh state for each window of 512 tokens), bits a byte of the
zoo's recurrent models on held-out text, and bytes of the file that the engine loads. Importance
matrices are computed from the last quarter of the same text, which is not measured. Run it with an
interpreter that has llama.cpp:

    .venv-bench/bin/python benchmarks/gguf_quality.py [--shared DIR] [--only smollm2] [--publish]

`--resume` takes what an interrupted run has measured. `--publish` also draws
`docs/images/gguf_quality.svg`: quality over bytes, and the best of each.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import artefacts
import harness
import numpy as np
import quality
from plot import Chart, Line, Points, svg
from smollm2 import smollm2_hub

from edge_mmllm.bundle import open_bundle

IMAGE = harness.ROOT / "docs/images/gguf_quality.svg"
#: Words that stand for the matrix of the model.
MATRIX = "MATRIX"

#: What is left out of SmolLM2's table: with its rows they are other types than they are called.
MISNAMED = ("BF16", "Q3_K_M", "IQ3_XXS imatrix", "Q2_K", "IQ2_XS imatrix", "IQ1_M imatrix")

#: Label -> options of `edge-mmllm export`.
GGUF = {
    "F16": ("F16",),
    "BF16": ("BF16",),
    "Q8_0": ("Q8_0",),
    "Q6_K": ("Q6_K",),
    "Q5_K_M": ("Q5_K_M",),
    "Q4_1": ("Q4_1",),
    "Q4_K_M": ("Q4_K_M",),
    "Q4_K_M imatrix": ("Q4_K_M", MATRIX),
    "Q4_0": ("Q4_0",),
    "IQ4_XS": ("IQ4_XS",),
    "IQ4_XS imatrix": ("IQ4_XS", MATRIX),
    "Q3_K_M": ("Q3_K_M",),
    "Q3_K_M imatrix": ("Q3_K_M", MATRIX),
    "IQ3_XXS imatrix": ("IQ3_XXS", MATRIX),
    "Q2_K": ("Q2_K",),
    "Q2_K imatrix": ("Q2_K", MATRIX),
    "IQ2_XS imatrix": ("IQ2_XS", MATRIX),
    "IQ1_M imatrix": ("IQ1_M", MATRIX),
}
ONNX = {
    "ONNX f32": ("--quant", "f32"),
    "ONNX int8": ("--quant", "int8"),
    "ONNX int4-b32": ("--quant", "int4"),
    "ONNX int4-b128": ("--quant", "int4", "--block-size", "128"),
    "ONNX int4-b32-min": ("--quant", "int4", "--zero", "float"),
}
FIGURES = ("kl_mean", "kl_p99", "top1_agreement", "kl_mean_of_engine")
NOTES = {
    "smollm2": "SmolLM2's only free source is itself Q4_1, so that 4 bits with a minimum lose "
    "nothing here. Its rows of 576 are no multiple of 256: llama.cpp stores most of its matrices "
    "as the next type in blocks of 32 (Q4_K as Q5_0, Q3_K as Q4_0, IQ types as IQ4_NL), so that K "
    "and I types below four bits are not what their names say.",
    "tiny-mamba": "Rows of 256 and 512: true K and I types. `ssm_x` and `ssm_dt` are held to 8 "
    "bits or more, which is why a file has more bits a weight than its name.",
    "tiny-rwkv7": "Rows of 256 and 1024: true K and I types. Adapters are held to 16 bits or more.",
}


@dataclass(frozen=True)
class Row:
    """One line of a table: bytes of what the engine loads, and the loss in the task's unit."""

    label: str
    size_bytes: int
    loss: float


TASKS: Mapping[str, quality.Task] = {
    "smollm2": quality.Task(
        "SmolLM2-135M-Instruct, WikiText-2, first 8 x 512 tokens", "text/wiki.test.raw",
        8, 512, 512, False,
    ),
    "tiny-mamba": quality.Task(
        "zoo/tiny-mamba, eval/heldout.txt", "zoo/eval/heldout.txt", None, 513, 512, True
    ),
    "tiny-rwkv7": quality.Task(
        "zoo/tiny-rwkv7, eval/heldout.txt", "zoo/eval/heldout.txt", None, 513, 512, True
    ),
}  # fmt: skip


def engine_bytes(bundle: Path) -> int:
    """Bytes of the files that an engine loads: the model, without the tokenizer beside it."""
    names = ("model.gguf", "weights.bin", "decoder.onnx")
    return sum((bundle / n).stat().st_size for n in names if (bundle / n).is_file())


def matrix(source: Path, text: str, name: str, arguments: argparse.Namespace) -> Path:
    """The importance matrix of a checkpoint."""
    path: Path = arguments.cache / "benchmarks" / f"imatrix-{name}.gguf"
    if path.is_file() and not arguments.refresh:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        command = [sys.executable, "-m", "edge_mmllm", "imatrix", str(source), "--force"]
        options = ["--text", file.name, "--chunks", str(arguments.chunks), "--out", str(path)]
        artefacts.run([*command, *options])
    return path


def recorded(name: str) -> dict[str, dict[str, Any]]:
    """The last record of each type that this checkout has."""
    path = harness.RESULTS / "gguf_quality.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    records = [json.loads(line) for line in lines]
    return {r["scheme"]: r for r in records if r["model"] == name and "parameters" in r}


def run(name: str, arguments: argparse.Namespace, report: harness.Reporter) -> list[Row]:
    """One model's table."""
    task = TASKS[name]
    hub = smollm2_hub(arguments.cache) if name == "smollm2" else arguments.shared / "zoo" / name
    text = (arguments.shared / task.text).read_text(encoding="utf-8")
    cut = 3 * len(text) // 4
    path = matrix(hub, text[cut:], name, arguments)
    schemes = {**ONNX}
    for label, (kind, *rest) in GGUF.items():
        if name == "smollm2" and label in MISNAMED:
            continue
        own = ("--imatrix", str(path)) if rest else ()
        schemes[label] = ("--format", "gguf", "--gguf-type", kind, *own)
    packages = ("edge-mmllm", "llama-cpp-python", "onnxruntime", "numpy")
    versions = harness.versions(sys.executable, packages)
    rows, cells = list[Row](), []
    found = recorded(name) if arguments.resume else {}
    for label, options in schemes.items():
        if label not in found:
            bundle = arguments.cache / "benchmarks" / f"gguf-quality-{name}"
            artefacts.run(artefacts.export_command(hub, bundle, *options, *quality.GATE))
            manifest = open_bundle(bundle).manifest
            total, count, size = quality.losses(bundle, task, text[:cut], arguments.threads)
            loss = total / np.log(2) / size if task.per_byte else np.exp(total / count)
            found[label] = report.record(
                model=name, scheme=label, predictions=count, nats_per_token=total / count,
                loss=float(loss), unit="bits a byte" if task.per_byte else "perplexity",
                engine_bytes=engine_bytes(bundle), gate=dict(manifest.gate.figures or {}),
                quantization=[(g.group, g.scheme, g.tensors, g.size_bytes)
                              for g in manifest.quantization.groups],
                parameters=manifest.model.parameters, threads=arguments.threads,
                versions=versions,
            )  # fmt: skip
        one, base = found[label], found["ONNX f32"]
        rows.append(Row(label, one["engine_bytes"], one["loss"]))
        count, change = one["predictions"], one["loss"] / base["loss"] - 1
        bits = 8 * sum(size for *_, size in one["quantization"]) / base["parameters"]
        cells.append(
            [label, f"{one['engine_bytes'] / 1e6:.2f}", f"{bits:.2f}", f"{one['loss']:.4f}",
             f"{100 * change:+.2f} %", *(f"{one['gate'][f]:.2g}" for f in FIGURES)]
        )  # fmt: skip
        print(cells[-1], file=sys.stderr, flush=True)
    unit = "bits a byte" if task.per_byte else "perplexity"
    report.table(
        f"{task.title} ({count} predictions)",
        ["type", "file MB", "bits/weight", unit, "change",
         "gate: KL mean", "KL p99", "top-1", "KL of the engine"],
        cells,
    )  # fmt: skip
    report.text(NOTES[name])
    return rows


def frontier(rows: list[Row]) -> list[Row]:
    """Those that nothing smaller beats."""
    best = list[Row]()
    for row in sorted(rows, key=lambda r: (r.size_bytes, r.loss)):
        if best and row.loss >= best[-1].loss:
            continue
        if best and row.size_bytes < 1.001 * best[-1].size_bytes:
            best.pop()  # as large: what differs is said in the metadata
        best.append(row)
    return best


def chart(name: str, rows: list[Row], shown: float) -> Chart:
    """Loss over bytes; `shown`: losses beyond so many times the best are left out, and
    what is larger than eight bits."""
    task = TASKS[name]
    least = min(r.loss for r in rows)
    eighth = 1.1 * max(r.size_bytes for r in rows if r.label in ("Q8_0", "ONNX int8"))
    rows = [r for r in rows if r.loss < shown * least and r.size_bytes < eighth]
    best = frontier(rows)
    top = max(r.loss for r in rows)
    return Chart(
        f"{task.title}: {'bits a byte' if task.per_byte else 'perplexity'}",
        "MB of the file that is loaded",
        [Line("best of its size", [r.size_bytes / 1e6 for r in best],
              [r.loss for r in best])],
        span=(least - 0.05 * (top - least), top),
        points=[
            Points("GGUF", [(r.size_bytes / 1e6, r.loss, r.label) for r in rows
                            if not r.label.startswith("ONNX")]),
            Points("ONNX", [(r.size_bytes / 1e6, r.loss, r.label.removeprefix("ONNX "))
                            for r in rows if r.label.startswith("ONNX")]),
        ],
    )  # fmt: skip


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--shared", type=Path, default=harness.ROOT.parent / "shared/data")
    parser.add_argument("--only", nargs="*", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--chunks", type=int, default=20, help="pieces of 512 tokens for imatrix")
    parser.add_argument("--resume", action="store_true", help="go on after an earlier run")
    parser.add_argument("--refresh", action="store_true", help="compute the matrices again")
    arguments = parser.parse_args()
    report = harness.Reporter("gguf_quality", "Quality of GGUF's types", arguments)
    charts = []
    for name in arguments.only:
        rows = run(name, arguments, report)
        charts.append(chart(name, rows, 1.6 if name == "smollm2" else 1.04))
    picture = svg(charts)
    if arguments.publish:
        IMAGE.parent.mkdir(exist_ok=True)
        IMAGE.write_text(picture, encoding="utf-8")
        report.text("![quality over bytes](../docs/images/gguf_quality.svg)")
    report.close()


if __name__ == "__main__":
    main()
