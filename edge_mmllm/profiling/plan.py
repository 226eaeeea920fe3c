"""A plan of tests: which lengths, threads and kernels are tried with each bundle.

A TOML (or JSON) file; every field may be one value or a list, and a test is made of each
combination, for each bundle:

    repetitions = 5
    rounds = 1
    seed = 0

    [[test]]
    prompt_tokens = [128, 512]
    new_tokens = 64
    threads = [1, 2]
    image = ["cat.png"]
    operators = true
"""

from __future__ import annotations

import itertools
import json
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edge_mmllm._toml import read_toml
from edge_mmllm.errors import UsageError
from edge_mmllm.profiling.job import Job

#: Fewer do not tell a spread.
LEAST_REPETITIONS = 5
MOST_ROUNDS = 1000

#: Field of a test -> the type of its values.
_FIELDS: Mapping[str, type] = {
    "prompt_tokens": int,
    "new_tokens": int,
    "threads": int,
    "context": int,
    "kernels": str,
    "sustained_s": float,
    "operators": bool,
}
_MEDIA = ("image", "video", "audio")


@dataclass(frozen=True)
class Plan:
    """What to run with each bundle.

    Attributes:
        tests: one job for each combination; `bundle` and `name` are empty.
        seed: of the order; None: as written.
        rounds: times that everything is run, each in processes and an order of its own, so that
            results tell how processes differ and not only the repetitions within one.
    """

    tests: tuple[Job, ...] = (Job(""),)
    seed: int | None = 0
    rounds: int = 1

    def jobs(self, bundles: Sequence[str]) -> list[Job]:
        """Every test of every bundle, in a random order: what slows the machine for a while
        then hits all bundles alike."""
        names = bundle_names(bundles)
        made = [
            replace(test, bundle=bundle, name=name)
            for bundle, name in zip(bundles, names, strict=True)
            for test in self.tests
        ]
        draw = random.Random(self.seed)  # noqa: S311 - no secret
        order: list[Job] = []
        for _ in range(self.rounds):
            order += made if self.seed is None else draw.sample(made, len(made))
        return order


def bundle_names(bundles: Sequence[str]) -> list[str]:
    """What reports call them: the last part of each path, as many parts as tell them apart."""
    parts = [Path(os.path.abspath(b)).parts for b in bundles]  # noqa: PTH100
    for count in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(p[-count:]) for p in parts]
        if len(set(names)) == len(set(parts)):
            break
    return names if bundles else []


def read_plan(path: str | os.PathLike[str]) -> Plan:
    """Reads a file.

    Raises:
        UsageError: no such file, a field that is not known or has a wrong type, no test.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError("the plan cannot be read", where=str(file), found=str(error)) from error
    except ValueError as error:
        raise UsageError("the plan is not text", where=str(file)) from error
    if file.suffix == ".json":
        try:
            document = json.loads(text)
        except ValueError as error:
            raise UsageError("not a JSON file", where=str(file), found=str(error)) from error
    else:
        document = read_toml(text, str(file))
    return make_plan(document, str(file), file.parent)


def make_plan(document: Any, where: str, folder: Path) -> Plan:
    """A plan from its document; `folder` is where its pictures' paths begin. Raises: UsageError."""
    if not isinstance(document, dict):
        raise UsageError("a plan is a table", where=where)
    known = {"repetitions", "rounds", "seed", "test"}
    _refuse_unknown(document, known, where)
    repetitions = _value(document.get("repetitions", LEAST_REPETITIONS), int, "repetitions", where)
    rounds = _value(document.get("rounds", 1), int, "rounds", where)
    seed = _value(document.get("seed", 0), int, "seed", where)
    if not 1 <= rounds <= MOST_ROUNDS:
        raise UsageError(
            "rounds does not fit", where=where, expected=f"1 to {MOST_ROUNDS}", found=str(rounds)
        )
    tables = document.get("test")
    if not isinstance(tables, list) or not tables:
        raise UsageError("the plan has no test", where=where, expected="at least one [[test]]")
    tests: list[Job] = []
    for number, table in enumerate(tables, 1):
        place = f"{where}, test {number}"
        if not isinstance(table, dict):
            raise UsageError("a test is a table", where=place)
        _refuse_unknown(table, {*_FIELDS, *_MEDIA}, place)
        media = {
            name: tuple(
                str(folder / _value(item, str, name, place)) for item in _listed(table[name])
            )
            for name in _MEDIA
            if table.get(name)
        }
        names = [name for name in _FIELDS if name in table]
        lists = [[_value(v, _FIELDS[n], n, place) for v in _listed(table[n])] for n in names]
        if any(not values for values in lists):
            raise UsageError("a list of the plan is empty", where=place)
        for values in itertools.product(*lists):
            given = dict(zip(names, values, strict=True))
            tests.append(replace(Job("", media=media, repetitions=repetitions), **given))
    return Plan(tuple(tests), seed, rounds)


def _refuse_unknown(table: Mapping[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(set(table) - known)
    if unknown:
        raise UsageError(
            "unknown fields in the plan",
            where=where,
            expected=", ".join(sorted(known)),
            found=", ".join(unknown),
        )


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _value(value: Any, kind: type, name: str, where: str) -> Any:
    whole = kind is float and isinstance(value, int)
    if isinstance(value, bool) is not (kind is bool) or not (isinstance(value, kind) or whole):
        raise UsageError(
            f"{name} of the plan has a wrong type",
            where=where,
            expected=kind.__name__,
            found=repr(value)[:80],
        )
    return kind(value)
