"""Text settings of a hub-layout folder: tokenizer, special ids, chat template.

Where two files disagree, the order is the one `transformers` uses: `generation_config.json` over
`config.json` for ids, `chat_template.jinja` over `chat_template.json` over
`tokenizer_config.json` for the template. Every EOS that any of them names counts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from edge_mmllm.errors import CheckpointError, CorruptCheckpoint
from edge_mmllm.spec import TextSpec

from .base import TextAssets
from .files import read_json

#: Tokenizer files that need a library the exporter does not carry.
_FOREIGN = (
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "tekken.json",
)


def hub_text(directory: Path, config: dict[str, Any]) -> TextAssets:
    """Reads the text files beside the weights.

    Args:
        directory: where they lie.
        config: the parsed `config.json`, or `{}`; the last resort for ids.

    Raises: CheckpointError where only a foreign tokenizer exists, CorruptCheckpoint.
    """

    def optional(name: str) -> dict[str, Any]:
        path = directory / name
        return read_json(path) if path.is_file() else {}

    settings = optional("special_tokens_map.json") | optional("tokenizer_config.json")
    generation = optional("generation_config.json")
    nested = config.get("text_config")
    model = config | nested if isinstance(nested, dict) else config

    path = directory / "tokenizer.json"
    tokenizer: Tokenizer | None = None
    if path.is_file():
        blob = path.read_bytes()
        tokenizer = load_tokenizer(blob, str(path))
    else:
        blob = None
        _refuse_foreign(directory)

    def special(kind: str) -> tuple[int | None, str | None]:
        """Id and text of `bos`, `eos` or `pad`; an explicit null in the settings means none."""
        name = f"{kind}_token"
        if tokenizer is not None and name in settings:
            text = _token_text(settings[name], directory / "tokenizer_config.json")
            return (None, None) if text is None else (tokenizer.token_to_id(text), text)
        found = _ids(generation.get(f"{name}_id", model.get(f"{name}_id")), f"{name}_id", directory)
        first = found[0] if found else None
        text = tokenizer.id_to_token(first) if tokenizer and first is not None else None
        return first, text

    bos_id, bos_token = special("bos")
    eos_id, eos_token = special("eos")
    pad_id, _ = special("pad")
    named = generation.get("eos_token_id", model.get("eos_token_id"))
    eos_ids = _ids(named, "eos_token_id", directory)
    if eos_id is not None:
        eos_ids = (*eos_ids, eos_id)
    spec = TextSpec(
        tokenizer="none" if tokenizer is None else "tokenizers",
        bos_id=bos_id,
        eos_ids=tuple(dict.fromkeys(eos_ids)),
        add_bos=_wants_bos(tokenizer, settings, bos_id),
        chat_template=_chat_template(directory, settings),
        bos_token=bos_token,
        eos_token=eos_token,
        pad_id=pad_id,
    )
    return TextAssets(spec, blob)


def load_tokenizer(blob: bytes, where: str) -> Tokenizer:
    """Parses `tokenizer.json`. Raises: CorruptCheckpoint."""
    try:
        return Tokenizer.from_buffer(blob)
    except Exception as error:  # tokenizers raises bare Exception
        raise CorruptCheckpoint(
            "tokenizer.json cannot be parsed", where=where, found=str(error)[:300]
        ) from error


def adds_bos(tokenizer: Tokenizer, bos_id: int) -> bool:
    """Whether the tokenizer's own post-processor puts BOS first (found by encoding)."""
    return bool(tokenizer.encode("a").ids[:1] == [bos_id]) and tokenizer.encode(
        "a", add_special_tokens=False
    ).ids[:1] != [bos_id]


def _wants_bos(tokenizer: Tokenizer | None, settings: dict[str, Any], bos_id: int | None) -> bool:
    """`add_bos_token`, unless `tokenizer.json` already does it: BOS must never be doubled."""
    if tokenizer is None or bos_id is None or settings.get("add_bos_token") is not True:
        return False
    return not adds_bos(tokenizer, bos_id)


def _refuse_foreign(directory: Path) -> None:
    """No `tokenizer.json`: a tokenizer in another form must not be passed over in silence."""
    foreign = [name for name in _FOREIGN if (directory / name).is_file()]
    if foreign:
        raise CheckpointError(
            f"{directory} has {foreign[0]} but no tokenizer.json",
            expected="tokenizer.json",
            found=", ".join(foreign),
            fix="write it once with transformers: "
            f"AutoTokenizer.from_pretrained({str(directory)!r}).save_pretrained(...), "
            "or export with --tokenizer PATH, --tokenizer bytes or --tokenizer none",
        )


def _token_text(value: object, path: Path) -> str | None:
    """A special token: text, `{"content": text}` (an AddedToken) or null."""
    if isinstance(value, dict):
        value = value.get("content")
    if value is None or isinstance(value, str):
        return value
    raise CorruptCheckpoint(
        f"a special token in {path.name} is neither text nor an object with content",
        where=str(path),
        found=repr(value)[:200],
    )


def _ids(value: object, name: str, directory: Path) -> tuple[int, ...]:
    """An id, a list of ids or null."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(v) is int and v >= 0 for v in values):
        raise CorruptCheckpoint(
            f"{name} is not a token id or a list of them",
            where=str(directory),
            found=repr(value)[:200],
        )
    return tuple(values)


def _chat_template(directory: Path, settings: dict[str, Any]) -> str | None:
    """Jinja source; of several named templates the one called `default`, or the only one."""
    jinja = directory / "chat_template.jinja"
    if jinja.is_file():
        try:
            return jinja.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CorruptCheckpoint(
                "chat_template.jinja cannot be read", where=str(jinja), found=str(error)
            ) from error
    path = directory / "chat_template.json"
    value = (read_json(path) if path.is_file() else settings).get("chat_template")
    if isinstance(value, list) and all(isinstance(v, dict) for v in value):
        value = {str(v.get("name")): v.get("template") for v in value}
    if isinstance(value, dict):
        value = value.get("default", next(iter(value.values())) if len(value) == 1 else None)
    if value is None or isinstance(value, str):
        return value
    raise CorruptCheckpoint(
        "chat_template is neither text nor a list of named templates",
        where=str(directory),
        found=type(value).__name__,
    )
