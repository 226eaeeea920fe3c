"""Bundles of the small trained models that the state benchmarks run: a table, and their text."""

from __future__ import annotations

import argparse
from pathlib import Path

import artefacts
import harness

#: Name -> checkpoint, below the shared data; the example comes with the repository.
MODELS = {
    "tiny-mamba": "zoo/tiny-mamba",
    "tiny-mamba2": "",
    "tiny-rwkv7": "zoo/tiny-rwkv7",
}
TEXT = "zoo/eval/heldout.txt"


def options(parser: argparse.ArgumentParser, models: tuple[str, ...]) -> None:
    """Options that say which models, and where their data is."""
    parser.add_argument("--shared", type=Path, default=harness.ROOT.parent / "shared/data")
    parser.add_argument("--only", nargs="*", choices=models, default=list(models))
    parser.add_argument("--threads", type=int, default=2)


def bundle(name: str, arguments: argparse.Namespace, quant: str) -> Path | None:
    """A zoo model's bundle, exported again each time (a second); None without its checkpoint."""
    below = MODELS[name]
    source = arguments.shared / below if below else harness.ROOT / "examples/models" / name
    if not source.is_dir():
        print(f"{name}: not here, left out", flush=True)
        return None
    out: Path = arguments.cache / "benchmarks" / f"zoo-{name}-{quant}"
    out.parent.mkdir(parents=True, exist_ok=True)
    artefacts.run(artefacts.export_command(source, out, "--quant", quant, "--gate", "off"))
    return out


def text(arguments: argparse.Namespace) -> str:
    """Text to read: held-out books, or without the shared data the example's own description."""
    path: Path = arguments.shared / TEXT
    if not path.is_file():
        path = harness.ROOT / "examples/models/tiny-mamba2/README.md"
    return path.read_text(encoding="utf-8")
