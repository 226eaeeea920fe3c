"""What the kernels ask of a target: its vectors' width, and its 8-bit products.

Everything else is written with vector types that LLVM fits to any target, so that a new
instruction set needs a variant of `block_sum` and nothing more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tvm.script.ir_builder import tirx as T
from tvm.target import Target
from tvm.target.codegen import llvm_get_cpu_features, llvm_get_system_cpu, target_has_features

#: A TIR expression (tvm ships no type hints).
Expr = Any

Dot = Literal["vnni512", "vnni256", "avx2", "sdot", "generic"]


@dataclass(frozen=True)
class Isa:
    """An instruction set, as far as the kernels care.

    Attributes:
        lanes: float32 values of one vector.
        dot: how products of 8-bit numbers are summed.
        half: whether float16 is converted by an instruction.
        tile: rows of activations that share each unpacked weight.
        threads: more than one, or every loop is serial.
    """

    lanes: int
    dot: Dot
    half: bool
    tile: int
    threads: bool = True

    @property
    def parts(self) -> int:
        """Vectors that 16 rows take."""
        return 16 // self.lanes

    @staticmethod
    def of(target: Any, *, threads: bool = True) -> Isa:
        """That of a TVM target of kind `llvm`."""

        def has(*features: str) -> bool:
            return all(target_has_features(f, target) for f in features)

        triple = str(target.attrs.get("mtriple", ""))
        if triple.startswith(("aarch64", "arm")):
            wide = triple.startswith(("aarch64", "arm64"))
            dot: Dot = "sdot" if wide and has("dotprod") else "generic"
            return Isa(4, dot, half=wide, tile=4, threads=threads)
        if has("avx512vnni", "avx512bw"):
            return Isa(16, "vnni512", half=True, tile=8, threads=threads)
        if has("avxvnni", "avx2"):
            return Isa(8, "vnni256", half=True, tile=4, threads=threads)
        if has("avx2", "f16c"):
            return Isa(8, "avx2", half=True, tile=4, threads=threads)
        return Isa(4, "generic", half=False, tile=4, threads=threads)


def block_sum(isa: Isa, start: Expr, codes: Sequence[Expr], values: Sequence[Expr]) -> Expr:
    """Sums of products along K for the rows of one vector: int32 x lanes.

    Args:
        start: int32 x lanes, what the sums begin from.
        codes: for each 4 along K, uint8 x (4 lanes), at most 15 each.
        values: for each 4 along K, the int8 activations as one int32.
    """
    n, parts = isa.lanes, list(zip(codes, values, strict=True))
    if isa.dot in ("vnni512", "vnni256"):
        name = f"llvm.x86.avx512.vpdpbusd.{32 * n}"
        total = start
        for code, four in parts:
            spread = T.reinterpret(f"int8x{4 * n}", T.broadcast(four, n))
            total = T.call_llvm_pure_intrin(
                f"int32x{n}", name, total, code, T.reinterpret(f"uint8x{4 * n}", spread)
            )
        return total
    if isa.dot == "sdot":
        total = start
        for code, four in parts:
            spread = T.reinterpret("int8x16", T.broadcast(four, 4))
            total = T.call_llvm_pure_intrin(
                "int32x4", "llvm.aarch64.neon.sdot.v4i32.v16i8", total,
                T.reinterpret("int8x16", code), spread,
            )  # fmt: skip
        return total
    total = start
    # 16-bit sums: eight products of a code (at most 14) and an activation (at most 127), twice
    # that where neighbours are added, fit; more are summed in turns.
    for i in range(0, len(parts), 8):
        some = parts[i : i + 8]
        total = total + (_pairs_avx2(n, some) if isa.dot == "avx2" else _fours(n, some))
    return total


def _pairs_avx2(n: int, parts: Sequence[tuple[Expr, Expr]]) -> Expr:
    pairs = None
    for code, four in parts:
        spread = T.reinterpret(f"int8x{4 * n}", T.broadcast(four, n))
        both = T.call_llvm_pure_intrin(
            f"int16x{2 * n}", "llvm.x86.avx2.pmadd.ub.sw",
            T.reinterpret(f"int8x{4 * n}", code), spread,
        )  # fmt: skip
        pairs = both if pairs is None else pairs + both
    ones = T.broadcast(T.int16(1), 2 * n)
    return T.call_llvm_pure_intrin(f"int32x{n}", "llvm.x86.avx2.pmadd.wd", pairs, ones)


def _fours(n: int, parts: Sequence[tuple[Expr, Expr]]) -> Expr:
    """16-bit products and sums, neighbours added by shifts: any target's vectors have those."""
    wide, sums = f"int16x{4 * n}", None
    for code, four in parts:
        spread = T.reinterpret(f"int8x{4 * n}", T.broadcast(four, n))
        product = T.cast(T.reinterpret(f"int8x{4 * n}", code), wide) * T.cast(spread, wide)
        sums = product if sums is None else sums + product
    sums = T.bind(sums)
    pairs = T.bind(_neighbours(sums, f"int32x{2 * n}", T.int32(16), 2 * n))
    return T.cast(_neighbours(pairs, f"int64x{n}", T.int64(32), n), f"int32x{n}")


def _neighbours(x: Expr, wider: str, bits: Expr, lanes: int) -> Expr:
    """The two halves of each element of `x` read as a wider one, added."""
    both, shift = T.reinterpret(wider, x), T.broadcast(bits, lanes)
    return T.shift_right(both, shift) + T.shift_right(T.shift_left(both, shift), shift)


def runs_here(target: Any) -> bool:
    """Whether this machine's CPU has all that the target's code may use."""
    needed = {str(f) for f in llvm_get_cpu_features(target)}
    own = Target({"kind": "llvm", "mcpu": str(llvm_get_system_cpu())})
    # Tuning hints are listed among the features; only instructions matter.
    return {f for f in needed if f in _INSTRUCTIONS} <= {str(f) for f in llvm_get_cpu_features(own)}


#: Names that the kernels' code may depend on.
_INSTRUCTIONS = (
    "avx", "avx2", "avx512bw", "avx512f", "avx512vl", "avx512vnni", "avxvnni", "f16c", "fma",
    "dotprod", "neon",
)  # fmt: skip
