"""One test in a process of its own.

A job goes to the child as JSON on its standard input, its record comes back as the last line of
its standard output: so a job can run wherever a command can, on this machine or another.

    {"bundle": "...", "prompt_tokens": 512, ...}  ->  {"schema_version": 2, ...} or {"error": {...}}
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from edge_mmllm._children import python_command
from edge_mmllm.errors import EdgeError, UsageError
from edge_mmllm.profiling import limits as limits_
from edge_mmllm.profiling.limits import Limits

__all__ = ["Job", "error_from_json", "error_to_json", "launch", "main", "read_answer", "run_job"]

#: Called with (generations done, generations in all).
Steps = Callable[[int, int], None]

_PARTS = ("where", "expected", "found", "fix")
_MAIN = "from edge_mmllm.profiling.job import main; main()"


@dataclass(frozen=True)
class Job:
    """What one child measures.

    Attributes:
        bundle: its folder, where the child runs.
        name: what reports call it.
        prompt_tokens, new_tokens, repetitions, threads, context, kernels, sustained_s, operators:
            see `profile.ProfileOptions`.
        media: modality -> files, where the child runs.
        limits: memory and CPUs that the child may use.
    """

    bundle: str
    name: str = ""
    prompt_tokens: int = 512
    new_tokens: int = 64
    repetitions: int = 5
    threads: int | None = None
    context: int | None = None
    kernels: str = "auto"
    media: dict[str, tuple[str, ...]] = field(default_factory=dict)
    sustained_s: float = 0.0
    operators: bool = False
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "new_tokens", "repetitions"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1", found=str(getattr(self, name)))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Job:
        """Reads `to_json`. Raises: UsageError for a field that is not known."""
        unknown = set(document) - {f.name for f in fields(cls)}
        if unknown:
            raise UsageError("unknown fields of a job", found=", ".join(sorted(unknown)))
        given = dict(document)
        given["limits"] = Limits(**(given.get("limits") or {}))
        given["media"] = {name: tuple(files) for name, files in given.get("media", {}).items()}
        return cls(**given)


def run_job(job: Job, steps: Steps | None = None) -> dict[str, Any]:
    """Measures in this process, under the job's limits from now on. Returns one record.

    Raises:
        EdgeError: as `profile`; `DoesNotFit` where memory ran out.
    """
    if job.limits.any:
        limits_.apply(job.limits)
    from edge_mmllm.profiling.profile import ProfileOptions, profile

    options = ProfileOptions(
        prompt_tokens=job.prompt_tokens,
        new_tokens=job.new_tokens,
        repetitions=job.repetitions,
        threads=job.threads,
        context=job.context,
        kernels=job.kernels,
        media=job.media or None,
        sustained_s=job.sustained_s,
        operators=job.operators,
    )
    progress = None if steps is None else (lambda _, done, total: steps(done, total))
    report = profile(job.bundle, options, progress=progress)
    return {"name": job.name or os.path.basename(os.path.normpath(job.bundle)), **report.to_json()}  # noqa: PTH119


def launch(job: Job, steps: Steps | None = None) -> dict[str, Any]:
    """Runs a job in a child of this process.

    Raises:
        EdgeError: what the child raised, of the same type; one that says how it ended, where it
            said nothing.
    """
    child = subprocess.Popen(
        python_command(_MAIN),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
    with child:
        try:
            out, said = child.communicate(json.dumps(job.to_json()))
        except BaseException:
            child.kill()
            raise
    return read_answer(out, child.returncode, said, job)


def read_answer(out: str, status: int, said: str, job: Job) -> dict[str, Any]:
    """What a child's output means.

    Args:
        out, said: its standard output and error.
        status: of its end; negative for a signal.

    Raises:
        EdgeError: see `launch`.
    """
    lines = out.strip().splitlines()
    try:
        document: Any = json.loads(lines[-1]) if lines else None
    except ValueError:
        document = None
    if isinstance(document, dict) and "error" in document:
        raise error_from_json(document["error"])
    if status == 0 and isinstance(document, dict):
        return document
    limits_.ended(status, said, job.limits, job.bundle)


def error_to_json(error: EdgeError) -> dict[str, str | None]:
    """An error as a record carries it."""
    parts = {name: getattr(error, name) for name in _PARTS}
    return {"type": type(error).__name__, "what": error.what, **parts}


def error_from_json(document: Mapping[str, Any]) -> EdgeError:
    """The error again, of the same type where this release knows it."""
    kind = _kinds(EdgeError).get(str(document.get("type")), EdgeError)
    made: EdgeError = EdgeError.__new__(kind)
    parts = {n: None if document.get(n) is None else str(document[n]) for n in _PARTS}
    EdgeError.__init__(made, str(document.get("what")), **parts)
    return made


def _kinds(kind: type[EdgeError]) -> dict[str, type[EdgeError]]:
    """The error tree by name, with what modules of their own added to it."""
    found = {kind.__name__: kind}
    for below in kind.__subclasses__():
        found |= _kinds(below)
    return found


def _told(error: Exception, job: Job | None) -> EdgeError:
    """An error of the child as one of ours."""
    text = f"{type(error).__name__}: {error}"
    if job is not None and limits_.says_no_memory(text):
        return limits_.does_not_fit(job.limits, text, job.bundle)
    return error if isinstance(error, EdgeError) else EdgeError(str(error))


def main() -> None:
    """The child: a job on standard input, a record or an error on standard output."""
    job: Job | None = None
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is not part of the answer
    try:
        job = Job.from_json(json.load(sys.stdin))
        answer: dict[str, Any] = run_job(job)
    except (EdgeError, OSError, MemoryError) as error:
        answer = {"error": error_to_json(_told(error, job))}
    except KeyboardInterrupt:
        sys.exit(130)
    print(json.dumps(answer), file=output, flush=True)
