"""What every benchmark here shares: records, tables, children, priorities, memory peaks.

Each script prints a table, appends one JSON object a measurement to `results/<name>.jsonl` (not
in git) and, with `--publish`, puts the table into `RESULTS.md` with the command that made it.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from edge_mmllm.profiling.machine import read_machine
from edge_mmllm.profiling.stats import summarize

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
CACHE = ROOT / ".cache"
RESULTS = HERE / "results"
PUBLISHED = HERE / "RESULTS.md"
#: The interpreter that has the peers (see the Makefile's `bench`).
PEERS_PYTHON = ROOT / ".venv-bench/bin/python"
#: The interpreter that has TVM (see the Makefile's `test-full`).
TVM_PYTHON = ROOT / ".venv-tvm/bin/python"
#: Children import the working tree, whichever interpreter runs them.
SOURCES = os.pathsep.join(str(p) for p in (ROOT, ROOT / "export", ROOT / "runtimes"))

# The native kernels are built into this cache, not the user's, and used where a benchmark asks for
# them; all others measure what a device has that did not build them.
os.environ.setdefault("EDGE_MMLLM_CACHE", str(CACHE / "kernels"))
os.environ.setdefault("EDGE_MMLLM_KERNELS", "stock")

#: Set to a negative nice value (e.g. -15) to have benchmark children preferred to everything else
#: on the machine. Off unless asked for: others who share the machine pay for it.
PRIORITY = "EDGE_MMLLM_BENCH_PRIORITY"


def child_env(**extra: str) -> dict[str, str]:
    """The environment of a benchmark's child."""
    return {**os.environ, "PYTHONPATH": SOURCES, "PYTHONHASHSEED": "0", **extra}


def raise_priority() -> bool:
    """Where the environment asks for it, have the scheduler prefer this process.

    All engines compared get the same. Linux groups processes by session and shares time between
    groups first (sched(7), autogroup), so the child gets a session of its own and that group's
    nice value too. Returns whether it was asked for and allowed.
    """
    asked = os.environ.get(PRIORITY)
    if not asked:
        return False
    try:
        if os.getsid(0) != os.getpid():
            os.setsid()
        os.setpriority(os.PRIO_PROCESS, 0, int(asked))
        Path("/proc/self/autogroup").write_text(asked)
    except (OSError, AttributeError, ValueError):
        return False
    return True


def tree_sha256(path: Path) -> str:
    """Identity of an artefact: a file, or a folder's names and bytes."""
    digest = hashlib.sha256()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for file in files:
        digest.update(str(file.relative_to(path.parent)).encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def size_bytes(path: Path) -> int:
    """Bytes of a file or of a folder's files."""
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    return sum(p.stat().st_size for p in files)


def versions(python: Path | str, packages: Sequence[str]) -> dict[str, str]:
    """Versions of the packages that an interpreter has."""
    code = (
        "import json,sys,platform\nfrom importlib.metadata import version,PackageNotFoundError\n"
        "out={'python':platform.python_version()}\n"
        "for p in sys.argv[1:]:\n try: out[p]=version(p)\n except PackageNotFoundError: pass\n"
        "print(json.dumps(out))"
    )
    result = subprocess.run(
        [str(python), "-c", code, *packages], capture_output=True, text=True, check=True
    )
    found: dict[str, str] = json.loads(result.stdout)
    return found


def wait_quiet(load: float, limit_s: float) -> float:
    """Wait until no more than `load` other tasks run (seen 5 times in a row), or for `limit_s`.

    Returns the one-minute load average.
    """
    deadline, calm = time.monotonic() + limit_s, 0
    while calm < 5 and time.monotonic() < deadline:
        running = int(Path("/proc/loadavg").read_text().split()[3].split("/")[0]) - 1
        calm = calm + 1 if running <= load else 0
        time.sleep(0.5)
    return os.getloadavg()[0]


class Reporter:
    """Collects one benchmark's records and tables.

    Args:
        name: of the benchmark; its results go to `results/<name>.jsonl`.
        title: heading in RESULTS.md.
        arguments: parsed options, with `publish`.
    """

    def __init__(self, name: str, title: str, arguments: argparse.Namespace) -> None:
        self.name, self.title, self.publishes = name, title, bool(arguments.publish)
        self.started = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        self._parts: list[str] = []
        machine = read_machine()
        self.device = {
            "cpu": machine.cpu_model,
            "cpus": machine.affinity_cpus,
            "features": [f for f in machine.cpu_features if f.startswith(("avx", "amx", "asimd"))],
            "memory_gib": round((machine.memory_bytes or 0) / 2**30, 1),
        }

    def record(self, **fields: Any) -> dict[str, Any]:
        """Append one measurement to the JSONL file."""
        entry = {
            "benchmark": self.name,
            "started_utc": self.started,
            "device": self.device,
            "load_average": round(os.getloadavg()[0], 2),
            "priority": os.environ.get(PRIORITY),
            **fields,
        }
        RESULTS.mkdir(exist_ok=True)
        with (RESULTS / f"{self.name}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        return entry

    def table(self, caption: str, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Print a table, the first column left, the others right."""
        cells = [[str(c) for c in row] for row in (head, *rows)]
        widths = [max(len(r[i]) for r in cells) for i in range(len(head))]
        lines = ["| " + " | ".join(_pad(r, widths)) + " |" for r in cells]
        rule = ["-" * max(3, w) for w in widths]
        lines.insert(
            1,
            "|"
            + "|".join(f" {rule[0]} " if i == 0 else f" {r}:" for i, r in enumerate(rule))
            + "|",
        )
        self.text(f"**{caption}**\n\n" + "\n".join(lines))

    def text(self, paragraph: str) -> None:
        """Print a paragraph."""
        print("\n" + paragraph, flush=True)
        self._parts.append(paragraph)

    def close(self) -> None:
        """With `--publish`, replace this benchmark's section of RESULTS.md."""
        if not self.publishes:
            return
        command = " ".join(["python", "benchmarks/" + Path(sys.argv[0]).name, *_public(sys.argv)])
        device = f"{self.device['cpu']}, {self.device['cpus']} CPUs"
        load, raised = os.getloadavg()[0], os.environ.get(PRIORITY)
        kernels = os.environ["EDGE_MMLLM_KERNELS"]
        body = "\n\n".join(
            [
                f"<!-- {self.name} -->\n## {self.title}",
                f"`{command}` on {self.started[:10]}; {device}; load average {load:.1f} at the end"
                + (f"; children at nice {raised}" if raised else "")
                + (f"; kernels {kernels} unless said" if kernels != "stock" else ""),
                *self._parts,
                f"<!-- /{self.name} -->",
            ]
        )
        _replace_section(PUBLISHED, self.name, body)


def _pad(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    first = row[0].ljust(widths[0])
    return [first, *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]


def _public(argv: Sequence[str]) -> list[str]:
    """Arguments as RESULTS.md shows them: without paths of this machine."""
    return [a if not a.startswith("/") else Path(a).name for a in argv[1:] if a != "--publish"]


def _replace_section(path: Path, name: str, body: str) -> None:
    head = (
        "# Results\n\nMade by the scripts beside this file (`--publish`), on a shared two-core "
        "machine: trust ratios within one table,\nnot absolutes across tables.\n"
    )
    text = path.read_text(encoding="utf-8") if path.exists() else head
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if start in text and end in text:
        before, _, rest = text.partition(start)
        text = before + body + rest.partition(end)[2]
    else:
        text = text.rstrip("\n") + "\n\n" + body + "\n"
    path.write_text(text, encoding="utf-8")


def parser(description: str | None) -> argparse.ArgumentParser:
    """Options that every benchmark has."""
    made = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    made.add_argument("--publish", action="store_true", help="put the tables into RESULTS.md")
    made.add_argument("--peers", type=Path, default=PEERS_PYTHON, help="interpreter with the peers")
    made.add_argument("--cache", type=Path, default=CACHE, help="models and artefacts")
    return made


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median and spread, for a record."""
    s = summarize(values)
    return {
        "median": s.median,
        "spread": s.spread,
        "min": s.minimum,
        "max": s.maximum,
        "runs": s.count,
    }


def percent(value: float | None) -> str:
    """A spread as text."""
    return "-" if value is None else f"{100 * value:.0f} %"


class PeakWatcher:
    """Highest resident memory of a child and its children, polled from /proc/PID/status.

    Each process's own VmHWM counts (never ru_maxrss: a child starts with its parent's there); the
    sum is over processes alive at one moment.
    """

    def __init__(self, pid: int, interval_s: float = 0.005) -> None:
        self._pid, self._interval = pid, interval_s
        self._stop = threading.Event()
        self.peak_bytes = 0
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """Ends the polling; returns the peak."""
        self._stop.set()
        self._thread.join()
        return self.peak_bytes

    def _watch(self) -> None:
        while not self._stop.is_set():
            peaks = [_status_bytes(p, "VmHWM") for p in _family(self._pid)]
            self.peak_bytes = max(self.peak_bytes, sum(peaks))
            self._stop.wait(self._interval)


def _family(pid: int) -> Iterator[int]:
    yield pid
    with contextlib.suppress(OSError, ValueError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from _family(int(child))


def _status_bytes(pid: int, key: str) -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    return 0


def measured_run(command: Sequence[str], **env: str) -> tuple[float, int, Mapping[str, Any]]:
    """Run a whole process. Returns wall seconds, peak bytes, and {stdout, stderr}.

    Raises: RuntimeError with the end of its stderr when it fails.
    """
    started = time.perf_counter()
    child = subprocess.Popen(
        list(command), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=child_env(**env), preexec_fn=raise_priority,
    )  # fmt: skip
    watcher = PeakWatcher(child.pid)
    out, err = child.communicate()
    wall = time.perf_counter() - started
    peak = watcher.stop()
    if child.returncode:
        raise RuntimeError(f"{command[:4]} exited with {child.returncode}: {err[-1500:]}")
    return wall, peak, {"stdout": out, "stderr": err}
