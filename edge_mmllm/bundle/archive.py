"""A bundle as one `.edge` file: a zip whose members are stored, not compressed.

Members, in this order: `manifest.json`, then the manifest's files as listed. Weights do not
compress, and a stored member can be read in place.
"""

from __future__ import annotations

import hashlib
import os
import stat
import struct
import zipfile
from pathlib import Path
from typing import IO

from edge_mmllm.bundle.manifest import MANIFEST_FILE, MAX_MANIFEST_BYTES, FileEntry, Manifest
from edge_mmllm.bundle.paths import CHUNK_BYTES, check_relative
from edge_mmllm.bundle.reader import Bundle, altered, open_bundle
from edge_mmllm.bundle.staging import Staging, check_free_space, space_error
from edge_mmllm.bundle.writer import BundleWriter
from edge_mmllm.errors import BundleError, CorruptBundle, UnsafeBundle, UsageError

#: The zip format's earliest date: the same bundle gives the same bytes.
_DATE = (1980, 1, 1, 0, 0, 0)
_ENCRYPTED = 0x1


def pack_bundle(
    bundle: str | os.PathLike[str], out: str | os.PathLike[str], *, force: bool = False
) -> Path:
    """Packs the bundle in folder `bundle` into the file `out`; every hash is checked on the way.

    Files that the manifest does not list stay behind. The same bundle always gives the same
    bytes.

    Raises:
        BundleError: as `open_bundle`; CorruptBundle for a file with another hash.
        OutputExists: `out` exists (with `force`: and is not a packed bundle).
        OutOfSpace: the disk is full.
        UsageError: `out` lies inside the bundle.
    """
    opened = open_bundle(bundle, verify="sizes")
    if Path(out).absolute().resolve().is_relative_to(opened.root.resolve()):
        raise UsageError("a bundle cannot be packed into its own folder", where=str(out))
    staging = Staging(Path(out), force=force, replaceable=_is_packed)
    try:
        check_free_space(staging.out.parent, opened.size_bytes)
        with zipfile.ZipFile(staging.part, "x", zipfile.ZIP_STORED) as archive:
            manifest = (opened.root / MANIFEST_FILE).read_bytes()
            if hashlib.sha256(manifest).hexdigest() != opened.sha256:
                raise altered(opened.root, MANIFEST_FILE, opened.sha256, "another content")
            archive.writestr(_member(MANIFEST_FILE, len(manifest)), manifest)
            for entry in opened.manifest.files:
                member = _member(entry.path, entry.size_bytes)
                with (
                    opened.file(entry.path).open("rb") as source,
                    archive.open(member, "w", force_zip64=entry.size_bytes >= 1 << 31) as target,
                ):
                    _copy(source, target, entry, opened.root)
        staging.publish()
    except OSError as error:
        full = space_error(error, staging.out.parent)
        if full:
            raise full from error
        raise
    finally:
        staging.close()
    return staging.out


def unpack_bundle(
    file: str | os.PathLike[str], out: str | os.PathLike[str], *, force: bool = False
) -> Bundle:
    """Unpacks `file` into the folder `out`, atomically, and trusts nothing it says.

    Only the manifest's files are written, each with the size and the hash that the manifest
    says; the archive must hold exactly these.

    Raises:
        BundleError: no such file.
        CorruptBundle: not a zip; a member missing, unexpected, twice there, or altered.
        UnsafeBundle: a path that leaves the folder, a symbolic link, a compressed member.
        UnsupportedBundle: a format version or an engine that this release does not know.
        OutputExists, OutOfSpace, UsageError: as `BundleWriter`.
    """
    file = Path(file)
    if not file.is_file():
        raise BundleError("there is no packed bundle here", where=str(file), expected="a file")
    try:
        with file.open("rb") as stream, zipfile.ZipFile(stream) as archive:
            return _unpack(archive, file, Path(out), force)
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        EOFError,
        OverflowError,
        ValueError,
        struct.error,
    ) as error:
        raise CorruptBundle(
            "not a readable packed bundle",
            where=str(file),
            expected="a zip archive with stored members",
            found=str(error) or type(error).__name__,
            fix="copy the file again",
        ) from error


def _unpack(archive: zipfile.ZipFile, file: Path, out: Path, force: bool) -> Bundle:
    members = _members(archive, file)
    content = _manifest_bytes(archive, members, file)
    manifest = Manifest.from_bytes(content, f"{file.name}:{MANIFEST_FILE}")
    _match(manifest, members, file)
    total = sum(entry.size_bytes for entry in manifest.files)
    with BundleWriter(out, force=force) as writer:
        check_free_space(writer.root, total)
        for entry in manifest.files:
            with (
                archive.open(members[entry.path]) as source,
                writer.path(entry.path).open("xb") as target,
            ):
                _copy(source, target, entry, file)
        return writer.publish(content)


def _members(archive: zipfile.ZipFile, file: Path) -> dict[str, zipfile.ZipInfo]:
    """The archive's members by name, each one of a kind that a bundle may have."""
    members: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        # orig_filename: zipfile cuts the other at a NUL and turns the system's separators.
        name = check_relative(info.orig_filename, str(file))
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG):
            raise _unsafe(file, name, "a regular file", f"file type {kind:#o}")
        if info.flag_bits & _ENCRYPTED or info.compress_type != zipfile.ZIP_STORED:
            raise _unsafe(file, name, "a stored member", "a compressed or encrypted one")
        if info.compress_size != info.file_size:
            raise _unsafe(
                file, name, f"{info.compress_size} bytes, as stored", f"{info.file_size} declared"
            )
        if not 0 <= info.header_offset < file.stat().st_size:
            raise CorruptBundle("a member lies outside the file", where=str(file), found=name)
        if name in members:
            raise CorruptBundle("a member is there twice", where=str(file), found=name)
        members[name] = info
    # Overlapping members make a small file unpack to a huge one.
    total = sum(info.file_size for info in members.values())
    if total > file.stat().st_size:
        raise _unsafe(
            file, "all members", f"at most {file.stat().st_size} bytes", f"{total} bytes declared"
        )
    return members


def _manifest_bytes(
    archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo], file: Path
) -> bytes:
    info = members.get(MANIFEST_FILE)
    if info is None:
        raise CorruptBundle("not a packed bundle", where=str(file), expected=MANIFEST_FILE)
    if info.file_size > MAX_MANIFEST_BYTES:
        raise CorruptBundle(
            "the manifest is too large",
            where=str(file),
            expected=f"at most {MAX_MANIFEST_BYTES} bytes",
            found=f"{info.file_size} bytes",
        )
    return archive.read(info)


def _match(manifest: Manifest, members: dict[str, zipfile.ZipInfo], file: Path) -> None:
    """Checks that the archive holds what the manifest lists, and nothing else."""
    listed = {entry.path: entry.size_bytes for entry in manifest.files}
    missing = sorted(set(listed) - set(members))
    unexpected = sorted(set(members) - set(listed) - {MANIFEST_FILE})
    if missing or unexpected:
        raise CorruptBundle(
            "the archive does not hold what its manifest lists",
            where=str(file),
            expected="missing: " + (", ".join(missing) or "none"),
            found="unexpected: " + (", ".join(unexpected) or "none"),
        )
    for path, size in listed.items():
        if members[path].file_size != size:
            raise altered(file, path, f"{size} bytes", f"{members[path].file_size} bytes")


def _copy(source: IO[bytes], target: IO[bytes], entry: FileEntry, where: Path) -> None:
    """Copies exactly `entry.size_bytes` bytes and checks their hash."""
    digest = hashlib.sha256()
    left = entry.size_bytes
    while left:
        piece = source.read(min(left, CHUNK_BYTES))
        if not piece:
            break
        digest.update(piece)
        target.write(piece)
        left -= len(piece)
    if left:
        raise altered(where, entry.path, f"{entry.size_bytes} bytes", f"{left} bytes fewer")
    if digest.hexdigest() != entry.sha256:
        raise altered(where, entry.path, f"sha256 {entry.sha256}", f"sha256 {digest.hexdigest()}")


def _member(name: str, size_bytes: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, _DATE)
    info.create_system = 3  # Unix, on every system: the same bytes everywhere
    info.external_attr = (stat.S_IFREG | 0o644) << 16
    info.file_size = size_bytes
    return info


def _is_packed(path: Path) -> bool:
    """Whether `path` is a file that starts as `pack_bundle` starts it."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(30 + len(MANIFEST_FILE))  # a zip's local header is 30 bytes, then a name
    return head.startswith(b"PK\x03\x04") and head.endswith(os.fsencode(MANIFEST_FILE))


def _unsafe(file: Path, name: str, expected: str, found: str) -> UnsafeBundle:
    return UnsafeBundle(
        "a packed bundle with an unsafe member",
        where=f"{file}: {name}",
        expected=expected,
        found=found,
        fix="do not use this file; get it again from a source you trust",
    )
