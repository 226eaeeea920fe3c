"""`--target ssh://` end to end: a local sshd on a loopback port, throwaway keys, this Python.

Skipped, and named, where there is no sshd or no paramiko.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from edge_mmllm.errors import EdgeError, UsageError
from edge_mmllm.profiling.job import Job
from edge_mmllm.remote import bench as remote
from edge_mmllm.remote.bench import RemoteDevice, RemoteOptions
from edge_mmllm.remote.targets import (
    ConnectionLost,
    HostKeyRefused,
    RemoteError,
    Target,
    parse_target,
)

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
needs_sshd = pytest.mark.skipif(SSHD is None, reason="no sshd here (openssh-server)")
FEW = {"prompt_tokens": 8, "new_tokens": 4, "repetitions": 2, "threads": 1}
LONG = {"prompt_tokens": 64, "new_tokens": 32, "repetitions": 1_000_000}


@dataclass
class Server:
    """A running sshd."""

    port: int
    folder: Path
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        return f"ssh://127.0.0.1:{self.port}"

    @property
    def host_key(self) -> str:
        return (self.folder / "host.pub").read_text()

    def options(self, **more: Any) -> RemoteOptions:
        given = {
            "host_key": self.host_key, "identity": str(self.folder / "user"),
            "root": str(self.folder / "device"), "python": sys.executable,
        }  # fmt: skip
        return RemoteOptions(**{**given, **more})


def _keygen(path: Path) -> None:
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True,
        capture_output=True,
    )  # fmt: skip


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    pytest.importorskip("paramiko")
    assert SSHD is not None
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    folder = tmp_path / "sshd"
    folder.mkdir(mode=0o700)
    _keygen(folder / "host")
    _keygen(folder / "user")
    shutil.copy(folder / "user.pub", folder / "authorized")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nPidFile none\n"
        f"AuthorizedKeysFile {folder}/authorized\nPasswordAuthentication no\nUsePAM no\n"
        "StrictModes no\nSubsystem sftp internal-sftp\n"
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [SSHD, "-D", "-e", "-f", str(folder / "config")], stdout=subprocess.DEVNULL, stderr=log
        )
    for _ in range(100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.05)
    else:
        pytest.fail((folder / "log").read_text())
    yield Server(port, folder, process)
    process.terminate()
    process.wait()


def _ours(folder: Path) -> list[int]:
    """Processes whose working folder is below `folder`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if str(folder) in str((entry / "cwd").readlink()):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def _wait_none(folder: Path) -> None:
    for _ in range(100):
        if not _ours(folder):
            return
        time.sleep(0.1)
    pytest.fail(f"still running: {_ours(folder)}")


def remote_bench(
    url: str, bundle: Path, counts: dict[str, Any], options: RemoteOptions, **more: Any
) -> dict[str, Any]:
    with RemoteDevice(url, options, **more) as device:
        return device.launch(Job(str(bundle), **counts))


@needs_sshd
def test_bench_there_and_back(server: Server, base_bundle: Path) -> None:
    brought: list[str] = []
    told = remote_bench(
        server.url, base_bundle, FEW, server.options(),
        progress=lambda phase, done, total: brought.append(phase),
    )  # fmt: skip
    assert told["decode_tokens_per_s"] > 0
    assert told["name"] == base_bundle.name
    assert {"copy runtime", "copy bundle"} <= set(brought)
    device = server.folder / "device"
    assert _ours(device) == []
    assert list((device / "runs").iterdir()) == []
    # The second time nothing is copied, and the key is the one remembered.
    brought.clear()
    remote_bench(
        server.url, base_bundle, FEW, server.options(host_key=None),
        progress=lambda phase, done, total: brought.append(phase),
    )  # fmt: skip
    assert not {"copy runtime", "copy bundle"} & set(brought)
    # No exporter on the device.
    names = {path.name for path in (device / "trees").glob("*/*")}
    assert "edge_mmllm_runtime" in names
    assert "edge_mmllm_export" not in names


@needs_sshd
def test_unknown_and_wrong_host_keys_are_refused(
    server: Server, base_bundle: Path, tmp_path: Path
) -> None:
    with pytest.raises(HostKeyRefused, match="not known") as unknown:
        remote_bench(server.url, base_bundle, FEW, server.options(host_key=None))
    assert "SHA256:" in str(unknown.value)
    assert not (tmp_path / "config/edge-mmllm/known_hosts").exists()
    _keygen(tmp_path / "other")
    other = (tmp_path / "other.pub").read_text()
    with pytest.raises(HostKeyRefused, match="not the pinned one"):
        remote_bench(server.url, base_bundle, FEW, server.options(host_key=other))
    # A host that was known by another key.
    pins = tmp_path / "config/edge-mmllm/known_hosts"
    pins.parent.mkdir(parents=True)
    words = other.split()
    pins.write_text(f"[127.0.0.1]:{server.port} {words[0]} {words[1]}\n")
    with pytest.raises(HostKeyRefused, match="not the pinned one"):
        remote_bench(server.url, base_bundle, FEW, server.options(host_key=None))
    assert not (server.folder / "device").exists()
    log = (server.folder / "log").read_text()
    assert "Accepted" not in log


@needs_sshd
def test_a_user_who_is_not_let_in(server: Server, base_bundle: Path, tmp_path: Path) -> None:
    _keygen(tmp_path / "stranger")
    with pytest.raises(RemoteError, match="lets this user not in"):
        remote_bench(
            server.url, base_bundle, FEW, server.options(identity=str(tmp_path / "stranger"))
        )


class _Cut:
    """A shell that breaks after so many appended bytes, once."""

    def __init__(self, shell: Any, state: dict[str, int]) -> None:
        self._shell, self._state = shell, state

    def run(self, command: str, *, timeout_s: float = 60, beat: bool = False) -> Any:
        return self._shell.run(command, timeout_s=timeout_s, beat=beat)

    def append(self, local: Path, remote_path: str, offset: int, size: int) -> None:
        self._state["appends"] += 1
        self._state.setdefault("bytes", 0)
        if self._state["appends"] == self._state["cut_at"]:
            half = size // 2
            self._shell.append(local, remote_path, offset, half)
            self._state["offset"] = offset + half
            self._shell._client.get_transport().sock.shutdown(socket.SHUT_RDWR)
        self._state["bytes"] += size
        self._shell.append(local, remote_path, offset, size)

    def close(self) -> None:
        self._shell.close()


@needs_sshd
def test_a_cut_while_copying_is_resumed(
    server: Server, base_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {"appends": 0, "cut_at": 2}
    opened = []

    def opener(target: Target, options: RemoteOptions) -> Any:
        opened.append(1)
        return _Cut(remote.open_shell(target, options), state)

    told = remote_bench(server.url, base_bundle, FEW, server.options(), opener=opener)
    assert told
    assert len(opened) == 2
    assert not list((server.folder / "device/blobs").glob("*.part"))


def _wait_for_child(folder: Path) -> int:
    """The bench (not its supervisor) on the device."""
    for _ in range(300):
        for pid in _ours(folder / "runs"):
            try:
                line = Path(f"/proc/{pid}/cmdline").read_bytes().decode()
            except OSError:
                continue
            if "edge_mmllm" in line and "supervisor.py" not in line:
                return pid
        time.sleep(0.05)
    pytest.fail("the bench never started")


@needs_sshd
def test_a_killed_bench_is_told(server: Server, base_bundle: Path) -> None:
    device = server.folder / "device"
    caught: list[BaseException] = []

    def go() -> None:
        try:
            remote_bench(server.url, base_bundle, LONG, server.options(attempts=1))
        except EdgeError as error:
            caught.append(error)

    thread = threading.Thread(target=go)
    thread.start()
    os.kill(_wait_for_child(device), signal.SIGKILL)
    thread.join(60)
    assert "SIGKILL" in str(caught[0])
    _wait_none(device)


@needs_sshd
def test_a_cut_while_running_leaves_nothing(server: Server, base_bundle: Path) -> None:
    device = server.folder / "device"
    caught: list[BaseException] = []
    shells: list[Any] = []

    def opener(target: Target, options: RemoteOptions) -> Any:
        shells.append(remote.open_shell(target, options))
        return shells[-1]

    def go() -> None:
        try:
            remote_bench(server.url, base_bundle, LONG, server.options(attempts=1), opener=opener)
        except EdgeError as error:
            caught.append(error)

    thread = threading.Thread(target=go)
    thread.start()
    _wait_for_child(device)
    shells[0]._client.get_transport().sock.shutdown(socket.SHUT_RDWR)
    thread.join(60)
    assert [type(e) for e in caught] == [ConnectionLost]
    _wait_none(device)


@needs_sshd
def test_what_the_device_lacks_is_said(server: Server, base_bundle: Path) -> None:
    with pytest.raises(RemoteError, match="no Python that runs"):
        remote_bench(server.url, base_bundle, FEW, server.options(python="/no/python"))
    with pytest.raises(UsageError, match="absolute"):
        remote_bench(server.url, base_bundle, FEW, server.options(root="here"))


# -- the command line, as a process of its own ----------------------------------------------------


class Proxy:
    """A way to the server that can be cut.

    Args:
        port: of the server.
        cut_after: bytes to the server after which the first connection is cut; None: by `cut` only.
    """

    def __init__(self, port: int, cut_after: int | None = None) -> None:
        self._port, self._left = port, cut_after
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self.connections = 0
        self._start(self._accept)

    @property
    def url(self) -> str:
        return f"ssh://127.0.0.1:{self._listener.getsockname()[1]}"

    def _start(self, target: Any, *arguments: Any) -> None:
        self._threads.append(threading.Thread(target=target, args=arguments, daemon=True))
        self._threads[-1].start()

    def _accept(self) -> None:
        while True:
            try:
                here, _ = self._listener.accept()
            except OSError:
                return
            there = socket.create_connection(("127.0.0.1", self._port))
            self.connections += 1
            self._sockets += [here, there]
            for a, b, counts in ((here, there, True), (there, here, False)):
                self._start(self._pump, a, b, counts)

    def _pump(self, source: socket.socket, sink: socket.socket, counts: bool) -> None:
        try:
            while data := source.recv(1 << 14):
                if counts and self._left is not None:
                    self._left -= len(data)
                    if self._left < 0:
                        self._left = None
                        break
                sink.sendall(data)
        except OSError:
            pass
        for end in (source, sink):
            _shut(end)

    def cut(self) -> None:
        """Ends every connection and takes no more."""
        for end in (self._listener, *self._sockets):
            _shut(end)

    def close(self) -> None:
        """Cuts, and gives everything back."""
        self.cut()
        for thread in self._threads:
            thread.join(10)
        for end in (self._listener, *self._sockets):
            end.close()


def _shut(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)


def _command(server: Server, url: str, bundle: Path, *more: str, long: bool = False) -> list[str]:
    """`edge-mmllm bench --target` in JSON; with the server's key unless another is named."""
    counts = LONG if long else FEW
    words = [sys.executable, "-m", "edge_mmllm", "bench", str(bundle), "--target", url, "--json"]
    words += ["--identity", str(server.folder / "user"), "--remote-python", sys.executable]
    words += ["--remote-root", str(server.folder / "device")]
    for name in ("prompt_tokens", "new_tokens", "repetitions"):
        words += ["--" + name.replace("_", "-"), str(counts[name])]
    if "--host-key" not in more:
        words += ["--host-key", str(server.folder / "host.pub")]
    return [*words, *[word for word in more if word]]


def _bench(command: list[str]) -> tuple[int, Any, str]:
    """Status, the one document on stdout, stderr."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    return done.returncode, json.loads(done.stdout), done.stderr


@needs_sshd
def test_the_command_line_there_and_back(
    server: Server, base_bundle: Path, tmp_path: Path, cli: Any
) -> None:
    out = tmp_path / "results.jsonl"
    command = _command(server, server.url, base_bundle, "--out", str(out))
    status, told, said = _bench(command)
    assert (status, told["status"]) == (0, "ok"), said
    assert told["device"] == server.url
    assert told["decode_tokens_per_s"] > 0
    device = server.folder / "device"
    _wait_none(device)
    assert list((device / "runs").iterdir()) == []
    known = (tmp_path / "config/edge-mmllm/known_hosts").read_text()
    assert server.host_key.split()[1] in known
    # The key is remembered, the results are those of any bench.
    status, told, said = _bench(
        [word for word in command if word not in ("--host-key", str(server.folder / "host.pub"))]
    )
    assert (status, told["status"]) == (0, "ok"), said
    assert len(out.read_text().splitlines()) == 2
    assert cli("report", out, "--html", tmp_path / "r.html").status == 0
    assert server.url in (tmp_path / "r.html").read_text()


@needs_sshd
def test_the_command_line_refuses_host_keys(
    server: Server, base_bundle: Path, tmp_path: Path
) -> None:
    _keygen(tmp_path / "other")
    wrong = ("--host-key", str(tmp_path / "other.pub"))
    for more, message in ((wrong, "is not the pinned one"), (("--host-key", ""), "is not known")):
        command = _command(server, server.url, base_bundle, *more)
        command = [word for word in command if word != "--host-key"] if not more[1] else command
        status, told, _ = _bench(command)
        assert status == 1
        assert told["error"]["type"] == "HostKeyRefused"
        assert message in told["error"]["what"]
    assert not (server.folder / "device").exists()
    assert "Accepted" not in (server.folder / "log").read_text()
    assert not (tmp_path / "config/edge-mmllm/known_hosts").exists()


@pytest.mark.full
@needs_sshd
def test_the_command_line_goes_on_after_a_cut(server: Server, base_bundle: Path) -> None:
    with contextlib.closing(Proxy(server.port, cut_after=200_000)) as proxy:
        status, told, said = _bench(_command(server, proxy.url, base_bundle))
    assert (status, told["status"]) == (0, "ok"), said
    assert proxy.connections == 2
    _wait_none(server.folder / "device")


@pytest.mark.full
@needs_sshd
@pytest.mark.parametrize("how", ["the device is gone", "the bench is killed", "Ctrl-C"])
def test_the_command_line_ends_clearly(server: Server, base_bundle: Path, how: str) -> None:
    device = server.folder / "device"
    with contextlib.closing(Proxy(server.port)) as proxy:
        child = subprocess.Popen(
            _command(server, proxy.url, base_bundle, long=True),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        pid = _wait_for_child(device)
        if how == "the device is gone":
            proxy.cut()
        elif how == "the bench is killed":
            os.kill(pid, signal.SIGKILL)
        else:
            child.send_signal(signal.SIGINT)
        out, said = child.communicate(timeout=120)
    _wait_none(device)
    if how == "Ctrl-C":
        assert child.returncode == 130, said
        assert not out or "error" in json.loads(out)
        return
    assert child.returncode == 1, said
    wanted = {"the bench is killed": "SIGKILL", "the device is gone": "connection"}[how]
    assert wanted in out


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("ssh://pi@board.local", Target("ssh", "board.local", 22, "pi")),
        ("ssh://127.0.0.1:2222/", Target("ssh", "127.0.0.1", 2222)),
        ("ssh://u@[::1]:22", Target("ssh", "::1", 22, "u")),
        ("adb", Target("adb")),
        ("adb:emulator-5554", Target("adb", serial="emulator-5554")),
    ],
)
def test_targets(text: str, target: Target) -> None:
    assert parse_target(text) == target


@pytest.mark.parametrize(
    "text",
    ["", "ssh://", "ssh://-oProxyCommand=x", "ssh://h:99999", "adb:-s", "http://h", "ssh://a b"],
)
def test_what_is_no_target(text: str) -> None:
    with pytest.raises(UsageError, match="no target"):
        parse_target(text)
