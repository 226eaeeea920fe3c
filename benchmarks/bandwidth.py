"""How fast this machine reads memory: the floor under a decode step.

Each of N threads multiplies a block of 256 MB with itself (`numpy.dot`, one BLAS thread each, which
releases the GIL): one read for two operations, far beyond any cache. Prints GB/s as JSON, best of
several passes, for 1 thread and for N.
"""

from __future__ import annotations

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

os.environ["OPENBLAS_NUM_THREADS"] = "1"

import numpy as np

BLOCK = 256 << 20


def read_gb_per_s(threads: int, passes: int = 6) -> float:
    """Best rate at which `threads` threads read their blocks together."""
    blocks = [np.ones(BLOCK // 4, np.float32) for _ in range(threads)]
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(passes):
            started = time.perf_counter()
            list(pool.map(lambda b: b.dot(b), blocks))
            best = max(best, threads * BLOCK / (time.perf_counter() - started) / 1e9)
    return best


if __name__ == "__main__":
    counts = sorted({1, int(sys.argv[1])})
    print(json.dumps({str(n): round(read_gb_per_s(n), 1) for n in counts}))
