"""The error tree: what the docstring draws is what there is, and messages are laid out."""

from __future__ import annotations

import re

import pytest

from edge_mmllm import errors
from edge_mmllm.errors import ContextFull, EdgeError, MissingDependency


def test_the_drawn_tree_is_the_real_one() -> None:
    drawn = re.findall(r"^    (.*?)(\w+?)(?:  |$)", errors.__doc__ or "", re.MULTILINE)
    parents: list[tuple[int, str]] = []
    seen = {}
    for indent, name in drawn:
        while parents and parents[-1][0] >= len(indent):
            parents.pop()
        seen[name] = parents[-1][1] if parents else "Exception"
        parents.append((len(indent), name))
    real = {
        name: value.__base__.__name__
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, EdgeError)
    }
    assert seen == real


def test_a_message_names_every_detail_on_its_own_line() -> None:
    error = EdgeError("it broke", where="a.bin", expected="1", found="2", fix="do this")
    assert str(error) == "it broke\n  where: a.bin\n  expected: 1\n  found: 2\n  fix: do this"


def test_a_missing_detail_takes_no_line() -> None:
    assert str(EdgeError("it broke", found="2")) == "it broke\n  found: 2"


def test_a_missing_dependency_names_the_pip_line() -> None:
    assert "pip install 'edge-mmllm[runtime-onnx]'" in str(
        MissingDependency("onnxruntime", "runtime-onnx")
    )


def test_context_full_carries_its_figures() -> None:
    error = ContextFull(position=60, requested=10, capacity=64)
    assert (error.position, error.requested, error.capacity) == (60, 10, 64)
    assert "at most 4 more tokens" in str(error)


@pytest.mark.parametrize(
    "error",
    [
        EdgeError("w", where="x"),
        MissingDependency("p", "e"),
        ContextFull(1, 2, 3),
    ],
)
def test_errors_survive_a_process_boundary(error: EdgeError) -> None:
    import pickle

    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
