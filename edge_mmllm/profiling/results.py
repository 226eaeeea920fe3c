"""Reading results: JSONL of `bench`, single documents of `bench --json`, llama-bench's JSON.

`docs/results.md` documents the fields. Results come from other machines and other people: nothing
in them is trusted, and what is missing is missing, never 0.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_mmllm.errors import UsageError
from edge_mmllm.profiling.llama_bench import from_llama_bench, is_llama_bench
from edge_mmllm.profiling.report_data import SCHEMA_VERSION

#: A file of results is some kilobytes a test; this is a thousand tests and more.
_LARGEST_BYTES = 256 << 20


@dataclass(frozen=True)
class Result:
    """One record and where it stands.

    Attributes:
        record: as read, version 1 brought to the present form.
        source: `file.jsonl:3`, by which a figure can be traced.
    """

    record: Mapping[str, Any]
    source: str

    @property
    def name(self) -> str:
        """What reports call the bundle."""
        return str(self.record.get("name") or "?")[:200]

    @property
    def test(self) -> str:
        """The test's name; of records without one, its counts."""
        told = self.record.get("test")
        if isinstance(told, str) and told:
            return told[:200]
        return f"{self.text('prompt_tokens')}+{self.text('new_tokens')}"

    @property
    def failed(self) -> bool:
        """Whether the test gave no figures."""
        return self.record.get("status") == "failed"

    def number(self, *path: str) -> float | None:
        """A figure, perhaps inside of another field; None where it is missing or no number."""
        value: Any = self.record
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        return as_number(value)

    def text(self, *path: str) -> str:
        """A field as text; `?` where it is missing."""
        value: Any = self.record
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        return "?" if value is None or isinstance(value, (dict, list)) else str(value)[:400]

    def values(self, name: str) -> list[float]:
        """One figure for each repetition; the median alone where only that is known."""
        listed = numbers(self.record.get(f"{name}_values"))
        if listed:
            return listed
        single = self.number(name)
        return [] if single is None else [single]

    def table(self, *path: str) -> Mapping[str, Any]:
        """A nested field; empty where it is missing."""
        value: Any = self.record
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        return value if isinstance(value, Mapping) else {}

    def rows(self, *path: str) -> list[Any]:
        """A nested list; empty where it is missing."""
        value: Any = self.record
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        return value if isinstance(value, list) else []


def as_number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        made = float(value)
    except OverflowError:
        return None
    return made if math.isfinite(made) else None


def numbers(value: Any) -> list[float]:
    """The finite numbers of a list; empty where it is none."""
    if not isinstance(value, (list, tuple)):
        return []
    return [made for item in value if (made := as_number(item)) is not None]


def read_results(paths: Sequence[str | os.PathLike[str]]) -> list[Result]:
    """Reads files, in order.

    Raises:
        UsageError: a file that cannot be read, is empty, is not JSON, or is of a later version;
            it names the line.
    """
    found: list[Result] = []
    for path in paths:
        before = len(found)
        for record, source in _records(Path(path)):
            _check(record, source)
            found.append(Result({**record, "schema_version": SCHEMA_VERSION}, source))
        if len(found) == before:
            raise UsageError("there are no results in the file", where=str(path))
    return found


def _records(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    try:
        if path.stat().st_size > _LARGEST_BYTES:
            raise UsageError("too large for a file of results", where=str(path))
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(
            "the results cannot be read", where=str(path), found=error.strerror
        ) from error
    except ValueError as error:
        raise UsageError("the results are not text in UTF-8", where=str(path)) from error
    stripped = text.lstrip()
    if stripped.startswith("[") or (stripped.startswith("{") and "\n" in stripped.rstrip()):
        try:
            whole = _parse(text)
        except (ValueError, RecursionError):
            pass  # a line for each record
        else:
            yield from _of_document(whole, path.name)
            return
    theirs: list[Any] = []  # llama-bench writes a line for each half of a record
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        source = f"{path.name}:{number}"
        try:
            document = _parse(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(
                "a line of the results is not JSON", where=source, found=str(error)[:200]
            ) from error
        if isinstance(document, dict) and is_llama_bench(document):
            theirs.append(document)
        else:
            yield from _of_document(document, source)
    if theirs:
        yield from _of_document(theirs, path.name)


def _parse(text: str) -> Any:
    def refuse(name: str) -> None:
        return None  # NaN and infinity: not measured

    return json.loads(text, parse_constant=refuse)


def _of_document(document: Any, source: str) -> Iterator[tuple[dict[str, Any], str]]:
    """One document's records: a record, `bench --json` of several, or llama-bench's list."""
    if isinstance(document, dict) and isinstance(document.get("results"), list):
        document = document["results"]
    if is_llama_bench(document):
        for number, record in enumerate(from_llama_bench(document), 1):
            yield record, f"{source}#{number}"
        return
    several = isinstance(document, list)
    for number, record in enumerate(document if several else [document], 1):
        place = f"{source}#{number}" if several else source
        if not isinstance(record, dict):
            raise UsageError("a result is an object", where=place, found=type(record).__name__)
        yield record, place


def _check(record: Mapping[str, Any], source: str) -> None:
    version = record.get("schema_version", 1)
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise UsageError("a result's version is not one", where=source, found=repr(version)[:80])
    if version > SCHEMA_VERSION:
        raise UsageError(
            "a result is of a later version than this release reads",
            where=source,
            expected=f"schema_version up to {SCHEMA_VERSION}",
            found=str(version),
            fix="update edge-mmllm",
        )
    if record.get("status") == "failed":
        return
    speed = ("decode_tokens_per_s", "prefill_tokens_per_s", "ttft_ms")
    if not any(as_number(record.get(name)) is not None for name in speed):
        raise UsageError(
            "a result has no figure",
            where=source,
            expected="one of " + ", ".join(speed) + " (bench --out), or llama-bench's JSON",
            found=", ".join(map(str, list(record)[:8])) or "an empty object",
        )
