"""A checkpoint with a LoRA adapter (PEFT layout) merged in, tile by tile, in float32.

The adapter is a folder with `adapter_config.json` and `adapter_model.safetensors`. For a weight
W `(N, K)` it holds A `(r, K)` and B `(N, r)`; what is read is `W + scale * B A`, with scale
`alpha / r` (`alpha / sqrt(r)` with `use_rslora`). Since the merge happens below every weight map,
it serves any architecture, fused projections and tied weights included.
Source: LoRA (arXiv 2106.09685) eq. 3, rsLoRA (2312.03732); PEFT's `LoraConfig` and layout.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from edge_mmllm.errors import CheckpointError, TensorMismatch, UnsupportedArchitecture
from edge_mmllm_export.checkpoints.base import Checkpoint, Float32, Layout, TensorInfo, TextAssets
from edge_mmllm_export.checkpoints.files import read_json
from edge_mmllm_export.checkpoints.safetensors import SafetensorsFile
from edge_mmllm_export.models.config import Fields

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_ROOT = "base_model.model."
_NAME = re.compile(r"^(.+)\.lora_(embedding_)?([AB])(\.default)?(\.weight)?$")
#: A repeated group: with it a hostile expression can take time without end.
_ENDLESS = re.compile(r"\)[*+{]")
#: What changes more than `B A`, and the only value that there is a definition for.
_REFUSED: dict[str, Any] = {
    "use_dora": False,
    "bias": "none",
    "fan_in_fan_out": False,
    "use_qalora": False,
    "lora_bias": False,
    "layer_replication": None,
    "alora_invocation_tokens": None,
}
#: What transformers 4, 5 and `save_pretrained` put, or do not put, into the same weight's name
#: (`language_model.model.layers` is `model.language_model.layers`).
_WRAPPERS = frozenset({"model", "language_model", "vision_model"})


@dataclass(frozen=True)
class _Delta:
    """What one weight gets: names of A and B in the adapter.

    Attributes:
        embedding: A is `(r, vocab)` and B `(hidden, r)`: the weight's rows are A's columns.
    """

    a: str
    b: str
    scale: float
    embedding: bool


@dataclass(frozen=True)
class Factors:
    """What one weight gets: `scale * b @ a`, or for an embedding its transpose.

    Attributes:
        a: float32 `(r, K)`; of an embedding `(r, vocab)`.
        b: float32 `(N, r)`; of an embedding `(hidden, r)`.
    """

    a: Float32
    b: Float32
    scale: float
    embedding: bool


class LoraCheckpoint:
    """`base` with the adapter in `directory` merged in; see the module.

    Raises:
        CheckpointError: no adapter there, or one that changes more than a LoRA does.
        TensorMismatch: targets that the checkpoint has not, ranks or shapes that do not fit; all
            are listed.
    """

    def __init__(self, base: Checkpoint, directory: Path) -> None:
        self._base, self.directory = base, directory
        for name in (CONFIG, WEIGHTS):
            if not (directory / name).is_file():
                raise CheckpointError(
                    f"no {name} in the adapter's folder",
                    where=str(directory),
                    expected=f"{CONFIG} and {WEIGHTS}, as PEFT saves them",
                    fix="give the folder of a LoRA adapter",
                )
        self._file = SafetensorsFile(directory / WEIGHTS)
        config = read_json(directory / CONFIG)
        fields = Fields(config, str(directory / CONFIG))
        self._deltas = self._matched(fields)
        self.alpha = float(fields.number("lora_alpha", 8)) or 1.0
        self.source: Path = base.source
        self.layout: Layout = base.layout

    def _matched(self, f: Fields) -> dict[str, _Delta]:
        """Weight of the checkpoint -> what it gets."""
        f.one_of("peft_type", ("LORA",))
        for key, wanted in _REFUSED.items():
            if key in f.config and f.config[key] not in (wanted, None):
                raise UnsupportedArchitecture(
                    f"the adapter's {key} has no definition here",
                    where=f.where,
                    expected=f"{key} {wanted}",
                    found=str(f.config[key])[:80],
                    fix="merge it with PEFT (merge_and_unload) and export the result",
                )
        pairs: dict[tuple[str, bool], dict[str, str]] = {}
        wrong = []
        for name in self._file.tensors:
            match = _NAME.match(name)
            if match is None:
                wrong.append(f"not of a LoRA: {name}")
                continue
            pairs.setdefault((match[1], bool(match[2])), {})[match[3]] = name
        found = {}
        for (module, embedding), pair in pairs.items():
            target = self._target(module.removeprefix(_ROOT))
            problem: str | None = "no such weight in the checkpoint"
            if set(pair) != {"A", "B"}:
                problem = f"only {', '.join(pair)} of A and B"
            elif target is not None:
                rank, scale = _scale(f, module.removeprefix(_ROOT))
                problem = self._objection(target, pair, rank, embedding)
                found[target] = _Delta(pair["A"], pair["B"], scale, embedding)
            if problem:
                wrong.append(f"{module}: {problem}")
        if wrong or not found:
            raise TensorMismatch(
                f"the adapter does not fit the checkpoint: {len(wrong)} of its targets are wrong",
                where=str(self.directory),
                found="\n    " + "\n    ".join(wrong or ["no targets at all"]),
                fix="give the adapter of this checkpoint",
            )
        return found

    def _target(self, module: str) -> str | None:
        """The checkpoint's name of a module's weight, in whichever spelling it has."""
        exact = f"{module}.weight"
        if exact in self._base.tensors:
            return exact
        found = self._spellings.get(_bare(exact), [])
        return found[0] if len(found) == 1 else None

    @cached_property
    def _spellings(self) -> dict[str, list[str]]:
        """Names without their wrappers -> the checkpoint's names."""
        out: dict[str, list[str]] = {}
        for name in self._base.tensors:
            out.setdefault(_bare(name), []).append(name)
        return out

    def _objection(
        self, target: str, pair: Mapping[str, str], rank: int, embedding: bool
    ) -> str | None:
        shape = self._base.tensors[target].shape
        a, b = (self._file.tensors[pair[n]].shape for n in "AB")
        if len(shape) != 2:
            return f"a weight of shape {shape}, not a matrix"
        rows, columns = shape[::-1] if embedding else shape
        if a != (rank, columns) or b != (rows, rank):
            return f"expected A {(rank, columns)} and B {(rows, rank)}, found {a} and {b}"
        return None

    @property
    def config(self) -> dict[str, Any]:
        """The checkpoint's own."""
        return self._base.config

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The checkpoint's own."""
        return self._base.tensors

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """The weight files, the adapter's last."""
        return (*self._base.files, self._file.path)

    @property
    def targets(self) -> tuple[str, ...]:
        """The weights that the adapter changes."""
        return tuple(self._deltas)

    def factors(self, name: str) -> Factors:
        """What a weight of `targets` gets."""
        delta = self._deltas[name]
        read = self._file.read
        return Factors(read(delta.a), read(delta.b), delta.scale, delta.embedding)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Float32:
        """See `Checkpoint.read`; merged."""
        rows = self._base.read(name, start, stop)
        delta = self._deltas.get(name)
        if delta is None or not len(rows):
            return rows
        stop = start + len(rows)
        if delta.embedding:
            a = self._file.read(delta.a)[:, start:stop]
            return np.asarray(rows + np.float32(delta.scale) * (a.T @ self._file.read(delta.b).T))
        b, a = self._file.read(delta.b, start, stop), self._file.read(delta.a)
        return np.asarray(rows + np.float32(delta.scale) * (b @ a), np.float32)

    def text(self) -> TextAssets:
        """The checkpoint's own."""
        return self._base.text()

    def close(self) -> None:
        """Closes both."""
        self._file.close()
        self._base.close()


def _bare(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _scale(f: Fields, module: str) -> tuple[int, float]:
    """Rank and scale of a module, `rank_pattern` and `alpha_pattern` applied."""
    rank = _patterned(f, "rank_pattern", module, f.size("r", 8))
    alpha = _patterned(f, "alpha_pattern", module, f.number("lora_alpha", 8))
    root = math.sqrt(rank) if f.flag("use_rslora", False) else rank
    return int(rank), float(alpha) / root


def _patterned(f: Fields, key: str, module: str, default: float) -> float:
    """The value of the pattern that a module's name ends with. As PEFT: a regular expression."""
    for pattern, value in _patterns(f, key):
        try:
            fits = re.match(rf"(.*\.)?({pattern})$", module) is not None
        except (re.error, OverflowError, RecursionError) as error:
            raise CheckpointError(
                f"a pattern of {key} cannot be read", where=f.where, found=f"{pattern}: {error}"
            ) from error
        if fits:
            return value
    return default


def _patterns(f: Fields, key: str) -> Iterator[tuple[str, float]]:
    table = Fields(f.table(key), f"{f.where}, {key}")
    for pattern in table.config:
        if _ENDLESS.search(pattern):
            raise CheckpointError(
                f"a pattern of {key} repeats a group, which may take for ever",
                where=table.where,
                found=pattern[:80],
                fix="write out what it stands for",
            )
        whole = key == "rank_pattern"
        yield pattern, table.size(pattern) if whole else table.number(pattern)
