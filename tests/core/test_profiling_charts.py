"""Charts of figures that lie far apart, and what of many results a report draws."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from typing import Any

import pytest

from edge_mmllm.profiling.charts import Bar, Line, Point, bars, lines, scatter, wide
from edge_mmllm.profiling.page import page
from edge_mmllm.profiling.results import Result
from edge_mmllm.profiling.view import grouped


def result(name: str, tokens: int, line: int, **more: Any) -> Result:
    record = {"name": name, "test": f"{tokens}+8", "status": "ok", "prompt_tokens": tokens,
              "decode_tokens_per_s": 100.0, **more}  # fmt: skip
    return Result(record, f"r.jsonl:{line}")


def test_values_far_apart_are_points_on_a_logarithmic_axis() -> None:
    near, far = [Bar("a", 10), Bar("b", 30)], [Bar("a", 10), Bar("b", 8000, 1, 7000, 9000)]
    assert "<rect" in bars("t", near, "tokens/s")
    drawn = bars("t", far, "tokens/s")
    assert "<rect" not in drawn
    assert "logarithmic" in drawn
    places = [float(x) for x in re.findall(r"cx='([\d.]+)'", drawn)]
    assert places == sorted(places)
    assert 0 < places[0] < 0.5 * places[1] < 308
    assert not wide([0.0, 1e6])
    assert not wide([])


@pytest.mark.parametrize("low", [0.0, 1e-6])
def test_a_wide_axis_keeps_every_point_inside(low: float) -> None:
    points = [(1.0, low), (2.0, 0.003), (3.0, 0.5)]
    for drawn in (
        lines("t", "x", "y", [Line("a", points)]),
        scatter("t", "x", "y", [Point("p", x, y) for x, y in points], [points[:2], points[1:]]),
    ):
        root = ET.fromstring(drawn)  # noqa: S314 - our own
        circles = [e for e in root.iter() if e.tag.endswith("circle")]
        assert len(circles) == 3
        heights = [float(c.get("cy", "nan")) for c in circles]
        assert heights == sorted(heights, reverse=True)
        assert all(9 < h < 211 for h in heights)
        assert ("1e-6" in drawn) is (low > 0)


def test_a_long_decode_is_drawn_whichever_test_it_was() -> None:
    points = [[0.5, 100.0, None, None], [1.0, 90.0, None, None]]
    results = [result("a", 64, 1), result("b", 64, 2), result("a", 256, 3)]
    assert "Throttling" not in page("t", results)
    results[2].record["sustained"] = {"points": points}
    assert "Throttling" in page("t", results)


def test_a_bundle_s_tests_stand_together() -> None:
    results = [result("a", 512, 1), result("b", 64, 2), result("a", 64, 3)]
    assert [r.source for r in grouped(results)] == ["r.jsonl:3", "r.jsonl:1", "r.jsonl:2"]
