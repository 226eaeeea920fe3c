"""`edge-mmllm doctor`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from edge_mmllm.cli._options import json_option
from edge_mmllm.cli._output import emit, grid, size_text, table

if TYPE_CHECKING:
    from edge_mmllm.profiling.doctor import DoctorReport


@click.command("doctor")
@json_option
def command(as_json: bool) -> None:
    """Show what is installed, what is missing, and what the machine offers."""
    from edge_mmllm.profiling.doctor import doctor

    report = doctor()
    if as_json:
        emit(report.to_json())
    else:
        _show(report)


def _show(report: DoctorReport) -> None:
    grid(
        ("package", "version", "extra", "purpose", "to do"),
        [
            (
                p.package,
                p.version or "missing",
                p.extra or "-",
                p.purpose,
                ": ".join(part for part in (p.problem, p.fix) if part),
            )
            for p in report.packages
        ],
    )
    machine, cgroup = report.machine, report.cgroup
    quota = "no limit" if cgroup.cpus is None else f"{cgroup.cpus:g} CPUs"
    limit = "no limit" if cgroup.memory_bytes is None else size_text(cgroup.memory_bytes)
    table(
        [
            ("edge-mmllm", report.edge_mmllm or "not installed as a package"),
            ("Python", f"{report.python} ({report.implementation})"),
            ("system", f"{machine.system}, {machine.architecture}"),
            ("CPU", machine.cpu_model or "unknown"),
            ("CPU features", ", ".join(machine.cpu_features) or "unknown"),
            ("CPUs", f"{machine.logical_cpus} logical, {machine.affinity_cpus} for this process, "
             f"{machine.physical_cores or 'unknown'} physical behind them"),
            ("cgroup", "none" if cgroup.version is None
             else f"version {cgroup.version}: {quota}; memory: {limit}"),
            ("default threads", machine.default_threads),
            ("memory", f"{size_text(machine.memory_bytes)}, "
             f"{size_text(machine.available_bytes)} available"),
            ("load average", machine.load_average),
            ("can run bundles", "yes" if report.can_run else "no"),
            ("can export", "yes" if report.can_export else "no"),
        ]
    )  # fmt: skip
