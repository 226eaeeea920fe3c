"""Typed reading of JSON that nobody vouches for.

`Fields` wraps one JSON object and hands out members of the type asked for; anything else is a
`CorruptBundle` that names the member by its full path, e.g. `model.states[3].shape`.
Members that are not asked for are ignored: a newer release may add some.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from edge_mmllm.errors import CorruptBundle

_MISSING: Any = object()
_NAMES = {str: "a string", bool: "true or false", int: "an integer", dict: "an object"}


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """Parses `data` as one JSON object.

    Duplicate members, NaN, Infinity and nesting past the interpreter's limit are refused: two
    readers must not be able to see two different documents.

    Raises:
        CorruptBundle: not JSON, or not an object.
    """
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:
        raise CorruptBundle(
            "not valid JSON", where=where, expected="one JSON object in UTF-8", found=str(error)
        ) from error
    if not isinstance(value, dict):
        raise CorruptBundle(
            "the JSON document is not an object",
            where=where,
            expected="an object",
            found=describe(value),
        )
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"duplicate members: {', '.join(twice)}")
    return members


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def describe(value: object) -> str:
    """A value and its JSON type, short enough for an error message."""
    if value is _MISSING:
        return "nothing"
    if value is None:
        return "null"
    kinds = {dict: "object", list: "array", str: "string", bool: "boolean"}
    kind = kinds.get(type(value), "number")
    text = repr(value)
    return f"{kind} {text if len(text) <= 60 else text[:57] + '...'}"


class Fields:
    """One JSON object with typed access.

    Attributes:
        value: the object itself.
        where: its path, for error messages.
    """

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, Mapping):
            raise CorruptBundle(
                "wrong type", where=where, expected="an object", found=describe(value)
            )
        self.value, self.where = value, where

    def path(self, name: str) -> str:
        """The full path of member `name`."""
        return f"{self.where}.{name}"

    def fail(self, name: str, expected: str) -> CorruptBundle:
        """The error for a member that is not what was expected (to be raised by the caller)."""
        value = self.value.get(name, _MISSING)
        what = "a member is missing" if value is _MISSING else "a member has a wrong value"
        return CorruptBundle(what, where=self.path(name), expected=expected, found=describe(value))

    def _typed(self, name: str, kind: type, default: Any) -> Any:
        value = self.value.get(name, default)
        good = isinstance(value, kind) and not (kind is int and isinstance(value, bool))
        if value is not _MISSING and (good or (value is None and default is None)):
            return value
        raise self.fail(name, _NAMES[kind])

    def text(self, name: str) -> str:
        """A string."""
        value: str = self._typed(name, str, _MISSING)
        return value

    def maybe_text(self, name: str) -> str | None:
        """A string, null, or absent."""
        value: str | None = self._typed(name, str, None)
        return value

    def one_of(self, name: str, choices: tuple[str, ...]) -> str:
        """One of the given strings."""
        value = self.value.get(name, _MISSING)
        if not isinstance(value, str) or value not in choices:
            raise self.fail(name, "one of " + ", ".join(choices))
        return value

    def integer(self, name: str, *, least: int = 0) -> int:
        """An integer of at least `least`, at most 2**63 - 1."""
        value: int = self._typed(name, int, _MISSING)
        if not least <= value < 2**63:
            raise self.fail(name, f"an integer from {least} to 2**63 - 1")
        return value

    def maybe_integer(self, name: str, *, least: int = 0) -> int | None:
        """As `integer`; null or absent gives None."""
        return None if self.value.get(name) is None else self.integer(name, least=least)

    def number(self, name: str) -> float:
        """A finite number of at least 0, as a float."""
        value = self.value.get(name, _MISSING)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.fail(name, "a number")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not (math.isfinite(number) and number >= 0):
            raise self.fail(name, "a finite number of at least 0")
        return number

    def flag(self, name: str, default: bool | None = None) -> bool:
        """true or false; `default` where absent, unless that is None."""
        value: bool = self._typed(name, bool, _MISSING if default is None else default)
        return value

    def mapping(self, name: str, *, required: bool = True) -> dict[str, Any]:
        """An object; `{}` where absent and not required."""
        value: dict[str, Any] = self._typed(name, dict, _MISSING if required else {})
        return value

    def child(self, name: str) -> Fields:
        """An object, wrapped."""
        return Fields(self.mapping(name), self.path(name))

    def items(self, name: str) -> list[Any]:
        """An array."""
        value = self.value.get(name, _MISSING)
        if not isinstance(value, (list, tuple)):
            raise self.fail(name, "an array")
        return list(value)

    def children(self, name: str) -> list[Fields]:
        """An array of objects, wrapped."""
        return [Fields(v, f"{self.path(name)}[{i}]") for i, v in enumerate(self.items(name))]

    def integers(self, name: str, *, least: int = 0) -> tuple[int, ...]:
        """An array of integers of at least `least`, at most 2**63 - 1."""
        values = self.items(name)
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int):
                raise self.fail(name, "an array of integers")
            if not least <= value < 2**63:
                raise self.fail(name, f"an array of integers from {least} to 2**63 - 1")
        return tuple(values)

    def texts(self, name: str) -> tuple[str, ...]:
        """An array of strings."""
        values = self.items(name)
        if not all(isinstance(value, str) for value in values):
            raise self.fail(name, "an array of strings")
        return tuple(values)
