"""LoRA adapters that are applied while a model runs: GGUF files beside a GGUF model.

Nobody vouches for such a file either: a child process loads it with the model first, as it does
with the model itself (`gguf/file.py`). `edge-mmllm adapter` makes one of a PEFT folder; an engine
without adapters at run time takes them merged (`edge-mmllm export --lora DIR`).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_mmllm._children import python_command
from edge_mmllm.errors import CorruptBundle, UsageError

#: Seconds that the child may take.
_PATIENCE_S = 600


@dataclass(frozen=True)
class Adapter:
    """An adapter and how strongly it counts.

    Attributes:
        path: a GGUF file.
        scale: factor of what it adds; 1 as it was trained, 0 for nothing.
    """

    path: Path
    scale: float = 1.0


#: What `load(lora=...)` takes: a file, a file with a scale, or several.
AdapterLike = str | os.PathLike[str] | Adapter | tuple[str | os.PathLike[str], float]


def adapters_of(given: AdapterLike | Sequence[AdapterLike] | None) -> tuple[Adapter, ...]:
    """The adapters of `load(lora=...)`.

    Raises:
        UsageError: no file there, a PEFT folder, or a scale that is no number.
    """
    if given is None:
        return ()
    if isinstance(given, (str, os.PathLike, Adapter)) or _is_pair(given):
        return (_adapter(given),)
    return tuple(_adapter(one) for one in given)


def _is_pair(given: object) -> bool:
    return (
        isinstance(given, tuple)
        and len(given) == 2
        and isinstance(given[1], (int, float))
        and not isinstance(given[1], bool)
    )


def _adapter(given: object) -> Adapter:
    if isinstance(given, tuple) and _is_pair(given):
        found = Adapter(Path(given[0]), float(given[1]))
    elif isinstance(given, Adapter):
        found = given
    elif isinstance(given, (str, os.PathLike)):
        found = Adapter(Path(given))
    else:
        raise UsageError("no adapter", expected="a file, or (file, scale)", found=repr(given)[:80])
    if not math.isfinite(found.scale):
        raise UsageError("an adapter's scale must be a number", found=str(found.scale))
    if found.path.is_dir():
        raise UsageError(
            "an adapter is applied from a GGUF file, not from a folder",
            where=str(found.path),
            fix=f"edge-mmllm adapter SRC --lora {found.path} --out adapter.gguf",
        )
    if not found.path.is_file():
        raise UsageError("there is no such adapter", where=str(found.path))
    return found


def identity(model_sha256: str, adapters: Sequence[Adapter]) -> str:
    """What states of the model with these adapters are bound to; without any, the model's own."""
    if not adapters:
        return model_sha256
    digest = hashlib.sha256(model_sha256.encode())
    for adapter in adapters:
        with adapter.path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        digest.update(float(adapter.scale).hex().encode())
    return digest.hexdigest()


def check(model: Path, adapters: Sequence[Adapter]) -> None:
    """Has a child process load the adapters with their model.

    Raises:
        CorruptBundle: llama.cpp refuses one, or crashes on it.
    """
    for adapter in adapters:
        given = f"{str(model)!r}, {str(adapter.path.resolve())!r}"
        code = f"from edge_mmllm_runtime.adapters import main; main({given})"
        try:
            child = subprocess.run(
                python_command(code), capture_output=True, timeout=_PATIENCE_S, check=False
            )
            found = f"exit status {child.returncode}"
            if child.returncode < 0:
                found = f"llama.cpp crashed on it (signal {-child.returncode})"
            told = json.loads(child.stdout) if child.returncode == 0 else {"error": found}
        except (subprocess.TimeoutExpired, ValueError) as error:
            told = {"error": str(error)[:200]}
        if "error" in told:
            raise CorruptBundle(
                "llama.cpp cannot use this adapter",
                where=str(adapter.path),
                expected="a LoRA of this model as GGUF",
                found=told["error"],
                fix="edge-mmllm adapter SRC --lora DIR --out FILE makes one of a PEFT folder",
            )


def main(model: str, adapter: str) -> None:
    """The child: loads both; prints `{}`, or what is wrong."""
    from edge_mmllm_runtime.gguf.llama import Model

    told: dict[str, str] = {}
    try:
        Model(Path(model)).adapter(Path(adapter))
    except CorruptBundle as error:
        told = {"error": error.found or str(error)}
    sys.stdout.write(json.dumps(told))
