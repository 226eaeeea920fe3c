"""Child processes that import what this one would, and nothing from where it happens to run."""

from __future__ import annotations

import ctypes
import signal
import sys

#: Source: linux/prctl.h.
_PR_SET_PDEATHSIG = 1


def python_command(code: str) -> list[str]:
    """The command that runs `code` in a new Python with this one's module path.

    `python -m` and `python -c` put the working folder first on the path: started in a folder
    that somebody else filled, a downloaded checkpoint's say, they would run its `numpy.py`.
    """
    return [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; {code}"]


def die_with_parent() -> None:
    """Called by a child. On Linux, a parent that is killed (SIGKILL) takes it along."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
