"""An output that appears whole or not at all, whenever the process is killed.

Beside an output `NAME`, in the same folder and thus on the same file system, live:

    .NAME.edge-lock             flock'ed by the process that is making NAME
    .NAME.edge-part-xxxxxxxx    what it has made so far (8 random hexadecimal digits)
    .NAME.edge-old              the bundle that is being replaced, for a moment

Whoever holds the lock may remove the parts of NAME: their maker is dead, since the kernel drops
a dead process's lock. Replacing goes in this order, each line atomic:

    1. part is complete and on disk (fsync of files, folders)
    2. rename NAME -> old
    3. rename part -> NAME
    4. fsync the folder, remove old

Killed before 2: NAME is the old bundle. Between 2 and 3: NAME is missing, old is whole; the next
run renames it back. After 3: NAME is the new bundle; the next run removes old.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from edge_mmllm.errors import EdgeError, ExportError, OutOfSpace, OutputExists, UsageError

try:
    import fcntl
except ImportError:  # Windows: no lock, so parts of a killed run are left to the user
    fcntl = None  # type: ignore[assignment]

_TEMPORARY = re.compile(r"^\.(.+)\.edge-(lock|old|part-[0-9a-f]{8})$", re.DOTALL)
_LOCK_TRIES = 20
_LOCK_WAIT_S = 0.05


class Staging:
    """Reserves `out`, and hands out `part`, a path beside it to build the output at.

    Args:
        out: where the output will appear.
        force: whether an existing output may be replaced.
        replaceable: says whether what exists at `out` is ours to replace.

    Raises:
        UsageError: `out` has no name, or the folder to hold it does not exist.
        OutputExists: something is at `out`; or another process is making it.
        ExportError: the folder cannot be written to.
    """

    def __init__(self, out: Path, *, force: bool, replaceable: Callable[[Path], bool]) -> None:
        self.out = Path(os.path.abspath(out))  # noqa: PTH100 (resolve() would follow a link)
        self.force, self._replaceable = force, replaceable
        if not self.out.name:
            raise UsageError("the output needs a name", where=str(self.out))
        parent = self.out.parent
        if not parent.is_dir():
            raise UsageError(
                "the output's folder does not exist", where=str(parent), fix="create it first"
            )
        try:
            self._lock = _Lock.take(self.out)
        except OSError as error:
            raise _unwritable(error, parent) from error
        try:
            if self._lock.certain:
                _recover(self.out, replaceable)
                _sweep(parent, self.out.name, replaceable)
            self.check_free()
        except BaseException:
            self._lock.release()
            raise
        self.part = parent / f".{self.out.name}.edge-part-{secrets.token_hex(4)}"

    def check_free(self) -> None:
        """Raises `OutputExists` unless the output may be put in place."""
        if not os.path.lexists(self.out):
            return
        if not self.force:
            raise OutputExists(
                "the output exists", where=str(self.out), fix="choose another, or pass --force"
            )
        if self.out.is_symlink() or not self._replaceable(self.out):
            raise OutputExists(
                "the output exists and is not a bundle: --force does not replace it",
                where=str(self.out),
                expected="a bundle made by edge-mmllm, or nothing",
                found="a symbolic link" if self.out.is_symlink() else "something else",
                fix="choose another output, or remove this one yourself",
            )

    def publish(self) -> None:
        """Renames the finished part into place (order: see the module's docstring)."""
        self.check_free()
        sync_tree(self.part)
        if not os.path.lexists(self.out) or self.part.is_file():
            _rename(self.part, self.out)
        else:
            old = _old(self.out)
            _rename(self.out, old)
            try:
                _rename(self.part, self.out)
            except BaseException:
                if not os.path.lexists(self.out):
                    _rename(old, self.out)
                raise
        sync_folder(self.out.parent)
        remove(_old(self.out))

    def close(self) -> None:
        """Removes what was not published, and gives `out` free."""
        try:
            remove(self.part)
        finally:
            self._lock.release()


class _Lock:
    """A lock file; `certain` is False where the system has no flock."""

    def __init__(self, path: Path, descriptor: int, certain: bool) -> None:
        self.path, self._descriptor, self.certain = path, descriptor, certain

    @classmethod
    def take(cls, out: Path, tries: int = _LOCK_TRIES) -> _Lock:
        """Takes the lock of `out`; a few tries, for another run may just be sweeping it."""
        path = out.parent / f".{out.name}.edge-lock"
        for i in range(tries):
            if i:
                time.sleep(_LOCK_WAIT_S)
            lock = cls._try(path)
            if lock:
                return lock
        raise OutputExists(
            "another process is writing this output",
            where=str(out),
            fix="wait for it to end, or choose another output",
        )

    @classmethod
    def _try(cls, path: Path) -> _Lock | None:
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        descriptor = os.open(path, flags, 0o666)
        certain = fcntl is not None
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its last holder may have removed the file between our open and our flock.
            if os.path.samestat(os.fstat(descriptor), path.lstat()):
                return cls(path, descriptor, certain)
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                return cls(path, descriptor, certain=False)  # a file system without flock
        os.close(descriptor)
        return None

    def release(self) -> None:
        """Removes the lock file, then drops the lock, in this order (see `_try`)."""
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):
                self.path.unlink()
            os.close(self._descriptor)
            self._descriptor = -1


def _old(out: Path) -> Path:
    return out.parent / f".{out.name}.edge-old"


def _rename(source: Path, target: Path) -> None:
    # replace, not rename: on Windows only this replaces an existing file.
    source.replace(target)


def _leftovers(parent: Path) -> Iterator[tuple[str, Path]]:
    """Temporary entries in `parent`, as `(NAME, path)`."""
    with contextlib.suppress(OSError):
        for path in sorted(parent.iterdir()):
            match = _TEMPORARY.match(path.name)
            if match:
                yield match.group(1), path


def _recover(out: Path, replaceable: Callable[[Path], bool]) -> None:
    """Cleans up after a killed run that was making `out`. The caller holds its lock."""
    for name, path in _leftovers(out.parent):
        if name != out.name:
            continue
        if ".edge-part-" in path.name:
            remove(path)
        elif path == _old(out):
            if not os.path.lexists(out):
                _rename(path, out)
            elif replaceable(out):
                remove(path)


def _sweep(parent: Path, own: str, replaceable: Callable[[Path], bool]) -> None:
    """Cleans up after killed runs that were making other outputs in the same folder."""
    for name in sorted({name for name, _ in _leftovers(parent)} - {own}):
        try:
            lock = _Lock.take(parent / name, tries=1)
        except (OutputExists, OSError):
            continue  # alive, or another user's
        try:
            if lock.certain:
                with contextlib.suppress(OSError):
                    _recover(parent / name, replaceable)
        finally:
            lock.release()


def remove(path: Path) -> None:
    """Removes a file or a folder as far as it can; a link is removed, not followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def sync_folder(path: Path) -> None:
    """Makes a folder's entries durable, where the system can (not on Windows)."""
    with contextlib.suppress(PermissionError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync_tree(path: Path) -> None:
    """Makes a file, or all files and folders below a folder, durable."""
    if path.is_file():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        return
    for folder, _, files in os.walk(path, topdown=False):
        for name in files:
            sync_tree(Path(folder) / name)
        sync_folder(Path(folder))


def check_free_space(folder: Path, size_bytes: int) -> None:
    """Raises `OutOfSpace` where `folder`'s disk has less than `size_bytes` left."""
    free = shutil.disk_usage(folder).free
    if free < size_bytes:
        raise OutOfSpace(
            "the disk has too little room",
            where=str(folder),
            expected=f"{size_bytes} bytes free",
            found=f"{free} bytes free",
            fix="free some space, or choose another output",
        )


def space_error(error: OSError, folder: Path) -> OutOfSpace | None:
    """`OutOfSpace` if `error` says, or in numpy's case hides, that the disk is full.

    `numpy.ndarray.tofile` raises an OSError without errno ("16384 requested and 8192 written");
    such a one counts where less than 1 MiB is left.
    """
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    if error.errno is None and not isinstance(error, EdgeError):
        with contextlib.suppress(OSError):
            full = shutil.disk_usage(folder).free < 1 << 20
    if not full:
        return None
    return OutOfSpace(
        "the disk is full",
        where=str(folder),
        found=str(error),
        fix="free some space, or choose another output; nothing was left behind",
    )


def _unwritable(error: OSError, parent: Path) -> EdgeError:
    return space_error(error, parent) or ExportError(
        "the output's folder cannot be written to",
        where=str(parent),
        found=error.strerror or str(error),
        fix="choose another output, or change the folder's permissions",
    )
