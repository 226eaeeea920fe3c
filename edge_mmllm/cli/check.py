"""`edge-mmllm check`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from edge_mmllm.cli._options import json_option, threads_option
from edge_mmllm.cli._output import emit, grid, say, size_text, table

if TYPE_CHECKING:
    from edge_mmllm_runtime.check import CheckReport


@click.command("check")
@click.argument("bundle", metavar="BUNDLE")
@threads_option
@json_option
def command(bundle: str, threads: int | None, as_json: bool) -> None:
    """Check a bundle's files and its answers on this device.

    Every file's hash first; then the golden vectors, which say what the model answered where it
    was exported. Exit status 1 where anything is wrong. Needs no network.
    """
    from edge_mmllm_runtime.check import check

    report = check(bundle, threads=threads)
    if as_json:
        emit(report.to_json())
    else:
        _show(report)
    if not report.ok:
        sys.exit(1)


def _show(report: CheckReport) -> None:
    if report.passes:
        heads = ("golden vectors", "positions", "clear", "same best token", "KL (nats)", "verdict")
        rows = [
            (
                p.name,
                p.positions,
                p.clear_positions,
                "-" if p.top1_agreement_clear is None else f"{p.top1_agreement_clear:.1%}",
                "-" if p.kl_mean is None else f"{p.kl_mean:.2e}",
                "; ".join(p.breaches) or "ok",
            )
            for p in report.passes
        ]
        grid(heads, rows)
    engine = f"{report.engine} {report.engine_version}, {report.threads} threads"
    hashes = f"{len(report.problems)} wrong" if report.problems else "ok"
    table(
        [
            ("files", f"{report.files}, {size_text(report.size_bytes)}, hashes {hashes}"),
            ("not listed", ", ".join(report.extra) or None),
            ("engine", engine if report.engine else None),
            ("note", report.note),
        ]
    )
    for problem in report.problems:
        say(f"error: {problem}")
    say("the bundle is sound" if report.ok else "the bundle failed its check")
