"""K-quants and I-quants: llama.cpp's own quantizer over a file that we wrote, in a child process.

`llama_model_quantize` chooses a type for each tensor by its own rules (more bits for some layers,
fewer for others; another block where a row is no multiple of 256), so it is first asked what it
would do: over a file that has a header and a hole for its data. What must not be quantized so, it
finds written as it shall stay, with an override of its own name.

The child is another process because llama.cpp ends the process where something is wrong; it maps
one tensor of the draft at a time, and quantizes `_BUFFER_BYTES` of it at once.
"""

from __future__ import annotations

import ctypes
import errno
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType, LlamaFileType

from edge_mmllm._children import die_with_parent, python_command
from edge_mmllm.errors import ExportError, MissingDependency
from edge_mmllm_export.gguf.types import KINDS, GgufWord, Kind

#: What llama.cpp holds of a tensor at once: rows as stored, in float32, and quantized.
_BUFFER_BYTES = 64 << 20
#: RSS of the child before its first tensor.
_BASE_RAM = 160 << 20
#: `[   1/ 272]  blk.0.attn_q.weight - [576, 576, 1, 1], type = bf16, size = 1 MiB -> 0 MiB (q4_K)`
_LINE = re.compile(r"\[ *(\d+)/ *(\d+)\] +(\S+) +- \[.*?\], +type = +(\w+)")
_CHOSEN = re.compile(r"MiB +-> .*\((\w+)\)")
_ERROR, _CONTINUED = 3, 5


@dataclass(frozen=True)
class Job:
    """What llama.cpp is asked.

    Attributes:
        source: a file of ours.
        target: the file to write; None asks what it would write.
        word: the file's type.
        fixed: types of tensors that are not left to llama.cpp.
        imatrix: a file as `imatrix.write` makes it; `""` says that there will be one.
    """

    source: str
    target: str | None
    word: GgufWord
    fixed: Mapping[str, Kind]
    imatrix: str | None
    threads: int = 1


def require() -> None:
    """Raises: MissingDependency: llama-cpp-python is not installed."""
    if importlib.util.find_spec("llama_cpp") is None:
        raise MissingDependency("llama-cpp-python", "gguf")


def ram_bytes(largest: int) -> int:
    """What the child needs for a draft whose largest tensor has so many bytes."""
    return _BASE_RAM + 2 * _BUFFER_BYTES + largest


def chosen(job: Job) -> dict[str, Kind]:
    """The type that each tensor would get.

    Raises:
        MissingDependency, ExportError: llama.cpp is not there, or refuses the file.
    """
    found: dict[str, Kind] = {}
    for name, kind, _, _ in _run(job, lambda *_: None):
        if kind not in KINDS:
            raise ExportError(
                "llama.cpp would store a tensor as a type unknown here",
                where=name, expected=" | ".join(KINDS), found=kind,
            )  # fmt: skip
        found[name] = kind
    return found


def quantize(job: Job, progress: Callable[[int, int], None]) -> None:
    """Write `job.target`.

    Args:
        progress: called with tensors done, tensors.

    Raises:
        MissingDependency, ExportError: llama.cpp is not there, or failed.
        OSError: no space is left.
    """
    _run(job, progress)


def _run(job: Job, progress: Callable[[int, int], None]) -> list[tuple[str, str, int, int]]:
    require()
    command = python_command(
        "from edge_mmllm_export.gguf import mixes as gguf_mixes; sys.exit(gguf_mixes.main())"
    )
    lines: list[tuple[str, str, int, int]] = []
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True
        )
        assert child.stdin is not None  # noqa: S101 - for the type checker
        assert child.stdout is not None  # noqa: S101 - for the type checker
        try:
            try:
                child.stdin.write(json.dumps(asdict(job)))
                child.stdin.close()
            except BrokenPipeError:
                pass  # its status says why
            for text in child.stdout:
                name, kind, done, of = json.loads(text)
                lines.append((name, kind, done, of))
                progress(done, of)
            status = child.wait()
        except BaseException:
            child.kill()
            child.wait()
            raise
        finally:
            child.stdout.close()
        if status == 0:
            return lines
        said.seek(0)
        why = said.read().decode("utf-8", "replace").strip()[-2000:]
    raise _failure(job, status, why)


def _failure(job: Job, status: int, why: str) -> Exception:
    target = Path(job.target or job.source).parent
    if job.target is not None and shutil.disk_usage(target).free < _BUFFER_BYTES:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), job.target)
    ended = f"it was ended by signal {-status}" if status < 0 else f"exit status {status}"
    return ExportError(
        f"llama.cpp could not quantize the model to {job.word}",
        found=f"{why or 'it did not say why'} ({ended})",
        fix="a type that it need not be asked for, e.g. --gguf-type Q4_0"
        if status >= 0
        else "more memory where the system ended it; else report this, and take --gguf-type Q4_0",
    )


class _Log:
    """Reads llama.cpp's log: a line for each tensor, in pieces, and its errors."""

    def __init__(self, dry: bool) -> None:
        self.errors: list[str] = []
        self._dry, self._level, self._line = dry, 0, ""

    def __call__(self, level: int, text: bytes, _: object) -> None:
        """The callback."""
        self._level = self._level if level == _CONTINUED else level
        if self._level == _ERROR:
            self.errors.append(text.decode("utf-8", "replace"))
            return
        self._line += text.decode("utf-8", "replace")
        if self._line.endswith("\n"):
            line, self._line = self._line, ""
            if found := _LINE.search(line):
                done, of, name, kind = found.groups()
                if self._dry and (other := _CHOSEN.search(line)):
                    kind = other[1]
                sys.stdout.write(json.dumps((name, _spelt(kind), int(done), int(of))) + "\n")
                sys.stdout.flush()


def _spelt(kind: str) -> str:
    """ggml writes `q4_K` and `bf16`."""
    return kind.upper()


def _imatrix(api: Any, path: str) -> tuple[Any, Sequence[Any]]:
    """The array that llama.cpp reads up to an entry without a name, and what it points to."""
    from edge_mmllm_export.gguf import imatrix

    values = {"-": imatrix.ONES} if path == "" else imatrix.read(Path(path)).importances()
    array = (api.llama_model_imatrix_data * (len(values) + 1))()
    for entry, (name, numbers) in zip(array, values.items(), strict=False):
        entry.name, entry.size = name.encode(), numbers.size
        entry.data = numbers.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    return array, list(values.values())


def main() -> int:
    """Entry point of the child: a job on stdin; a line on stdout for each tensor, errors on stderr.

    Statuses: 0 done, 1 llama.cpp failed.
    """
    die_with_parent()
    job = Job(**json.load(sys.stdin))
    import llama_cpp.llama_cpp as api

    log = _Log(job.target is None)
    callback = api.llama_log_callback(log)
    api.llama_log_set(callback, None)
    api.llama_backend_init()
    params = api.llama_model_quantize_default_params()
    params.nthread, params.dry_run = job.threads, job.target is None
    params.ftype = LlamaFileType["MOSTLY_" + job.word].value
    params.max_buf_size = _BUFFER_BYTES
    overrides = (api.llama_model_tensor_override * (len(job.fixed) + 1))()
    for entry, (name, kind) in zip(overrides, job.fixed.items(), strict=False):
        entry.pattern = f"^{re.escape(name)}$".encode()
        entry.type = GGMLQuantizationType[kind].value
    params.tt_overrides = overrides
    kept = None
    if job.imatrix is not None:
        kept = _imatrix(api, job.imatrix)
        params.imatrix = kept[0]
    status = api.llama_model_quantize(
        job.source.encode(), (job.target or os.devnull).encode(), ctypes.byref(params)
    )
    del kept
    if status != 0:
        sys.stderr.write("".join(log.errors).strip() or f"llama_model_quantize gave {status}")
    return int(status != 0)
