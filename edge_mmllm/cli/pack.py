"""`edge-mmllm pack`."""

from __future__ import annotations

import click

from edge_mmllm.cli._errors import clean_termination
from edge_mmllm.cli._options import json_option
from edge_mmllm.cli._output import emit, say, size_text


@click.command("pack")
@click.argument("bundle", metavar="BUNDLE")
@click.argument("out", metavar="FILE")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@json_option
def command(bundle: str, out: str, force: bool, as_json: bool) -> None:
    """Pack a bundle's folder into one .edge file.

    For transport: engines read the folder. Every hash is checked on the way.
    """
    from edge_mmllm.bundle import pack_bundle

    with clean_termination():
        made = pack_bundle(bundle, out, force=force)
    size = made.stat().st_size
    if as_json:
        emit({"file": str(made), "size_bytes": size})
    else:
        say(f"wrote {made} ({size_text(size)})")
