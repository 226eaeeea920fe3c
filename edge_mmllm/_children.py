"""Child processes that import what this one would, and nothing from where it happens to run."""

from __future__ import annotations

import sys


def python_command(code: str) -> list[str]:
    """The command that runs `code` in a new Python with this one's module path.

    `python -m` and `python -c` put the working folder first on the path: started in a folder
    that somebody else filled, a downloaded checkpoint's say, they would run its `numpy.py`.
    """
    return [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; {code}"]
