"""The HTML page: what it shows of records, notes and pictures."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from edge_mmllm.errors import UsageError
from edge_mmllm.profiling.report import write_html

PNG = Path(__file__).parents[2] / "examples/models/tiny-llava/image_1.png"


def test_the_page_says_where_the_time_of_a_picture_went(tmp_path: Path) -> None:
    phases = {"preprocess": 1.25, "encode": 10.5, "prefill": 3.0}
    write_html(tmp_path / "r.html", "t", [{"name": "a"}, {"name": "<b>", "phases_ms": phases}])
    page = (tmp_path / "r.html").read_text()
    assert "preprocess ms" in page
    assert ">10.5<" in page
    assert "<b>" not in page
    write_html(tmp_path / "r.html", "t", [{"name": "a"}])
    assert "preprocess" not in (tmp_path / "r.html").read_text()


def test_a_picture_stands_in_its_note(tmp_path: Path) -> None:
    notes = [("asked", "what <is> it?"), ("else", "")]
    write_html(tmp_path / "r.html", "t", [], notes=notes, pictures={"asked": PNG})
    page = (tmp_path / "r.html").read_text()
    data = base64.b64encode(PNG.read_bytes()).decode()
    found = f"<h2>asked</h2>\n<img alt='image_1.png' src='data:image/png;base64,{data}'>\n<pre>what"
    assert found in page
    assert page.count("<img") == 1


def test_a_quote_in_a_picture_s_name_ends_no_attribute(tmp_path: Path) -> None:
    path = tmp_path / "a' onerror='x.png"
    path.write_bytes(PNG.read_bytes())
    write_html(tmp_path / "r.html", "t", [], notes=[("n", "")], pictures={"n": path})
    assert "onerror='" not in (tmp_path / "r.html").read_text()


def test_other_files_are_no_pictures(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        write_html(tmp_path / "r.html", "t", [], notes=[("n", "")], pictures={"n": __file__})
