"""`edge-mmllm bench` and `edge-mmllm doctor`: what they say, never how fast."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import edge_mmllm
from edge_mmllm.bundle import open_bundle
from edge_mmllm.errors import UsageError
from edge_mmllm.profiling import doctor as doctor_module
from edge_mmllm.profiling.doctor import PACKAGES, Package, doctor, examine, try_import

FEW = ("--prompt-tokens", 16, "--new-tokens", 4, "--repetitions", 2)


def test_bench_is_one_json_object(cli: Callable[..., Any], chat_bundle: Path) -> None:
    done = cli("bench", chat_bundle, *FEW, "--threads", 1, "--json")
    assert done.status == 0
    assert done.stderr == ""
    told = done.json
    positive = (
        "load_ms", "first_load_ms", "ttft_ms", "prefill_tokens_per_s", "decode_tokens_per_s",
        "itl_ms_p50", "itl_ms_p99", "peak_rss_bytes", "rss_before_load_bytes",
        "rss_after_load_bytes", "rss_after_load_anonymous_bytes", "rss_after_load_file_bytes",
        "state_bytes", "state_capacity_bytes", "python_us_per_token", "python_percent",
        "size_bytes", "parameters",
    )  # fmt: skip
    assert all(told[name] > 0 for name in positive)
    assert told["itl_ms_p50"] <= told["itl_ms_p99"]
    assert told["prefill_tokens_per_s"] == pytest.approx(16e3 / told["ttft_ms"])
    assert told["bundle_sha256"] == open_bundle(chat_bundle).sha256
    assert (told["prompt_tokens"], told["new_tokens"], told["repetitions"]) == (16, 4, 2)
    assert (told["engine"], told["threads"], told["quantization"]) == ("onnx", 1, "f32")
    spec = open_bundle(chat_bundle).spec
    assert told["state_bytes"] == spec.state_bytes(16 + 4)
    assert {"ttft_spread", "decode_spread", "load_spread", "load_average_after"} <= set(told)
    assert told["machine"]["default_threads"] >= 1


def test_bench_for_people(cli: Callable[..., Any], base_bundle: Path) -> None:
    done = cli("bench", base_bundle, *FEW)
    assert done.stdout == ""
    assert "tokens/s" in done.stderr
    assert "anonymous" in done.stderr


@pytest.mark.parametrize(
    ("prompt", "new", "status", "kind"), [(200, 4, 1, "ContextFull"), (120, 64, 2, "UsageError")]
)
def test_tokens_that_do_not_fit(
    cli: Callable[..., Any], chat_bundle: Path, prompt: int, new: int, status: int, kind: str
) -> None:
    done = cli("bench", chat_bundle, "--prompt-tokens", prompt, "--new-tokens", new, "--json")
    assert done.status == status
    assert done.json["error"]["type"] == kind


def test_counts_below_one_are_refused(chat_bundle: Path) -> None:
    for name in ("prompt_tokens", "new_tokens", "repetitions"):
        with pytest.raises(UsageError, match=name):
            edge_mmllm.bench(chat_bundle, **{name: 0})


def test_bench_counts_every_repetition(chat_bundle: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    edge_mmllm.bench(
        chat_bundle,
        prompt_tokens=4,
        new_tokens=1,
        repetitions=3,
        progress=lambda *step: seen.append(step),
    )
    assert seen == [("bench", i, 4) for i in (1, 2, 3, 4)]


# -- doctor -------------------------------------------------------------------------------------


def test_doctor_in_json(cli: Callable[..., Any]) -> None:
    told = cli("doctor", "--json").json
    packages = {p["package"]: p for p in told["packages"]}
    assert packages["onnxruntime"]["version"]
    assert packages["numpy"]["fix"] is None
    assert told["can_run"] is True
    assert told["machine"]["default_threads"] >= 1
    assert set(told["cgroup"]) == {"version", "cpus", "memory_bytes", "memory_used_bytes"}


def test_doctor_for_people(cli: Callable[..., Any]) -> None:
    done = cli("doctor")
    assert done.stdout == ""
    for text in ("onnxruntime", "CPU features", "cgroup", "default threads", "can run bundles"):
        assert text in done.stderr


def test_what_is_missing_has_its_pip_line() -> None:
    found = examine(Package("no-such-thing", "no_such_thing", "gguf", "nothing"))
    assert found.version is None
    assert found.fix == "pip install 'edge-mmllm[gguf]'"
    base = examine(Package("no-such-thing", "no_such_thing", None, "nothing"))
    assert base.fix == "pip install 'edge-mmllm'"


def test_what_is_broken_is_found_by_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    ort = next(p for p in PACKAGES if p.package == "onnxruntime")
    found = examine(ort, load=lambda module: f"{module}: libstdc++.so.6: cannot open")
    assert found.version is not None
    assert "libstdc++" in (found.problem or "")
    assert found.fix == "pip install --force-reinstall 'edge-mmllm[runtime-onnx]'"
    monkeypatch.setattr(doctor_module, "try_import", lambda module: "broken")
    report = doctor()
    assert not report.can_run
    assert not report.can_export


def test_a_trial_survives_a_crash() -> None:
    assert try_import("json") is None
    assert "no_such_thing" in (try_import("no_such_thing") or "")
    assert try_import("os; os.abort()") == "importing it ends in signal 6"


def test_the_extras_are_those_of_the_project() -> None:
    text = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()
    section = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    assert all(f"\n{p.extra} = [" in section for p in PACKAGES if p.extra)
