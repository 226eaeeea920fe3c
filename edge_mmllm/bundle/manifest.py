"""`manifest.json`: its dataclasses, and reading and writing them. Keys: docs/bundle.md."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, cast, get_args

from edge_mmllm._fields import Fields, parse_object
from edge_mmllm.bundle.paths import check_relative
from edge_mmllm.errors import CorruptBundle, UnsupportedBundle
from edge_mmllm.spec import TOKENIZER_FILES, ModelSpec

FORMAT = "edge-mmllm-bundle"
FORMAT_VERSION = 1

MANIFEST_FILE = "manifest.json"
GOLDEN_FILE = "golden.npz"

#: A manifest holds a few kB per layer; a larger one is hostile or broken.
MAX_MANIFEST_BYTES = 16 << 20

Engine = Literal["onnx", "gguf", "mlc"]
Verdict = Literal["passed", "failed-accepted", "not judged"]

_HEX = frozenset("0123456789abcdef")


def _sha256(fields: Fields, name: str) -> str:
    text = fields.text(name)
    if len(text) != 64 or not _HEX.issuperset(text):
        raise fields.fail(name, "a sha256: 64 lower-case hexadecimal digits")
    return text


@dataclass(frozen=True)
class FileEntry:
    """A file of the bundle. `path` is relative, with forward slashes."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class SourceFile:
    """A weight file of the checkpoint that was exported."""

    name: str
    size_bytes: int
    sha256: str


def source_hash(files: Iterable[SourceFile]) -> str:
    """One hash for a whole checkpoint: sha256 of the sorted lines `<sha256>  <name>` + LF."""
    lines = sorted(f"{file.sha256}  {file.name}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@dataclass(frozen=True)
class Source:
    """Where the weights came from.

    Attributes:
        name: the checkpoint's own name (a hub id or a folder's last part), no machine's path.
        layout: `hub`, `pth` or `gguf`.
        files: the weight files.
        sha256: `source_hash(files)`.
        config: the checkpoint's configuration, as read.
    """

    name: str
    layout: str
    files: tuple[SourceFile, ...]
    sha256: str
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class QuantGroup:
    """Tensors stored in one way.

    Attributes:
        group: what they are, e.g. `attention`, or the pattern that chose them.
        scheme: e.g. `int4`, `int8`, `f16`, `Q4_0`.
        bits: stored bits of one weight, without its share of the scales.
        block_size: weights that share a scale; None where there are no scales.
        symmetric: whether the zero point is fixed; None where there are no scales.
        tensors: how many.
        size_bytes: stored bytes, scales and zero points included.
    """

    group: str
    scheme: str
    bits: float
    block_size: int | None
    symmetric: bool | None
    tensors: int
    size_bytes: int


@dataclass(frozen=True)
class Quantization:
    """How the weights are stored.

    Attributes:
        scheme: the scheme asked for (`--quant`).
        groups: what became of it, group by group.
        bits_per_weight: all stored bits over all parameters.
    """

    scheme: str
    groups: tuple[QuantGroup, ...]
    bits_per_weight: float


@dataclass(frozen=True)
class Gate:
    """The quality gate's verdict. `figures` by name, e.g. `top1_agreement`, `kl_mean`."""

    verdict: Verdict
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class GoldenMedia:
    """Golden vectors of one modality: what the model says about a sample.

    Attributes:
        modality: e.g. `image`.
        vectors: a file as `golden.npz`; its ids hold a placeholder's id for each row.
        media: the sample's file.
    """

    modality: str
    vectors: str
    media: str


@dataclass(frozen=True)
class ExportRecord:
    """How the bundle was made.

    Attributes:
        tool_versions: package -> version.
        wall_s: duration, the gate left out.
        peak_rss_bytes: None where the system does not tell.
        created_utc: ISO 8601, e.g. `2026-01-31T12:00:00Z`.
        command: the arguments, machine paths left out.
    """

    tool_versions: dict[str, str]
    wall_s: float
    peak_rss_bytes: int | None
    created_utc: str
    command: str


@dataclass(frozen=True)
class Manifest:
    """All of `manifest.json` but `format` and `format_version`.

    Attributes:
        engine_format: what the engine needs to know of the artefact, e.g. `{"opset": 21}`.
        files: every file but the manifest itself; filled in by `BundleWriter.commit`.
        golden: file with the golden vectors, or None.
        golden_media: those of the modalities.
    """

    engine: Engine
    engine_format: dict[str, Any]
    source: Source
    model: ModelSpec
    quantization: Quantization
    gate: Gate
    export: ExportRecord
    golden: str | None = None
    golden_media: tuple[GoldenMedia, ...] = ()
    files: tuple[FileEntry, ...] = ()

    def to_bytes(self) -> bytes:
        """The file's content: sorted keys, two spaces of indent, LF, ASCII."""
        document: dict[str, Any] = {"format": FORMAT, "format_version": FORMAT_VERSION}
        document.update(asdict(self))
        document["model"] = self.model.to_json()
        text = json.dumps(document, sort_keys=True, indent=2, allow_nan=False)
        return (text + "\n").encode("ascii")

    @classmethod
    def from_bytes(cls, data: bytes, where: str = MANIFEST_FILE) -> Manifest:
        """Parses and checks a manifest; see the classes above for what holds afterwards.

        Raises:
            CorruptBundle: malformed, or at odds with itself.
            UnsafeBundle: a path that could leave the folder.
            UnsupportedBundle: another format, version or engine.
        """
        fields = Fields(parse_object(data, where), where)
        _check_format(fields)
        manifest = cls(
            engine=cast(Engine, fields.text("engine")),
            engine_format=fields.mapping("engine_format"),
            source=_source(fields.child("source")),
            model=ModelSpec.from_json(fields.mapping("model"), fields.path("model")),
            quantization=_quantization(fields.child("quantization")),
            gate=_gate(fields.child("gate")),
            export=_export(fields.child("export")),
            golden=fields.maybe_text("golden"),
            golden_media=_golden_media(fields),
            files=_files(fields),
        )
        listed = {entry.path for entry in manifest.files}
        needed = {f"model.stages.{n}.file": s.file for n, s in manifest.model.stages.items()}
        if manifest.golden is not None:
            needed["golden"] = manifest.golden
        for i, entry in enumerate(manifest.golden_media):
            needed[f"golden_media[{i}].vectors"] = entry.vectors
            needed[f"golden_media[{i}].media"] = entry.media
        if manifest.model.text.tokenizer in TOKENIZER_FILES:
            needed["model.text.tokenizer"] = TOKENIZER_FILES[manifest.model.text.tokenizer]
        for name, path in needed.items():
            if path not in listed:
                raise CorruptBundle(
                    "the manifest uses a file that it does not list",
                    where=fields.path(name),
                    expected="a path in files",
                    found=path,
                )
        return manifest


def _check_format(fields: Fields) -> None:
    found = fields.value.get("format")
    if found != FORMAT:
        raise UnsupportedBundle(
            "not an edge-mmllm bundle",
            where=fields.path("format"),
            expected=FORMAT,
            found=repr(found)[:80],
        )
    version = fields.integer("format_version", least=1)
    if version != FORMAT_VERSION:
        raise UnsupportedBundle(
            "a bundle of another format version",
            where=fields.path("format_version"),
            expected=f"version {FORMAT_VERSION}",
            found=f"version {version}",
            fix="upgrade edge-mmllm, or export the checkpoint again with this release",
        )
    engine = fields.text("engine")
    if engine not in get_args(Engine):
        raise UnsupportedBundle(
            "a bundle for an engine that this release does not know",
            where=fields.path("engine"),
            expected="one of " + ", ".join(get_args(Engine)),
            found=engine[:80],
            fix="upgrade edge-mmllm",
        )


def _files(fields: Fields) -> tuple[FileEntry, ...]:
    entries: list[FileEntry] = []
    seen: set[str] = set()
    for child in fields.children("files"):
        path = check_relative(child.text("path"), child.path("path"))
        # Folders that ignore case (macOS, Windows) would show one of two such files.
        if path.casefold() in seen or path.casefold() == MANIFEST_FILE:
            raise child.fail("path", "each file once (case ignored), the manifest not at all")
        seen.add(path.casefold())
        entries.append(FileEntry(path, child.integer("size_bytes"), _sha256(child, "sha256")))
    return tuple(entries)


def _source(fields: Fields) -> Source:
    files = tuple(
        SourceFile(f.text("name"), f.integer("size_bytes"), _sha256(f, "sha256"))
        for f in fields.children("files")
    )
    return Source(
        name=fields.text("name"),
        layout=fields.text("layout"),
        files=files,
        sha256=_sha256(fields, "sha256"),
        config=fields.mapping("config"),
    )


def _quantization(fields: Fields) -> Quantization:
    groups = tuple(
        QuantGroup(
            group=f.text("group"),
            scheme=f.text("scheme"),
            bits=f.number("bits"),
            block_size=f.maybe_integer("block_size", least=1),
            symmetric=None if f.value.get("symmetric") is None else f.flag("symmetric"),
            tensors=f.integer("tensors"),
            size_bytes=f.integer("size_bytes"),
        )
        for f in fields.children("groups")
    )
    return Quantization(fields.text("scheme"), groups, fields.number("bits_per_weight"))


def _gate(fields: Fields) -> Gate:
    verdict = cast(Verdict, fields.one_of("verdict", get_args(Verdict)))
    return Gate(verdict, fields.mapping("figures"))


def _golden_media(fields: Fields) -> tuple[GoldenMedia, ...]:
    if "golden_media" not in fields.value:
        return ()
    return tuple(
        GoldenMedia(f.text("modality"), f.text("vectors"), f.text("media"))
        for f in fields.children("golden_media")
    )


def _export(fields: Fields) -> ExportRecord:
    versions = fields.child("tool_versions")
    return ExportRecord(
        tool_versions={name: versions.text(name) for name in versions.value},
        wall_s=fields.number("wall_s"),
        peak_rss_bytes=fields.maybe_integer("peak_rss_bytes"),
        created_utc=fields.text("created_utc"),
        command=fields.text("command"),
    )
