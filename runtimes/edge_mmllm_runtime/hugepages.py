"""Large pages for the weights onnxruntime repacks into anonymous memory.

A decode step reads every weight once, so on 4 kB pages it also misses the TLB once a page. Linux
offers 2 MB pages on request (`transparent_hugepage/enabled` = `madvise`, the usual default);
onnxruntime does not ask for them. Asking for it, for the memory that loading a model has added
and for nothing else, makes a step 6 to 7 % faster (SmolLM2 int4; benchmarks/speed.py).
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_HUGE = 2 << 20
#: `MADV_COLLAPSE` (Linux 6.1): gather the pages now instead of in the background.
_MADV_COLLAPSE = 25


@contextmanager
def huge_pages(maps: Path = Path("/proc/self/maps")) -> Iterator[None]:
    """Asks for huge pages for anonymous memory that appears inside the block.

    Advice only: where the system has no such thing, nothing happens.
    """
    before = list(_anonymous(maps))
    yield
    for start, stop in _added(before, _anonymous(maps)):
        _advise(start, stop)


def give_back() -> None:
    """Has glibc return what was freed to the system; elsewhere nothing happens."""
    if sys.platform.startswith("linux"):
        with suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)


def _anonymous(maps: Path) -> Iterator[tuple[int, int]]:
    """Address ranges `(start, stop)` of private writable memory without a file: mappings of
    their own, and the heap, where the smaller weights lie."""
    if not sys.platform.startswith("linux"):
        return
    with suppress(OSError, ValueError):
        for line in maps.read_text().splitlines():
            fields = line.split(maxsplit=5)
            if fields[1] == "rw-p" and fields[4] == "0" and fields[5:] in ([], ["[heap]"]):
                start, _, stop = fields[0].partition("-")
                yield int(start, 16), int(stop, 16)


def _added(
    before: list[tuple[int, int]], after: Iterator[tuple[int, int]]
) -> Iterator[tuple[int, int]]:
    """What `after` has and `before` had not, cut to whole huge pages."""
    for start, stop in after:
        pieces = [(start, stop)]
        for old_start, old_stop in before:
            pieces = [
                part
                for a, b in pieces
                for part in ((a, min(b, old_start)), (max(a, old_stop), b))
                if part[0] < part[1]
            ]
        for a, b in pieces:
            a, b = -(-a // _HUGE) * _HUGE, b // _HUGE * _HUGE
            if a < b:
                yield a, b


def _advise(start: int, stop: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    for advice in (getattr(mmap, "MADV_HUGEPAGE", 14), _MADV_COLLAPSE):
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), advice)
