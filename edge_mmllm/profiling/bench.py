"""`bench`: speed and memory of one bundle on this device. A plain call of `profile`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from edge_mmllm.profiling.profile import ProfileOptions, Progress, profile
from edge_mmllm.profiling.report_data import Report

__all__ = ["BenchReport", "bench"]

BenchReport = Report


def bench(
    bundle: str | os.PathLike[str],
    *,
    prompt_tokens: int = 512,
    new_tokens: int = 64,
    threads: int | None = None,
    context: int | None = None,
    repetitions: int = 5,
    media: Mapping[str, Sequence[Any]] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Measures a bundle in this process. Run it in a fresh one: memory is the process's.

    Args:
        prompt_tokens, new_tokens, repetitions, threads, context, media: see `ProfileOptions`.
        progress: see `profile`.

    Raises:
        UsageError, EdgeError: as `profile`.
    """
    options = ProfileOptions(
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repetitions=repetitions,
        threads=threads,
        context=context,
        media=media,
    )
    return profile(bundle, options, progress=progress)
