"""Paths out of a manifest or an archive, and the files they lead to: nothing leaves the folder."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from edge_mmllm.errors import CorruptBundle, UnsafeBundle

CHUNK_BYTES = 1 << 20

_MAX_PATH_CHARS = 1024
_MAX_PART_BYTES = 255
_WINDOWS_DEVICES = frozenset(
    {"con", "prn", "aux", "nul"} | {f"{n}{i}" for n in ("com", "lpt") for i in range(10)}
)


def check_relative(path: str, where: str) -> str:
    """Returns `path` if it is a plain relative path on every system, else raises.

    Plain: parts joined by single forward slashes; no part is empty, `.` or `..`, ends in a dot or
    a space, or is a Windows device; no backslash, colon (drives, NTFS streams) or control
    character; no lone surrogate.

    Raises:
        UnsafeBundle: `path` is not plain.
    """
    reason = _objection(path)
    if reason:
        raise UnsafeBundle(
            f"a path that may not be in a bundle: {reason}",
            where=where,
            expected="a relative path inside the bundle, with forward slashes",
            found=ascii(path[:200]),
            fix="do not use this bundle; get it again from a source you trust",
        )
    return path


def _objection(path: str) -> str | None:
    if not path or len(path) > _MAX_PATH_CHARS:
        return f"its length is {len(path)}"
    if path.startswith("/"):
        return "it is absolute"
    bad = {c for c in path if c in "\\:" or ord(c) < 32 or ord(c) == 127}
    if bad:
        return f"it holds {', '.join(sorted(ascii(c) for c in bad))}"
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        return "it is not Unicode text"
    for part in path.split("/"):
        if part in ("", ".", ".."):
            return f"it has the part {part!r}"
        if part[-1] in ". " or part.split(".")[0].lower() in _WINDOWS_DEVICES:
            return f"the part {part!r} means something else on Windows"
        if len(part.encode("utf-8")) > _MAX_PART_BYTES:
            return "a part is longer than 255 bytes"
    return None


def regular_file(root: Path, path: str, where: str) -> os.stat_result:
    """The status of `root/path`, after checking that no part of it below `root` is a symlink.

    Args:
        path: has passed `check_relative`.

    Raises:
        CorruptBundle: missing.
        UnsafeBundle: a symbolic link on the way, or not a regular file.
    """
    here = root
    parts = path.split("/")
    for i, part in enumerate(parts):
        here = here / part
        try:
            status = here.lstat()
        except (FileNotFoundError, NotADirectoryError):
            raise CorruptBundle(
                "a file of the bundle is missing", where=where, expected=path, found="no such file"
            ) from None
        last = i == len(parts) - 1
        good = stat.S_ISREG(status.st_mode) if last else stat.S_ISDIR(status.st_mode)
        if not good:
            raise UnsafeBundle(
                "not a plain file or folder",
                where=where,
                expected=f"{'/'.join(parts[: i + 1])} is a regular {'file' if last else 'folder'}",
                found=kind_of(status.st_mode),
            )
    return status


def kind_of(mode: int) -> str:
    """A file mode's type in words."""
    if stat.S_ISLNK(mode):
        return "a symbolic link"
    if stat.S_ISDIR(mode):
        return "a folder"
    return "a regular file" if stat.S_ISREG(mode) else "a device, pipe or socket"


def sha256_of(path: Path) -> str:
    """Hash of a file, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(CHUNK_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def walk(root: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Every entry below `root` that is not a folder, as `(relative path, lstat)`, sorted.

    Symbolic links are entries, never followed.
    """
    for folder, folders, files in os.walk(root):
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        folders[:] = sorted(set(folders) - set(links))
        for name in sorted(files + links):
            full = Path(folder) / name
            yield full.relative_to(root).as_posix(), full.lstat()
