"""`edge-mmllm imatrix`."""

from __future__ import annotations

from pathlib import Path

import click

from edge_mmllm.cli._errors import clean_termination
from edge_mmllm.cli._options import json_option
from edge_mmllm.cli._output import emit, progress_bars, size_text, table


@click.command("imatrix")
@click.argument("source", metavar="SRC")
@click.option("--text", required=True, metavar="FILE", help="A text like those of its later use.")
@click.option("--out", required=True, metavar="FILE", help="The matrix, in llama.cpp's form.")
@click.option("--chunks", type=click.IntRange(1), default=20, show_default=True,
              help="Pieces of 512 tokens of the text.")  # fmt: skip
@click.option("--lora", metavar="DIR", help="Merge a LoRA adapter in (PEFT layout).")
@click.option("--force", is_flag=True, help="Replace an existing matrix.")
@json_option
def command(
    source: str, text: str, out: str, chunks: int, lora: str | None, force: bool, as_json: bool
) -> None:
    """Compute an importance matrix for GGUF's K and I types.

    SRC is as of `export`. The oracle reads the text and adds up what goes into each layer.
    """
    from edge_mmllm_export.gguf.imatrix_collect import Calibration, compute_imatrix  # noqa: TID251

    with clean_termination(), progress_bars(shown=not as_json) as progress:
        matrix = compute_imatrix(
            source, out, Calibration(text, chunks), lora=lora, force=force,
            progress=lambda done, of: progress("read", done, of),
        )  # fmt: skip
    size = Path(out).stat().st_size
    if as_json:
        emit({"imatrix": out, "size_bytes": size, "entries": len(matrix.entries),
              "chunks": matrix.chunk_count, "chunk_tokens": matrix.chunk_size})  # fmt: skip
        return
    rows: list[tuple[str, object]] = [
        ("tensors", len(matrix.entries)),
        ("text read", f"{matrix.chunk_count} pieces of {matrix.chunk_size} tokens"),
        ("size", size_text(size)),
        ("next", f"edge-mmllm export {source} --format gguf --gguf-type Q4_K_M --imatrix {out}"),
    ]
    table(rows, f"wrote {out}")
