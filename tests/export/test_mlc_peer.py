"""`run --engine mlc-llm`: what an installed mlc_llm would be asked (a stand-in answers)."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from references import FOLDER

from edge_mmllm.errors import EdgeError, SessionError, UnsupportedBundle, UsageError
from edge_mmllm_export import exporter
from edge_mmllm_export.planning import ExportOptions
from edge_mmllm_runtime.answer import AnswerSettings, run
from edge_mmllm_runtime.sampling import Sampling


def bundle(tmp_path: Path, name: str) -> Path:
    options = ExportOptions(format="mlc", gate=False, targets=("none",), tokenizer="bytes")
    exporter.export(FOLDER / name, tmp_path / name, options)
    return tmp_path / name


@pytest.fixture
def mlc_llm(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A module of that name; what it was asked."""
    asked: dict[str, Any] = {}

    class Engine:
        def __init__(self, model: str, device: str) -> None:
            asked.update(model=model, device=device)
            self.completions = SimpleNamespace(create=self.create)

        def create(self, **given: Any) -> Any:
            asked.update(given)
            if given["prompt"] == []:
                raise ValueError("no prompt")
            for text, reason in (("Par", None), ("is", "stop")):
                choice = SimpleNamespace(text=text, finish_reason=reason)
                yield SimpleNamespace(choices=[choice], usage=None)
            yield SimpleNamespace(choices=[], usage=SimpleNamespace(completion_tokens=3))

        def terminate(self) -> None:
            asked["terminated"] = True

    module = ModuleType("mlc_llm")
    module.MLCEngine = Engine  # type: ignore[attr-defined]
    module.__spec__ = SimpleNamespace(name="mlc_llm")  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "mlc_llm", module)
    return asked


def test_it_is_asked_with_our_ids_and_settings(tmp_path: Path, mlc_llm: dict[str, Any]) -> None:
    pieces: list[str] = []
    settings = AnswerSettings(7, Sampling(0.5, seed=3), stop=("x",))
    path = bundle(tmp_path, "llama")
    told = run(path, "Hi", settings, engine="mlc-llm", write=pieces.append)
    assert (told.text, pieces, told.finish_reason) == ("Paris", ["Par", "is"], "eos")
    assert (told.prompt_tokens, told.new_tokens, told.engine) == (2, 3, "mlc-llm")
    assert mlc_llm["prompt"] == [72, 105]
    assert mlc_llm["max_tokens"] == 7
    assert (mlc_llm["temperature"], mlc_llm["seed"], mlc_llm["stop"]) == (0.5, 3, ["x"])
    assert mlc_llm["model"] == str(path.resolve())
    assert mlc_llm["terminated"]


def test_what_it_cannot_do_is_said(tmp_path: Path, mlc_llm: dict[str, Any]) -> None:
    path = bundle(tmp_path, "llama")
    with pytest.raises(UsageError, match="top_k"):
        run(path, "Hi", AnswerSettings(sampling=Sampling(top_k=3)), engine="mlc-llm")
    with pytest.raises(UsageError, match="a text and no more"):
        run(path, "Hi", threads=1, engine="mlc-llm")
    with pytest.raises(SessionError, match="no prompt"):
        run(path, "", engine="mlc-llm")
    assert mlc_llm["terminated"]
    with pytest.raises(UnsupportedBundle, match="mamba2"):
        run(bundle(tmp_path, "mamba2"), "Hi", engine="mlc-llm")


def test_it_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(EdgeError, match="not installed"):
        run(bundle(tmp_path, "llama"), "Hi", engine="mlc-llm")
