"""Compiles TIR functions to an object file of plain C functions, without TVM's packed calls.

`tvm.compile` gives functions that unpack and check a list of tensors and need the TVM runtime.
Here every function keeps the signature `int32_t f(void *, ...)`: the addresses of its buffers,
aligned to 64 bytes. It returns 0, or -1 where an assertion of the kernel failed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tvm
from tvm import tirx
from tvm.tirx.build import codegen_build

from edge_mmllm_export.standalone.plan import ALIGNMENT

#: They want functions that `MakePackedAPI` has passed; `_plain` comes after, then they run.
_LATER = ("tirx.BF16StorageLegalize", "tirx.FP8StorageLegalize")


def compile_kernels(kernels: Mapping[str, Any], target: Any, path: Path) -> None:
    """Write `path`, an object file with a C function for each kernel, under its symbol."""
    host = target.with_host(target)
    private = {tvm.ir.GlobalVar(name): _private(f) for name, f in kernels.items()}
    module = tirx.transform.BindTarget(host)(tvm.IRModule(private))
    lowering, finalize, _ = tirx.get_default_tir_pipeline(target)
    with target:
        with tvm.transform.PassContext(opt_level=3, disabled_pass=list(_LATER)):
            module = lowering(module)
        plain = {
            tvm.ir.GlobalVar(gv.name_hint): _plain(gv.name_hint, function)
            for gv, function in module.functions.items()
        }
        legal = tvm.transform.Sequential(
            [tirx.transform.FP8StorageLegalize(), tirx.transform.BF16StorageLegalize()]
        )
        module = finalize()(legal(tvm.IRModule(plain)))
        codegen_build(module, target).write_to_file(str(path), "o")


def _private(function: Any) -> Any:
    """Without a symbol: what `MakePackedAPI` leaves as it is."""
    if function.attrs is not None and "global_symbol" in function.attrs:
        return function.without_attr("global_symbol")
    return function


def _plain(name: str, function: Any) -> Any:
    """The lowered function over bare addresses."""
    inner = function.body
    # Where workspace is allocated: the CPU, 1 in DLPack. Around the body alone, for workspace is
    # freed at the end of such a scope, which must come before the return.
    for key, value in (("device_type", 1), ("device_id", 0)):
        inner = tirx.AttrStmt("default", key, tirx.const(value, "int32"), inner)
    pointers: list[Any] = []
    body = [inner, tirx.Return(tirx.const(0, "int32"))]
    for parameter in reversed(function.params):
        pointer = tirx.Var(f"{parameter.name}_", tvm.ir.PointerType(parameter.ty.dtype, "global"))
        pointers.insert(0, pointer)
        body.insert(0, tirx.DeclBuffer(parameter, data=pointer))
    whole: Any = tirx.SeqStmt(body)
    for parameter in function.params:
        aligned = tirx.const(ALIGNMENT, "int32")
        whole = tirx.AttrStmt(parameter, "storage_alignment", aligned, whole)
    result = tirx.PrimFunc(pointers, whole, tvm.ir.PrimType("int32"), function.attrs)
    return result.with_attr("global_symbol", name)
