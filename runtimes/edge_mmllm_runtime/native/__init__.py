"""The native kernels: a library for onnxruntime that a device builds with its own compiler.

A bundle carries its decoder twice: as a graph that stock onnxruntime runs, and as one node of a
custom op, over the same weights and states, that these kernels run (`src/program.h` says how).
They are optional: built once with `edge-mmllm kernels --build`, they are used from then on by
every bundle that has the node. The library is kept under a key of its sources, flags and CPU, so
that a library built for another machine is never loaded.

    CACHE/kernels-<key>/libedge_mmllm.so        CACHE: $EDGE_MMLLM_CACHE, else the user's own
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from edge_mmllm.errors import KernelError, UsageError

__all__ = ["build", "compiler", "library", "library_place", "wanted"]

_SOURCES = Path(__file__).parent / "src"
_FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden",
          "-fPIC", "-shared", "-pthread", "-Wno-psabi")  # fmt: skip
_COMPILERS = ("c++", "g++", "clang++")
_TIMEOUT_S = 600
#: Lines of /proc/cpuinfo that decide what `-march=native` means: x86, then Arm.
_CPU_LINES = ("flags", "CPU part", "Features")


def wanted(asked: str) -> Path | None:
    """The library that a session should use.

    Args:
        asked: `auto` (as $EDGE_MMLLM_KERNELS says, else native where the library is built),
            `native` or `stock`.

    Raises:
        KernelError: `native`, but no library is built for this machine.
        UsageError: $EDGE_MMLLM_KERNELS says something else.
    """
    if asked == "auto":
        asked = os.environ.get("EDGE_MMLLM_KERNELS", "") or "auto"
        if asked not in ("auto", "native", "stock"):
            raise UsageError(
                "unknown kernels",
                where="the environment variable EDGE_MMLLM_KERNELS",
                expected="auto | native | stock",
                found=repr(asked)[:80],
            )
    if asked == "stock":
        return None
    found = library()
    if found is None and asked == "native":
        raise KernelError(
            "the native kernels are not built for this machine",
            expected=str(library_place()),
            fix="edge-mmllm kernels --build",
        )
    return found


def library() -> Path | None:
    """The library built for this machine from these sources; None where there is none."""
    try:
        place = library_place()
    except (KernelError, OSError):
        return None  # no home, or no sources: nothing was built
    # Not Path.is_file, which raises where the user's cache may not be looked into.
    return place if os.path.isfile(place) else None  # noqa: PTH113


def library_place() -> Path:
    """Where the library of this machine lies, or would. Raises: KernelError."""
    return _cache() / f"kernels-{_key()}" / _name()


def compiler() -> str | None:
    """The compiler `build` would use: $CXX, else the first found on PATH."""
    asked = os.environ.get("CXX")
    return asked or next((found for name in _COMPILERS if (found := shutil.which(name))), None)


def build(
    command: str | None = None, *, place: Path | None = None, machine: str = "native"
) -> Path:
    """Compiles the library for this machine, about 20 s of one core.

    Args:
        command: the C++ compiler (C++17: GCC 9, Clang 14 or later), with arguments where it has
            some; None: see `compiler`.
        place: the file to write; None: where `library` looks for it.
        machine: what the compiler's `-march` (on Arm `-mcpu`) is told.

    Raises:
        KernelError: no compiler, or it failed (its messages are in the error); a cache that
            cannot be written.
    """
    place, command = place or library_place(), command or compiler()
    if command is None:
        raise KernelError(
            "there is no C++ compiler",
            expected="$CXX, or one of " + ", ".join(_COMPILERS) + " on PATH",
            fix="install one, or go on without: stock onnxruntime runs every bundle",
        )
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as folder:
            made = Path(folder) / _name()
            _compile(command, [*_FLAGS, _machine_flag(machine), "-o", str(made)])
            made.replace(place)  # whole or not at all
    except OSError as error:
        raise KernelError(
            "the library cannot be written",
            where=str(place),
            found=str(error),
            fix="name a folder that can be written in EDGE_MMLLM_CACHE",
        ) from error
    return place


def _compile(command: str, flags: list[str]) -> None:
    """Runs the compiler over the sources; it writes the file that the flags end with.

    Raises: KernelError.
    """
    try:
        words = [command] if shutil.which(command) else shlex.split(command)
        result = subprocess.run(
            [*words, *flags, *map(str, _sources())],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_TIMEOUT_S,
            check=False,
        )
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise KernelError("the compiler did not run", where=command, found=str(error)) from error
    if result.returncode != 0 or not os.path.isfile(flags[-1]):  # noqa: PTH113
        said = "\n".join(result.stderr.splitlines()[:20])
        raise KernelError(
            "the native kernels do not compile",
            where=command,
            found=said or f"exit status {result.returncode}, and no message",
            fix="try another compiler with --compiler",
        )


def _sources() -> list[Path]:
    return sorted(_SOURCES.glob("*.cc"))


def _machine_flag(machine: str) -> str:
    # On Arm, -mcpu is what every compiler takes "native" for.
    arm = platform.machine().lower() in ("arm64", "aarch64")
    return f"-mcpu={machine}" if arm else f"-march={machine}"


def _name() -> str:
    return "libedge_mmllm.dylib" if sys.platform == "darwin" else "libedge_mmllm.so"


def _cache() -> Path:
    own = os.environ.get("EDGE_MMLLM_CACHE")
    if own:
        return Path(own)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edge-mmllm"
    except RuntimeError as error:
        raise KernelError(
            "there is no home folder to keep the library in",
            found=str(error),
            fix="name a folder in EDGE_MMLLM_CACHE",
        ) from error


def _key() -> str:
    digest = hashlib.sha256()
    for path in sorted(p for p in _SOURCES.iterdir() if p.is_file()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    digest.update("\0".join((*_FLAGS, platform.machine())).encode())
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        seen = {line for line in lines if line.startswith(_CPU_LINES)}
        digest.update("\n".join(sorted(seen)).encode())
    return digest.hexdigest()[:16]
