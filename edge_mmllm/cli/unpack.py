"""`edge-mmllm unpack`."""

from __future__ import annotations

import click

from edge_mmllm.cli._errors import clean_termination
from edge_mmllm.cli._options import json_option
from edge_mmllm.cli._output import emit, say, size_text


@click.command("unpack")
@click.argument("file", metavar="FILE")
@click.argument("out", metavar="DIR")
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@json_option
def command(file: str, out: str, force: bool, as_json: bool) -> None:
    """Unpack an .edge file, checking every byte.

    Appears as DIR whole, or not at all.
    """
    from edge_mmllm.bundle import unpack_bundle

    with clean_termination():
        bundle = unpack_bundle(file, out, force=force)
    if as_json:
        emit({"bundle": str(bundle.root), "bundle_sha256": bundle.sha256,
              "size_bytes": bundle.size_bytes})  # fmt: skip
    else:
        say(f"wrote {bundle.root} ({size_text(bundle.size_bytes)})")
