"""`edge-mmllm adapter`."""

from __future__ import annotations

from pathlib import Path

import click

from edge_mmllm.cli._errors import clean_termination
from edge_mmllm.cli._options import json_option
from edge_mmllm.cli._output import emit, size_text, table


@click.command("adapter")
@click.argument("source", metavar="SRC")
@click.option("--lora", required=True, metavar="DIR", help="The adapter's folder (PEFT layout).")
@click.option("--out", required=True, metavar="FILE", help="The GGUF file to write.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@json_option
def command(source: str, lora: str, out: str, force: bool, as_json: bool) -> None:
    """Make a GGUF file of a LoRA adapter, for `run --lora`.

    SRC is the checkpoint that the adapter was trained on, as of `export`. The GGUF export of that
    checkpoint, of any type, then runs with it: `run MODEL --lora FILE`.
    """
    from edge_mmllm_export.gguf.adapter import write_adapter  # noqa: TID251

    with clean_termination():
        tensors = write_adapter(source, lora, out, force=force)
    size = Path(out).stat().st_size
    if as_json:
        emit({"adapter": out, "size_bytes": size, "tensors": len(tensors)})
        return
    rows: list[tuple[str, object]] = [
        ("tensors changed", len(tensors)),
        ("size", size_text(size)),
        ("next", f"edge-mmllm run MODEL --lora {out} --prompt ..."),
    ]
    table(rows, f"wrote {out}")
