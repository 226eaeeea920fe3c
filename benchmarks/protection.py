"""What int4 costs the trained RWKV and Mambas of the zoo, block by block and without protection.

Bits a byte on the zoo's held-out text (512 predictions in each window, as `quality.py`), beside
the bits a parameter takes, everything stored counted. Under int4 the only thing protected is the
embedding (and head), at 8 bits: `unprotected` has it at 4 bits too.

    python benchmarks/protection.py [--shared DIR] [--only tiny-mamba ...] [--publish]
"""

from __future__ import annotations

import argparse
import sys

import artefacts
import harness
import numpy as np
import quality
import zoo

from edge_mmllm.bundle import open_bundle

#: Label -> options of `edge-mmllm export`.
SCHEMES = {
    "f32": ("--quant", "f32"),
    "f16": ("--quant", "f16"),
    "int8": ("--quant", "int8"),
    "int4": ("--quant", "int4"),
    "int4, blocks of 64": ("--quant", "int4", "--block-size", "64"),
    "int4, blocks of 128": ("--quant", "int4", "--block-size", "128"),
    "int4, unprotected": ("--quant", "int4", "--embedding-quant", "int4"),
}


def run(name: str, arguments: argparse.Namespace, report: harness.Reporter) -> None:
    """One model's table."""
    below = zoo.MODELS[name]
    source = arguments.shared / below if below else harness.ROOT / "examples/models" / name
    if not source.is_dir():
        print(f"{name}: not here, left out", flush=True)
        return
    rows: list[list[str]] = []
    base: float | None = None
    for label, options in SCHEMES.items():
        out = arguments.cache / "benchmarks" / f"protection-{name}"
        artefacts.run(artefacts.export_command(source, out, *options, "--gate", "off"))
        total, count, size = quality.losses(
            out, quality.TASKS["mamba2"], zoo.text(arguments), arguments.threads
        )
        value = float(total / np.log(2) / size)
        base = value if base is None else base
        opened = open_bundle(out)
        bits = opened.manifest.quantization.bits_per_weight
        report.record(
            model=name, scheme=label, predictions=count, bits_per_byte=value,
            bits_per_parameter=bits, bundle_sha256=opened.sha256,
        )  # fmt: skip
        rows.append([label, f"{bits:.2f}", f"{value:.4f}", f"{100 * (value / base - 1):+.2f} %"])
        print(name, rows[-1], file=sys.stderr, flush=True)
    report.table(name, ["scheme", "bits/parameter", "bits a byte", "change"], rows)


def main() -> None:
    parser = harness.parser(__doc__)
    zoo.options(parser, tuple(zoo.MODELS))
    arguments = parser.parse_args()
    report = harness.Reporter("protection", "Quality of RWKV and Mamba in int4", arguments)
    for name in arguments.only:
        run(name, arguments, report)
    report.close()


if __name__ == "__main__":
    main()
