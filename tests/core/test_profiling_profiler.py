"""The profiler: what it says about an engine whose times are known. No timing is asserted but
that of sleeps which a fake engine injects, on a fake clock."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import edge_mmllm
from edge_mmllm.errors import ContextFull, UsageError
from edge_mmllm.profiling import profiler as profiler_module
from edge_mmllm.profiling.profiler import Profiler, ttft_split
from edge_mmllm.profiling.report_data import SCHEMA_VERSION


@dataclass
class Clock:
    """A clock that goes on only when somebody works."""

    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class FakeEngine:
    clock: Clock
    step_s: float
    memory_rows: int = 0

    def step(self, token: int, position: int) -> list[float]:
        self.clock.now += self.step_s
        return [0.0]


@dataclass
class FakeSession:
    """A session as far as the profiler looks: 2 ms of prefill, then steps, with 1 ms of Python."""

    clock: Clock
    engine: FakeEngine
    position: int = 0
    spec: Any = field(
        default_factory=lambda: SimpleNamespace(
            text=SimpleNamespace(tokenizer="none"), decoder_start_id=None
        )
    )
    perception: Any = field(
        default_factory=lambda: SimpleNamespace(
            timings=SimpleNamespace(
                load_ms=0.0, preprocess_ms=0.0, encode_ms=0.0, project_ms=0.0, prefill_ms=2.0
            )
        )
    )

    def generate_tokens(self, prompt: list[int], max_new_tokens: int) -> Iterator[int]:
        self.clock.now += 0.002
        self.position = len(prompt)
        for n in range(max_new_tokens):
            if n:
                self.engine.step(0, self.position)
                self.clock.now += 0.001
                self.position += 1
            yield 0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(profiler_module, "_clock", made)
    return made


def run(clock: Clock, step_s: float) -> Profiler:
    session = FakeSession(clock, FakeEngine(clock, step_s))
    with Profiler(session) as profiler:  # type: ignore[arg-type]
        for _ in session.generate_tokens([1, 2, 3], 5):
            pass
    assert "generate_tokens" not in vars(session)
    assert "step" not in vars(session.engine)
    return profiler


def test_an_injected_sleep_is_seen_as_what_it_is(clock: Clock) -> None:
    plain, slow = run(clock, 0.004), run(clock, 0.009)
    assert slow.summary()["itl_ms_p50"] - plain.summary()["itl_ms_p50"] == pytest.approx(5)
    (made,) = slow.generations
    assert made.ttft_ms == pytest.approx(2)
    assert made.gaps_ms == pytest.approx([10, 10, 10, 10])
    assert made.steps == pytest.approx([0.009] * 4)
    assert made.tokens_per_s == pytest.approx(100)
    assert made.phases_ms["decode"] == pytest.approx(40)
    assert made.prompt_tokens == 3
    assert slow.summary()["phases_ms"]["prefill"] == pytest.approx(2)


def test_time_before_the_first_token_is_asked_for_is_nobodys(clock: Clock) -> None:
    session = FakeSession(clock, FakeEngine(clock, 0.001))
    with Profiler(session) as profiler:  # type: ignore[arg-type]
        stream = session.generate_tokens([1], 2)
        clock.now += 5
        next(stream)
    assert profiler.generations[0].ttft_ms == pytest.approx(2)


def test_a_session_is_profiled_once(clock: Clock) -> None:
    session = FakeSession(clock, FakeEngine(clock, 0.001))
    with (
        Profiler(session),  # type: ignore[arg-type]
        pytest.raises(UsageError, match="already"),
        Profiler(session),  # type: ignore[arg-type]
    ):
        pass
    assert "generate_tokens" not in vars(session)


def test_the_split_adds_up() -> None:
    split = ttft_split({"tokenize": 1.0, "prefill": 6.0, "encode": 0.0, "decode": 9.0}, 8.0)
    assert split == {"tokenize_ms": 1.0, "prefill_ms": 6.0, "other_ms": pytest.approx(1.0)}


def test_around_a_real_session(chat_bundle: Path) -> None:
    with edge_mmllm.load(chat_bundle, threads=1) as session, Profiler(session) as profiler:
        text = "".join(session.generate("Hello", max_new_tokens=4))
        list(session.generate_tokens([1, 2, 3], 3, ignore_eos=True))
    first, second = profiler.generations
    assert text is not None
    assert {"tokenize", "prefill", "detokenize"} <= set(first.phases_ms)
    assert first.phases_ms["tokenize"] > 0
    assert first.prompt_tokens == 5
    assert second.prompt_tokens == 3
    assert len(second.times) == 3
    assert len(second.steps) == 2
    told = profiler.summary()
    assert told["generations"] == 2
    assert told["itl_ms_p50"] <= told["itl_ms_p90"] <= told["itl_ms_p99"] <= told["itl_ms_max"]


def test_nothing_was_generated(chat_bundle: Path) -> None:
    with edge_mmllm.load(chat_bundle, threads=1) as session, Profiler(session) as profiler:
        pass
    assert profiler.summary()["ttft_ms"] is None
    assert profiler.summary()["phases_ms"] == {}


def test_a_report_is_whole(chat_bundle: Path) -> None:
    options = edge_mmllm.ProfileOptions(
        prompt_tokens=16, new_tokens=4, repetitions=3, threads=1, operators=True, sustained_s=0.01
    )
    told = edge_mmllm.profile(chat_bundle, options).to_json()
    assert told["schema_version"] == SCHEMA_VERSION
    assert len(told["itl_ms_values"]) == 3 * 4
    assert len(told["decode_tokens_per_s_values"]) == 3
    low, high = told["decode_tokens_per_s_ci95"]
    assert low <= told["decode_tokens_per_s"] <= high
    assert told["itl_ms_p50"] <= told["itl_ms_p90"] <= told["itl_ms_p99"] <= told["itl_ms_max"]
    assert {"load", "tokenize", "prefill", "decode", "detokenize"} <= set(told["phases_ms"])
    split = told["ttft_split"]
    assert sum(split.values()) == pytest.approx(told["ttft_ms"], rel=0.2)
    assert told["gate"]["verdict"] == "passed"
    assert told["memory"]["weights_mapped_bytes"] >= 0
    assert told["memory"]["state_bytes"] == told["state_bytes"]
    assert told["peak_rss_bytes"] >= told["rss_after_load_bytes"]
    assert told["memory_over_time"]["points"]
    assert [mark for _, mark in told["memory_over_time"]["marks"]][:2] == ["load", "warm-up"]
    assert told["used"]["wall_s"] > 0
    assert told["energy"]["status"] in ("measured", "not measured")
    prefill, decode = told["operators"]
    assert (prefill["what"], decode["what"]) == ("prefill", "decode")
    assert sum(share["percent"] for share in decode["by_type"]) == pytest.approx(100)
    assert {"layer 0", "layer 1"} <= {share["name"] for share in decode["by_layer"]}


def test_bad_counts(chat_bundle: Path) -> None:
    for name in ("prompt_tokens", "new_tokens", "repetitions"):
        with pytest.raises(UsageError, match=name):
            edge_mmllm.ProfileOptions(**{name: 0})
    with pytest.raises(ContextFull):
        edge_mmllm.profile(chat_bundle, edge_mmllm.ProfileOptions(prompt_tokens=5000))
