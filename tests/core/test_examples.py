"""The examples that come with the repository do what their READMEs and goldens say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import edge_mmllm
from edge_mmllm_export.exporter import export
from edge_mmllm_export.planning import ExportOptions
from edge_mmllm_export.quantize.schemes import QuantPlan

EXAMPLES = Path(__file__).parents[2] / "examples"
LLAVA = EXAMPLES / "models/tiny-llava"


def test_examples_stay_short() -> None:
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) < 60, path.name


@pytest.mark.parametrize("scheme", ["f32", "int4"])
def test_tiny_llava_answers_as_its_goldens(tmp_path: Path, scheme: str) -> None:
    """Greedy tokens of transformers 5 in float32; of int4, the answers."""
    plan = QuantPlan(name=scheme)
    export(LLAVA, tmp_path / "b", ExportOptions(plan=plan, gate=False))
    cases = json.loads((LLAVA / "golden.json").read_text(encoding="utf-8"))["cases"]
    assert len(cases) == 7
    with edge_mmllm.load(tmp_path / "b", threads=1) as session:
        for case in cases:
            media = {"image": [LLAVA / case["image_file"]]}
            if scheme == "f32":
                prompt = session.encode(case["input_ids"], media)
                tokens = session.generate_tokens(prompt, 32, ignore_eos=True)
                assert list(tokens) == case["greedy_32"]
            answer = "".join(session.generate(case["question"], images=media["image"]))
            assert answer.strip() == case["answer"]
