"""Opening bundles: whole ones open, and every kind of damage or malice is named."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_mmllm.bundle import (
    Bundle,
    Manifest,
    SourceFile,
    open_bundle,
    source_hash,
    verify_bundle,
)
from edge_mmllm.errors import (
    BundleError,
    CorruptBundle,
    UnsafeBundle,
    UnsupportedBundle,
    UsageError,
)


@pytest.fixture
def bundle(tmp_path: Path, write_sample: Callable[..., Bundle]) -> Bundle:
    return write_sample(tmp_path / "tiny")


def _edit(bundle: Bundle, change: Callable[[dict[str, Any]], object]) -> None:
    path = bundle.root / "manifest.json"
    document = json.loads(path.read_bytes())
    change(document)
    path.write_text(json.dumps(document), encoding="utf-8")


def _edit_file_path(bundle: Bundle, path: object) -> None:
    _edit(bundle, lambda document: document["files"][0].update(path=path))


def test_what_was_written_is_read_back(
    bundle: Bundle, sample_manifest: Manifest, sample_files: dict[str, bytes]
) -> None:
    opened = open_bundle(bundle.root, verify="hashes")
    assert opened == bundle
    assert dataclasses.replace(opened.manifest, files=()) == sample_manifest
    assert opened.spec == sample_manifest.model
    assert {e.path: e.size_bytes for e in opened.manifest.files} == {
        name: len(content) for name, content in sample_files.items()
    }
    for name, content in sample_files.items():
        assert opened.file(name).read_bytes() == content
        assert opened.has(name)
    assert opened.size_bytes == sum(map(len, sample_files.values()))
    assert opened.sha256 == hashlib.sha256((bundle.root / "manifest.json").read_bytes()).hexdigest()


def test_the_manifest_is_sorted_json(bundle: Bundle) -> None:
    text = (bundle.root / "manifest.json").read_text("ascii")
    document = json.loads(text)
    assert text == json.dumps(document, sort_keys=True, indent=2) + "\n"
    assert (document["format"], document["format_version"]) == ("edge-mmllm-bundle", 1)
    assert set(document) == {
        "engine",
        "engine_format",
        "export",
        "files",
        "format",
        "format_version",
        "gate",
        "golden",
        "golden_media",
        "model",
        "quantization",
        "source",
    }


def test_a_file_that_is_not_listed_cannot_be_had(bundle: Bundle) -> None:
    (bundle.root / "extra").write_bytes(b"x")
    assert not bundle.has("extra")
    with pytest.raises(CorruptBundle, match="no such file"):
        bundle.file("extra")


def test_a_flipped_bit_is_found_by_its_hash(bundle: Bundle) -> None:
    path = bundle.file("weights/decoder.onnx.data")
    content = bytearray(path.read_bytes())
    expected = hashlib.sha256(content).hexdigest()
    content[4321] ^= 1
    path.write_bytes(content)
    open_bundle(bundle.root, verify="sizes")
    with pytest.raises(CorruptBundle) as caught:
        open_bundle(bundle.root, verify="hashes")
    assert (caught.value.where or "").endswith("weights/decoder.onnx.data")
    assert caught.value.expected == f"sha256 {expected}"
    assert caught.value.found == f"sha256 {hashlib.sha256(content).hexdigest()}"


def test_a_truncated_file_is_found_by_its_size(bundle: Bundle) -> None:
    bundle.file("decoder.onnx").write_bytes(b"graph")
    open_bundle(bundle.root, verify="none")
    with pytest.raises(CorruptBundle, match="expected: 600 bytes\n  found: 5 bytes"):
        open_bundle(bundle.root)


@pytest.mark.parametrize("verify", ["none", "sizes", "hashes"])
def test_a_missing_file_is_always_found(bundle: Bundle, verify: Any) -> None:
    bundle.file("decoder.onnx").unlink()
    with pytest.raises(CorruptBundle, match=r"missing[\s\S]*decoder\.onnx"):
        open_bundle(bundle.root, verify=verify)


@pytest.mark.parametrize(
    "path",
    [
        "../outside",
        "a/../../outside",
        "a/./b",
        "a//b",
        "a/",
        "/etc/passwd",
        "..",
        ".",
        "",
        "a\\b",
        "..\\outside",
        "C:/windows",
        "decoder.onnx:stream",
        "a\0b",
        "a\nb",
        "nul",
        "weights/CON.txt",
        "a. ",
        "a.",
        "\ud800",
        "x" * 2000,
        "x" * 256,
    ],
)
def test_a_path_that_could_leave_the_folder_is_refused(bundle: Bundle, path: str) -> None:
    (bundle.root.parent / "outside").write_bytes(b"secret")
    _edit_file_path(bundle, path)
    with pytest.raises(UnsafeBundle) as caught:
        open_bundle(bundle.root, verify="none")
    assert caught.value.where == "manifest.json.files[0].path"


@pytest.mark.parametrize(
    ("path", "reason"),
    [("../x", r"it has the part '\.\.'"), ("/x", "it is absolute"), ("C:x", "it holds ':'")],
)
def test_the_reason_is_named(bundle: Bundle, path: str, reason: str) -> None:
    _edit_file_path(bundle, path)
    with pytest.raises(UnsafeBundle, match=reason):
        open_bundle(bundle.root)


@pytest.mark.parametrize("path", ["DECODER.ONNX", "golden.npz", "manifest.json", "Manifest.JSON"])
def test_a_path_that_is_there_twice_is_refused(bundle: Bundle, path: str) -> None:
    def add(document: dict[str, Any]) -> None:
        document["files"].append({**document["files"][0], "path": path})

    _edit(bundle, add)
    with pytest.raises(CorruptBundle, match="each file once"):
        open_bundle(bundle.root, verify="none")


@pytest.mark.parametrize("name", ["decoder.onnx", "weights", "manifest.json"])
def test_a_symbolic_link_on_the_way_is_refused(bundle: Bundle, name: str) -> None:
    inside = bundle.root / name
    outside = bundle.root.parent / "outside"
    inside.rename(outside)
    inside.symlink_to(outside)
    with pytest.raises(UnsafeBundle, match="symbolic link"):
        open_bundle(bundle.root, verify="none")


def test_a_link_to_the_bundle_itself_is_fine(bundle: Bundle) -> None:
    link = bundle.root.parent / "link"
    link.symlink_to(bundle.root)
    assert open_bundle(link).root == bundle.root


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
@pytest.mark.parametrize("name", ["decoder.onnx", "manifest.json"])
def test_a_pipe_is_refused_and_not_waited_for(bundle: Bundle, name: str) -> None:
    (bundle.root / name).unlink()
    os.mkfifo(bundle.root / name)
    with pytest.raises(UnsafeBundle, match="pipe"):
        open_bundle(bundle.root)


def test_a_folder_in_the_place_of_a_file_is_refused(bundle: Bundle) -> None:
    bundle.file("decoder.onnx").unlink()
    (bundle.root / "decoder.onnx").mkdir()
    with pytest.raises(UnsafeBundle, match="a folder"):
        open_bundle(bundle.root)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"[]", "not an object"),
        (b'"x"', "not an object"),
        (b'{"format": 1, "format": 2}', "duplicate members: format"),
        (b'{"format": NaN}', "NaN is not JSON"),
        (b'{"a":' * 100_000, "not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_a_malformed_manifest_is_refused(bundle: Bundle, content: bytes, reason: str) -> None:
    if sys.version_info < (3, 10, 7) and b"999" in content:
        pytest.skip("this Python does not limit the digits of an integer")
    (bundle.root / "manifest.json").write_bytes(content)
    with pytest.raises(CorruptBundle, match=reason):
        open_bundle(bundle.root)


def test_an_oversized_manifest_is_refused_unread(bundle: Bundle) -> None:
    with (bundle.root / "manifest.json").open("r+b") as file:
        file.truncate((16 << 20) + 1)
    with pytest.raises(CorruptBundle, match="at most 16777216 bytes"):
        open_bundle(bundle.root)


@pytest.mark.parametrize(
    ("member", "value", "error", "text"),
    [
        ("format", "other", UnsupportedBundle, "not an edge-mmllm bundle"),
        ("format", None, UnsupportedBundle, "not an edge-mmllm bundle"),
        ("format_version", 2, UnsupportedBundle, "expected: version 1\n  found: version 2"),
        ("format_version", "1", CorruptBundle, "format_version"),
        ("engine", "tensorrt", UnsupportedBundle, "onnx, gguf, mlc"),
        ("engine", None, CorruptBundle, "engine"),
        ("files", {}, CorruptBundle, "an array"),
        ("files", [3], CorruptBundle, r"files\[0\]"),
        ("golden", "missing.npz", CorruptBundle, "does not list"),
        ("golden", "../golden.npz", CorruptBundle, "does not list"),
        ("gate", {"verdict": "fine", "figures": {}}, CorruptBundle, "failed-accepted"),
        ("source", {}, CorruptBundle, "source"),
        (
            "quantization",
            {"scheme": "f16", "groups": [], "bits_per_weight": -1},
            CorruptBundle,
            "bits",
        ),
        ("export", None, CorruptBundle, "export"),
    ],
)
def test_a_manifest_with_a_wrong_member_is_refused(
    bundle: Bundle, member: str, value: object, error: type[BundleError], text: str
) -> None:
    _edit(bundle, lambda document: document.update({member: value}))
    with pytest.raises(error, match=text):
        open_bundle(bundle.root)


@pytest.mark.parametrize("sha256", ["", "AB" * 32, "zz" * 32, "ab" * 31, 3])
def test_a_malformed_hash_is_refused(bundle: Bundle, sha256: object) -> None:
    _edit(bundle, lambda document: document["files"][0].update(sha256=sha256))
    with pytest.raises(CorruptBundle, match=r"files\[0\]\.sha256"):
        open_bundle(bundle.root)


def test_a_stage_must_use_a_listed_file(bundle: Bundle) -> None:
    _edit(bundle, lambda d: d["model"]["stages"]["decoder"].update(file="/etc/passwd"))
    with pytest.raises(CorruptBundle, match=r"stages\.decoder\.file[\s\S]*/etc/passwd"):
        open_bundle(bundle.root)


def test_members_of_a_later_release_are_ignored(bundle: Bundle) -> None:
    _edit(bundle, lambda document: document.update(later={"x": 1}))
    assert open_bundle(bundle.root).manifest == bundle.manifest


def test_no_bundle_where_asked(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no bundle here"):
        open_bundle(tmp_path / "none")
    with pytest.raises(CorruptBundle, match=r"manifest\.json"):
        open_bundle(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(BundleError, match="unpack"):
        open_bundle(tmp_path / "file")


def test_an_unknown_way_to_verify_is_a_usage_error(bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="hashes"):
        open_bundle(bundle.root, verify="all")  # type: ignore[arg-type]


def test_verify_lists_all_damage_and_all_extra_files(bundle: Bundle) -> None:
    assert verify_bundle(bundle.root).ok
    bundle.file("decoder.onnx").write_bytes(b"GRAPH " * 100)
    bundle.file("golden.npz").unlink()
    (bundle.root / "weights" / "notes.txt").write_bytes(b"x")
    (bundle.root / "link").symlink_to("/")
    found = verify_bundle(bundle.root)
    assert not found.ok
    assert [type(problem) for problem in found.problems] == [CorruptBundle, CorruptBundle]
    assert "decoder.onnx" in str(found.problems[0])
    assert "golden.npz" in str(found.problems[1])
    assert found.extra == ("link", "weights/notes.txt")


def test_source_hash_ignores_the_order_of_files() -> None:
    a, b = SourceFile("a", 1, "11" * 32), SourceFile("b", 1, "22" * 32)
    assert source_hash([a, b]) == source_hash([b, a]) != source_hash([a])


def test_every_key_is_documented(bundle: Bundle) -> None:
    page = (Path(__file__).parents[2] / "docs" / "bundle.md").read_text("utf-8")
    document = json.loads((bundle.root / "manifest.json").read_bytes())
    for free in ("engine_format", "details", "config", "figures", "tool_versions", "stages"):
        _empty(document, free)
    keys: set[str] = set()
    _collect(document, keys)
    assert len(keys) > 50
    words = set(re.findall(r"\w+", page))
    assert keys <= words


def _empty(value: Any, name: str) -> None:
    if isinstance(value, dict):
        if name in value:
            value[name] = {}
        for child in value.values():
            _empty(child, name)


def _collect(value: Any, keys: set[str]) -> None:
    for child in value.values() if isinstance(value, dict) else value:
        if isinstance(child, (dict, list)):
            _collect(child, keys)
    if isinstance(value, dict):
        keys |= set(value)
