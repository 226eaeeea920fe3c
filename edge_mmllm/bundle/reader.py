"""Opening a bundle with distrust, and checking all of it."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

from edge_mmllm.bundle.manifest import MANIFEST_FILE, MAX_MANIFEST_BYTES, FileEntry, Manifest
from edge_mmllm.bundle.paths import kind_of, regular_file, sha256_of, walk
from edge_mmllm.errors import BundleError, CorruptBundle, UnsafeBundle, UsageError
from edge_mmllm.spec import ModelSpec

Verify = Literal["sizes", "hashes", "none"]


@dataclass(frozen=True)
class Bundle:
    """An opened bundle.

    Attributes:
        root: its folder, symbolic links above it resolved.
        manifest: what `manifest.json` says.
        sha256: hash of the manifest's bytes. As the manifest carries every file's hash, this
            names the bundle as a whole; snapshots are bound to it.
    """

    root: Path
    manifest: Manifest
    sha256: str

    @property
    def spec(self) -> ModelSpec:
        """The model."""
        return self.manifest.model

    @cached_property
    def _entries(self) -> dict[str, FileEntry]:
        return {entry.path: entry for entry in self.manifest.files}

    def has(self, path: str) -> bool:
        """Whether the manifest lists `path`."""
        return path in self._entries

    def file(self, path: str) -> Path:
        """The place of a listed file.

        Raises:
            CorruptBundle: not listed.
        """
        if path not in self._entries:
            raise CorruptBundle(
                "the bundle has no such file",
                where=str(self.root),
                expected=path,
                found=", ".join(sorted(self._entries)[:20]) or "no files",
            )
        return self.root.joinpath(*path.split("/"))

    @property
    def size_bytes(self) -> int:
        """Bytes of all listed files."""
        return sum(entry.size_bytes for entry in self.manifest.files)


@dataclass(frozen=True)
class Verification:
    """What `verify_bundle` found.

    Attributes:
        bundle: the bundle, opened.
        problems: one error for each file that is missing, altered or unsafe.
        extra: paths in the folder that the manifest does not list.
    """

    bundle: Bundle
    problems: tuple[BundleError, ...]
    extra: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether every listed file is as the manifest says (extra files do no harm)."""
        return not self.problems


def open_bundle(path: str | os.PathLike[str], *, verify: Verify = "sizes") -> Bundle:
    """Opens the bundle in folder `path`.

    Every listed file is always checked to be a regular file inside the folder with no symbolic
    link on the way. `verify` says what else: `sizes` (no file is read), `hashes` (every byte is
    read) or `none`.

    Raises:
        BundleError: there is no bundle at `path`.
        CorruptBundle: malformed manifest; a file missing or altered.
        UnsafeBundle: a path that leaves the folder, a symbolic link, a special file.
        UnsupportedBundle: a format version or an engine that this release does not know.
        UsageError: an unknown value of `verify`.
    """
    if verify not in get_args(Verify):
        raise UsageError(
            "unknown value of verify", expected=", ".join(get_args(Verify)), found=str(verify)
        )
    bundle = read_folder(Path(path))
    for entry in bundle.manifest.files:
        check_file(bundle.root, entry, verify)
    return bundle


def verify_bundle(path: str | os.PathLike[str]) -> Verification:
    """Checks every file of a bundle, hashes included, and lists all that is wrong at once.

    Raises:
        BundleError: as `open_bundle`, where the manifest itself cannot be used.
    """
    bundle = read_folder(Path(path))
    problems: list[BundleError] = []
    for entry in bundle.manifest.files:
        try:
            check_file(bundle.root, entry, "hashes")
        except BundleError as error:
            problems.append(error)
    known = {entry.path for entry in bundle.manifest.files} | {MANIFEST_FILE}
    extra = tuple(name for name, _ in walk(bundle.root) if name not in known)
    return Verification(bundle, tuple(problems), extra)


def read_folder(path: Path) -> Bundle:
    """Reads and checks the manifest in folder `path`; looks at no other file."""
    if path.is_file():
        raise BundleError(
            "a bundle is a folder",
            where=str(path),
            found="a file",
            fix="give the folder that holds it"
            if path.name == MANIFEST_FILE
            else f"unpack it first: edge-mmllm unpack {path.name} FOLDER",
        )
    if not path.is_dir():
        aside = path.parent / f".{path.name}.edge-old"
        hint = "check the path"
        if aside.is_dir():
            hint = f"an export was killed while it replaced this bundle: rename {aside} back"
        raise BundleError(
            "there is no bundle here", where=str(path), found="no such folder", fix=hint
        )
    root = path.resolve()
    data = read_small(root / MANIFEST_FILE, MAX_MANIFEST_BYTES)
    manifest = Manifest.from_bytes(data, MANIFEST_FILE)
    return Bundle(root, manifest, hashlib.sha256(data).hexdigest())


def read_small(path: Path, limit_bytes: int) -> bytes:
    """Reads a regular file of at most `limit_bytes`; follows no link, waits on no pipe."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    flags |= getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        raise CorruptBundle(
            "not a bundle", where=str(path.parent), expected=path.name, found="no such file"
        ) from None
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise UnsafeBundle(
            "not a plain file", where=str(path), expected="a file", found="a symbolic link"
        ) from None
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise UnsafeBundle(
                "not a plain file",
                where=str(path),
                expected="a regular file",
                found=kind_of(status.st_mode),
            )
        data = file.read(limit_bytes + 1) if status.st_size <= limit_bytes else b""
    if status.st_size > limit_bytes or len(data) > limit_bytes:
        raise CorruptBundle(
            "the file is too large",
            where=str(path),
            expected=f"at most {limit_bytes} bytes",
            found=f"{max(status.st_size, len(data))} bytes",
        )
    return data


def check_file(root: Path, entry: FileEntry, verify: Verify) -> None:
    """Checks one listed file as `open_bundle` says."""
    status = regular_file(root, entry.path, str(root))
    if verify != "none" and status.st_size != entry.size_bytes:
        raise altered(root, entry.path, f"{entry.size_bytes} bytes", f"{status.st_size} bytes")
    if verify == "hashes":
        found = sha256_of(root.joinpath(*entry.path.split("/")))
        if found != entry.sha256:
            raise altered(root, entry.path, f"sha256 {entry.sha256}", f"sha256 {found}")


def altered(root: Path, path: str, expected: str, found: str) -> CorruptBundle:
    """The error for a file that is not the one the manifest describes."""
    return CorruptBundle(
        "a file of the bundle was altered or cut short",
        where=str(root / path),
        expected=expected,
        found=found,
        fix="copy the bundle again, or export it again",
    )
