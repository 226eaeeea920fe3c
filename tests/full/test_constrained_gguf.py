"""Constrained answers of SmolLM2 as GGUF, judged by others: jsonschema, llama.cpp's own grammar."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import jsonschema
import pytest

import edge_mmllm
from edge_mmllm_runtime.constrained import Constraint
from edge_mmllm_runtime.sampling import Sampling

pytestmark = pytest.mark.full
pytest.importorskip("llama_cpp")

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

GBNF = r"""root ::= "I like " thing (", " thing){0,2} "."
thing ::= kind " " ("tea" | "caf\u00e9" | "r\x61in")
kind ::= "hot" | "cold" | [0-9]{1,3}
"""


@pytest.fixture(scope="module")
def session():
    from smollm2 import smollm2_gguf

    with edge_mmllm.load(smollm2_gguf(), threads=2, context=512) as made:
        yield made


def test_every_answer_fits_the_schema(session) -> None:
    from constrained import ASKED, SCHEMA

    forced = tokens = 0
    for seed in range(8):
        text = "".join(
            session.generate(
                [{"role": "user", "content": ASKED}],
                json_schema=SCHEMA, temperature=1.0, seed=seed, max_new_tokens=200,
            )
        )  # fmt: skip
        assert session.finish_reason == "grammar"
        jsonschema.validate(json.loads(text), SCHEMA)
        forced += session.constraint_cost.forced
        tokens += session.constraint_cost.tokens
    assert forced > tokens / 3


def test_llama_cpps_own_grammar_accepts_the_answers(session) -> None:
    import llama_cpp.llama_cpp as api

    def accepted(ids: list[int]) -> bool:
        sampler = api.llama_sampler_init_grammar(session.engine.model.vocab, GBNF.encode(), b"root")
        try:
            for token in ids:
                data = (api.llama_token_data * 1)(api.llama_token_data(token, 1.0, 0.0))
                array = api.llama_token_data_array(data, 1, -1, False)
                api.llama_sampler_apply(sampler, array)
                if not math.isfinite(data[0].logit):
                    return False
                api.llama_sampler_accept(sampler, token)
            return True
        finally:
            api.llama_sampler_free(sampler)

    assert not accepted(session.text.encode("I like cats."))
    constraint, found = Constraint.of(grammar=GBNF), set()
    for seed in range(12):
        stream = session.generate_tokens(
            "What do you like?", 64, Sampling(1.5, seed=seed), constraint=constraint
        )
        ids = list(stream)
        assert accepted(ids), session.text.decode(ids)
        found.add(session.text.decode(ids))
    assert len(found) > 4


def test_the_tables_of_both_tokenizers_are_one(session) -> None:
    from smollm2 import smollm2_gguf

    from edge_mmllm.text import Text
    from edge_mmllm_export.checkpoints import open_checkpoint

    assets = open_checkpoint(smollm2_gguf()).text()
    size = session.spec.vocab_size
    ours = session.text.vocabulary(size)
    theirs = Text(assets.spec, assets.tokenizer_json).vocabulary(size)
    assert ours.special == theirs.special
    words = [i for i in range(size) if i not in ours.special]
    assert [ours.tokens[i] for i in words] == [theirs.tokens[i] for i in words]
    for text in ("naïve 日本 🎉\n", '{"a": [1, 22]}'):
        ids = session.text.encode(text)
        assert b"".join(ours.tokens[i] for i in ids) == text.encode()


def test_a_guide_goes_on_from_a_snapshot(session) -> None:
    schema = {"type": "array", "items": {"enum": ["left", "right", "up"]}, "minItems": 4,
              "maxItems": 4}  # fmt: skip
    constraint = Constraint.of(json_schema=schema)
    whole = list(session.generate_tokens("Go:", 64, constraint=constraint))
    assert len(json.loads(session.text.decode(whole))) == 4
    begun = list(session.generate_tokens("Go:", 4, constraint=constraint))
    assert begun == whole[:4]
    snapshot = session.snapshot()
    session.reset()
    session.restore(snapshot)
    session.decode(begun[-1])
    guide = session.guide(constraint).after(begun)
    rest = list(session.generate_tokens(None, 64, constraint=guide))
    assert len(json.loads(session.text.decode(begun + rest))) == 4
