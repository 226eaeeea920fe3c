"""Copying to a device: by content, resumed, checksummed.

    ROOT/blobs/<sha256>          whole files, named by what is in them
    ROOT/blobs/<sha256>.part     begun; goes on where it ended
    ROOT/trees/<sha256>/...      folders made of hard links (or copies) of blobs

ROOT is a folder of the user's on the device. A file that is there is not copied again, whichever
bundle brought it. A blob gets its name only after the device itself has hashed it.
"""

from __future__ import annotations

import hashlib
import io
import shlex
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from edge_mmllm.bundle import Bundle
from edge_mmllm.remote.targets import Done, RemoteError, Shell

#: Bytes a piece: what a cut connection can cost.
_PIECE_BYTES = 8 << 20
_HASH_S = 600
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Item:
    """A file to bring. `path`: relative, inside its tree."""

    path: str
    local: Path
    size_bytes: int
    sha256: str


def bundle_items(bundle: Bundle) -> list[Item]:
    """All files of a bundle, with the hashes that its manifest promises."""
    items = [
        Item(f.path, bundle.file(f.path), f.size_bytes, f.sha256) for f in bundle.manifest.files
    ]
    return [*items, local_item("manifest.json", bundle.root / "manifest.json")]


@cache
def runtime_archive() -> bytes:
    """The light runtime as a zip: sources of the core and of the device side, nothing of the
    exporter. The same bytes for the same sources."""
    import edge_mmllm
    import edge_mmllm_runtime

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for package in (edge_mmllm, edge_mmllm_runtime):
            root = Path(str(package.__file__)).parent
            for file in sorted(root.rglob("*")):
                if file.is_file() and "__pycache__" not in file.parts:
                    name = f"{root.name}/{file.relative_to(root).as_posix()}"
                    info = zipfile.ZipInfo(name)  # dated 1980: times are no content
                    info.external_attr = 0o644 << 16
                    info.compress_type = zipfile.ZIP_DEFLATED
                    archive.writestr(info, file.read_bytes())
    return buffer.getvalue()


def local_item(path: str, local: Path) -> Item:
    """A file of ours, hashed now."""
    data = local.read_bytes()
    return Item(path, local, len(data), hashlib.sha256(data).hexdigest())


def tree_hash(items: Iterable[Item]) -> str:
    """One hash for a folder: sha256 of the sorted lines `<sha256>  <path>` + LF."""
    lines = sorted(f"{item.sha256}  {item.path}\n" for item in items)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


class Store:
    """Our folder on a device.

    Args:
        shell: the way there.
        root: an absolute path.
        python: a Python on the device, for hashing where it has no `sha256sum`.
    """

    def __init__(self, shell: Shell, root: str, python: str = "python3") -> None:
        self._shell, self.root, self._python = shell, root, python

    def tree(self, items: list[Item], label: str, progress: Progress | None = None) -> str:
        """Makes sure that a folder with these files is on the device; returns its path.

        Raises:
            ConnectionLost: what was copied stays.
            RemoteError: no room, no permission, or what arrived is not what was sent.
        """
        place = f"{self.root}/trees/{tree_hash(items)}"
        if self._ask(f"test -d {_q(place)}").status == 0:
            return place
        self._say(f"mkdir -p {_q(self.root)}/blobs {_q(self.root)}/trees")
        self._bring(items, label, progress)
        partial = f"{place}.partial"
        # One command a few files: a command line has a length.
        self._say(f"rm -rf {_q(partial)} && mkdir -p {_q(partial)}")
        folders = sorted({str(Path(item.path).parent) for item in items} - {"."})
        if folders:
            self._say(f"cd {_q(partial)} && mkdir -p " + " ".join(map(_q, folders)))
        blobs = "../../blobs"
        for start in range(0, len(items), 50):
            links = [
                f"{{ ln {blobs}/{i.sha256} {_q(i.path)} 2>/dev/null || "
                f"cp {blobs}/{i.sha256} {_q(i.path)}; }}"
                for i in items[start : start + 50]
            ]
            self._say(f"cd {_q(partial)} && " + " && ".join(links))
        self._say(f"mv {_q(partial)} {_q(place)}")
        return place

    def unpacked(self, archive: bytes, label: str, progress: Progress | None = None) -> str:
        """The same for the content of a zip; its folder is named by the zip's hash."""
        digest = hashlib.sha256(archive).hexdigest()
        place = f"{self.root}/trees/{digest}"
        if self._ask(f"test -d {_q(place)}").status == 0:
            return place
        self._say(f"mkdir -p {_q(self.root)}/blobs {_q(self.root)}/trees")
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / "archive"
            local.write_bytes(archive)
            self._bring([Item("archive", local, len(archive), digest)], label, progress)
        partial = f"{place}.partial"
        self._say(
            f"rm -rf {_q(partial)} && {_q(self._python)} -m zipfile -e "
            f"{_q(f'{self.root}/blobs/{digest}')} {_q(partial)} && mv {_q(partial)} {_q(place)}"
        )
        return place

    def _bring(self, items: list[Item], label: str, progress: Progress | None) -> None:
        """Copies the files that the device lacks."""
        listed = self._say(f"cd {_q(self.root)}/blobs && ls -ln").out.decode(errors="replace")
        sizes = {}
        for line in listed.splitlines():
            words = line.split()
            if len(words) >= 8 and words[4].isdigit():
                sizes[words[-1]] = int(words[4])
        missing = {i.sha256: i for i in items if sizes.get(i.sha256) != i.size_bytes}
        total = sum(i.size_bytes for i in missing.values())
        done = 0
        for item in missing.values():
            done = self._copy(
                item, sizes.get(f"{item.sha256}.part", 0), label, done, total, progress
            )

    def _copy(
        self, item: Item, have: int, label: str, done: int, total: int, progress: Progress | None
    ) -> int:
        part = f"{self.root}/blobs/{item.sha256}.part"
        if have > item.size_bytes:
            self._say(f"rm -f {_q(part)}")
            have = 0
        if item.size_bytes == 0:
            self._say(f": > {_q(part)}")
        begin = have
        while have < item.size_bytes:
            size = min(_PIECE_BYTES, item.size_bytes - have)
            self._shell.append(item.local, part, have, size)
            have += size
            if progress is not None:
                progress(label, done + have - begin, max(total, 1))
        found = self._hash(part)
        if found != item.sha256:
            self._say(f"rm -f {_q(part)}")
            raise RemoteError(
                "what arrived on the device is not what was sent",
                where=item.path,
                expected=item.sha256,
                found=found or "no hash",
                fix="run it again; if it stays so, the device's storage or the bundle is damaged",
            )
        self._say(f"mv {_q(part)} {_q(self.root)}/blobs/{item.sha256}")
        return done + item.size_bytes - begin

    def _hash(self, path: str) -> str:
        """The device's own sha256 of a file."""
        code = "import hashlib,sys;print(hashlib.sha256(open(sys.argv[1],'rb').read()).hexdigest())"
        done = self._ask(
            f"sha256sum {_q(path)} 2>/dev/null || {_q(self._python)} -c {_q(code)} {_q(path)}",
            timeout_s=_HASH_S,
        )
        words = done.out.decode(errors="replace").split()
        return words[0] if done.status == 0 and words else ""

    def _ask(self, command: str, timeout_s: float = 120) -> Done:
        return self._shell.run(command, timeout_s=timeout_s)

    def _say(self, command: str) -> Done:
        """A command that has to succeed."""
        done = self._ask(command)
        if done.status != 0:
            raise RemoteError(
                "the device refused a command",
                where=command[:120],
                found=done.err.decode(errors="replace").strip()[-300:] or f"status {done.status}",
                fix="is there room, and may this user write there? --remote-root names a folder",
            )
        return done


def _q(text: str) -> str:
    return shlex.quote(text)
