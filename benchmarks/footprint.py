"""What a device installs: size of a fresh virtual environment with `edge-mmllm[runtime-onnx]`.

Prints the size of each installed package (pip and setuptools left out), checks that torch, onnx
and transformers cannot be imported there, times `edge-mmllm --help`, and runs an int4 bundle.

    python benchmarks/footprint.py [BUNDLE] [--keep DIR] [--publish]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import artefacts
import harness

FORBIDDEN = ("torch", "onnx", "transformers", "safetensors", "gguf")
NOT_OURS = ("pip", "setuptools", "pkg_resources", "_distutils_hack", "distutils-precedence.pth")
HELP_RUNS = 10
LIMIT_MIB = 250

_SIZES = """
import importlib.metadata as m, json, os, sys
out = {}
for d in m.distributions():
    files = {os.path.realpath(d.locate_file(f)) for f in d.files or ()}
    size = sum(os.path.getsize(f) for f in files if os.path.isfile(f))
    out[d.metadata["Name"]] = [d.version, size]
print(json.dumps(out))
"""


def install(folder: Path) -> Path:
    """A virtual environment with the working tree, not editable. Returns its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin/python"
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run([*pip, f"{harness.ROOT}[runtime-onnx]"], check=True, env=env)
    return python


def total_bytes(folder: Path) -> int:
    """Everything in site-packages but pip and setuptools, hard links once."""
    (site,) = folder.glob("lib/python3*/site-packages")
    total = 0
    for entry in site.iterdir():
        if not entry.name.startswith(NOT_OURS):
            total += harness.size_bytes(entry)
    return total


def run(arguments: argparse.Namespace, report: harness.Reporter, folder: Path) -> None:
    """Install, measure, run."""
    python = install(folder)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def ask(*command: str) -> str:
        done = subprocess.run(
            [str(python), *command], capture_output=True, text=True, check=True, env=env,
            cwd=folder,
        )  # fmt: skip
        return done.stdout

    total = total_bytes(folder)
    sizes = json.loads(ask("-c", _SIZES))
    rows = [
        [name, version, f"{size / 2**20:.1f}"]
        for name, (version, size) in sorted(sizes.items(), key=lambda i: -i[1][1])
        if name not in ("pip", "setuptools")
    ]
    rows.append(["together, on disk", "", f"{total / 2**20:.1f}"])
    importable = [n for n in FORBIDDEN if _importable(python, n, env)]
    help_ms = []
    for _ in range(HELP_RUNS + 1):
        started = time.perf_counter()
        ask("-m", "edge_mmllm", "--help")
        help_ms.append(1e3 * (time.perf_counter() - started))
    helped = harness.summary(help_ms[1:])
    bundle = arguments.bundle or artefacts.ours("smollm2", arguments.cache, "--quant", "int4")
    answer = json.loads(
        ask(
            "-m", "edge_mmllm", "run", str(bundle.resolve()), "--prompt", arguments.prompt,
            "--max-new-tokens", "24", "--temperature", "0", "--json",
        )
    )  # fmt: skip
    text = str(answer.get("text", answer))
    report.record(
        total_bytes=total, packages=sizes, importable=importable, help_ms=helped, answer=answer,
        versions=harness.versions(python, ("edge-mmllm", "onnxruntime", "numpy", "tokenizers")),
        artefact_sha256=harness.tree_sha256(bundle), threads=os.cpu_count(),
    )  # fmt: skip
    report.table(
        f"A fresh environment with edge-mmllm[runtime-onnx] (limit {LIMIT_MIB} MiB)",
        ["package", "version", "MiB"],
        rows,
    )
    report.text(
        f"Importable of {', '.join(FORBIDDEN)}: {', '.join(importable) or 'none'}. "
        f"`edge-mmllm --help`: median {helped['median']:.0f} ms of {HELP_RUNS} (best "
        f"{helped['min']:.0f}). Asked {arguments.prompt!r}, the bundle answers: "
        f"{re.sub(chr(10), ' ', text)[:120]!r}"
    )


def _importable(python: Path, name: str, env: dict[str, str]) -> bool:
    code = f"import importlib.util,sys; sys.exit(importlib.util.find_spec({name!r}) is None)"
    return subprocess.run([str(python), "-c", code], env=env, check=False).returncode == 0


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("bundle", nargs="?", type=Path, help="default: SmolLM2 int4")
    parser.add_argument("--prompt", default="What is the capital of France?")
    parser.add_argument("--keep", type=Path, help="make the environment here and leave it")
    arguments = parser.parse_args()
    report = harness.Reporter("footprint", "Footprint", arguments)
    if arguments.keep:
        run(arguments, report, arguments.keep)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            run(arguments, report, Path(scratch) / "venv")
    report.close()


if __name__ == "__main__":
    main()
