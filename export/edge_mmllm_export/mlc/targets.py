"""What a model library can be compiled for."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from typing import Any

from edge_mmllm.errors import UsageError
from edge_mmllm_runtime.mlc.machine import machine_flags

#: Tasks that the TVM runtime is told to expect; it uses as many threads as it is given.
_CORES = 4


@dataclass(frozen=True)
class MlcTarget:
    """One kind of device.

    Attributes:
        name: as in `--target` and `lib/NAME.so`.
        triple: LLVM's.
        cpu: LLVM's name for the oldest CPU that will do; empty: any of the triple.
        features: of the CPU, as LLVM names them.
        machines: what `platform.machine()` says there.
        flags: of `/proc/cpuinfo` that such a CPU has; it is chosen where all are there.
        gcc: cross compiler that links, and the names `zig cc` has for the same.
        extra: more attributes of TVM's target.
    """

    name: str
    triple: str
    cpu: str = ""
    features: tuple[str, ...] = ()
    machines: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    gcc: str = "gcc"
    zig: str = ""
    extra: tuple[tuple[str, Any], ...] = ()

    def needs(self) -> dict[str, list[str]]:
        """What a device must have, as the manifest's `engine_format.needs` says it."""
        return {"machines": list(self.machines), "flags": list(self.flags)}

    def tvm(self) -> Any:
        """The compiler's own target."""
        import tvm

        config: dict[str, Any] = {"kind": "llvm", "num-cores": _CORES, **dict(self.extra)}
        if self.triple:
            config["mtriple"] = self.triple
        if self.cpu:
            config["mcpu"] = self.cpu
        if self.features:
            config["mattr"] = list(self.features)
        return tvm.target.Target(config)


_V3 = ("avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe")

#: `--target`. `native` is made for the CPU it is compiled on, by `target_of`.
TARGETS = {
    t.name: t
    for t in (
        MlcTarget(
            "x86-64-v3",
            "x86_64-linux-gnu",
            cpu="x86-64-v3",
            machines=("x86_64", "AMD64"),
            flags=_V3,
            gcc="x86_64-linux-gnu-gcc",
            zig="x86_64-linux-gnu.2.17",
        ),
        MlcTarget(
            "aarch64",
            "aarch64-linux-gnu",
            features=("+neon",),
            machines=("aarch64", "arm64"),
            gcc="aarch64-linux-gnu-gcc",
            zig="aarch64-linux-gnu.2.17",
        ),
        MlcTarget(
            "aarch64-dotprod",
            "aarch64-linux-gnu",
            features=("+neon", "+v8.2a", "+dotprod", "+fullfp16"),
            machines=("aarch64", "arm64"),
            flags=("asimddp",),
            gcc="aarch64-linux-gnu-gcc",
            zig="aarch64-linux-gnu.2.17",
        ),
        MlcTarget(
            "armv7",
            "armv7l-linux-gnueabihf",
            cpu="cortex-a7",
            features=("+neon", "+vfp4"),
            machines=("armv7l", "armv8l"),
            gcc="arm-linux-gnueabihf-gcc",
            zig="arm-linux-gnueabihf.2.17",
            extra=(("mfloat-abi", "hard"),),
        ),
        MlcTarget(
            "aarch64-android",
            "aarch64-linux-android",
            features=("+neon",),
            gcc="aarch64-linux-android",
        ),
    )
}
NAMES = ("native", *TARGETS)


def target_of(name: str) -> MlcTarget:
    """The target of a name of `--target`. Raises: UsageError."""
    if name == "native":
        return _native()
    if name not in TARGETS:
        raise UsageError("no such target", where="--target", expected=" | ".join(NAMES), found=name)
    return TARGETS[name]


def _native() -> MlcTarget:
    """This machine's CPU, with all it has."""
    import tvm

    machine = platform.machine()
    triple = str(tvm.get_global_func("target.llvm_get_system_triple")())
    cpu = str(tvm.get_global_func("target.llvm_get_system_cpu")())
    return MlcTarget(
        "native",
        triple,
        cpu=cpu,
        machines=(machine,),
        flags=machine_flags(),
        gcc=os.environ.get("CC", "gcc" if shutil.which("gcc") else "cc"),
    )
