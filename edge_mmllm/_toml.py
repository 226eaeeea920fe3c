"""TOML on every Python: `tomllib` (3.11), else `tomli`, else the lines that a small reader knows.

The small reader takes what our own tables are written in: `[name]` and `[name.name]` headers,
`key = value` on one line each with a value that is also JSON (a string in double quotes, a number,
true, false, an array on one line), and comments on lines of their own. Anything else is an error
that names the package to install, never a guess.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

from edge_mmllm.errors import UsageError

_NAME = r"[A-Za-z0-9_-]+"
_HEADER = re.compile(rf"\[({_NAME}(?:\.{_NAME})*)\]")
_LINE = re.compile(rf"({_NAME})\s*=\s*(.+)")


def read_toml(text: str, where: str) -> dict[str, Any]:
    """Parses `text`; `where` is its name, for messages.

    Raises:
        UsageError: not TOML, or TOML that Python 3.10 needs `tomli` for.

    """
    parser = _parser()
    if parser is None:
        return read_plain_toml(text, where)
    try:
        return parser(text)
    except ValueError as error:  # TOMLDecodeError is one
        raise UsageError("not a TOML file", where=where, found=str(error)[:200]) from error


def _parser() -> Callable[[str], dict[str, Any]] | None:
    for name in ("tomllib", "tomli"):
        try:
            module: ModuleType = importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        parser: Callable[[str], dict[str, Any]] = module.loads
        return parser
    return None


def read_plain_toml(text: str, where: str) -> dict[str, Any]:
    """The small reader. Raises: UsageError for a line that it does not know."""
    root: dict[str, Any] = {}
    table = root
    for line in text.splitlines():
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        header, pair = _HEADER.fullmatch(line), _LINE.fullmatch(line)
        if header:
            table = root
            for part in header[1].split("."):
                table = table.setdefault(part, {})
            continue
        try:
            if pair is None or pair[1] in table:
                raise ValueError
            table[pair[1]] = json.loads(pair[2])
        except ValueError as error:
            raise UsageError(
                "this TOML needs Python 3.11 or later, or the package tomli",
                where=where,
                found=line[:80],
                fix="pip install tomli",
            ) from error
    return root
