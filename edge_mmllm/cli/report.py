"""`edge-mmllm report`."""

from __future__ import annotations

import click

from edge_mmllm.cli._options import json_option
from edge_mmllm.cli._output import emit, say


@click.command("report")
@click.argument("results", nargs=-1, required=True, metavar="RESULTS...")
@click.option("--html", metavar="FILE", help="Write one self-contained page.")
@click.option("--md", "markdown", metavar="FILE", help="Write Markdown, for a README.")
@click.option("--png", metavar="DIR", help="Write the figures as PNG files (matplotlib).")
@click.option("--title", metavar="TEXT", help="Of the report.")
@json_option
def command(
    results: tuple[str, ...],
    html: str | None,
    markdown: str | None,
    png: str | None,
    title: str | None,
    as_json: bool,
) -> None:
    """Make a page or Markdown of results.

    RESULTS are files of `bench --out` or `bench --json`, or llama-bench's JSON (`-o json`).
    Without --html, --md and --png, the Markdown goes to stdout.
    """
    from edge_mmllm.profiling.report import TITLE, report, to_markdown

    found = report(results, html=html, markdown=markdown, png=png, title=title or TITLE)
    if as_json:
        failed = sum(result.failed for result in found)
        emit(
            {
                "results": len(found),
                "failed": failed,
                "html": html,
                "markdown": markdown,
                "png": png,
            }
        )
    elif html is None and markdown is None and png is None:
        click.echo(to_markdown(title or TITLE, found).encode("utf-8", "replace"), nl=False)
    for written in (html, markdown, png):
        if written is not None:
            say(f"wrote {written}")
