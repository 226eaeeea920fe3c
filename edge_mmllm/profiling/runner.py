"""Runs a plan: each test in a child of its own, each record written as soon as it is there."""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from edge_mmllm.errors import EdgeError
from edge_mmllm.profiling.job import Job, error_to_json, launch
from edge_mmllm.profiling.plan import Plan
from edge_mmllm.profiling.report_data import SCHEMA_VERSION

Launch = Callable[[Job], dict[str, Any]]
Record = dict[str, Any]
Progress = Callable[[str, int, int], None]


def run_plan(
    bundles: Sequence[str],
    plan: Plan,
    *,
    launch: Launch = launch,
    write: Callable[[Record], None] | None = None,
    progress: Progress | None = None,
    device: str | None = None,
) -> list[Record]:
    """Runs every test of every bundle.

    Args:
        bundles: their folders.
        launch: runs one job, see `job.launch`. A remote target brings its own.
        write: called with each record when it is there.
        progress: called with ("bench", tests done, tests in all).
        device: name of the device, for the records.

    Returns:
        The records, in the order they were run. One that failed has `status` `failed` and an
        `error`; the others go on.
    """
    jobs = plan.jobs(bundles)
    run, records = uuid.uuid4().hex[:12], []
    for number, job in enumerate(jobs):
        record = run_test(job, launch=launch, run=run, order=number, device=device)
        records.append(record)
        if write is not None:
            write(record)
        if progress is not None:
            progress("bench", number + 1, len(jobs))
    return records


def run_test(
    job: Job, *, launch: Launch = launch, run: str = "", order: int = 0, device: str | None = None
) -> Record:
    """One test as a record, whether it works or not."""
    started = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    known: Record = {
        "schema_version": SCHEMA_VERSION,
        "tool": "edge-mmllm",
        "name": job.name,
        "run": run,
        "order": order,
        "started_utc": started,
        "tool_version": _version(),
        "device": device,
        "test": test_name(job),
        "job": {k: v for k, v in job.to_json().items() if k not in ("bundle", "media", "name")},
    }
    try:
        told = launch(job)
    except EdgeError as error:
        counts = {"prompt_tokens": job.prompt_tokens, "new_tokens": job.new_tokens}
        return {**known, **counts, "status": "failed", "error": error_to_json(error)}
    return {**told, **known, "name": job.name or told.get("name"), "status": "ok"}


def test_name(job: Job) -> str:
    """A test's name, by which `compare` finds its partner: what was asked for, not the bundle."""
    parts = [f"{job.prompt_tokens}+{job.new_tokens}"]
    parts += [f"{name}:{len(files)}" for name, files in sorted(job.media.items())]
    if job.threads is not None:
        parts.append(f"t{job.threads}")
    if job.context is not None:
        parts.append(f"c{job.context}")
    if job.kernels != "auto":
        parts.append(job.kernels)
    if job.limits.memory_bytes is not None:
        parts.append(f"mem{job.limits.memory_bytes >> 20}M")
    if job.limits.cpus is not None:
        parts.append(f"cpus{job.limits.cpus}")
    return " ".join(parts)


@contextmanager
def jsonl_writer(path: str | os.PathLike[str]) -> Iterator[Callable[[Record], None]]:
    """Appends records to a file, each line whole or not at all."""
    with Path(path).open("a", encoding="utf-8") as file:

        def write(record: Record) -> None:
            file.write(line_of(record))
            file.flush()

        yield write


def line_of(record: Record) -> str:
    """A record as a line of JSON; what is not finite becomes null."""
    return json.dumps(_finite(record), allow_nan=False, separators=(",", ":")) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _version() -> str | None:
    try:
        return version("edge-mmllm")
    except PackageNotFoundError:
        return None
