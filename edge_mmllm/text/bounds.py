"""What keeps a chat template from taking all memory or never ending.

Each check comes before the work. A value may have `MAX_VALUE_ITEMS` characters or items, and a
render `MAX_STEPS` loop steps and calls, in `MAX_CPU_S` seconds of this thread's CPU time. No
template of a real model comes near.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from typing import Any

MAX_VALUE_ITEMS = 1 << 24
MAX_STEPS = 300_000
MAX_CPU_S = 10.0
MAX_WIDTH = 1 << 16
MAX_NUMBER_BITS = 4096

#: A width or precision of 5 digits and more, or one taken from an argument.
_WIDE_PERCENT = re.compile(r"%[^a-zA-Z%]*(\*|\d{5})")
_WIDE_BRACES = re.compile(r":[^}]*(\{|\d{5})")
_PADDING = frozenset({"ljust", "rjust", "center", "zfill", "expandtabs", "to_bytes"})


class TooMuch(Exception):
    """A template went past one of the bounds."""


class Budget:
    """The steps and the time of one render."""

    def __init__(self) -> None:
        self._left = MAX_STEPS
        self._until = time.thread_time() + MAX_CPU_S

    def step(self) -> bool:
        """Takes one step; always True, so that it can stand in a condition."""
        self._left -= 1
        if self._left < 0:
            raise TooMuch(f"more than {MAX_STEPS} steps")
        if time.thread_time() > self._until:
            raise TooMuch(f"more than {MAX_CPU_S:.0f} s")
        return True


def check_items(items: int) -> None:
    """Refuses a value of `items` characters or items."""
    if items > MAX_VALUE_ITEMS:
        raise TooMuch(f"a value of {items} characters or items")


def check_width(width: object) -> None:
    """Refuses a width to pad to."""
    if isinstance(width, int) and abs(width) > MAX_WIDTH:
        raise TooMuch(f"a width of {width}")


def join(parts: Iterable[str], separator: str = "") -> str:
    """`separator.join(parts)`, bounded."""
    pieces = list(parts)
    check_items(sum(map(len, pieces)) + len(separator) * len(pieces))
    return separator.join(pieces)


def check_percent(form: str) -> None:
    """Refuses `form % arguments` with wide fields."""
    if _WIDE_PERCENT.search(form):
        raise TooMuch("formatting with a large or computed width")


def check_braces(form: str) -> None:
    """Refuses `form.format(arguments)` with wide fields."""
    if _WIDE_BRACES.search(form):
        raise TooMuch("formatting with a large or computed width")


def check_replace(text: str, old: str, new: str) -> None:
    """Refuses a replacement that makes a huge string."""
    check_items(len(text) + text.count(old) * len(new))


def _items(value: object) -> int | None:
    """Length of what can be repeated or added, else None."""
    return len(value) if isinstance(value, (str, bytes, list, tuple)) else None


def check_operation(operator: str, left: Any, right: Any) -> None:
    """Refuses `left operator right` where the result would be huge."""
    a, b = _items(left), _items(right)
    if operator == "+" and a is not None and b is not None:
        check_items(a + b)
    elif operator == "*" and a is not None and isinstance(right, int):
        check_items(a * right)
    elif operator == "*" and b is not None and isinstance(left, int):
        check_items(b * left)
    elif operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length()
        bits = bits * right if operator == "**" else bits + right.bit_length()
        if bits > MAX_NUMBER_BITS:
            raise TooMuch("a number of too many digits")
    elif operator == "%" and isinstance(left, str):
        check_percent(left)


def check_call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Refuses a method call that would make a huge value; returns the arguments to call with."""
    owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
    if name in _PADDING:
        for argument in arguments:
            check_width(argument)
    if isinstance(owner, str) and name == "replace" and len(arguments) >= 2:
        check_replace(owner, str(arguments[0]), str(arguments[1]))
    if isinstance(owner, str) and name == "join" and arguments:
        pieces = list(arguments[0])
        check_items(sum(len(str(piece)) for piece in pieces) + len(owner) * len(pieces))
        return (pieces, *arguments[1:])
    return arguments
