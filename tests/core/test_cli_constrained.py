"""`run` and `chat` with --json-schema, --grammar, --regex and --choice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

#: The vocabulary of the test's bundle has no space.
SCHEMA = """{"type": "array", "items": {"enum": [1, 2, 3]}, "minItems": 2, "maxItems": 2,
    "x-guidance": {"item_separator": ","}}"""


def test_run_writes_what_fits(cli: Callable[..., Any], chat_bundle: Path, tmp_path: Path) -> None:
    given = ("run", chat_bundle, "--prompt", "Hello")
    file = tmp_path / "schema.json"
    file.write_text(SCHEMA)
    for schema in (SCHEMA, file):
        done = cli(*given, "--json-schema", schema)
        assert done.status == 0
        found = json.loads(done.stdout)
        assert len(found) == 2
        assert set(found) <= {1, 2, 3}
        assert "(grammar)" in done.stderr
        assert "constraint" in done.stderr
        assert "forced" in done.stderr
    grammar = tmp_path / "a.gbnf"
    grammar.write_text('root ::= "left" | "right"\n')
    assert cli(*given, "--grammar", grammar).stdout.strip() in ("left", "right")
    assert cli(*given, "--regex", "[0-9]{4}").stdout.strip().isdigit()
    told = cli(*given, "--choice", "tea", "--choice", "rain", "--json").json
    assert told["text"] in ("tea", "rain")
    assert told["finish_reason"] == "grammar"
    assert told["constraint"]["tokens"] == len(told["text"])
    assert told["constraint"]["forced"] == len(told["text"]) - 1
    assert cli(*given, "--max-new-tokens", 3, "--json").json["constraint"] is None


def test_a_byte_that_no_token_has(cli: Callable[..., Any], chat_bundle: Path) -> None:
    schema = json.dumps({k: v for k, v in json.loads(SCHEMA).items() if k != "x-guidance"})
    done = cli("run", chat_bundle, "--prompt", "Hello", "--json-schema", schema)
    assert done.status == 1
    assert "cannot be followed any further" in done.stderr
    assert "<state>" not in done.stderr


def test_chat_keeps_to_it_each_turn(cli: Callable[..., Any], chat_bundle: Path) -> None:
    done = cli("chat", chat_bundle, "--choice", "tea", "--choice", "rain", stdin="Hi\nAnd now?\n")
    assert done.status == 0
    assert set(done.stdout.split()) <= {"tea", "rain"}
    assert len(done.stdout.split()) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--json-schema", "nowhere.json"), "--json-schema cannot be read"),
        (("--json-schema", "{"), "no JSON"),
        (("--json-schema", '{"type": "nope"}'), "nope"),
        (("--grammar", "nowhere.gbnf"), "nowhere.gbnf"),
        (("--regex", "("), "regex"),
        (("--regex", "a", "--choice", "b"), "one constraint"),
    ],
)
def test_what_cannot_be_used_is_a_usage_error(
    cli: Callable[..., Any], chat_bundle: Path, options: tuple[str, ...], words: str
) -> None:
    done = cli("run", chat_bundle, "--prompt", "Hello", *options)
    assert done.status == 2
    assert words in done.stderr
    assert not done.stdout
