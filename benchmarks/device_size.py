"""What a device must hold for one int4 model: library, runtime, weights, state, memory.

Each model is exported once for every target (`--format mlc --standalone`). Sizes of files are the
bytes that are copied; libraries are stripped. Memory is that of the C example linked statically,
after a prompt and 48 tokens on this machine, from the kernel's counters of the process: anonymous
pages less the state, which is what a device needs beyond weights and state. The TVM runtime is
counted where its wheel is: the installed one, and those of `--wheels DIR` for other machines.

    python benchmarks/device_size.py [--only NAME ...] [--wheels DIR] [--publish]
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import artefacts
import harness

#: The interpreter with TVM: that of `make test-full`.
TVM_PYTHON = harness.TVM_PYTHON
#: Target -> compilers of a static C program, wheels' name of the machine.
TARGETS = {
    "x86-64-v3": ("gcc", "x86_64"),
    "aarch64": ("aarch64-linux-gnu-gcc", "aarch64"),
    "aarch64-dotprod": ("aarch64-linux-gnu-gcc", "aarch64"),
    "armv7": ("arm-linux-gnueabihf-gcc", "armv7l"),
}
#: The libraries that a process with a model library maps.
RUNTIME = ("libtvm_runtime.so", "libtvm_ffi.so")
MODELS = ("tiny-rwkv7", "tiny-mamba2", "rwkv7-0.1b", "mamba-130m", "mamba2-130m")


@dataclass(frozen=True)
class Row:
    """One model on one target, in bytes."""

    model: str
    target: str
    library: int
    runtime: int | None
    weights: int
    standalone: int
    packed: int
    state: int
    scratch: int
    program: int | None
    beyond: int | None


def source_of(name: str, cache: Path) -> Path:
    """A small trained model of the repository, or a random one of published dimensions."""
    own = harness.ROOT / "examples/models" / name
    return own if own.is_dir() else artefacts.MODELS[name].hub(cache)


def exported(name: str, targets: list[str], arguments: argparse.Namespace) -> Path:
    """A fresh bundle with libraries of all targets."""
    out = Path(arguments.cache) / "benchmarks" / f"device-size-{name}"
    source = str(source_of(name, arguments.cache))
    command = [str(arguments.tvm), "-m", "edge_mmllm", "export", source, "--out", str(out)]
    command += ["--format", "mlc", "--quant", "int4", "--standalone", "--force", "--gate", "off"]
    command += [word for target in targets for word in ("--target", target)]
    subprocess.run(command, check=True, env=harness.child_env(), stdout=subprocess.DEVNULL)
    return out


def runtime_bytes(machine: str, arguments: argparse.Namespace) -> int | None:
    """The runtime's libraries, from wheels or from what is installed; None where there is none."""
    found: dict[str, int] = {}
    for wheel in sorted(arguments.wheels.glob("*.whl")) if arguments.wheels else ():
        if not wheel.name.startswith("apache_tvm") or not wheel.stem.endswith(machine):
            continue
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.infolist():
                if Path(member.filename).name in RUNTIME:
                    found[Path(member.filename).name] = member.file_size
    if not found and machine == "x86_64":
        for path in arguments.tvm.parents[1].glob("lib/python3*/site-packages/tvm*/lib/*.so"):
            if path.name in RUNTIME:
                found[path.name] = path.stat().st_size
    return sum(found.values()) if len(found) == len(RUNTIME) else None


def program(folder: Path, gcc: str) -> Path | None:
    """The C example with everything in it; None without a compiler."""
    if shutil.which(gcc) is None:
        return None
    out = folder / "generate-static"
    command = [gcc, "-std=c11", "-O2", "-static", "-s", "generate.c", "edge_model.c", "kernels.o"]
    subprocess.run([*command, "-lm", "-o", out.name], cwd=folder, check=True)
    return out


def beyond_bytes(program_: Path, folder: Path, state: int) -> int:
    """Anonymous memory of a run, less the state."""
    command = [program_, "-m", folder / "model.weights", "48", "1", "2", "3", "4", "5"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = dict(line.split(":") for line in done.stderr.splitlines() if ":" in line)
    return int(found["RssAnon"].split()[0]) * 1024 - state


def measure(name: str, target: str, bundle: Path, arguments: argparse.Namespace) -> Row:
    manifest: dict[str, Any] = json.loads((bundle / "manifest.json").read_text())
    said = manifest["engine_format"]["standalone"][target]
    folder = bundle / said["folder"]
    gcc, machine = TARGETS[target]
    static = program(folder, gcc)
    native = static is not None and machine == "x86_64"
    shards = sum(f["size_bytes"] for f in manifest["files"] if f["path"].startswith("params_"))
    return Row(
        model=name,
        target=target,
        library=(bundle / "lib" / f"{target}.so").stat().st_size,
        runtime=runtime_bytes(machine, arguments),
        weights=shards,
        standalone=said["library_bytes"],
        packed=(folder / "model.weights").stat().st_size,
        state=said["state_bytes"],
        scratch=said["scratch_bytes"],
        program=static.stat().st_size if static else None,
        beyond=beyond_bytes(static, folder, said["state_bytes"]) if native and static else None,
    )


def kib(size: int | None) -> str:
    return "not measured" if size is None else f"{size / 1024:,.0f}"


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--wheels", type=Path, help="folder with wheels of apache-tvm(-ffi)")
    parser.add_argument("--tvm", type=Path, default=TVM_PYTHON, help="interpreter with TVM")
    arguments = parser.parse_args()
    report = harness.Reporter("device_size", "What a device must hold", arguments)
    report.text(
        "KiB of files, int4 (q4f32_1). With the TVM runtime: model library, runtime "
        f"({' and '.join(RUNTIME)}; Python and numpy not counted) and weights. Standalone: the "
        "library or, instead, the C example with everything linked in, and packed weights. "
        "Memory beyond weights and state: anonymous pages of that program after 48 tokens."
    )
    for name in arguments.only:
        bundle = exported(name, list(TARGETS), arguments)
        rows = [measure(name, target, bundle, arguments) for target in TARGETS]
        for row in rows:
            report.record(**vars(row))
        report.table(
            name,
            (
                "target", "model library", "TVM runtime", "weights", "standalone library",
                "or static program", "packed weights", "state", "memory beyond",
            ),
            [
                [
                    row.target, kib(row.library), kib(row.runtime), kib(row.weights),
                    kib(row.standalone), kib(row.program), kib(row.packed), kib(row.state),
                    kib(row.beyond),
                ]
                for row in rows
            ],
        )  # fmt: skip
        shutil.rmtree(bundle)
    report.close()


if __name__ == "__main__":
    main()
