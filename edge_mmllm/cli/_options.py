"""Option types and options that several sub-commands share."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edge_mmllm.errors import UsageError

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

if TYPE_CHECKING:
    from edge_mmllm_runtime.constrained import Constraint

    _IntType = click.ParamType[int]
else:
    _IntType = click.ParamType  # no generic class before click 8.2

_UNITS = {
    "": 1,
    "b": 1,
    **{f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)},
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgt", 1)},
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)")


def parse_size(text: str) -> int:
    """Bytes of `2GiB`, `512MiB` (powers of 1024), `1.5GB` (powers of 1000) or `1048576`.

    Raises:
        ValueError: no size, or not a positive one.
    """
    match = _SIZE.fullmatch(text.strip().lower())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"{text!r} is not a size such as 2GiB, 512MiB, 1.5GB or 1048576")
    size = int(Fraction(match[1]) * _UNITS[match[2]])
    if not 0 < size < 1 << 63:
        raise ValueError(f"{text!r} is not a usable size")
    return size


class Size(_IntType):
    """A number of bytes, see `parse_size`."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """An int passes; text is parsed."""
        if isinstance(value, int):
            return value
        try:
            return parse_size(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


SIZE = Size()
POSITIVE = click.IntRange(min=1)


def json_option(command: Decorated) -> Decorated:
    """`--json`."""
    text = "Print exactly one JSON document on stdout."
    return click.option("--json", "as_json", is_flag=True, help=text)(command)


def threads_option(command: Decorated) -> Decorated:
    """`--threads`."""
    text = "Threads to compute with; default: what CPU affinity and the cgroup's quota allow."
    return click.option("--threads", type=POSITIVE, metavar="N", help=text)(command)


def context_option(command: Decorated) -> Decorated:
    """`--context`."""
    text = "Tokens to make room for; default: the model's own limit."
    return click.option("--context", type=POSITIVE, metavar="N", help=text)(command)


def lora_option(command: Decorated) -> Decorated:
    """`--lora`."""
    text = "Apply this LoRA adapter (GGUF models; see `adapter`). May be given again."
    return click.option("--lora", multiple=True, metavar="FILE[=SCALE]", help=text)(command)


def mmproj_option(command: Decorated) -> Decorated:
    """`--mmproj`."""
    text = "Encoder of pictures or sounds that goes with a GGUF file from elsewhere."
    return click.option("--mmproj", metavar="FILE", help=text)(command)


def lora_given(values: tuple[str, ...]) -> list[tuple[str, float]] | None:
    """Files and scales of `--lora`; None without any."""
    found = []
    for value in values:
        file, _, scale = value.rpartition("=")
        number = re.fullmatch(r"[+-]?\d+(\.\d+)?", scale)
        found.append((file, float(scale)) if file and number else (value, 1.0))
    return found or None


#: Modality -> what its option's help says.
_MEDIA = {
    "image": "A picture to ask about.",
    "video": "A video to ask about (an animated file).",
    "audio": "A recording to ask about.",
}


def media_options(command: Decorated) -> Decorated:
    """`--image`, `--video`, `--audio`; each may be given again."""
    for name, text in reversed(_MEDIA.items()):
        text += " May be given again."
        command = click.option(f"--{name}", name, multiple=True, metavar="PATH", help=text)(command)
    return command


def media_given(given: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """What `media_options` were given: modality -> paths."""
    return {name: given[name] for name in _MEDIA if given[name]}


def sampling_options(command: Decorated) -> Decorated:
    """Options of `run` and `chat`: how tokens are picked, and when to stop."""
    for option in reversed(
        (
            click.option("--max-new-tokens", type=click.IntRange(min=0), default=256,
                         show_default=True, metavar="N", help="Longest answer in tokens."),
            click.option("--temperature", type=float, default=0.0, show_default=True,
                         metavar="T", help="0: always the likeliest token."),
            click.option("--top-k", type=int, default=0, metavar="K",
                         help="Keep the K likeliest tokens; 0: all."),
            click.option("--top-p", type=float, default=1.0, metavar="P",
                         help="Keep the fewest tokens whose probabilities reach P."),
            click.option("--min-p", type=float, default=0.0, metavar="P",
                         help="Keep tokens at least P times as likely as the likeliest."),
            click.option("--repetition-penalty", type=float, default=1.0, metavar="R",
                         help="Above 1: makes tokens that were seen less likely."),
            click.option("--seed", type=int, metavar="S",
                         help="Makes a run with a temperature repeatable."),
            click.option("--stop", multiple=True, metavar="TEXT",
                         help="Ends the answer, and is no part of it. May be given again."),
        )
    ):  # fmt: skip
        command = option(command)
    return command


def constraint_options(command: Decorated) -> Decorated:
    """Options of `run` and `chat`: what the answer must look like; one of them."""
    for option in reversed(
        (
            click.option("--json-schema", metavar="FILE|JSON",
                         help="Answer with JSON that fits this schema."),
            click.option("--grammar", metavar="FILE", type=click.Path(exists=True, dir_okay=False),
                         help="Answer with what this grammar (Lark or GBNF) describes."),
            click.option("--regex", metavar="REGEX", help="Answer with what this describes."),
            click.option("--choice", "choices", multiple=True, metavar="TEXT",
                         help="Answer with one of these. May be given again."),
        )
    ):  # fmt: skip
        command = option(command)
    return command


def constraint_given(given: Mapping[str, Any]) -> Constraint | None:
    """What `constraint_options` were given.

    Raises:
        UsageError: more than one; a file that cannot be read; no JSON.
    """
    schema, grammar = given["json_schema"], given["grammar"]
    values = (schema, grammar, given["regex"], given["choices"] or None)
    if all(value is None for value in values):
        return None
    from edge_mmllm_runtime.constrained import Constraint

    if schema is not None and not schema.lstrip().startswith("{"):
        schema = _content(schema, "--json-schema")
    if grammar is not None:
        grammar = _content(grammar, "--grammar")
    return Constraint.of(schema, grammar, given["regex"], given["choices"] or None)


def _content(path: str, option: str) -> str:
    """A file's text. Raises: UsageError."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(
            f"the file of {option} cannot be read", where=path, found=str(error)[:200]
        ) from error


def recorded_command(ctx: click.Context, paths: tuple[str, ...]) -> str:
    """The arguments given, for a record: of the parameters `paths` only a path's last part."""
    words = [ctx.info_name or ""]
    for param in ctx.command.params:
        name = param.name or ""
        if ctx.get_parameter_source(name) in (None, click.core.ParameterSource.DEFAULT):
            continue
        value = ctx.params[name]
        for item in value if isinstance(value, (list, tuple)) else (value,):
            text = last_part(str(item)) if name in paths else str(item)
            if isinstance(param, click.Argument):
                words.append(text)
            else:
                words += [param.opts[0]] if isinstance(item, bool) else [param.opts[0], text]
    return shlex.join(words)


def last_part(text: str) -> str:
    """The last part of a path that exists here or is absolute; a hub id stays whole."""
    here = os.path.lexists(text) or os.path.lexists(os.path.dirname(text))  # noqa: PTH120
    if not here and text.count(os.sep) == 1 and not text.startswith((os.sep, ".", "~")):
        return text
    return os.path.basename(os.path.abspath(text))  # noqa: PTH100, PTH119
