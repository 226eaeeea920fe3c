"""Where a model came from and under which licence, as `general.*` of GGUF."""

from __future__ import annotations

import re
from pathlib import Path

from edge_mmllm_export.checkpoints.base import Checkpoint

#: A model card is prose behind a few lines of settings; these are near its beginning.
_CARD_BYTES = 1 << 16
#: Keys of a model card's front matter -> GGUF's.
_CARD_KEYS = {
    "license": "general.license",
    "license_name": "general.license.name",
    "license_link": "general.license.link",
    "model_name": "general.name",
}
#: Keys of a GGUF file that say nothing of its contents' form and go on with it.
_KEPT = (
    "general.name", "general.author", "general.organization", "general.version",
    "general.basename", "general.finetune", "general.description", "general.license",
    "general.license.name", "general.license.link", "general.url", "general.repo_url",
    "general.source.url", "general.source.repo_url", "general.size_label",
)  # fmt: skip


def provenance(checkpoint: Checkpoint) -> dict[str, str]:
    """`general.*` keys that are known of a checkpoint; its name at the least."""
    found = {"general.type": "model", "general.name": checkpoint.source.stem}
    if checkpoint.layout == "gguf":
        kept = {key: checkpoint.config.get(key) for key in _KEPT}
        return found | {k: v for k, v in kept.items() if isinstance(v, str) and v}
    folder = checkpoint.source if checkpoint.source.is_dir() else checkpoint.source.parent
    found["general.name"] = (
        checkpoint.source.name if checkpoint.source.is_dir() else (checkpoint.source.stem)
    )
    return found | _card(folder / "README.md")


def _card(path: Path) -> dict[str, str]:
    """The front matter's plain `key: value` lines that GGUF has a key for."""
    try:
        with path.open("rb") as file:
            text = file.read(_CARD_BYTES).decode("utf-8", "replace")
    except OSError:
        return {}
    head = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    found = {}
    for line in (head[1] if head else "").splitlines():
        key, _, value = line.partition(":")
        value = value.strip().strip("'\"")
        if key in _CARD_KEYS and value and value[0] not in "[{|>":
            found[_CARD_KEYS[key]] = value
    return found
