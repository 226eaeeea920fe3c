"""Model libraries of an export, compiled in a child process: a compiler's memory is not the
export's, and only the child imports one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edge_mmllm import errors
from edge_mmllm._children import die_with_parent, python_command
from edge_mmllm.errors import EdgeError, ExportError

#: RSS of the child: the compiler, and what it keeps of a model (SmolLM2: 278 MiB in all).
CHILD_RAM_BYTES = 400 << 20
#: Exit status of a child that says on stdout what is wrong.
_REFUSED = 4


@dataclass(frozen=True)
class Request:
    """What the child is told; paths as strings, for JSON.

    Attributes:
        quantization: a key of `QUANTIZATIONS`.
        targets: names as in `mlc.targets`.
        folder: where `lib/TARGET.so` goes, and where the weight files are.
        standalone: also write `standalone/TARGET/` (see `standalone`).
    """

    source: str
    lora: str | None
    context: int | None
    quantization: str
    targets: tuple[str, ...]
    folder: str
    standalone: bool = False


def library_file(target: str) -> str:
    """Path of a target's library in the bundle."""
    return f"lib/{target}.so"


def compile_libraries(request: Request) -> dict[str, Any]:
    """Have a child compile.

    Returns: target -> what a machine needs to run its library: `machines`, `flags`; with
        `standalone`, of that: what it holds.
    Raises:
        UnsupportedArchitecture, UsageError, ExportError, MissingDependency: as the child says.
    """
    command = python_command(
        "from edge_mmllm_export.mlc import compile as mlc_compile; sys.exit(mlc_compile.main())"
    )
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        output, said = child.communicate(json.dumps(asdict(request)))
    except BaseException:
        child.kill()
        child.wait()
        raise
    if child.returncode == _REFUSED:
        raise _error(json.loads(output.splitlines()[-1]))
    if child.returncode != 0:
        raise ExportError(
            "the model's libraries could not be compiled",
            found=said.strip()[-2000:] or f"exit status {child.returncode}",
            fix="more memory, where the system ended it; or --target none, which writes weights "
            "alone",
        )
    needs: dict[str, Any] = json.loads(output.splitlines()[-1])
    return needs


def _error(fields: dict[str, Any]) -> EdgeError:
    """An error of the child, as if it were ours."""
    kind = getattr(errors, str(fields.pop("type")), ExportError)
    if kind is errors.MissingDependency:
        return errors.MissingDependency("apache-tvm", "mlc")
    error: EdgeError = kind(fields.pop("what"), **fields)
    return error


def run(request: Request) -> dict[str, Any]:
    """The child's work."""
    try:
        from edge_mmllm_export.mlc import library as mlc_library
        from edge_mmllm_export.mlc import targets as mlc_targets
    except ModuleNotFoundError as error:
        raise errors.MissingDependency(error.name or "apache-tvm", "mlc") from error
    from edge_mmllm_export.checkpoints import open_checkpoint
    from edge_mmllm_export.mlc import layout as mlc
    from edge_mmllm_export.models import build
    from edge_mmllm_export.ops.relax_params import layouts_of
    from edge_mmllm_export.weights import bind
    from edge_mmllm_runtime.mlc.weights import QUANTIZATIONS

    checkpoint = open_checkpoint(request.source, request.lora)
    model = build(checkpoint, request.context)
    weights = bind(
        checkpoint, model.parameters(), model.sources(checkpoint.layout), ignored=model.ignored()
    )
    files = mlc.layout(model, weights, QUANTIZATIONS[request.quantization])
    needs: dict[str, Any] = {}
    for name in request.targets:
        target = mlc_targets.target_of(name)
        out = Path(request.folder, library_file(name))
        layouts = layouts_of(weights, files.kinds, half=files.quant.half)
        mlc_library.compile_library(model, weights, layouts, files.quant.name, target, out)
        needs[name] = {"machines": list(target.machines), "flags": list(target.flags)}
        if request.standalone:
            from edge_mmllm_export.standalone.build import export_standalone

            needs[name]["standalone"] = export_standalone(
                model, weights, layouts, files, target, Path(request.folder)
            ).to_json()
    return needs


def main() -> int:
    """Entry point of the child: request on stdin; needs, or an error, as JSON on stdout's end."""
    die_with_parent()
    fields = json.load(sys.stdin)
    request = Request(**{**fields, "targets": tuple(fields["targets"])})
    try:
        document = run(request)
    except EdgeError as error:
        document = {
            "type": type(error).__name__,
            "what": error.what,
            "where": error.where,
            "expected": error.expected,
            "found": error.found,
            "fix": error.fix,
        }
        sys.stdout.write("\n" + json.dumps(document))
        return _REFUSED
    sys.stdout.write("\n" + json.dumps(document))
    return 0
