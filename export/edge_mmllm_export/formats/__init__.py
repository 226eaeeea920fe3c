"""Output formats by name, imported when asked for: no format needs another's packages."""

from __future__ import annotations

import importlib

from edge_mmllm.errors import UsageError
from edge_mmllm_export.formats.base import Artefact, Format, Inputs, Job, Written

__all__ = ["FORMATS", "Artefact", "Format", "Inputs", "Job", "Written", "output_format"]

#: `--format` -> module:constant of this package.
FORMATS = {
    "onnx": "onnx:ONNX",
    "gguf": "gguf:GGUF",
    "mlc": "mlc:MLC",
}


def output_format(name: str) -> Format:
    """The adapter of a format.

    Raises:
        UsageError: there is none of this name.
        MissingDependency: a package that it writes with is not installed.
    """
    if name not in FORMATS:
        raise UsageError("unknown format", expected=" | ".join(FORMATS), found=name)
    module, _, constant = FORMATS[name].partition(":")
    found: Format = getattr(importlib.import_module(f"{__name__}.{module}"), constant)
    return found
