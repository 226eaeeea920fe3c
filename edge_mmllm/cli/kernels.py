"""`edge-mmllm kernels`."""

from __future__ import annotations

import click

from edge_mmllm.cli._options import json_option
from edge_mmllm.cli._output import emit, table


@click.command("kernels")
@click.option("--build", "wants_build", is_flag=True, help="Compile them for this machine.")
@click.option(
    "--compiler", metavar="CXX", help="The C++ compiler; default: $CXX, c++, g++, clang++."
)
@json_option
def command(wants_build: bool, compiler: str | None, as_json: bool) -> None:
    """Build the native kernels, which are faster, or show whether they are there.

    Once built, they are used by every bundle that carries a program for them;
    EDGE_MMLLM_KERNELS=stock turns them off.
    """
    from edge_mmllm_runtime import native

    place = native.build(compiler) if wants_build else native.library()
    found = {
        "library": str(place) if place else None,
        "compiler": compiler or native.compiler(),
    }
    if as_json:
        emit(found)
        return
    table(
        [
            ("library", found["library"] or "not built: edge-mmllm kernels --build"),
            ("compiler", found["compiler"] or "none found"),
        ]
    )
