"""The bench on a device: copies what it needs, runs it there, brings its answer back."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edge_mmllm.bundle import open_bundle
from edge_mmllm.errors import EdgeError, UsageError
from edge_mmllm.profiling.job import Job, read_answer
from edge_mmllm.remote.deploy import Progress, Store, bundle_items, local_item, runtime_archive
from edge_mmllm.remote.targets import ConnectionLost, RemoteError, Shell, Target, parse_target

#: What the runtime imports, and the extra that installs all of it.
_NEEDS = ("numpy", "tokenizers", "jinja2", "PIL", "click", "rich", "onnxruntime")
#: A device that hears nothing of us for so long ends the bench.
_SILENCE_S = 60
_MAIN = "from edge_mmllm.profiling.job import main; main()"


@dataclass(frozen=True)
class RemoteOptions:
    """How to reach and use a device.

    Attributes:
        host_key, identity: see `SshShell`.
        root: our folder there; None: `.cache/edge-mmllm` below the user's home, with adb
            /data/local/tmp/edge-mmllm.
        python: the Python there that has the runtime's dependencies.
        timeout_s: longest bench.
        attempts: how often a lost connection is made again.
    """

    host_key: str | None = None
    identity: str | None = None
    root: str | None = None
    python: str = "python3"
    timeout_s: float = 3600.0
    attempts: int = 3


def open_shell(target: Target, options: RemoteOptions) -> Shell:
    """The way to a target. Raises: see `SshShell`, `AdbShell`."""
    if target.kind == "adb":
        from edge_mmllm.remote.adb import AdbShell

        return AdbShell(target)
    from edge_mmllm.remote.ssh import SshShell

    return SshShell(target, host_key=options.host_key, identity=options.identity)


class RemoteDevice:
    """A device that runs jobs: `launch` is one for `runner.run_plan`.

    A connection that breaks is made anew, at most `options.attempts` times a job: copying goes on
    where it was, a job begins again (the device has ended the first one by then).

    Args:
        target: see `parse_target`.
        opener: makes the connection.
        progress: told of copying.

    Raises:
        UsageError: no such target, or a relative root.
    """

    def __init__(
        self,
        target: str,
        options: RemoteOptions | None = None,
        *,
        opener: Callable[[Target, RemoteOptions], Shell] = open_shell,
        progress: Progress | None = None,
    ) -> None:
        self.target, self._options = parse_target(target), options or RemoteOptions()
        self._opener, self._progress = opener, progress
        self._shell: Shell | None = None
        root = self._options.root
        if root is not None and not root.startswith("/"):
            raise UsageError("--remote-root must be an absolute path", found=root[:80])

    def __enter__(self) -> RemoteDevice:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection."""
        if self._shell is not None:
            self._shell.close()
        self._shell = None

    def launch(self, job: Job) -> dict[str, Any]:
        """Runs a job on the device and brings its record back.

        Raises:
            HostKeyRefused, RemoteError: see `open_shell`.
            ConnectionLost: it broke again and again.
            EdgeError: what the job raised there, of the same type.
        """
        attempts = max(self._options.attempts, 1)
        lost: ConnectionLost | None = None
        for _ in range(attempts):
            try:
                if self._shell is None:
                    self._shell = self._opener(self.target, self._options)
                return self._once(self._shell, job)
            except ConnectionLost as error:
                lost = error
                self.close()
        assert lost is not None  # noqa: S101 - for the type checker: there was an attempt
        raise ConnectionLost(
            f"the connection to the device broke {attempts} times",
            where=str(self.target), found=lost.found, fix=lost.fix,
        ) from lost  # fmt: skip

    def _once(self, shell: Shell, job: Job) -> dict[str, Any]:
        where, python, quote = self.target, self._options.python, shlex.quote
        root = self._options.root or _default_root(shell, where)
        _check_python(shell, where, python)
        store = Store(shell, root, python)
        runtime = store.unpacked(runtime_archive(), "copy runtime", self._progress)
        bundle = open_bundle(job.bundle)
        place = store.tree(bundle_items(bundle), "copy bundle", self._progress)
        media = {
            kind: tuple(self._bring_file(store, file) for file in files)
            for kind, files in job.media.items()
        }
        there = replace(job, bundle=place, media=media, name=job.name or bundle.root.name)
        run = f"{root}/runs/{os.urandom(8).hex()}"
        made = shell.run(
            f"mkdir -p {quote(run)} && cd {quote(run)} && "
            f"printf %s {quote(json.dumps(there.to_json()))} > in"
        )
        if made.status != 0:
            raise RemoteError("the device refused a folder", where=run, found=_end(made.err))
        guard = [f"{runtime}/edge_mmllm/remote/supervisor.py", "in", "out", "err", str(_SILENCE_S)]
        command = [python, *guard, "--", python, "-c", _MAIN]
        line = f"cd {quote(run)} && PYTHONDONTWRITEBYTECODE=1 PYTHONPATH={quote(runtime)} exec "
        try:
            done = shell.run(
                line + " ".join(map(quote, command)), timeout_s=self._options.timeout_s, beat=True
            )
            verdict = _verdict(done.out)
            if verdict is None or not isinstance(verdict.get("status"), int):
                raise RemoteError(
                    "the bench on the device was ended before its end",
                    where=str(where),
                    found=_end(done.err) or f"status {done.status}, the supervisor said nothing",
                    fix="run it again; the device may have ended it for lack of memory",
                )
            out = shell.run(f"cat {quote(run)}/out").out.decode("utf-8", errors="replace")
            err = shell.run(f"tail -c 4000 {quote(run)}/err").out.decode("utf-8", errors="replace")
        finally:
            _tidy(shell, run)
        return read_answer(out, verdict["status"], err, replace(there, bundle=str(where)))

    def _bring_file(self, store: Store, file: str) -> str:
        item = local_item(Path(file).name, Path(file))
        return f"{store.tree([item], 'copy media', self._progress)}/{item.path}"


def _tidy(shell: Shell, run: str) -> None:
    """Takes the run's folder away, where the device is still there."""
    try:
        shell.run(f"rm -rf {shlex.quote(run)}")
    except EdgeError:
        return


def _default_root(shell: Shell, where: Target) -> str:
    if where.kind == "adb":
        return "/data/local/tmp/edge-mmllm"
    home = shell.run('printf %s "$HOME"').out.decode("utf-8", errors="replace").strip()
    if not home.startswith("/"):
        raise RemoteError("the device's user has no home folder", where=str(where), found=home[:80])
    return f"{home}/.cache/edge-mmllm/remote"


def _check_python(shell: Shell, where: Target, python: str) -> None:
    """Raises RemoteError where the device lacks a Python or what the runtime imports."""
    code = (
        "import importlib.util as u,json,sys;"
        f"print(json.dumps([list(sys.version_info[:2]),[n for n in {_NEEDS!r} "
        "if u.find_spec(n) is None]]))"
    )
    done = shell.run(f"{shlex.quote(python)} -c {shlex.quote(code)}", timeout_s=120)
    try:
        version, missing = json.loads(done.out.decode().strip().splitlines()[-1])
    except (ValueError, IndexError) as error:
        raise RemoteError(
            "the device has no Python that runs",
            where=str(where),
            expected=f"{python}, 3.10 or later",
            found=_end(done.err) or f"status {done.status}",
            fix="--remote-python names another, a virtual environment's say",
        ) from error
    if tuple(version) < (3, 10):
        raise RemoteError(
            "the device's Python is too old", where=str(where), expected="3.10 or later",
            found=".".join(map(str, version)), fix="--remote-python names another",
        )  # fmt: skip
    if missing:
        raise RemoteError(
            "the device lacks packages that the runtime needs",
            where=f"{where}, {python}",
            found="not installed: " + ", ".join(missing),
            fix="pip install numpy tokenizers jinja2 pillow click rich onnxruntime, there",
        )


def _verdict(printed: bytes) -> dict[str, Any] | None:
    for line in reversed(printed.decode("utf-8", errors="replace").splitlines()):
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            return found
    return None


def _end(data: bytes) -> str:
    return data.decode("utf-8", errors="replace").strip()[-300:]
