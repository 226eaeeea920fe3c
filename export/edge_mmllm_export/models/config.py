"""Typed reading of published configs: `config.json` of the hub, metadata of a GGUF file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edge_mmllm.errors import CheckpointError

#: No published model comes near these; beyond them a config is damaged or hostile.
MAX_SIZE = 1 << 24
MAX_LAYERS = 1024
MAX_NUMBER = 1e18


class Fields:
    """A config dict with typed, bounded access and errors that name the key.

    Args:
        prefix: put before each key (`llama.` in GGUF metadata).
    """

    def __init__(self, config: dict[str, Any], where: str, prefix: str = "") -> None:
        self.config, self.where, self.prefix = config, where, prefix

    def get(self, key: str, default: Any = None) -> Any:
        """The raw value; a JSON null counts as absent."""
        value = self.config.get(self.prefix + key)
        return default if value is None else value

    def _fail(self, key: str, expected: str, found: object) -> CheckpointError:
        return CheckpointError(
            f"the config's {self.prefix + key!r} cannot be used",
            where=self.where,
            expected=expected,
            found="nothing" if found is None else f"{type(found).__name__} {str(found)[:80]}",
            fix="take config.json from the checkpoint's original release",
        )

    def size(
        self, key: str, default: int | None = None, *, least: int = 1, limit: int = MAX_SIZE
    ) -> int:
        """A whole number from `least` to `limit`. Raises: CheckpointError."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= limit:
            raise self._fail(key, f"a whole number from {least} to {limit}", value)
        return value

    def numbers(
        self, key: str, default: Sequence[int], *, least: int, most: int
    ) -> tuple[int, ...]:
        """Whole numbers from `least` to `most`, at least one; a bare one counts as a list of it.
        Raises: CheckpointError."""
        value = self.get(key, list(default))
        values = value if isinstance(value, list) else [value]
        if not values or not all(type(n) is int and least <= n <= most for n in values):
            raise self._fail(key, f"whole numbers from {least} to {most}", value)
        return tuple(values)

    def number(self, key: str, default: float | None = None, *, positive: bool = False) -> float:
        """A finite number, above 0 where `positive`. Raises: CheckpointError."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self._fail(key, "a number", value)
        if not abs(value) <= MAX_NUMBER or (positive and value <= 0):  # NaN is no number either
            wanted = "a number above 0" if positive else "a finite number"
            raise self._fail(key, f"{wanted}, at most {MAX_NUMBER:g}", value)
        return float(value)

    def text(self, key: str, default: str | None = None) -> str:
        """A string. Raises: CheckpointError."""
        value = self.get(key, default)
        if not isinstance(value, str):
            raise self._fail(key, "a string", value)
        return value

    def flag(self, key: str, default: bool) -> bool:
        """True or false. Raises: CheckpointError."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self._fail(key, "true or false", value)
        return value

    def one_of(self, key: str, allowed: tuple[str, ...], default: str | None = None) -> str:
        """One of the allowed words. Raises: CheckpointError."""
        value = self.get(key, default)
        if value not in allowed:
            raise self._fail(key, " | ".join(allowed), value)
        return str(value)

    def table(self, key: str) -> dict[str, Any]:
        """A nested object, empty where absent. Raises: CheckpointError."""
        value = self.get(key, {})
        if not isinstance(value, dict):
            raise self._fail(key, "an object", value)
        return value
