"""Finds a compiler that links for a target: the platform's gcc, clang, zig, or the Android NDK.

For code that TVM compiled (an object file) and the little C around it. `EDGE_MMLLM_CC` names
another command, of any kind.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_mmllm.errors import ExportError, UsageError
from edge_mmllm_export.mlc.targets import MlcTarget

#: Overrides what is found.
COMMAND = "EDGE_MMLLM_CC"
#: The oldest Android that libraries are linked for (5.0, the first with 64 bits).
ANDROID_API = 21
_TIMEOUT_S = 300.0
#: Debian's packages of the cross compilers, by the command.
_PACKAGES = {
    "aarch64-linux-gnu-gcc": "gcc-aarch64-linux-gnu",
    "arm-linux-gnueabihf-gcc": "gcc-arm-linux-gnueabihf",
    "x86_64-linux-gnu-gcc": "gcc-x86-64-linux-gnu",
}


@dataclass(frozen=True)
class Linker:
    """A C compiler for one target.

    Attributes:
        command: its words, before any option of ours.
        kind: `gcc`, `clang`, `zig` or `ndk`; `own` where `EDGE_MMLLM_CC` names it.
    """

    command: tuple[str, ...]
    kind: str

    def run(self, arguments: Sequence[str]) -> None:
        """Compile or link. Raises: ExportError with the compiler's last words."""
        try:
            done = subprocess.run(
                [*self.command, *arguments],
                capture_output=True,
                text=True,
                timeout=_TIMEOUT_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ExportError("the C compiler cannot be run", found=str(error)) from error
        if done.returncode:
            raise ExportError(
                "the C compiler failed",
                where=shlex.join([*self.command, *arguments])[:600],
                found=done.stderr.strip()[-1500:] or f"exit status {done.returncode}",
                fix=f"another compiler for this target: {COMMAND}='...'",
            )

    def share(self, inputs: Sequence[Path], out: Path, options: Sequence[str] = ()) -> None:
        """Link a shared library. Raises: ExportError."""
        self.run(["-shared", "-fPIC", "-o", str(out), *map(str, inputs), *options])


def find_linker(target: MlcTarget) -> Linker:
    """The first that is there: `EDGE_MMLLM_CC`, the platform's gcc, clang, zig (PyPI's ziglang).

    Raises:
        ExportError: there is none; says what to install.
        UsageError: an Android target without `ANDROID_NDK`.
    """
    own = os.environ.get(COMMAND)
    if own:
        return Linker(tuple(shlex.split(own)), "own")
    if "android" in target.triple:
        return _ndk(target)
    if _is_host(target):
        for name in (target.gcc, "gcc", "cc", "clang"):
            if found := shutil.which(name):
                return Linker((found,), "clang" if "clang" in name else "gcc")
    elif found := shutil.which(target.gcc):
        return Linker((found,), "gcc")
    if (clang := shutil.which("clang")) and shutil.which("ld.lld") and _has_libc(clang, target):
        return Linker((clang, f"--target={target.triple}", "-fuse-ld=lld"), "clang")
    if zig := _zig():
        return Linker((*zig, "cc", *(("-target", target.zig) if target.zig else ())), "zig")
    package = _PACKAGES.get(target.gcc, target.gcc)
    raise ExportError(
        "no C compiler that links for this target",
        where=f"--target {target.name}",
        expected=f"{target.gcc}, clang with its libc, or zig",
        fix=f"apt install {package}, or pip install ziglang, or {COMMAND}='...'",
    )


def _is_host(target: MlcTarget) -> bool:
    """Whether this machine's own compiler makes code for the target."""
    return platform.system() == "Linux" and platform.machine() in target.machines


def _zig() -> tuple[str, ...]:
    if found := shutil.which("zig"):
        return (found,)
    if importlib.util.find_spec("ziglang") is not None:
        return (sys.executable, "-m", "ziglang")
    return ()


def _has_libc(clang: str, target: MlcTarget) -> bool:
    """Whether clang finds headers and libraries of the target's system."""
    command = [clang, f"--target={target.triple}", "-fuse-ld=lld", "-shared", "-fPIC", "-xc", "-"]
    source = "#include <stdlib.h>\nvoid *f(void) { return malloc(1); }\n"
    done = subprocess.run(
        [*command, "-o", os.devnull, "-lm"],
        input=source,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )
    return done.returncode == 0


def _ndk(target: MlcTarget) -> Linker:
    """Clang of the Android NDK, as its releases since r19 lay it out."""
    root = os.environ.get("ANDROID_NDK") or os.environ.get("ANDROID_NDK_HOME")
    if not root:
        raise UsageError(
            "an Android library is linked by the Android NDK",
            where=f"--target {target.name}",
            expected="ANDROID_NDK, the folder of an unpacked NDK (r19 or later)",
            found="not set",
            fix="download the NDK, then: export ANDROID_NDK=/path/to/android-ndk",
        )
    system = f"{platform.system().lower()}-x86_64"
    name = f"{target.triple}{ANDROID_API}-clang"
    clang = Path(root) / "toolchains" / "llvm" / "prebuilt" / system / "bin" / name
    if not clang.is_file():
        raise UsageError(
            "ANDROID_NDK holds no compiler for this target",
            where=root,
            expected=str(clang.relative_to(root)),
            found="no such file",
            fix="an NDK of r19 or later, for this host",
        )
    return Linker((str(clang),), "ndk")
