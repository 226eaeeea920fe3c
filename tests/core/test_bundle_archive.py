"""`.edge` files: the same bundle in one piece, and nothing that a hostile one asks for."""

from __future__ import annotations

import stat
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_mmllm.bundle import Bundle, open_bundle, pack_bundle, unpack_bundle
from edge_mmllm.errors import (
    BundleError,
    CorruptBundle,
    EdgeError,
    OutputExists,
    UnsafeBundle,
    UsageError,
)


@pytest.fixture
def bundle(tmp_path: Path, write_sample: Callable[..., Bundle]) -> Bundle:
    return write_sample(tmp_path / "tiny")


@pytest.fixture
def packed(bundle: Bundle) -> Path:
    return pack_bundle(bundle.root, bundle.root.parent / "tiny.edge")


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _rewrite(packed: Path, change: Callable[[zipfile.ZipInfo, bytes], list[tuple]]) -> None:  # type: ignore[type-arg]
    """Writes the archive anew from what `change` makes of each member."""
    with zipfile.ZipFile(packed) as archive:
        members = [(info, archive.read(info)) for info in archive.infolist()]
    packed.unlink()
    with zipfile.ZipFile(packed, "w") as archive:
        for info, content in members:
            for name, data in change(info, content):
                archive.writestr(name, data)


def test_there_and_back(bundle: Bundle, packed: Path, tmp_path: Path) -> None:
    unpacked = unpack_bundle(packed, tmp_path / "copy")
    assert unpacked.sha256 == bundle.sha256
    assert open_bundle(tmp_path / "copy", verify="hashes").manifest == bundle.manifest
    assert _names(tmp_path) == ["copy", "tiny", "tiny.edge"]


def test_members_are_stored_and_the_manifest_comes_first(packed: Path) -> None:
    with zipfile.ZipFile(packed) as archive:
        infos = archive.infolist()
    assert infos[0].filename == "manifest.json"
    assert all(info.compress_type == zipfile.ZIP_STORED for info in infos)


def test_the_same_bundle_gives_the_same_bytes(bundle: Bundle, packed: Path) -> None:
    (bundle.root / "unlisted").write_bytes(b"x")
    bundle.file("decoder.onnx").touch()
    again = pack_bundle(bundle.root, bundle.root.parent / "again.edge")
    assert again.read_bytes() == packed.read_bytes()


def test_a_bundle_is_not_packed_into_itself(bundle: Bundle) -> None:
    before = _names(bundle.root)
    with pytest.raises(UsageError, match="its own folder"):
        pack_bundle(bundle.root, bundle.root / "in.edge")
    assert _names(bundle.root) == before


def test_an_altered_bundle_is_not_packed(bundle: Bundle, tmp_path: Path) -> None:
    bundle.file("decoder.onnx").write_bytes(b"GRAPH " * 100)
    with pytest.raises(CorruptBundle, match="sha256"):
        pack_bundle(bundle.root, tmp_path / "tiny.edge")
    assert _names(tmp_path) == ["tiny"]


def test_pack_overwrites_only_packed_bundles_and_only_with_force(
    bundle: Bundle, packed: Path, tmp_path: Path
) -> None:
    with pytest.raises(OutputExists):
        pack_bundle(bundle.root, packed)
    pack_bundle(bundle.root, packed, force=True)
    other = tmp_path / "thesis.zip"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("thesis.txt", b"years of work")
    before = other.read_bytes()
    with pytest.raises(OutputExists):
        pack_bundle(bundle.root, other, force=True)
    assert other.read_bytes() == before


def test_unpack_refuses_an_existing_output(packed: Path, bundle: Bundle) -> None:
    with pytest.raises(OutputExists):
        unpack_bundle(packed, bundle.root)
    unpack_bundle(packed, bundle.root, force=True)


def _symlink(info: zipfile.ZipInfo, content: bytes) -> list[tuple[zipfile.ZipInfo | str, bytes]]:
    if info.filename == "golden.npz":
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        content = b"/etc/passwd"
    return [(info, content)]


def _slip(info: zipfile.ZipInfo, content: bytes) -> list[tuple[zipfile.ZipInfo | str, bytes]]:
    return [("../golden.npz" if info.filename == "golden.npz" else info, content)]


def _absolute(info: zipfile.ZipInfo, content: bytes) -> list[tuple[zipfile.ZipInfo | str, bytes]]:
    return [("/golden.npz" if info.filename == "golden.npz" else info, content)]


def _deflated(info: zipfile.ZipInfo, content: bytes) -> list[tuple[zipfile.ZipInfo | str, bytes]]:
    info.compress_type = zipfile.ZIP_DEFLATED
    return [(info, content)]


def _missing(info: zipfile.ZipInfo, content: bytes) -> list[tuple[zipfile.ZipInfo | str, bytes]]:
    return [] if info.filename == "golden.npz" else [(info, content)]


def _extra(info: zipfile.ZipInfo, content: bytes) -> list[tuple[zipfile.ZipInfo | str, bytes]]:
    extra = [("run.sh", b"rm")] if info.filename == "golden.npz" else []
    return [(info, content), *extra]


def _flipped(info: zipfile.ZipInfo, content: bytes) -> list[tuple[zipfile.ZipInfo | str, bytes]]:
    return [(info, b"GOLDEN" if info.filename == "golden.npz" else content)]


def _longer(info: zipfile.ZipInfo, content: bytes) -> list[tuple[zipfile.ZipInfo | str, bytes]]:
    return [(info.filename, content + (b"x" if info.filename == "golden.npz" else b""))]


def _no_manifest(
    info: zipfile.ZipInfo, content: bytes
) -> list[tuple[zipfile.ZipInfo | str, bytes]]:
    return [] if info.filename == "manifest.json" else [(info, content)]


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (_symlink, UnsafeBundle, "golden.npz"),
        (_slip, UnsafeBundle, r"\.\./golden"),
        (_absolute, UnsafeBundle, "absolute"),
        (_deflated, UnsafeBundle, "compressed"),
        (_missing, CorruptBundle, r"missing: golden\.npz"),
        (_extra, CorruptBundle, r"unexpected: run\.sh"),
        (_flipped, CorruptBundle, "sha256"),
        (_longer, CorruptBundle, "6 bytes"),
        (_no_manifest, CorruptBundle, "manifest.json"),
    ],
)
def test_a_hostile_archive_is_refused_and_leaves_nothing(
    packed: Path,
    tmp_path: Path,
    change: Callable[[zipfile.ZipInfo, bytes], list[tuple[zipfile.ZipInfo | str, bytes]]],
    error: type[BundleError],
    text: str,
) -> None:
    _rewrite(packed, change)
    with pytest.raises(error, match=text):
        unpack_bundle(packed, tmp_path / "copy")
    assert _names(tmp_path) == ["tiny", "tiny.edge"]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_duplicate_member_is_refused(packed: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(packed, "a") as archive:
        archive.writestr("golden.npz", b"golden")
    with pytest.raises(CorruptBundle, match="twice"):
        unpack_bundle(packed, tmp_path / "copy")


def _patch_central(packed: Path, name: bytes, offset: int, value: bytes) -> None:
    """Overwrites a field of `name`'s central directory header (46 bytes, then the name)."""
    content = bytearray(packed.read_bytes())
    start = content.rindex(name) - 46
    assert content[start : start + 4] == b"PK\x01\x02"
    content[start + offset : start + offset + len(value)] = value
    packed.write_bytes(content)


def test_a_declared_size_bomb_is_refused(packed: Path, tmp_path: Path) -> None:
    huge = (2**31).to_bytes(4, "little")
    _patch_central(packed, b"golden.npz", 20, huge + huge)  # compressed, uncompressed size
    with pytest.raises(UnsafeBundle, match="bytes declared"):
        unpack_bundle(packed, tmp_path / "copy")
    _patch_central(packed, b"golden.npz", 20, (6).to_bytes(4, "little") + huge)
    with pytest.raises(UnsafeBundle, match="declared"):
        unpack_bundle(packed, tmp_path / "copy")


def test_any_truncation_and_any_flipped_byte_is_a_typed_error_or_harmless(
    packed: Path, bundle: Bundle, tmp_path: Path
) -> None:
    content = packed.read_bytes()
    end = content.rindex(b"PK\x01\x02", 0, len(content))
    damaged = tmp_path / "damaged.edge"
    cases = [content[:size] for size in range(0, len(content), 997)]
    for at in [*range(0, 60), *range(end, len(content), 3)]:
        flipped = bytearray(content)
        flipped[at] ^= 0x55
        cases.append(bytes(flipped))
    refused = 0
    for case in cases:
        damaged.write_bytes(case)
        try:
            copy = unpack_bundle(damaged, tmp_path / "copy", force=True)
        except EdgeError:
            refused += 1
        else:  # a date or an attribute was hit: what was unpacked is still the very bundle
            assert open_bundle(copy.root, verify="hashes").sha256 == bundle.sha256
    assert refused > len(cases) // 3


def test_no_archive_where_asked(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no packed bundle"):
        unpack_bundle(tmp_path / "none.edge", tmp_path / "copy")
    (tmp_path / "text.edge").write_bytes(b"not a zip")
    with pytest.raises(CorruptBundle, match="not a readable"):
        unpack_bundle(tmp_path / "text.edge", tmp_path / "copy")
