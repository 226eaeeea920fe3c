"""Errors at the edge: a message on stderr, an exit status, and with `--json` one document.

Expected errors (`EdgeError`, what the operating system refuses, memory, Ctrl-C) have no
traceback. Anything else is a bug and keeps its own.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

import click

from edge_mmllm.cli._output import emit, say
from edge_mmllm.errors import EdgeError, MissingDependency, UsageError

#: 128 + SIGINT, as shells report it.
INTERRUPTED = 130

#: What a package that fails to import belongs to; see pyproject.toml.
_EXTRAS = {
    "onnxruntime": "runtime-onnx",
    "onnx": "export",
    "onnx_ir": "export",
    "safetensors": "export",
    "gguf": "export",
    "edge_mmllm_export": "export",
}
_PARTS = ("where", "expected", "found", "fix")


def guarded(call: Callable[[], Any], args: Sequence[str] | None) -> NoReturn:
    """Runs a command and ends the process with its status."""
    open_standard_streams()
    words = list(sys.argv[1:] if args is None else args)
    as_json = "--json" in (words[: words.index("--")] if "--" in words else words)
    try:
        result = call()
    except click.ClickException as error:
        error.show(sys.stderr)
        fail("UsageError", {"what": error.format_message()}, error.exit_code, as_json)
    except click.Abort as error:
        if isinstance(error.__cause__, EOFError):
            raise error.__cause__ from None  # ours, not the user's
        say("interrupted")
        fail("Interrupted", {"what": "interrupted"}, INTERRUPTED, as_json)
    except EdgeError as error:
        _show(error, 2 if isinstance(error, UsageError) else 1, as_json)
    except ImportError as error:
        _show(_missing(error), 1, as_json)
    except MemoryError as error:
        _show(_no_memory(str(error)), 1, as_json)
    except OSError as error:
        _show(_system(error), 1, as_json)
    sys.exit(result if isinstance(result, int) else 0)


def open_standard_streams() -> None:
    """Puts the null device in place of standard streams that the caller closed (`>&-`).

    Python has None there; and the next file opened would get the stream's number, and with it
    whatever a library prints to it.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            try:
                os.fstat(number)
            except OSError:
                os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115


def _show(error: EdgeError, status: int, as_json: bool) -> NoReturn:
    say(f"error: {error}")
    fail(type(error).__name__, describe(error), status, as_json)


def describe(error: EdgeError) -> dict[str, str | None]:
    """The parts of an error, for JSON."""
    return {"what": error.what, **{name: getattr(error, name) for name in _PARTS}}


def fail(kind: str, parts: dict[str, str | None], status: int, as_json: bool) -> NoReturn:
    """Ends the process; with `--json` the error is the one document on stdout."""
    if as_json:
        document = {"type": kind, "what": None, **dict.fromkeys(_PARTS), **parts}
        with suppress(OSError):  # stdout may be what failed
            emit({"error": document})
    sys.exit(status)


def _missing(error: ImportError) -> EdgeError:
    """A package that is absent, or there but broken. Raises `error` if it is none of ours."""
    package = (error.name or "").partition(".")[0]
    if package not in _EXTRAS:
        raise error
    extra = _EXTRAS[package]
    if isinstance(error, ModuleNotFoundError):
        return MissingDependency(package, extra)
    return EdgeError(
        f"{package} is installed but cannot be loaded",
        found=str(error),
        fix=f"pip install --force-reinstall 'edge-mmllm[{extra}]'; edge-mmllm doctor shows more",
    )


def _no_memory(found: str) -> EdgeError:
    return EdgeError(
        "out of memory",
        found=found or None,
        fix="close other programs, or use a smaller model, a smaller --context or fewer --threads",
    )


def _system(error: OSError) -> EdgeError:
    """What the operating system refused. Raises `error` where it names neither code nor file."""
    if error.errno is None:
        raise error
    if error.errno == errno.ENOMEM:
        return _no_memory(str(error))
    return EdgeError(
        error.strerror or os.strerror(error.errno),
        where=None if error.filename is None else str(error.filename),
    )


@contextmanager
def clean_termination() -> Iterator[None]:
    """Makes SIGTERM unwind like Ctrl-C, so that what is half-written is removed."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
