"""Devices through the adb program (Android's platform tools), which must be on PATH or in $ADB.

The device needs a Python: Termux's, named with --remote-python, or one of a native shell.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

from edge_mmllm.errors import EdgeError
from edge_mmllm.remote.targets import ConnectionLost, Done, RemoteError, Target

_BEAT_S = 1.0
#: How adb words a device that went away.
_GONE = (
    "device offline",
    "no devices",
    "not found",
    "device unauthorized",
    "closed",
    "protocol fault",
)
_PUSH_S = 600


class AdbShell:
    """A `Shell` through adb.

    Raises:
        EdgeError: no adb program.
        RemoteError: no such device, or it does not let us in.
    """

    def __init__(self, target: Target, program: str | None = None) -> None:
        found = program or os.environ.get("ADB") or shutil.which("adb")
        if not found:
            raise EdgeError(
                "the adb program was not found",
                expected="adb on PATH, or its path in $ADB",
                fix="install Android's platform tools",
            )
        self._target = target
        self._adb = [found, *(["-s", target.serial] if target.serial else [])]
        done = self._call(["get-state"], 30)
        if done.status != 0 or done.out.strip() != b"device":
            raise RemoteError(
                "adb has no device that is ready",
                where=str(target),
                expected="device",
                found=_text(done.out + done.err),
                fix="`adb devices` lists them; allow debugging on the device's screen",
            )

    def _call(self, arguments: list[str], timeout_s: float) -> Done:
        try:
            done = subprocess.run(
                [*self._adb, *arguments], stdin=subprocess.DEVNULL, capture_output=True,
                timeout=timeout_s, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise RemoteError(
                f"adb gave no answer in {timeout_s:.0f} s", where=str(self._target),
                found=" ".join(arguments)[:200],
            ) from error  # fmt: skip
        return Done(done.returncode, done.stdout, done.stderr)

    def _lost(self, done: Done) -> None:
        """Raises ConnectionLost where adb itself says so."""
        text = _text(done.err)
        if (
            done.status != 0
            and text.startswith(("error:", "adb:"))
            and any(w in text for w in _GONE)
        ):
            raise ConnectionLost(
                "the connection to the device broke", where=str(self._target), found=text,
                fix="run it again: what was copied is kept",
            )  # fmt: skip

    def run(self, command: str, *, timeout_s: float = 60, beat: bool = False) -> Done:
        """See `Shell.run`."""
        if not beat:
            done = self._call(["shell", command], timeout_s)
            self._lost(done)
            return done
        child = subprocess.Popen(
            [*self._adb, "shell", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )  # fmt: skip
        pipes = {"out": child.stdout, "err": child.stderr}
        texts = {"out": b"", "err": b""}

        def drain(name: str) -> None:
            pipe = pipes[name]
            assert pipe is not None  # noqa: S101 - for the type checker: PIPE was asked for
            texts[name] = pipe.read()

        threads = [threading.Thread(target=drain, args=(name,), daemon=True) for name in pipes]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + timeout_s
        assert child.stdin is not None  # noqa: S101 - as above
        try:
            while child.poll() is None:
                if time.monotonic() > deadline:
                    raise RemoteError(f"no answer in {timeout_s:.0f} s", where=str(self._target))
                with suppress(OSError):  # it may be ending
                    child.stdin.write(b"\n")
                    child.stdin.flush()
                try:
                    child.wait(_BEAT_S)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            if child.poll() is None:
                child.kill()
            child.wait()
            for thread in threads:
                thread.join(10)
            with suppress(OSError):
                child.stdin.close()
            for pipe in pipes.values():
                if pipe is not None:
                    pipe.close()
        done = Done(child.returncode, texts["out"], texts["err"])
        self._lost(done)
        return done

    def append(self, local: Path, remote: str, offset: int, size: int) -> None:
        """See `Shell.append`: adb copies whole files, so a piece goes beside and is joined."""
        with tempfile.TemporaryDirectory() as folder, local.open("rb") as source:
            piece = Path(folder) / "piece"
            source.seek(offset)
            piece.write_bytes(source.read(size))
            done = self._call(["push", str(piece), f"{remote}.piece"], _PUSH_S)
        self._lost(done)
        if done.status != 0:
            raise ConnectionLost(
                "adb could not copy", where=str(self._target), found=_text(done.out + done.err)
            )
        joined = self.run(f"cat '{remote}.piece' >> '{remote}' && rm '{remote}.piece'")
        if joined.status != 0:
            raise RemoteError(
                "the device could not write", where=str(self._target), found=_text(joined.err)
            )

    def close(self) -> None:
        """See `Shell.close`: adb's server stays, it is the user's."""


def _text(data: bytes) -> str:
    return data.decode("utf-8", errors="replace").strip()[:500]
