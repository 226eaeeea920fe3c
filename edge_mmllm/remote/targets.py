"""Targets, and what every way to a device can do."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from edge_mmllm.errors import EdgeError, UsageError

_SSH = re.compile(
    r"ssh://(?:(?P<user>[A-Za-z0-9_][A-Za-z0-9_.-]*)@)?"
    r"(?P<host>[A-Za-z0-9_][A-Za-z0-9_.-]*|\[[0-9A-Fa-f:.]+\])(?::(?P<port>[0-9]{1,5}))?/?"
)
_ADB = re.compile(r"adb(?::(?P<serial>[A-Za-z0-9][A-Za-z0-9_.:-]*))?")


class RemoteError(EdgeError):
    """A device cannot be used, or said no."""


class ConnectionLost(RemoteError):
    """The connection broke; what was copied stays and is not copied again."""


class HostKeyRefused(RemoteError):
    """The host's key is unknown or is not the one pinned; nothing was sent to it."""


@dataclass(frozen=True)
class Target:
    """Where to run. `kind`: `ssh` or `adb`."""

    kind: str
    host: str = ""
    port: int = 22
    user: str | None = None
    serial: str | None = None

    def __str__(self) -> str:
        if self.kind == "adb":
            return "adb" if self.serial is None else f"adb:{self.serial}"
        return f"ssh://{self.user + '@' if self.user else ''}{self.host}:{self.port}"


def parse_target(text: str) -> Target:
    """A target from `--target`. Raises: UsageError."""
    if found := _ADB.fullmatch(text):
        return Target("adb", serial=found["serial"])
    if found := _SSH.fullmatch(text):
        port = int(found["port"] or 22)
        if 0 < port < 65536:
            return Target("ssh", found["host"].strip("[]"), port, found["user"])
    raise UsageError(
        "no target that bench knows",
        expected="ssh://user@host[:port] | adb | adb:SERIAL",
        found=text[:80],
    )


@dataclass(frozen=True)
class Done:
    """A command that ended. `status`: negative for a signal, None where nobody knows."""

    status: int | None
    out: bytes
    err: bytes


class Shell(Protocol):
    """A way to a device. Every method raises `ConnectionLost` where it breaks."""

    def run(self, command: str, *, timeout_s: float = 60, beat: bool = False) -> Done:
        """Runs a line of POSIX shell.

        Args:
            timeout_s: after that the command is given up (`RemoteError`).
            beat: keep the command's standard input open and send a byte a second, for the
                supervisor to see that somebody is there; else it gets no input.
        """
        ...

    def append(self, local: Path, remote: str, offset: int, size: int) -> None:
        """Adds bytes `offset:offset + size` of a local file to the end of a remote one."""
        ...

    def close(self) -> None:
        """Ends the connection."""
        ...
