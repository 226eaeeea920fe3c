"""A probe of one bundle in a child of its own: its memory by phase, both ways to count it, and
the time of a step. `fit` calibrates itself with it, and its errors are measured with it.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edge_mmllm._children import python_command
from edge_mmllm.errors import EdgeError
from edge_mmllm.profiling.limits import Limits, apply, does_not_fit, ended, says_no_memory
from edge_mmllm.profiling.memory import memory_use
from edge_mmllm.profiling.stats import percentile

#: Private writable bytes are sampled this often: the kernel keeps no peak of them.
_SAMPLE_S = 0.002


@dataclass(frozen=True)
class ProbeRequest:
    """What to try.

    Attributes:
        bundle: its folder.
        prompt_tokens, new_tokens: read at once; then decoded one by one.
        threads, context, kernels: as `edge_mmllm.load` takes them.
    """

    bundle: str
    prompt_tokens: int = 512
    new_tokens: int = 32
    threads: int | None = None
    context: int | None = 1024
    kernels: str = "auto"


@dataclass(frozen=True)
class Probe:
    """What was seen, bytes. `data`: private writable mappings, what RLIMIT_DATA bounds.

    Attributes:
        engine_rss_bytes, engine_data_bytes: libraries imported, no model yet.
        loaded_rss_bytes, loaded_data_bytes: the model loaded.
        load_peak_rss_bytes, load_peak_data_bytes: the highest until then.
        peak_rss_bytes: highest RSS (VmHWM).
        peak_data_bytes: highest of samples every 2 ms.
        step_ms: median decode step; `step_best_ms`: the lower quartile, which others' use of the
            machine disturbs less; `prefill_ms`: the prompt.
        native: whether the native kernels ran it.
    """

    engine_rss_bytes: int
    engine_data_bytes: int
    loaded_rss_bytes: int
    loaded_data_bytes: int
    load_peak_rss_bytes: int
    load_peak_data_bytes: int
    peak_rss_bytes: int
    peak_data_bytes: int
    state_capacity_bytes: int
    prefill_ms: float
    step_ms: float
    step_best_ms: float
    threads: int
    native: bool


def probe(request: ProbeRequest, limits: Limits | None = None) -> Probe:
    """Runs a bundle in a child under `limits`.

    Raises:
        DoesNotFit: the limit is too tight.
        EdgeError: the child says why not.
    """
    limits = limits or Limits()
    task = json.dumps({"request": asdict(request), "limits": asdict(limits)})
    command = python_command("from edge_mmllm.profiling.probe import child; child()")
    done = subprocess.run(
        command, input=task, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    answer = _answer(done.stdout)
    where = Path(request.bundle).name
    if answer is None:
        ended(done.returncode, done.stderr[-4000:], limits, where)
    if "error" in answer:
        text = str(answer["error"])
        if says_no_memory(text):
            raise does_not_fit(limits, " ".join(text.split()), where)
        raise EdgeError("the probe failed", where=where, found=text)
    return Probe(**answer)


def _answer(printed: str) -> dict[str, Any] | None:
    for line in reversed(printed.splitlines()):
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            return found
    return None


def child() -> None:
    """The child: a task on stdin, an answer on stdout."""
    import sys

    task = json.loads(sys.stdin.read())
    try:
        apply(Limits(**task["limits"]))
        answer = asdict(_run(ProbeRequest(**task["request"])))
    except (EdgeError, MemoryError, OSError, ImportError, RuntimeError) as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    sys.stdout.write("\n" + json.dumps(answer) + "\n")
    sys.stdout.flush()
    os._exit(0)  # an engine short of memory may not end well


def _run(request: ProbeRequest) -> Probe:
    import numpy as np

    import edge_mmllm
    import edge_mmllm_runtime.onnx  # the engine's library belongs to the first phase

    engine = _now()
    peak = _Peak()
    with (
        peak,
        edge_mmllm.load(
            request.bundle,
            threads=request.threads,
            context=request.context,
            kernels=request.kernels,
        ) as session,
    ):
        if session.spec.modalities:
            session.engine.load_stage("decoder")
        loaded = _now()
        peak.sample()
        load_peak = memory_use().peak_rss_bytes or 0, peak.data_bytes
        ids = np.random.default_rng(0).integers(0, session.spec.vocab_size, request.prompt_tokens)
        ids[np.isin(ids, [m.token_id for m in session.spec.modalities.values()])] = 0
        started = time.perf_counter()
        session.prefill(ids)
        prefill_ms = (time.perf_counter() - started) * 1e3
        steps = []
        for token in ids[: request.new_tokens].tolist() or [0]:
            started = time.perf_counter()
            session.step(token)
            steps.append((time.perf_counter() - started) * 1e3)
        capacity, threads = session.state_capacity_bytes, session.engine.threads
        native = "native" in session.engine.version
        peak.sample()
        highest = memory_use().peak_rss_bytes or 0
    assert edge_mmllm_runtime.onnx  # noqa: S101 - imported for its memory alone
    return Probe(
        *engine, *loaded, *load_peak, highest, peak.data_bytes, capacity, prefill_ms,
        statistics.median(steps), percentile(steps, 25), threads, native,
    )  # fmt: skip


def data_bytes(proc: Path = Path("/proc")) -> int:
    """Private writable bytes of this process, what RLIMIT_DATA bounds (VmData); 0 unknown."""
    try:
        text = (proc / "self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    for line in text.splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    return 0


def _now() -> tuple[int, int]:
    return memory_use().rss_bytes or 0, data_bytes()


class _Peak:
    """Samples private writable memory from a thread of its own."""

    def __init__(self) -> None:
        self.data_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def sample(self) -> None:
        """One more sample."""
        self.data_bytes = max(self.data_bytes, data_bytes())

    def _watch(self) -> None:
        while not self._stop.wait(_SAMPLE_S):
            self.sample()

    def __enter__(self) -> _Peak:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
