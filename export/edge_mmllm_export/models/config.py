"""Typed reading of published configs: `config.json` of the hub, metadata of a GGUF file."""

from __future__ import annotations

from typing import Any

from edge_mmllm.errors import CheckpointError

#: No published model comes near these; beyond them a config is damaged or hostile.
MAX_SIZE = 1 << 24
MAX_LAYERS = 1024


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

    def number(self, key: str, default: float | None = None) -> float:
        """A number. Raises: CheckpointError."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self._fail(key, "a number", value)
        return float(value)

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
