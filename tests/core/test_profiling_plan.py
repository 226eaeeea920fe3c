"""Plans, jobs in children, and the runner."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge_mmllm.errors import BundleError, ContextFull, CorruptBundle, EdgeError, UsageError
from edge_mmllm.profiling.job import (
    Job,
    error_from_json,
    error_to_json,
    launch,
    read_answer,
)
from edge_mmllm.profiling.limits import Limits
from edge_mmllm.profiling.operators import model_runs, node_layers, tables
from edge_mmllm.profiling.plan import Plan, bundle_names, read_plan
from edge_mmllm.profiling.results import read_results
from edge_mmllm.profiling.runner import jsonl_writer, line_of, run_plan, run_test, test_name

SMALL = Job("", prompt_tokens=8, new_tokens=2, repetitions=2, threads=1)


def fake(job: Job) -> dict[str, Any]:
    if job.name == "bad":
        raise ContextFull(0, 9, 8)
    return {"ttft_ms": 1.0, "name": "theirs", "noise": []}


def test_every_combination_is_a_test(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(
        "repetitions = 7\nseed = 3\n[[test]]\nprompt_tokens = [64, 256]\nthreads = [1, 2]\n"
        'image = ["cat.png"]\n[[test]]\nnew_tokens = 8\noperators = true\nsustained_s = 2\n'
    )
    plan = read_plan(path)
    assert [(t.prompt_tokens, t.threads) for t in plan.tests[:4]] == [
        (64, 1), (64, 2), (256, 1), (256, 2)
    ]  # fmt: skip
    assert plan.tests[0].media == {"image": (str(tmp_path / "cat.png"),)}
    last = plan.tests[4]
    assert (last.new_tokens, last.operators, last.sustained_s) == (8, True, 2.0)
    assert {t.repetitions for t in plan.tests} == {7}
    jobs = plan.jobs(["x/a", "x/b"])
    assert len(jobs) == 10
    assert [(j.name, j.prompt_tokens) for j in jobs] == [
        (j.name, j.prompt_tokens) for j in plan.jobs(["x/a", "x/b"])
    ]
    assert jobs != replace(plan, seed=None).jobs(["x/a", "x/b"])
    thrice = replace(plan, rounds=3).jobs(["x/a", "x/b"])
    rounds = [thrice[i : i + len(jobs)] for i in range(0, len(thrice), len(jobs))]
    assert len(rounds) == 3
    assert all(sorted(map(repr, r)) == sorted(map(repr, jobs)) for r in rounds)
    assert rounds[0] != rounds[1]
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"test": [{"context": 64}]}))
    assert read_plan(path).tests[0].context == 64


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no test"),
        ("test = 3", "no test"),
        ("[[test]]\nprompts = 3", "unknown fields"),
        ("what = 1\n[[test]]\n", "unknown fields"),
        ('[[test]]\nprompt_tokens = "64"', "wrong type"),
        ("[[test]]\nprompt_tokens = true", "wrong type"),
        ("[[test]]\nprompt_tokens = []", "empty"),
        ("[[test]]\nprompt_tokens = 0", "at least 1"),
        ("repetitions = 0\n[[test]]\n", "at least 1"),
        ("[[test", "TOML"),
    ],
)
def test_bad_plans(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=says):
        read_plan(path)
    with pytest.raises(UsageError, match="cannot be read"):
        read_plan(tmp_path / "missing.toml")


def test_names_tell_bundles_apart() -> None:
    assert bundle_names(["a/x", "b/y/"]) == ["x", "y"]
    assert bundle_names(["/m/a/x", "/m/b/x"]) == ["a/x", "b/x"]
    assert bundle_names(["/m/x", "/m/x"]) == ["x", "x"]
    assert bundle_names([]) == []


def test_a_failure_does_not_end_the_plan(tmp_path: Path) -> None:
    out, seen = tmp_path / "r.jsonl", []
    with jsonl_writer(out) as write:
        records = run_plan(
            ["m/good", "m/bad"], Plan((SMALL,)), launch=fake, write=write, device="board",
            progress=lambda *step: seen.append(step),
        )  # fmt: skip
    assert {r["name"]: r["status"] for r in records} == {"good": "ok", "bad": "failed"}
    assert sorted(r["order"] for r in records) == [0, 1]
    assert len({r["run"] for r in records}) == 1
    assert {r["device"] for r in records} == {"board"}
    assert seen == [("bench", 1, 2), ("bench", 2, 2)]
    results = read_results([out])
    assert [r.failed for r in results].count(True) == 1
    failed = next(r for r in records if r["status"] == "failed")
    assert isinstance(error_from_json(failed["error"]), ContextFull)


def test_names_of_tests() -> None:
    job = replace(SMALL, kernels="stock", context=64, media={"image": ("a", "b")})
    job = replace(job, limits=Limits(memory_bytes=64 << 20, cpus=1))
    assert test_name(job) == "8+2 image:2 t1 c64 stock mem64M cpus1"


test_name.__test__ = False  # type: ignore[attr-defined]
run_test.__test__ = False  # type: ignore[attr-defined]


def test_jobs_and_errors_survive_json() -> None:
    job = replace(SMALL, media={"image": ("a",)}, limits=Limits(cpus=1))
    assert Job.from_json(json.loads(json.dumps(job.to_json()))) == job
    with pytest.raises(UsageError, match="unknown fields"):
        Job.from_json({"bundle": "x", "shell": "rm"})
    error = CorruptBundle("what", where="w", expected="e", found="f", fix="x")
    again = error_from_json(error_to_json(error))
    assert type(again) is CorruptBundle
    assert str(again) == str(error)
    assert type(error_from_json({"type": "os", "what": None})) is EdgeError
    assert type(error_from_json({"type": "annotations", "what": "x"})) is EdgeError


@pytest.mark.parametrize(("out", "status"), [("", 0), ("x", 0), ("[1]", 0), ("{}", 3), ("", -9)])
def test_a_child_that_says_nothing_is_an_error(out: str, status: int) -> None:
    with pytest.raises(EdgeError, match="without"):
        read_answer(out, status, "some\nTraceback", SMALL)


def test_a_child_measures(chat_bundle: Path) -> None:
    record = launch(replace(SMALL, bundle=str(chat_bundle), name="tiny"))
    assert record["name"] == "tiny"
    assert record["repetitions"] == 2
    assert record["threads"] == 1
    with pytest.raises(BundleError):
        launch(replace(SMALL, bundle=str(chat_bundle / "missing")))


def test_the_command_runs_a_plan(
    cli: Callable[..., Any], chat_bundle: Path, base_bundle: Path, tmp_path: Path
) -> None:
    plan, out = tmp_path / "plan.toml", tmp_path / "r.jsonl"
    plan.write_text("repetitions = 1\n[[test]]\nprompt_tokens = [8, 600]\nnew_tokens = 2\n")
    done = cli("bench", chat_bundle, base_bundle, "--plan", plan, "--out", out, "--json")
    assert done.status == 1  # the context of one is too small
    results = read_results([out])
    assert len(results) == 4
    assert [r.name for r in results if r.failed] == [chat_bundle.name]
    page = tmp_path / "r.html"
    assert cli("report", out, "--html", page).status == 0
    assert "failed" in page.read_text()
    again = cli("compare", out, out, "--fail-on-regression", "5%")
    assert again.status == 0


def test_lines_are_whole() -> None:
    line = line_of({"a": float("nan"), "b": [float("inf"), 1.5], "c": {"d": (1,)}})
    assert json.loads(line) == {"a": None, "b": [None, 1.5], "c": {"d": [1]}}
    assert line.endswith("}\n")


# -- operators ------------------------------------------------------------------------------


def test_a_trace_as_tables() -> None:
    def node(name: str, kind: str, ts: int, dur: int) -> dict[str, Any]:
        return {"cat": "Node", "name": f"{name}_kernel_time", "ts": ts, "dur": dur,
                "args": {"op_name": kind}}  # fmt: skip

    events = []
    for start in (0, 100):
        events += [
            {"cat": "Session", "name": "model_run", "ts": start, "dur": 50},
            node("mm", "MatMul", start + 1, 20),
            node("scan", "Scan", start + 25, 20),
            node("inside", "Add", start + 30, 5),
        ]
    runs = model_runs(events)
    assert [total for total, _ in runs] == [50, 50]
    told = tables("decode", runs, {"mm": 0, "scan": 1})
    assert {(s.name, s.calls, s.us) for s in told.by_type} == {
        ("MatMul", 1, 20), ("Scan", 1, 15), ("Add", 1, 5)
    }  # fmt: skip
    assert [(s.name, s.us) for s in told.by_layer] == [
        ("layer 0", 20), ("layer 1", 15), ("other", 5)
    ]  # fmt: skip
    assert told.outside_us == pytest.approx(10)
    assert tables("decode", [], {}).by_type == ()


def test_layers_of_a_graph(chat_bundle: Path) -> None:
    layers = node_layers((chat_bundle / "decoder.onnx").read_bytes())
    assert set(layers.values()) == {0, 1}
    assert node_layers(b"") == {}
    assert node_layers(b"\x3a\xff\xff\xff") == {}
