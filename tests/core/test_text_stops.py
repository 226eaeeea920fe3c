"""Stop strings: found wherever the text is cut, and never let through, not even in part."""

from __future__ import annotations

import random

import pytest

from edge_mmllm.errors import UsageError
from edge_mmllm.text import StopMatcher


def _run(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    matcher = StopMatcher(stops)
    shown = ""
    for piece in pieces:
        text, stopped = matcher.push(piece)
        shown += text
        if stopped:
            return shown, True
    return shown + matcher.flush(), False


def test_a_stop_in_one_piece_cuts_the_text() -> None:
    assert StopMatcher(["END"]).push("some END more") == ("some ", True)


def test_a_stop_over_several_pieces_leaks_nothing() -> None:
    matcher = StopMatcher(["<|end|>"])
    pushed = [matcher.push(piece) for piece in ("Hi", " <", "|en", "d|", ">x")]
    assert pushed == [("Hi", False), (" ", False), ("", False), ("", False), ("", True)]


def test_what_was_held_back_is_shown_when_it_was_no_stop() -> None:
    matcher = StopMatcher(["aab"])
    assert [matcher.push(p)[0] for p in "aaac"] == ["", "", "a", "aac"]
    assert matcher.push("xa") == ("x", False)
    assert matcher.flush() == "a"
    assert matcher.flush() == ""


def test_nothing_comes_after_a_stop() -> None:
    matcher = StopMatcher(["."])
    assert matcher.push("a.b") == ("a", True)
    assert matcher.push("c") == ("", True)
    assert matcher.flush() == ""
    assert matcher.stopped


def test_the_stop_that_is_complete_first_counts() -> None:
    assert _run(["abc", "b"], ["abc"]) == ("a", True)
    assert _run(["abc", "b"], ["a", "b", "c"]) == ("a", True)
    assert _run(["bc", "abc"], ["xabc"]) == ("x", True)


@pytest.mark.parametrize("stops", [[], None, ()])
def test_without_stops_nothing_is_held_back(stops: list[str] | None) -> None:
    assert StopMatcher(stops).push("text") == ("text", False)


def test_a_single_string_is_one_stop() -> None:
    assert StopMatcher("END").push("xENDy") == ("x", True)


@pytest.mark.parametrize("stops", [[""], ["a", ""], "", [1]])
def test_an_empty_stop_is_a_usage_error(stops: list[str]) -> None:
    with pytest.raises(UsageError):
        StopMatcher(stops)


def test_how_the_text_is_cut_makes_no_difference() -> None:
    draw = random.Random(3)
    stopped = 0
    for _ in range(2000):
        text = "".join(draw.choices("ab\n", k=draw.randrange(12)))
        stops = ["".join(draw.choices("ab\n", k=draw.randrange(1, 5))) for _ in range(2)]
        cuts = sorted(draw.choices(range(len(text) + 1), k=3))
        pieces = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        ends = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
        expected = (text[: min(ends)[1]], True) if ends else (text, False)
        assert _run(stops, pieces) == _run(stops, list(text)) == expected
        stopped += expected[1]
    assert 200 < stopped < 1800
