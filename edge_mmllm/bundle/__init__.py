"""The bundle: a folder (or one `.edge` file) that holds everything a device needs.

Format: docs/bundle.md.

    with BundleWriter(out) as writer:
        export_to(writer.path("decoder.onnx"))
        bundle = writer.commit(manifest)

    bundle = open_bundle(out)
    bundle.file("decoder.onnx")
"""

from edge_mmllm.bundle.archive import pack_bundle, unpack_bundle
from edge_mmllm.bundle.manifest import (
    FORMAT,
    FORMAT_VERSION,
    GOLDEN_FILE,
    MANIFEST_FILE,
    Engine,
    ExportRecord,
    FileEntry,
    Gate,
    GoldenMedia,
    Manifest,
    QuantGroup,
    Quantization,
    Source,
    SourceFile,
    Verdict,
    source_hash,
)
from edge_mmllm.bundle.reader import Bundle, Verification, Verify, open_bundle, verify_bundle
from edge_mmllm.bundle.writer import BundleWriter, check_free_space

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "GOLDEN_FILE",
    "MANIFEST_FILE",
    "Bundle",
    "BundleWriter",
    "Engine",
    "ExportRecord",
    "FileEntry",
    "Gate",
    "GoldenMedia",
    "Manifest",
    "QuantGroup",
    "Quantization",
    "Source",
    "SourceFile",
    "Verdict",
    "Verification",
    "Verify",
    "check_free_space",
    "open_bundle",
    "pack_bundle",
    "source_hash",
    "unpack_bundle",
    "verify_bundle",
]
