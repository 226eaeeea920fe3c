"""Engines measured by turns, so that whatever else the machine does hits all alike.

Each engine sits in a child of its own (`engines.py`), loaded once, and blocks on a pipe while the
others are measured; that idle children use no CPU is checked. Commands go round the children.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import artefacts
import harness

from edge_mmllm.profiling.stats import median

CONTEXT = 1024
#: Seconds between commands: spinning threads of the engine before must have gone to sleep.
SETTLE_S = 0.15
PACKAGES = ("edge-mmllm", "onnxruntime", "onnxruntime-genai", "llama-cpp-python", "numpy")
#: Of a round's tokens, at least this many undisturbed ones make a median of their own.
ENOUGH = 8


@dataclass(frozen=True)
class Contender:
    """What takes part: an engine of `engines.py` and what it loads.

    Attributes:
        label: its name in tables; several may share an engine.
    """

    label: str
    engine: str
    artefact: Path


@dataclass
class Child:
    """A loaded engine, and what it answered: seconds and interruptions of each call by command."""

    contender: Contender
    process: subprocess.Popen[str]
    messages: IO[str]
    times: dict[str, list[list[tuple[float, int]]]] = field(default_factory=dict)
    idle_cpu_s: float = 0.0

    @property
    def name(self) -> str:
        """Its name in tables."""
        return self.contender.label

    def ask(self, **command: Any) -> Any:
        """Send a command, return the answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> Any:
        """The next line it prints."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            self.messages.seek(0)
            said = self.messages.read()[-1500:]
            raise RuntimeError(f"{self.name} exited with {code}: {said}")
        return json.loads(line)

    def cpu_s(self) -> float:
        """CPU time used so far. Source: proc(5), fields 14 and 15 of stat."""
        text = Path(f"/proc/{self.process.pid}/stat").read_text()
        fields = text.rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """End the process."""
        if self.process.poll() is None:
            assert self.process.stdin is not None
            self.process.stdin.write('{"exit": true}\n')
            self.process.stdin.close()
            self.process.wait()
        self.messages.close()

    def seconds(self, key: str) -> list[float]:
        """A figure for each round: the median of its undisturbed calls where there are enough."""
        out = []
        for times in self.times[key]:
            calm = [t for t, n in times if n == 0]
            out.append(median(calm if len(calm) >= ENOUGH else [t for t, _ in times]))
        return out

    def calm_share(self, key: str = "decode") -> float:
        """Share of calls that nobody interrupted."""
        calls = [n for times in self.times[key] for _, n in times]
        return sum(n == 0 for n in calls) / len(calls)


def contenders(
    model: str, arguments: argparse.Namespace, missing: str | None, blocks: Sequence[int] = ()
) -> list[Contender]:
    """Who can run a model here, their artefacts made.

    Args:
        arguments: with `cache`, `peers` and `refresh`.
        missing: why there are no native kernels; None: there are.
        blocks: block sizes with which the native kernels take part as well.
    """
    cache, peers, refresh = arguments.cache, arguments.peers, arguments.refresh
    if refresh:
        artefacts.ours(model, cache, "--quant", "int4", refresh=True)
    out = []
    for engine in artefacts.MODELS[model].engines:
        here = not missing if engine == "ours native" else peers.exists()
        if here or engine == "ours stock":
            out.append(Contender(engine, engine, artefacts.artefact(engine, model, cache, peers)))
    for block in () if missing else blocks:
        options = ("--quant", "int4", "--block-size", str(block))
        path = artefacts.ours(model, cache, *options, refresh=refresh)
        out.append(Contender(f"ours native, block {block}", "ours native", path))
    return out


def start(contender: Contender, python: Path, threads: int, *extra: str) -> Child:
    """Load an engine in a child that may use `threads` CPUs."""
    command = [
        artefacts.interpreter(contender.engine, python), str(harness.HERE / "engines.py"),
        contender.engine, str(contender.artefact), str(threads), str(CONTEXT), *extra,
    ]  # fmt: skip
    messages = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - the child's life
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=messages, text=True,
        env=harness.child_env(), preexec_fn=lambda: _prepare(threads),
    )  # fmt: skip
    child = Child(contender, process, messages)
    child.answer()
    return child


def _prepare(threads: int) -> None:
    """In the child: no more CPUs than threads, so that no engine takes more than it was given."""
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) > threads:
        os.sched_setaffinity(0, cpus[:threads])
    harness.raise_priority()


@contextmanager
def loaded(contenders: Sequence[Contender], python: Path, threads: int) -> Iterator[list[Child]]:
    """Children for the contenders, ended on the way out."""
    children: list[Child] = []
    with contextlib.ExitStack() as stack:
        for contender in contenders:
            child = start(contender, python, threads)
            stack.callback(child.close)
            children.append(child)
        yield children


def measure(
    children: Sequence[Child], rounds: int, commands: Mapping[str, Mapping[str, int]]
) -> float:
    """Fill `Child.times` by command; the first round warms up and is dropped. Returns seconds."""
    started = time.monotonic()
    for number in range(rounds + 1):
        for key, command in commands.items():
            for child in children:
                time.sleep(SETTLE_S)
                others = [(c, c.cpu_s()) for c in children if c is not child]
                times = [(t, n) for t, n in child.ask(**command)]
                for other, before in others:
                    other.idle_cpu_s += other.cpu_s() - before
                if number:
                    child.times.setdefault(key, []).append(times)
    return time.monotonic() - started


def idle(children: Sequence[Child], wall: float) -> str:
    """CPU that children used out of turn, as text."""
    return ", ".join(f"{c.name} {100 * c.idle_cpu_s / wall:.1f} %" for c in children)


def rates(script: str, threads: int) -> dict[str, float]:
    """What `bandwidth.py` or `arithmetic.py` finds, in a child."""
    out = subprocess.run(
        [sys.executable, str(harness.HERE / script), str(threads)], env=harness.child_env(),
        capture_output=True, text=True, check=True, preexec_fn=lambda: _prepare(threads),
    ).stdout  # fmt: skip
    found: dict[str, float] = json.loads(out)
    return found


def highest(*found: Mapping[str, float]) -> dict[str, float]:
    """The best of several measurements of the same rates."""
    return {key: max(f[key] for f in found) for key in found[0]}


def versions(python: Path) -> dict[bool, dict[str, str]]:
    """Package versions of ours (True) and of the peers (False)."""
    peers = harness.versions(python, PACKAGES) if python.exists() else {}
    return {True: harness.versions(sys.executable, PACKAGES), False: peers}


def time_table(
    what: str, contender: Contender, arguments: argparse.Namespace, report: harness.Reporter,
    *, prefill: int, past: int, steps: int = 32,
) -> None:  # fmt: skip
    """Where our time goes: by node type of stock onnxruntime (its profiler adds about 1 us a
    node), or by kind of phase of the native kernels, where their library counts it."""
    child = start(contender, arguments.peers, arguments.threads, "profile")
    try:
        found = child.ask(profile={"prefill": prefill, "decode": steps, "past": past})
    finally:
        child.process.kill()
        child.process.wait()
    if not found["decode"]:
        return
    part = "phase" if contender.engine == "ours native" else "node"
    note = " (an If's time holds its branches')" if "If" in found["decode"] else ""
    rows = []
    for op in sorted(found["decode"], key=lambda o: -found["decode"][o][1]):
        count, step_us = found["decode"][op]
        prefill_us = found["prefill"].get(op, [0, 0.0])[1]
        each = step_us / max(1, count)
        rows.append([op, count, f"{step_us / 1e3:.3f}", f"{each:.1f}", f"{prefill_us / 1e3:.2f}"])
    report.record(what=what, artefact=contender.artefact.name, threads=arguments.threads,
                  nodes=found)  # fmt: skip
    report.table(
        f"Where the time goes, {what}: decode at {past}, prefill of {prefill}{note}",
        [f"{part} type", f"{part}s", "decode ms", f"us a {part}", "prefill ms"],
        rows,
    )
