"""Writing bundles: whole or not at all, whatever interrupts."""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import edge_mmllm.bundle.staging as staging
from edge_mmllm.bundle import (
    Bundle,
    BundleWriter,
    Gate,
    Manifest,
    check_free_space,
    open_bundle,
)
from edge_mmllm.errors import (
    BundleError,
    ExportError,
    OutOfSpace,
    OutputExists,
    UnsafeBundle,
    UsageError,
)

ROOT = Path(__file__).parents[2]

WriteSample = Callable[..., Bundle]

needs_flock = pytest.mark.skipif(sys.platform == "win32", reason="no flock, no SIGKILL")


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _start(script: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_nothing_is_visible_before_the_commit(tmp_path: Path, sample_manifest: Manifest) -> None:
    out = tmp_path / "tiny"
    with BundleWriter(out) as writer:
        writer.path("decoder.onnx").write_bytes(b"x")
        assert not out.exists()
        assert all(name.startswith(".") for name in _names(tmp_path))
    assert _names(tmp_path) == []


def test_only_the_bundle_is_left_after_the_commit(
    tmp_path: Path, write_sample: WriteSample
) -> None:
    write_sample(tmp_path / "tiny")
    assert _names(tmp_path) == ["tiny"]


def test_all_is_on_disk_before_it_gets_its_name(
    tmp_path: Path, write_sample: WriteSample, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[object] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: events.append(os.fstat(descriptor).st_ino))
    rename = staging._rename
    monkeypatch.setattr(staging, "_rename", lambda a, b: (events.append("rename"), rename(a, b)))
    root = write_sample(tmp_path / "tiny").root
    at = events.index("rename")
    below = {path.stat().st_ino for path in [root, *root.rglob("*")]}
    assert below <= set(events[:at])
    assert tmp_path.stat().st_ino in events[at:]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("x"), SystemExit(1)])
def test_an_interruption_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), BundleWriter(tmp_path / "tiny") as writer:  # noqa: PT012
        writer.path("a/b/c").write_bytes(b"x")
        raise error
    assert _names(tmp_path) == []


@needs_flock
def test_sigkill_in_mid_write_leaves_nothing_visible_and_the_next_run_cleans(
    tmp_path: Path, write_sample: WriteSample
) -> None:
    script = (
        "import sys; from edge_mmllm.bundle import BundleWriter\n"
        "with BundleWriter(sys.argv[1]) as writer:\n"
        "    writer.path('decoder.onnx').write_bytes(b'x' * 100_000)\n"
        "    print('written', flush=True); sys.stdin.read()\n"
    )
    child = _start(script, tmp_path / "tiny")
    assert child.stdout is not None
    assert child.stdout.readline() == "written\n"
    part = next(tmp_path.glob(".tiny.edge-part-*"))

    # Alive: nobody takes its output or removes its part, not even when sweeping for another.
    with pytest.raises(OutputExists, match="another process"):
        write_sample(tmp_path / "tiny")
    write_sample(tmp_path / "other")
    assert part.exists()

    child.kill()
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    assert part.exists()
    assert [name for name in _names(tmp_path) if name[0] != "."] == ["other"]
    write_sample(tmp_path / "tiny")
    assert _names(tmp_path) == ["other", "tiny"]


@needs_flock
def test_the_next_run_in_the_folder_sweeps_for_dead_runs_of_other_names(
    tmp_path: Path, write_sample: WriteSample
) -> None:
    (tmp_path / ".dead.edge-part-0123abcd" / "weights").mkdir(parents=True)
    (tmp_path / ".dead.edge-lock").touch()
    (tmp_path / ".keep.edge-part").mkdir()  # not one of ours
    write_sample(tmp_path / "tiny")
    assert _names(tmp_path) == [".keep.edge-part", "tiny"]


_KILLED_AT_RENAME = (
    "import os, pathlib, signal, sys\n"
    "import edge_mmllm.bundle.staging as staging\n"
    "from edge_mmllm.bundle import BundleWriter, Manifest, open_bundle\n"
    "out, count = sys.argv[1], int(sys.argv[2])\n"
    "bundle = open_bundle(out)\n"
    "rename, calls = staging._rename, []\n"
    "def killed(source, target):\n"
    "    if len(calls) == count: os.kill(os.getpid(), signal.SIGKILL)\n"
    "    calls.append(target); rename(source, target)\n"
    "staging._rename = killed\n"
    "if count == 2: staging.sync_folder = lambda path: calls[2:] or ("
    "len(calls) == 2 and os.kill(os.getpid(), signal.SIGKILL))\n"
    "with BundleWriter(out, force=True) as writer:\n"
    "    for entry in bundle.manifest.files:\n"
    "        writer.path(entry.path).write_bytes(bundle.file(entry.path).read_bytes())\n"
    "    writer.path('new').write_bytes(b'new')\n"
    "    writer.commit(bundle.manifest)\n"
)


@needs_flock
@pytest.mark.parametrize(("renames", "survivor"), [(0, "old"), (1, "old"), (2, "new")])
def test_sigkill_while_replacing_never_loses_both(
    tmp_path: Path, write_sample: WriteSample, renames: int, survivor: str
) -> None:
    out = tmp_path / "tiny"
    old = write_sample(out)
    child = _start(_KILLED_AT_RENAME, out, renames)
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    if renames == 1:  # between the two renames: the reader says what to do
        with pytest.raises(BundleError, match=r"\.tiny\.edge-old"):
            open_bundle(out)
    # Any writer in the folder recovers it, even one that then refuses to replace it.
    with pytest.raises(OutputExists):
        write_sample(out)
    assert _names(tmp_path) == ["tiny"]
    found = open_bundle(out, verify="hashes")
    assert found.has("new") == (survivor == "new")
    assert (found.sha256 == old.sha256) == (survivor == "old")


def test_a_failed_second_rename_puts_the_old_bundle_back(
    tmp_path: Path, write_sample: WriteSample, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "tiny"
    old = write_sample(out)
    rename = staging._rename

    def failing(source: Path, target: Path) -> None:
        if ".edge-part-" in source.name:
            raise OSError(errno.EIO, "input/output error")
        rename(source, target)

    monkeypatch.setattr(staging, "_rename", failing)
    with pytest.raises(OSError, match="input/output"):
        write_sample(out, force=True, salt=b"2")
    assert _names(tmp_path) == ["tiny"]
    assert open_bundle(out, verify="hashes").sha256 == old.sha256


def test_an_existing_bundle_is_replaced_only_with_force(
    tmp_path: Path, write_sample: WriteSample
) -> None:
    out = tmp_path / "tiny"
    old = write_sample(out)
    with pytest.raises(OutputExists, match="--force"):
        write_sample(out)
    assert open_bundle(out, verify="hashes").sha256 == old.sha256
    new = write_sample(out, force=True, salt=b"2")
    assert new.sha256 != old.sha256
    assert open_bundle(out, verify="hashes").sha256 == new.sha256
    assert _names(tmp_path) == ["tiny"]


def test_force_replaces_a_bundle_of_a_later_version(
    tmp_path: Path, write_sample: WriteSample
) -> None:
    path = write_sample(tmp_path / "tiny").root / "manifest.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 9'))
    write_sample(tmp_path / "tiny", force=True)
    open_bundle(tmp_path / "tiny")


@pytest.mark.parametrize("content", [None, b"{}", b'{"format": "chrome-extension"}', b"\xff"])
def test_force_never_replaces_what_is_not_a_bundle(
    tmp_path: Path, write_sample: WriteSample, content: bytes | None
) -> None:
    out = tmp_path / "photos"
    out.mkdir()
    (out / "cat.jpg").write_bytes(b"cat")
    if content is not None:
        (out / "manifest.json").write_bytes(content)
    with pytest.raises(OutputExists, match="not a bundle"):
        write_sample(out, force=True)
    assert (out / "cat.jpg").read_bytes() == b"cat"
    assert _names(tmp_path) == ["photos"]


@pytest.mark.parametrize("kind", ["file", "link"])
def test_force_replaces_no_file_and_no_link(
    tmp_path: Path, write_sample: WriteSample, kind: str
) -> None:
    bundle = write_sample(tmp_path / "tiny")
    out = tmp_path / "out"
    if kind == "file":
        out.write_bytes(b"x")
    else:
        out.symlink_to(bundle.root)
    with pytest.raises(OutputExists):
        write_sample(out, force=True)
    assert out.is_symlink() == (kind == "link")
    open_bundle(bundle.root, verify="hashes")


def test_an_output_that_appears_meanwhile_is_kept(
    tmp_path: Path, sample_manifest: Manifest, sample_files: dict[str, bytes]
) -> None:
    out = tmp_path / "tiny"
    with pytest.raises(OutputExists), BundleWriter(out) as writer:  # noqa: PT012
        for name, content in sample_files.items():
            writer.path(name).write_bytes(content)
        out.mkdir()
        (out / "cat.jpg").write_bytes(b"cat")
        writer.commit(sample_manifest)
    assert _names(out) == ["cat.jpg"]
    assert _names(tmp_path) == ["tiny"]


def test_the_folder_to_write_in_must_exist(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"), BundleWriter(tmp_path / "no" / "tiny"):
        pass
    with pytest.raises(UsageError, match="needs a name"), BundleWriter("/"):
        pass


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no /proc to fail to write to")
def test_a_folder_that_cannot_be_written_to() -> None:
    with pytest.raises(ExportError, match="cannot be written"), BundleWriter("/proc/self/tiny"):
        pass


@pytest.mark.parametrize("path", ["../x", "/x", "a\\b", ""])
def test_the_writer_gives_no_path_outside(tmp_path: Path, path: str) -> None:
    with BundleWriter(tmp_path / "tiny") as writer, pytest.raises(UnsafeBundle):
        writer.path(path)


def test_a_full_disk_is_out_of_space_whoever_writes(tmp_path: Path) -> None:
    with pytest.raises(OutOfSpace), BundleWriter(tmp_path / "tiny") as writer:  # noqa: PT012
        writer.path("a").write_bytes(b"x")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert _names(tmp_path) == []


def test_a_full_disk_while_the_manifest_is_written(
    tmp_path: Path, write_sample: WriteSample, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = write_sample(tmp_path / "tiny")
    write = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        if self.name == "manifest.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutOfSpace):
        write_sample(tmp_path / "tiny", force=True, salt=b"2")
    assert _names(tmp_path) == ["tiny"]
    assert open_bundle(tmp_path / "tiny", verify="hashes").sha256 == old.sha256


def test_another_error_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), BundleWriter(tmp_path / "tiny"):
        raise PermissionError(errno.EPERM, "no")


def test_a_really_full_disk(
    tmp_path: Path, sample_manifest: Manifest, sample_files: dict[str, bytes]
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("cannot mount a small tmpfs here")
    try:
        with pytest.raises(OutOfSpace), BundleWriter(disk / "tiny") as writer:  # noqa: PT012
            for name, content in sample_files.items():
                writer.path(name).write_bytes(content)
            writer.path("huge").write_bytes(bytes(1 << 20))
            writer.commit(sample_manifest)
        assert _names(disk) == []
        import numpy as np

        # numpy's tofile raises an OSError that does not say why.
        with pytest.raises(OutOfSpace), BundleWriter(disk / "tiny") as writer:
            np.zeros(1 << 18, np.float32).tofile(writer.path("huge"))
        assert _names(disk) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_free_space_is_checked_beforehand(tmp_path: Path) -> None:
    check_free_space(tmp_path, 1)
    with pytest.raises(OutOfSpace, match="too little room"):
        check_free_space(tmp_path, 1 << 62)


def test_a_draft_can_be_opened_and_judged_before_the_commit(
    tmp_path: Path, sample_manifest: Manifest, sample_files: dict[str, bytes]
) -> None:
    draft = dataclasses.replace(sample_manifest, gate=Gate("not judged"), golden=None)
    with BundleWriter(tmp_path / "tiny") as writer:
        for name, content in sample_files.items():
            writer.path(name).write_bytes(content)
        assert open_bundle(writer.draft(draft), verify="hashes").manifest.gate == Gate("not judged")
        writer.path("golden.npz").write_bytes(b"other golden")
        bundle = writer.commit(sample_manifest)
    assert bundle.manifest.gate.verdict == "passed"
    assert open_bundle(bundle.root, verify="hashes").file("golden.npz").read_bytes() == (
        b"other golden"
    )


def test_a_bundle_that_could_not_be_read_is_not_written(
    tmp_path: Path, sample_manifest: Manifest
) -> None:
    with pytest.raises(ExportError, match="could not be read back"):  # noqa: PT012, SIM117
        with BundleWriter(tmp_path / "tiny") as writer:
            writer.path("golden.npz").write_bytes(b"x")  # but no decoder.onnx
            writer.commit(sample_manifest)
    assert _names(tmp_path) == []


def test_a_figure_that_is_not_a_number_is_not_written(
    tmp_path: Path, sample_manifest: Manifest, sample_files: dict[str, bytes]
) -> None:
    manifest = dataclasses.replace(sample_manifest, gate=Gate("passed", {"kl_mean": float("nan")}))
    with pytest.raises(ExportError, match="could not be read back"):  # noqa: PT012, SIM117
        with BundleWriter(tmp_path / "tiny") as writer:
            for name, content in sample_files.items():
                writer.path(name).write_bytes(content)
            writer.commit(manifest)
    assert _names(tmp_path) == []


def test_a_link_is_not_written(
    tmp_path: Path, sample_manifest: Manifest, sample_files: dict[str, bytes]
) -> None:
    with pytest.raises(ExportError, match="regular files"):  # noqa: PT012, SIM117
        with BundleWriter(tmp_path / "tiny") as writer:
            for name, content in sample_files.items():
                writer.path(name).write_bytes(content)
            writer.path("link").symlink_to("decoder.onnx")
            writer.commit(sample_manifest)
    assert _names(tmp_path) == []
