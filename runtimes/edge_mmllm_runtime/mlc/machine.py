"""Which compiled libraries this machine can run."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: Where Linux lists what the CPU can do.
_CPUINFO = Path("/proc/cpuinfo")
#: Flags that compiled code may depend on, of x86 (`flags`) and ARM (`Features`).
_VECTORS = re.compile(r"(?:avx|fma|f16c|bmi|abm|movbe|sse4|ssse3|amx|neon|asimd|vfp|sve|fphp|i8mm)")


def machine_flags() -> tuple[str, ...]:
    """The CPU's flags that compiled code may depend on, sorted; empty where none are listed."""
    try:
        text = _CPUINFO.read_text(errors="replace")
    except OSError:
        return ()
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    words = found.group(1).split() if found else []
    return tuple(sorted({word for word in words if _VECTORS.match(word)}))


def runnable(needs: Mapping[str, Any]) -> bool:
    """Whether this machine has what a library needs.

    Args:
        needs: of the manifest's `engine_format.needs`: `machines`, names of `platform.machine()`,
            and `flags` of the CPU.
    """
    machines, flags = needs.get("machines", []), needs.get("flags", [])
    return platform.machine() in machines and set(flags) <= set(machine_flags())
