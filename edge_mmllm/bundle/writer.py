"""Writing a bundle: complete, or not at all."""

from __future__ import annotations

import dataclasses
import os
import stat
from pathlib import Path
from types import TracebackType

from edge_mmllm.bundle.manifest import MANIFEST_FILE, MAX_MANIFEST_BYTES, FileEntry, Manifest
from edge_mmllm.bundle.paths import check_relative, kind_of, sha256_of, walk
from edge_mmllm.bundle.reader import Bundle, read_folder
from edge_mmllm.bundle.staging import Staging, check_free_space, space_error
from edge_mmllm.errors import BundleError, CorruptBundle, ExportError, UnsupportedBundle

__all__ = ["BundleWriter", "check_free_space"]


def is_bundle(path: Path) -> bool:
    """Whether `path` is a folder with one of our manifests (of any version, even a later one)."""
    try:
        read_folder(path)
    except UnsupportedBundle as error:
        return not (error.where or "").endswith(".format")
    except (BundleError, OSError):
        return False
    return True


class BundleWriter:
    """Builds a bundle in a hidden folder beside `out` and renames it into place.

        with BundleWriter(out) as writer:
            export_to(writer.path("decoder.onnx"))
            gate = judge(writer.draft(manifest))
            bundle = writer.commit(replace(manifest, gate=gate))

    Leaving the block without `commit`, by any exception or Ctrl-C, leaves nothing behind. After
    a SIGKILL only hidden files stay, which the next writer in that folder removes
    (`bundle.staging` has the details). A full disk inside the block, by whoever's write, becomes
    `OutOfSpace`.

    Args:
        out: the bundle's folder; must not exist, or with `force` be a bundle.
        force: replace an existing bundle. The old one stays whole until the new one is.

    Raises:
        OutputExists: `out` exists (without `force`), is not a bundle (with it), or is being
            written by another process.
        UsageError: the folder to hold `out` does not exist.
        ExportError: it cannot be written to.
        OutOfSpace: the disk is full.
    """

    def __init__(self, out: str | os.PathLike[str], *, force: bool = False) -> None:
        self._out, self._force = Path(out), force
        self._staging: Staging | None = None
        self._hashes: dict[str, tuple[tuple[int, int, int], str]] = {}

    def __enter__(self) -> BundleWriter:
        staging = Staging(self._out, force=self._force, replaceable=is_bundle)
        try:
            staging.part.mkdir()
        except OSError as error:
            staging.close()
            full = space_error(error, staging.out.parent)
            raise full or ExportError(
                "the output's folder cannot be written to",
                where=str(staging.out.parent),
                found=error.strerror or str(error),
            ) from error
        self._staging = staging
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        staging, self._staging = self._open(), None
        # Before the cleaning, which frees the space again.
        full = space_error(error, staging.out.parent) if isinstance(error, OSError) else None
        staging.close()
        if full:
            raise full from error

    def _open(self) -> Staging:
        if self._staging is None:
            raise RuntimeError("BundleWriter is used outside its with block")
        return self._staging

    @property
    def root(self) -> Path:
        """The folder being filled."""
        return self._open().part

    def path(self, relative: str) -> Path:
        """The place for file `relative`; folders on the way are made.

        Raises:
            UnsafeBundle: `relative` is no plain relative path.
        """
        path = self.root.joinpath(*check_relative(relative, "BundleWriter.path").split("/"))
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def draft(self, manifest: Manifest) -> Path:
        """Writes a provisional manifest, so that `root` can be opened and judged before `commit`.

        `manifest.files` is replaced by what is there. Returns `root`.
        """
        self._write_manifest(self._described(manifest))
        return self.root

    def commit(self, manifest: Manifest) -> Bundle:
        """Hashes all files, writes the manifest, makes all of it durable, renames it into place.

        `manifest.files` is replaced by what is there. The writer is of no more use afterwards.

        Raises:
            ExportError: the manifest or a file is not what a reader would accept.
            OutOfSpace: the disk is full.
            OutputExists: something has appeared at `out` meanwhile.
        """
        return self.publish(self._described(manifest))

    def publish(self, content: bytes) -> Bundle:
        """As `commit`, for a manifest whose bytes are given and already checked (`unpack`)."""
        staging = self._open()
        self._write_manifest(content)
        staging.publish()
        return read_folder(staging.out)

    def _described(self, manifest: Manifest) -> bytes:
        """The manifest's bytes, with the files that are in the folder now."""
        entries = []
        for relative, status in walk(self.root):
            if relative == MANIFEST_FILE:
                continue  # a draft
            if not stat.S_ISREG(status.st_mode):
                raise ExportError(
                    "only regular files can be in a bundle",
                    where=relative,
                    found=kind_of(status.st_mode),
                )
            entries.append(FileEntry(relative, status.st_size, self._hash(relative, status)))
        try:
            content = dataclasses.replace(manifest, files=tuple(entries)).to_bytes()
            if len(content) > MAX_MANIFEST_BYTES:
                raise CorruptBundle(
                    "the manifest is too large",
                    expected=f"at most {MAX_MANIFEST_BYTES} bytes",
                    found=f"{len(content)} bytes",
                )
            Manifest.from_bytes(content)
        except (BundleError, TypeError, ValueError) as error:  # ValueError: NaN, infinity
            raise ExportError(
                "this bundle could not be read back", where=str(self._out), found=str(error)
            ) from error
        return content

    def _hash(self, relative: str, status: os.stat_result) -> str:
        """sha256 of a file; one that has not changed since the draft is not read again."""
        key = (status.st_ino, status.st_size, status.st_mtime_ns)
        known = self._hashes.get(relative)
        if known is None or known[0] != key:
            known = (key, sha256_of(self.root.joinpath(*relative.split("/"))))
            self._hashes[relative] = known
        return known[1]

    def _write_manifest(self, content: bytes) -> None:
        (self.root / MANIFEST_FILE).write_bytes(content)
