"""Every error the SDK raises on purpose.

    EdgeError
    ├── UsageError               the call itself is wrong (CLI exit 2; all others exit 1)
    ├── MissingDependency        an extra is not installed; carries the exact pip line
    ├── CheckpointError          the source checkpoint cannot be used
    │   ├── CorruptCheckpoint    truncated, overlapping, absurd counts
    │   ├── UnsafeCheckpoint     asks to run code (pickle opcodes off the allow list)
    │   ├── TensorMismatch       missing, unexpected or misshapen tensors, all listed at once
    │   ├── NonFiniteWeights     NaN or inf
    │   └── UnsupportedArchitecture
    ├── ExportError              the export cannot be done
    │   ├── OutputExists         refuses to overwrite without --force
    │   ├── OutOfSpace           the disk is, or would be, full
    │   ├── MemoryLimitExceeded  --max-ram would not hold
    │   └── QualityGateFailed    the artefact disagrees with the oracle
    ├── BundleError              a bundle cannot be used
    │   ├── CorruptBundle        missing file, wrong size or hash, malformed manifest
    │   ├── UnsafeBundle         a path that leaves the folder, a symlink
    │   ├── UnsupportedBundle    a format version or engine this release does not know
    │   └── TemplateError        a chat template failed or tried to leave the sandbox
    ├── MediaError               a picture, video or sound cannot be used
    │   ├── CorruptMedia         damaged, cut short or empty
    │   ├── UnsupportedMedia     a format or a shape that is not read; says what to convert to
    │   └── MediaTooLarge        past the settings' limit (a decompression bomb); not decoded
    ├── DoesNotFit               a run needs more memory than it is allowed
    ├── KernelError              the native kernels cannot be built or are not there
    └── SessionError             a running session cannot go on
        ├── ContextFull          no room for the tokens asked for
        ├── SessionClosed
        ├── StateMismatch        a snapshot of another bundle
        ├── CorruptState         a state file that is damaged, or none at all
        └── Cancelled            a prefill was cancelled between chunks

A message says what, where, expected, found, and the fix: give each as its own
argument and `str(error)` lays them out.
"""

from __future__ import annotations

from typing import Any


class EdgeError(Exception):
    """Base of the tree. `what` is one sentence; the rest are optional details."""

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        expected: str | None = None,
        found: str | None = None,
        fix: str | None = None,
    ) -> None:
        self.what, self.where = what, where
        self.expected, self.found, self.fix = expected, found, fix
        lines = [what]
        for label in ("where", "expected", "found", "fix"):
            value = getattr(self, label)
            if value:
                lines.append(f"  {label}: {value}")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[Any, ...]:
        # The default would call the class with the message alone, which fails for those with
        # arguments of their own: an error must survive the way out of a child process.
        return _restore, (type(self), self.args, self.__dict__.copy())


def _restore(kind: type[EdgeError], args: tuple[Any, ...], state: dict[str, Any]) -> EdgeError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(state)
    return error


class UsageError(EdgeError):
    """The call itself is wrong: an unknown option value, two options that exclude each other."""


class MissingDependency(EdgeError):
    """A package of an extra is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        self.package, self.extra = package, extra
        super().__init__(f"{package} is not installed", fix=f"pip install 'edge-mmllm[{extra}]'")


class CheckpointError(EdgeError):
    """The source checkpoint cannot be used."""


class CorruptCheckpoint(CheckpointError):
    """Truncated file, overlapping ranges, absurd counts, malformed header."""


class UnsafeCheckpoint(CheckpointError):
    """The file asks to execute code; nothing of it was executed."""


class TensorMismatch(CheckpointError):
    """Missing, unexpected or misshapen tensors; the message lists them all."""


class NonFiniteWeights(CheckpointError):
    """A weight holds NaN or inf."""


class UnsupportedArchitecture(CheckpointError):
    """No definition for this architecture; the message names the nearest supported one."""


class ExportError(EdgeError):
    """The export cannot be done."""


class OutputExists(ExportError):
    """The output exists and --force was not given."""


class OutOfSpace(ExportError):
    """The disk is full, or would be."""


class MemoryLimitExceeded(ExportError):
    """`--max-ram` cannot be held; the message says what it would take."""


class QualityGateFailed(ExportError):
    """The exported artefact disagrees with the oracle beyond its scheme's thresholds."""


class BundleError(EdgeError):
    """A bundle cannot be used."""


class CorruptBundle(BundleError):
    """Missing file, wrong size or hash, malformed manifest."""


class UnsafeBundle(BundleError):
    """A path that leaves the bundle's folder, or a symbolic link."""


class UnsupportedBundle(BundleError):
    """A format version or an engine that this release does not know."""


class TemplateError(BundleError):
    """A chat template failed, or tried to leave the sandbox."""


class MediaError(EdgeError):
    """A picture, video or sound cannot be used."""


class CorruptMedia(MediaError):
    """Damaged, cut short or empty."""


class UnsupportedMedia(MediaError):
    """A format or a shape that is not read; the message says what to convert it to."""


class MediaTooLarge(MediaError):
    """More pixels, frames or samples than the settings allow; nothing of it was decoded."""


class DoesNotFit(EdgeError):
    """A run needs more memory than it is allowed, by a limit or by the machine."""


class KernelError(EdgeError):
    """The native kernels cannot be built, or were asked for and are not there."""


class SessionError(EdgeError):
    """A running session cannot go on."""


class ContextFull(SessionError):
    """The tokens asked for do not fit the session's context.

    Attributes:
        position: tokens already in the state.
        requested: tokens that were to be added.
        capacity: tokens the session can hold.
    """

    def __init__(self, position: int, requested: int, capacity: int) -> None:
        self.position, self.requested, self.capacity = position, requested, capacity
        super().__init__(
            "the context is full",
            expected=f"at most {capacity - position} more tokens (capacity {capacity})",
            found=f"{requested} tokens at position {position}",
            fix="load(..., context=N) with a larger N, shorten the prompt, or reset()",
        )


class SessionClosed(SessionError):
    """The session was closed."""


class StateMismatch(SessionError):
    """A snapshot that belongs to another bundle or another context."""


class CorruptState(SessionError):
    """A `.state` file that is damaged, cut short, or no state file at all."""


class Cancelled(SessionError):
    """A long prefill was cancelled between two chunks; the state is as before it began."""
