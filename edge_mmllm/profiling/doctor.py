"""`doctor`: what is installed, what is missing and how to get it, and what the machine offers.

Nothing heavy is imported: versions come from the installed packages' metadata. Only an engine's
library is loaded, in a child process, since a broken one may crash.
"""

from __future__ import annotations

import importlib.util
import platform
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from edge_mmllm._children import python_command
from edge_mmllm.profiling.cgroup import CgroupLimits, cgroup_limits
from edge_mmllm.profiling.machine import Machine, read_machine


@dataclass(frozen=True)
class Package:
    """A package the SDK can use.

    Attributes:
        package: its name on the package index.
        module: what is imported.
        extra: the extra that installs it; None for a base dependency.
        purpose: what it is for.
        version: None where it is not installed.
        problem: why it cannot be loaded although it is installed, if so.
        fix: the exact pip line, where it is missing or broken.
    """

    package: str
    module: str
    extra: str | None
    purpose: str
    version: str | None = None
    problem: str | None = None
    fix: str | None = None


#: What may be installed; `extra` is a key of pyproject.toml's optional dependencies.
PACKAGES = (
    Package("numpy", "numpy", None, "arrays"),
    Package("tokenizers", "tokenizers", None, "text to tokens"),
    Package("jinja2", "jinja2", None, "chat templates"),
    Package("pillow", "PIL", None, "images"),
    Package("click", "click", None, "this command line"),
    Package("rich", "rich", None, "tables and progress bars"),
    Package("onnxruntime", "onnxruntime", "runtime-onnx", "runs ONNX bundles"),
    Package("onnx", "onnx", "export", "writes ONNX bundles"),
    Package("safetensors", "safetensors", "export", "writes and checks safetensors"),
    Package("gguf", "gguf", "export", "reads quantized GGUF checkpoints"),
    Package("huggingface_hub", "huggingface_hub", "export", "fetches hub ids"),
    Package("llama-cpp-python", "llama_cpp", "gguf", "runs GGUF bundles and files"),
    Package("llguidance", "llguidance", "constrained", "keeps answers to a schema or grammar"),
    Package("apache-tvm", "tvm", "mlc", "MLC bundles, in a later release"),
)

#: Modules whose libraries are loaded for a trial, in a child.
_TRIED = ("onnxruntime", "llama_cpp")
_TRIAL_S = 60


@dataclass(frozen=True)
class DoctorReport:
    """What was found.

    Attributes:
        can_run: whether ONNX bundles can be run here.
        can_export: whether checkpoints can be exported here.
    """

    edge_mmllm: str | None
    python: str
    implementation: str
    packages: tuple[Package, ...]
    machine: Machine
    cgroup: CgroupLimits
    can_run: bool
    can_export: bool

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def doctor() -> DoctorReport:
    """Looks around. Raises nothing on purpose: what cannot be found out is None."""
    packages = tuple(examine(package) for package in PACKAGES)
    good = {p.module for p in packages if p.fix is None}
    base = {p.module for p in PACKAGES if p.extra is None}
    can_run = (base | {"onnxruntime"}) <= good
    return DoctorReport(
        edge_mmllm=_version("edge-mmllm"),
        python=platform.python_version(),
        implementation=platform.python_implementation(),
        packages=packages,
        machine=read_machine(),
        cgroup=cgroup_limits(),
        can_run=can_run,
        can_export=can_run and {"onnx", "gguf"} <= good and _present("edge_mmllm_export"),
    )


def examine(
    package: Package,
    tried: tuple[str, ...] = _TRIED,
    load: Callable[[str], str | None] | None = None,
) -> Package:
    """The package with its version, and what is wrong with it.

    Args:
        tried: modules to load for a trial.
        load: how: gives what went wrong, or None.
    """
    load = load or try_import
    found = _version(package.package) if _present(package.module) else None
    problem = load(package.module) if found and package.module in tried else None
    fix = None
    if found is None or problem:
        wanted = "edge-mmllm" if package.extra is None else f"edge-mmllm[{package.extra}]"
        again = "--force-reinstall " if problem else ""
        fix = f"pip install {again}'{wanted}'"
    return Package(
        package.package, package.module, package.extra, package.purpose, found, problem, fix
    )


def try_import(module: str) -> str | None:
    """Imports `module` in a child process. Returns the last line of what went wrong, or None."""
    try:
        child = subprocess.run(
            python_command(f"import {module}"),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TRIAL_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if child.returncode == 0:
        return None
    if child.returncode < 0:
        return f"importing it ends in signal {-child.returncode}"
    lines = child.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit status {child.returncode}"


def _present(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
