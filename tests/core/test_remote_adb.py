"""`--target adb`: against a fake adb program that runs its shell here."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from edge_mmllm.errors import EdgeError
from edge_mmllm.profiling.job import Job
from edge_mmllm.remote.adb import AdbShell
from edge_mmllm.remote.bench import RemoteDevice, RemoteOptions
from edge_mmllm.remote.deploy import Store, local_item
from edge_mmllm.remote.targets import ConnectionLost, RemoteError, Target

_FAKE = r"""#!{python}
import os, shutil, subprocess, sys
words = sys.argv[1:]
with open({log!r}, "a") as log:
    print(*words[:4], file=log)
serial = None
if words[:1] == ["-s"]:
    serial, words = words[1], words[2:]
state = open({state!r}).read().split()
if serial not in (None, "emu-1"):
    sys.exit("error: device '%s' not found" % serial)
if "offline" in state:
    sys.exit("error: device offline")
if words[0] == "get-state":
    print("device")
elif words[0] == "shell":
    sys.exit(subprocess.run(["sh", "-c", words[1]]).returncode)
elif words[0] == "push":
    if "cut" in state:
        open({state!r}, "w").write("")
        with open(words[1], "rb") as a, open(words[2], "wb") as b:
            b.write(a.read()[:100])
        sys.exit("error: device offline")
    shutil.copy(words[1], words[2])
else:
    sys.exit(2)
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "adb"
    folder.mkdir()
    (folder / "state").write_text("")
    program = folder / "adb"
    program.write_text(
        _FAKE.format(python=sys.executable, log=str(folder / "log"), state=str(folder / "state"))
    )
    program.chmod(0o755)
    monkeypatch.delenv("ADB", raising=False)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


def test_bench_through_adb(fake: Path, base_bundle: Path, tmp_path: Path) -> None:
    options = RemoteOptions(root=str(tmp_path / "device"), python=sys.executable)
    job = Job(str(base_bundle), prompt_tokens=8, new_tokens=4, repetitions=2, threads=1)
    with RemoteDevice("adb:emu-1", options) as device:
        record = device.launch(job)
    assert record["decode_tokens_per_s"] > 0
    assert list((tmp_path / "device/runs").iterdir()) == []
    assert "-s emu-1 push" in (fake / "log").read_text()


def test_a_cut_push_is_resumed(fake: Path, tmp_path: Path) -> None:
    local = tmp_path / "file"
    local.write_bytes(bytes(range(256)) * 1000)
    root = str(tmp_path / "device")
    (fake / "state").write_text("cut")
    item = local_item("file", local)
    with pytest.raises(ConnectionLost, match=r"could not copy|broke"):
        Store(AdbShell(Target("adb")), root).tree([item], "copy")
    place = Store(AdbShell(Target("adb")), root).tree([item], "copy")
    assert (Path(place) / "file").read_bytes() == local.read_bytes()


def test_a_damaged_copy_is_refused(fake: Path, tmp_path: Path) -> None:
    local = tmp_path / "file"
    local.write_bytes(b"x" * 100)
    item = local_item("file", local)
    part = tmp_path / "device/blobs" / f"{item.sha256}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"y" * 50)  # as if begun from something else
    store = Store(AdbShell(Target("adb")), str(tmp_path / "device"))
    with pytest.raises(RemoteError, match="not what was sent"):
        store.tree([item], "copy")
    assert not part.exists()
    assert (Path(store.tree([item], "copy")) / "file").read_bytes() == b"x" * 100


def test_what_adb_lacks_is_said(
    fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RemoteError, match="no device that is ready"):
        AdbShell(Target("adb", serial="other"))
    (fake / "state").write_text("offline")
    with pytest.raises(RemoteError, match="no device that is ready"):
        AdbShell(Target("adb"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EdgeError, match="adb program was not found"):
        AdbShell(Target("adb"))
