"""What one machine was measured to do, so that `fit` predicts it: kept in the user's cache.

    CACHE/fit.json        CACHE: $EDGE_MMLLM_CACHE, else $XDG_CACHE_HOME/edge-mmllm, ~/.cache/...

A calibration holds how fast the threads read memory, and of each kind of kernels a rate of weights
and the cost of a layer, solved from decode steps of the bundles it was given (least squares on
relative errors). It belongs to one CPU and one number of threads.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edge_mmllm.errors import UsageError
from edge_mmllm.profiling.facts import Facts, bundle_facts
from edge_mmllm.profiling.machine import default_threads, read_machine
from edge_mmllm.profiling.probe import Probe, ProbeRequest, probe

_VERSION = 1
_BLOCK_BYTES = 64 << 20
_READ_S = 3.0
_PROMPT_TOKENS, _NEW_TOKENS, _ROUNDS = 64, 96, 3


@dataclass(frozen=True)
class Rate:
    """Decode speed of one kind of kernels here.

    Attributes:
        bytes_per_s: at which a step goes through its weights and state.
        layer_us: what a layer costs beside, in units of its architecture's `layer_units`.
        bundles: what it was solved from.
    """

    bytes_per_s: float
    layer_us: float
    bundles: tuple[str, ...]


@dataclass(frozen=True)
class Calibration:
    """One machine's.

    Attributes:
        cpu, threads: whose.
        read_bytes_per_s: at which all threads together read memory.
        cache_bytes: its last-level cache, which keeps that much of the weights; 0 unknown.
        rates: `native`, `stock` -> its rate; only what was measured.
        load_average: before and after.
        wall_s: what it took.
    """

    cpu: str
    threads: int
    read_bytes_per_s: float
    cache_bytes: int
    rates: dict[str, Rate]
    load_average: tuple[float | None, float | None]
    wall_s: float
    created_utc: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"version": _VERSION, **asdict(self)}


def calibration_file() -> Path:
    """Where this user's calibration lies, or would."""
    asked = os.environ.get("EDGE_MMLLM_CACHE")
    if asked:
        return Path(asked) / "fit.json"
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "edge-mmllm" / "fit.json"


def load_calibration(file: Path | None = None) -> Calibration | None:
    """This machine's calibration; None where there is none, or another machine's."""
    try:
        found = json.loads((file or calibration_file()).read_bytes())
        if found.pop("version") != _VERSION or found["cpu"] != _cpu():
            return None
        rates = {
            name: Rate(r["bytes_per_s"], r["layer_us"], tuple(r["bundles"]))
            for name, r in found.pop("rates").items()
        }
        before, after = found.pop("load_average")
        return Calibration(rates=rates, load_average=(before, after), **found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def store_calibration(made: Calibration, file: Path | None = None) -> Path:
    """Writes it, whole or not at all."""
    place = file or calibration_file()
    place.parent.mkdir(parents=True, exist_ok=True)
    number, name = tempfile.mkstemp(dir=place.parent, prefix=".fit-")
    partial = Path(name)
    try:
        with os.fdopen(number, "w", encoding="utf-8") as stream:
            json.dump(made.to_json(), stream, indent=2)
        partial.replace(place)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return place


def calibrate(
    bundles: Sequence[str | os.PathLike[str]],
    *,
    threads: int | None = None,
    kernels: Sequence[str] = ("native", "stock"),
    progress: Callable[[str, int, int], None] | None = None,
) -> Calibration:
    """Measures this machine with memory reads and with decode steps of `bundles`.

    Two bundles of different size or more tell weights from layers; one gives the rate alone, with
    the layers' cost as it is on the machine the model was made on.

    Raises:
        UsageError: a rate cannot be solved for.
        EdgeError: as `probe`.
    """
    threads = threads or default_threads()
    started, before = time.monotonic(), read_machine().load_average
    read = read_rate(threads)
    facts = [bundle_facts(path) for path in bundles]
    tried = [k for k in kernels if k == "stock" or _built()]
    total, done = _ROUNDS * len(tried) * len(facts), 0
    steps: dict[tuple[str, int], list[Probe]] = {}
    for _ in range(_ROUNDS):  # by turns: a disturbance hits all alike
        for kind in tried:
            for i, path in enumerate(bundles):
                if kind == "stock" or facts[i].native:
                    request = ProbeRequest(
                        os.fspath(path), _PROMPT_TOKENS, _NEW_TOKENS, threads, None, kind
                    )
                    steps.setdefault((kind, i), []).append(probe(request))
                done += 1
                if progress is not None:
                    progress("calibrate", done, total)
    rates = {}
    for kind in tried:
        points = [
            (facts[i], min(p.step_best_ms for p in found) / 1e3)
            for (k, i), found in steps.items()
            if k == kind
        ]
        if points:
            rates[kind] = solve_rate(kind, points, cache_bytes())
    return Calibration(
        cpu=_cpu(),
        threads=threads,
        read_bytes_per_s=read,
        cache_bytes=cache_bytes(),
        rates=rates,
        load_average=(before, read_machine().load_average),
        wall_s=time.monotonic() - started,
        created_utc=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )


def solve_rate(kind: str, points: Sequence[tuple[Facts, float]], cache: int) -> Rate:
    """The rate that explains decode steps (seconds) best, beside `cache` bytes of cache."""
    import numpy as np

    from edge_mmllm.profiling.fit import moved_bytes, reference_layer_us, step_units

    names = tuple(facts.name for facts, _ in points)

    def missed(facts: Facts) -> float:
        moved = moved_bytes(facts, _PROMPT_TOKENS + _NEW_TOKENS // 2, kind)
        return max(moved - cache, 0.2 * moved)

    rows = np.array([(missed(f), step_units(kind, f)) for f, _ in points])
    seconds = np.array([s for _, s in points])
    if len(points) >= 2:
        solved, *_ = np.linalg.lstsq(rows / seconds[:, None], np.ones(len(points)), rcond=None)
        if solved[0] > 0 and solved[1] >= 0:
            return Rate(1 / float(solved[0]), 1e6 * float(solved[1]), names)
    layer_us = reference_layer_us(kind)
    left = seconds - rows[:, 1] * layer_us / 1e6
    if (left <= 0).any():  # layers alone take longer there: a faster machine than ours
        layer_us, left = 0.0, seconds
    return Rate(float(np.sum(rows[:, 0]) / np.sum(left)), layer_us, names)


def read_rate(threads: int, seconds: float = _READ_S) -> float:
    """Bytes a second that `threads` threads read together, the best of what `seconds` allow."""
    import numpy as np

    if threads < 1:
        raise UsageError("threads must be at least 1", found=str(threads))
    blocks = [np.ones(_BLOCK_BYTES // 4, np.float32) for _ in range(threads)]
    best, end = 0.0, time.monotonic() + seconds
    with ThreadPoolExecutor(threads) as pool:
        while best == 0 or time.monotonic() < end:
            begun = time.perf_counter()
            # A maximum reads each element once and releases the interpreter; a dot product would
            # start threads of the BLAS library's own.
            list(pool.map(lambda block: block.max(), blocks))
            best = max(best, threads * _BLOCK_BYTES / (time.perf_counter() - begun))
    return best


def cache_bytes(root: Path = Path("/")) -> int:
    """Size of the largest cache of the first CPU, as Linux tells it; 0 unknown."""
    sizes = [0]
    for file in (root / "sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        try:
            text = file.read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            continue
        if text.endswith("K") and text[:-1].isdigit():
            sizes.append(int(text[:-1]) << 10)
        elif text.endswith("M") and text[:-1].isdigit():
            sizes.append(int(text[:-1]) << 20)
    return max(sizes)


def _built() -> bool:
    from edge_mmllm_runtime import native

    return native.library() is not None


def _cpu() -> str:
    machine = read_machine()
    return f"{machine.cpu_model or machine.architecture}, {machine.affinity_cpus} CPUs"
