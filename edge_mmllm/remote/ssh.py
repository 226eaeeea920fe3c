"""Devices over SSH, with paramiko (`pip install 'edge-mmllm[remote]'`).

The host's key decides whom we talk to, so it is pinned: it must be in a file of our own
(`known_hosts_file()`), which is written to only when `--host-key` names the key. An unknown key is
refused with its fingerprint, before anything of ours, not even a user's name, is sent.

Users authenticate by key: an agent's, `--identity`, or the usual files in ~/.ssh.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import os
import time
from pathlib import Path
from typing import Any

from edge_mmllm.errors import MissingDependency, UsageError
from edge_mmllm.remote.targets import ConnectionLost, Done, HostKeyRefused, RemoteError, Target

_CONNECT_S = 20.0
_BEAT_S = 1.0
_POLL_S = 0.02
_BLOCK_BYTES = 1 << 15
#: What a command may print; more is a program gone wild.
_MAX_OUTPUT_BYTES = 64 << 20


def known_hosts_file() -> Path:
    """Where pinned keys are: $XDG_CONFIG_HOME/edge-mmllm/known_hosts, else below ~/.config."""
    base = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(base).expanduser() / "edge-mmllm" / "known_hosts"


def fingerprint(key: bytes) -> str:
    """`SHA256:...` of a public key, as ssh-keygen -l prints it."""
    digest = base64.b64encode(hashlib.sha256(key).digest()).decode().rstrip("=")
    return f"SHA256:{digest}"


def pinned_fingerprint(text: str) -> str:
    """The fingerprint that `--host-key` names: one, a public key's line, or a file with it.

    Raises:
        UsageError: none of these.
    """
    text = text.strip()
    if text.startswith("SHA256:"):
        return text.rstrip("=")
    if not text.startswith(("ssh-", "ecdsa-")) and Path(text).is_file():
        text = Path(text).read_text(encoding="utf-8", errors="replace")[:10_000].strip()
    words = text.split()
    try:
        return fingerprint(base64.b64decode(words[1], validate=True))
    except (IndexError, ValueError) as error:
        raise UsageError(
            "--host-key names no public key",
            expected="SHA256:... (ssh-keygen -lf), a line `ssh-ed25519 AAAA...`, or its file",
            found=text[:60],
        ) from error


class SshShell:
    """A `Shell` over one SSH connection.

    Args:
        target: where to.
        host_key: pins this key (see `pinned_fingerprint`) and remembers it; None: the pinned one.
        identity: file of a private key.
        known_hosts: the file of pinned keys.

    Raises:
        MissingDependency: paramiko is not installed.
        HostKeyRefused: an unknown key, or another than the pinned one.
        RemoteError: no connection, or the user is not let in.
    """

    def __init__(
        self,
        target: Target,
        *,
        host_key: str | None = None,
        identity: str | os.PathLike[str] | None = None,
        known_hosts: Path | None = None,
    ) -> None:
        try:
            paramiko: Any = importlib.import_module("paramiko")
        except ModuleNotFoundError as error:
            raise MissingDependency("paramiko", "remote") from error
        self._paramiko, self._target = paramiko, target
        self._lost = (paramiko.SSHException, EOFError, OSError)
        pins = known_hosts or known_hosts_file()
        wanted = None if host_key is None else pinned_fingerprint(host_key)
        client: Any = paramiko.SSHClient()
        if wanted is None and pins.is_file():
            client.load_host_keys(str(pins))
        client.set_missing_host_key_policy(self._policy(wanted, pins))
        try:
            client.connect(
                target.host, port=target.port, username=target.user,
                key_filename=None if identity is None else os.fspath(identity),
                timeout=_CONNECT_S, banner_timeout=_CONNECT_S, auth_timeout=_CONNECT_S,
                allow_agent=identity is None, look_for_keys=identity is None,
            )  # fmt: skip
        except paramiko.BadHostKeyException as error:
            raise self._refused(error.key, fingerprint(error.expected_key.asbytes())) from error
        except paramiko.AuthenticationException as error:
            raise RemoteError(
                "the device lets this user not in",
                where=str(target),
                found=str(error),
                fix="put a public key of yours into its ~/.ssh/authorized_keys, or --identity FILE",
            ) from error
        except self._lost as error:
            raise RemoteError(
                "no connection to the device", where=str(target), found=str(error) or repr(error)
            ) from error
        client.get_transport().set_keepalive(5)
        self._client = client
        if wanted is not None:
            self._remember(pins)

    def _policy(self, wanted: str | None, pins: Path) -> Any:
        refused = self._refused

        class Pinned(self._paramiko.MissingHostKeyPolicy):  # type: ignore[misc, name-defined]
            """Takes the key that was named, and no other."""

            def missing_host_key(self, client: Any, hostname: str, key: Any) -> None:
                if wanted is None or fingerprint(key.asbytes()) != wanted:
                    raise refused(key, wanted)

        return Pinned()

    def _refused(self, key: Any, wanted: str | None) -> HostKeyRefused:
        offered = fingerprint(key.asbytes())
        if wanted is None:
            return HostKeyRefused(
                "the device's host key is not known",
                where=str(self._target),
                expected="a pinned key",
                found=f"{key.get_name()} {offered}",
                fix="compare it with `ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub` on the "
                f"device itself; then --host-key {offered}",
            )
        return HostKeyRefused(
            "the device's host key is not the pinned one: another machine may be in between",
            where=str(self._target),
            expected=wanted,
            found=f"{key.get_name()} {offered}",
            fix="if the device was set up anew, compare keys there, then --host-key with the new",
        )

    def _remember(self, pins: Path) -> None:
        """Writes the key of this connection to the file of pinned keys, in place of an older."""
        keys: Any = self._paramiko.HostKeys(str(pins) if pins.is_file() else None)
        host, port = self._target.host, self._target.port
        name = host if port == 22 else f"[{host}]:{port}"
        if keys.lookup(name):
            del keys[name]
        key = self._client.get_transport().get_remote_server_key()
        keys.add(name, key.get_name(), key)
        pins.parent.mkdir(parents=True, exist_ok=True)
        keys.save(str(pins))

    def _broken(self, error: BaseException) -> ConnectionLost:
        return ConnectionLost(
            "the connection to the device broke",
            where=str(self._target),
            found=str(error) or repr(error),
            fix="run it again: what was copied is kept",
        )

    def run(self, command: str, *, timeout_s: float = 60, beat: bool = False) -> Done:
        """See `Shell.run`."""
        out, err = bytearray(), bytearray()
        deadline, next_beat = time.monotonic() + timeout_s, 0.0
        try:
            channel = self._client.get_transport().open_session(timeout=_CONNECT_S)
        except (*self._lost, AttributeError) as error:
            raise self._broken(error) from error
        try:
            channel.exec_command(command)
            if not beat:
                channel.shutdown_write()
            while True:
                idle = True
                while channel.recv_ready():
                    out += channel.recv(_BLOCK_BYTES)
                    idle = False
                while channel.recv_stderr_ready():
                    err += channel.recv_stderr(_BLOCK_BYTES)
                    idle = False
                if (
                    idle
                    and channel.exit_status_ready()
                    and (channel.eof_received or channel.closed)
                ):
                    break
                if idle and channel.closed:
                    break
                if len(out) + len(err) > _MAX_OUTPUT_BYTES:
                    raise RemoteError("the device prints without end", where=str(self._target))
                now = time.monotonic()
                if now > deadline:
                    raise RemoteError(
                        f"no answer in {timeout_s:.0f} s", where=str(self._target),
                        found=command[:200],
                    )  # fmt: skip
                if beat and now >= next_beat:
                    channel.sendall(b"\n")
                    next_beat = now + _BEAT_S
                if idle:
                    time.sleep(_POLL_S)
            status = channel.recv_exit_status() if channel.exit_status_ready() else -1
            transport = self._client.get_transport()
            if status == -1 and (transport is None or not transport.is_active()):
                raise EOFError("closed by the device or on the way")
        except self._lost as error:
            raise self._broken(error) from error
        finally:
            channel.close()
        return Done(None if status == -1 else status, bytes(out), bytes(err))

    def append(self, local: Path, remote: str, offset: int, size: int) -> None:
        """See `Shell.append`."""
        try:
            with self._client.open_sftp() as sftp, local.open("rb") as source:
                source.seek(offset)
                with sftp.open(remote, "ab") as file:
                    file.set_pipelined(True)
                    left = size
                    while left and (block := source.read(min(_BLOCK_BYTES, left))):
                        file.write(block)
                        left -= len(block)
        except (*self._lost, AttributeError) as error:
            raise self._broken(error) from error

    def close(self) -> None:
        """See `Shell.close`."""
        self._client.close()
