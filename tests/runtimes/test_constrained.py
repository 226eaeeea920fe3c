"""Constrained answers: what may follow, how they end, what is forced, what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import toys

import edge_mmllm
from edge_mmllm.errors import MissingDependency, UsageError
from edge_mmllm_runtime.answer import AnswerSettings, answer
from edge_mmllm_runtime.constrained import Constraint
from edge_mmllm_runtime.sampling import Sampling

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "likes": {"type": "array", "items": {"enum": ["tea", "rain\n", 'a "b"']}, "maxItems": 3},
        "home": {"anyOf": [{"type": "null"}, {"type": "boolean"}]},
    },
    "required": ["name", "age", "likes", "home"],
    "additionalProperties": False,
}
GBNF = 'root ::= "a" b\nb ::= "x" | "y" root\n'


@pytest.fixture(params=["recurrent", "attention"])
def session(request, tmp_path):
    make = getattr(toys, request.param)
    toy = make(tmp_path, eos=(0, 3)) if request.param == "recurrent" else make(tmp_path)
    with toy.session() as made:
        yield made


def said(session, **options) -> str:
    return "".join(session.generate("hello", **options))


def test_every_answer_fits_the_schema(session) -> None:
    answers = set()
    for seed in range(12):
        options = {"temperature": 1.5, "seed": seed, "top_k": (0, 40)[seed % 2]}
        text = said(session, json_schema=SCHEMA, max_new_tokens=300, **options)
        assert session.finish_reason == "grammar"
        jsonschema.validate(json.loads(text), SCHEMA)
        answers.add(text)
    assert len(answers) > 3


def test_what_is_forced_is_not_sampled(session) -> None:
    schema = {"const": {"a long name": 1}}
    assert said(session, json_schema=schema) == '{"a long name": 1}'
    cost = session.constraint_cost
    assert cost.forced == cost.tokens == len('{"a long name": 1}')
    said(session, regex="[ab]{20}")
    assert session.constraint_cost.forced == 0
    assert session.constraint_cost.tokens == 20
    assert session.constraint_cost.mask_us_per_token > 0
    said(session)
    assert session.constraint_cost is None


def test_the_likeliest_token_that_may_follow(session) -> None:
    logits = session.prefill(list(b"hello"))
    expected = max(b"xyz", key=lambda i: logits[i])
    assert said(session, choices=["x", "y", "z"]) == chr(expected)


def test_a_seed_repeats_and_a_temperature_matters(session) -> None:
    options = {"regex": "[a-z]{12}", "temperature": 2.0}
    first = said(session, seed=1, **options)
    assert said(session, seed=1, **options) == first
    assert said(session, seed=2, **options) != first
    assert said(session, regex="[a-z]{12}", repetition_penalty=1e9) != said(
        session, regex="[a-z]{12}"
    )


def test_choices_and_grammars(session) -> None:
    words = ["no", "not", "é😀", 'a "quoted" \\ line\n']
    found = {said(session, choices=words, temperature=50.0, seed=i) for i in range(30)}
    assert len(found) > 1
    assert found <= set(words)
    for grammar in (GBNF, 'start: "a" b\nb: "x" | "y" start\n'):
        for seed in range(8):
            text = said(session, grammar=grammar, temperature=3.0, seed=seed)
            if session.finish_reason != "length":
                assert text.endswith("ax")
                assert set(text[:-1].split("ay")) <= {"", "a"}
    assert said(session, regex="") == ""
    assert session.finish_reason == ("eos" if session.spec.text.eos_ids else "grammar")


def test_characters_by_number_in_gbnf(session) -> None:
    grammar = r'root ::= "\u0041\x42\\u0043" "\"" [\u0061-\x62] "\x0a" "\u00e9"' + "\n"
    text = said(session, grammar=grammar)
    assert text in ('AB\\u0043"a\né', 'AB\\u0043"b\né')


def test_what_is_forced_counts_for_the_repetition_penalty(session) -> None:
    logits = session.prefill(list(b"hello<"))
    first, second = sorted(b"xyzw", key=lambda i: -logits[i])[:2]
    forced = f"{chr(first)}<"  # the likeliest has been said, by force
    penalty = 1e6 if logits[first] > 0 else 1e-6
    session.reset()
    plain = said(session, regex=f"{forced}[{chr(first)}{chr(second)}]")
    other = said(session, regex=f"{forced}[{chr(first)}{chr(second)}]", repetition_penalty=1e6)
    assert penalty
    logits = session.prefill(list(f"hello{forced}".encode()))
    values = {c: float(logits[c]) for c in (first, second)}
    expected = max(values, key=lambda c: values[c])
    assert plain[-1] == chr(expected)
    values[first] = values[first] / 1e6 if values[first] > 0 else values[first] * 1e6
    assert other[-1] == chr(max(values, key=lambda c: values[c]))


def test_an_end_only_where_the_grammar_may_end(tmp_path) -> None:
    with toys.recurrent(tmp_path, eos=tuple(range(128, 256))).session() as session:
        for seed in range(20):
            text = said(session, regex="[0-9]{3,6}", temperature=20.0, seed=seed)
            assert 3 <= len(text) <= 6
            assert text.isdigit()
            assert session.finish_reason == ("grammar" if len(text) == 6 else "eos")


def test_without_an_end_token_it_goes_on_to_the_limit(tmp_path) -> None:
    with toys.recurrent(tmp_path).session() as session:
        assert len(said(session, regex="[0-9]{3,}", max_new_tokens=9)) == 9
        assert session.finish_reason == "length"


def test_a_cut_answer_says_so(session) -> None:
    whole = said(session, json_schema=SCHEMA, max_new_tokens=300)
    count = session.constraint_cost.tokens
    assert said(session, json_schema=SCHEMA, max_new_tokens=count) == whole
    assert session.finish_reason == "grammar"
    assert said(session, json_schema=SCHEMA, max_new_tokens=count - 1) == whole[:-1]
    assert session.finish_reason == "length"
    assert said(session, json_schema=SCHEMA, max_new_tokens=4) == whole[:4]
    assert said(session, json_schema=SCHEMA, stop='"name"') == "{"
    assert session.finish_reason == "stop"


def test_a_full_context_says_so(tmp_path) -> None:
    with toys.attention(tmp_path).session(12) as session:
        assert said(session, json_schema=SCHEMA) == '{"name":'  # one more than was read
        assert session.finish_reason == "context"
        assert session.position == 12


def test_the_state_holds_all_but_the_last_token(session) -> None:
    prompt = tuple(b"hello")
    constraint = Constraint.of(json_schema=SCHEMA)
    for count in (1, 2, 5, 9, 300):
        ids = list(session.generate_tokens(prompt, count, constraint=constraint))
        assert session.tokens == prompt + tuple(ids[:-1])
        logits = session.decode(ids[-1])
        session.reset()
        expected = session.prefill([*prompt, *ids])
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    stream = session.generate_tokens(prompt, 300, constraint=constraint)
    taken = [next(stream) for _ in range(5)]
    stream.close()  # in the middle of a forced run
    assert session.tokens == prompt + tuple(taken[:-1])


def test_an_answer_cut_by_a_stop_string_leaves_a_state_to_go_on_from(session) -> None:
    settings = AnswerSettings(300, stop=("name",), constraint=Constraint.of(json_schema=SCHEMA))
    given = answer(session, "hello", settings, whole=True)
    assert given.text == '{"'
    assert session.tokens == tuple(b'hello{"name')


def test_a_guide_goes_on_from_the_middle(session) -> None:
    prompt, sampling = tuple(b"hello"), Sampling()
    constraint = Constraint.of(json_schema=SCHEMA)
    whole = list(session.generate_tokens(prompt, 300, sampling, constraint=constraint))
    guide = session.guide(constraint)
    for cut in (1, 7, 12, len(whole) - 1):
        begun = list(session.generate_tokens(prompt, cut, sampling, constraint=guide))
        snapshot = session.snapshot()
        session.reset()
        session.restore(snapshot)
        session.decode(begun[-1])
        rest = session.generate_tokens(None, 300, sampling, constraint=guide.after(begun))
        assert begun + list(rest) == whole
    assert guide.after(whole).may_end
    assert not guide.may_end
    with pytest.raises(UsageError, match="begins with"):
        guide.after(list(b'{"nope'))


def test_what_is_forced_is_no_part_of_the_prompts_time(session) -> None:
    stream = session.generate_tokens(list(b"hello"), constraint=Constraint.of(regex="[ab]c{9}[ab]"))
    next(stream)
    before = session.perception.timings.prefill_ms
    assert len(list(stream)) == 10
    assert session.perception.timings.prefill_ms == before > 0


def test_another_use_of_the_session_ends_it(session) -> None:
    stream = session.generate_tokens(list(b"hello"), constraint=Constraint.of(regex="a{9}"))
    assert [next(stream), next(stream), next(stream)] == [97, 97, 97]
    session.prefill([1])
    with pytest.raises(UsageError, match="something else"):
        next(stream)
    assert session.position == 6
    stream = session.generate_tokens(list(b"hello"), constraint=Constraint.of(regex="a{9}"))
    assert [next(stream), next(stream)] == [97, 97]
    session.close()
    stream.close()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"json_schema": '{"type": "object"'}, "no JSON"),
        ({"json_schema": [1]}, "no JSON"),
        ({"json_schema": "[1]"}, "is an object"),
        ({"json_schema": {"type": "nope"}}, "nope"),
        ({"json_schema": {"not": {"type": "string"}}}, "not"),
        ({"json_schema": {"$ref": "http://example.com/a.json"}}, "retriev"),
        ({"json_schema": {"type": "string", "pattern": "("}}, "regex"),
        ({"json_schema": {"anyOf": []}}, "Unsatisfiable"),
        ({"json_schema": {"enum": [{1, 2}]}}, "no JSON"),
        ({"grammar": "start: nope\n"}, "nope"),
        ({"grammar": 'root ::= "a'}, "GBNF"),
        ({"grammar": ""}, "grammar"),
        ({"grammar": 5}, "must be text"),
        ({"regex": "a("}, "regex"),
        ({"regex": "a" * (1 << 20) + "a"}, "at most"),
        ({"choices": []}, "nothing to choose"),
        ({"choices": "yes"}, "list of texts"),
        ({"choices": ["a", ""]}, "list of texts"),
        ({"regex": "a", "choices": ["a"]}, "one constraint"),
    ],
)
def test_what_cannot_be_used_is_said_before_anything_is_read(session, options, words) -> None:
    session.prefill([1, 2])
    with pytest.raises(UsageError, match=words) as caught:
        session.generate("hello", **options)
    assert "<state>" not in str(caught.value)
    assert session.position == 2


def test_a_fixed_number_of_tokens_is_no_constrained_answer(session) -> None:
    with pytest.raises(UsageError, match="constrained"):
        session.generate_tokens([1], ignore_eos=True, constraint=Constraint.of(regex="a"))


def test_without_the_library_the_pip_line(session, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match=r"pip install 'edge-mmllm\[constrained\]'"):
        session.generate("hello", regex="a")


def test_nothing_is_imported_unless_asked() -> None:
    code = (
        "import sys, edge_mmllm.cli.run, edge_mmllm_runtime.session, edge_mmllm_runtime.answer\n"
        "print([n for n in sys.modules if 'llguidance' in n or n.endswith('constrained')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_many_prompts_under_one_constraint(session) -> None:
    found = session.generate_many(
        ["one", "two"], 40, Sampling(1.0, seed=1), constraint=Constraint.of(regex="[0-9]{3}")
    )
    assert all(len(text) == 3 and text.isdigit() for text in found)
    guide = session.guide(Constraint.of(regex="[0-9]{3}"))
    assert guide is session.guide(Constraint.of(regex="[0-9]{3}"))


@pytest.fixture(scope="module", params=["tiny-mamba2", "tiny-rwkv7"])
def exported(request, tmp_path_factory):
    """A model of the examples: byte-level BPE, and RWKV World."""
    from edge_mmllm_export.exporter import export
    from edge_mmllm_export.planning import ExportOptions
    from edge_mmllm_export.quantize.schemes import QuantPlan

    out = tmp_path_factory.mktemp("bundles") / request.param
    source = ROOT / "examples/models" / request.param
    source = next(source.glob("*.pth"), source)
    export(source, out, ExportOptions(QuantPlan("int4"), gate=False))
    with edge_mmllm.load(out, threads=1) as session:
        yield session


def test_models_of_the_examples_write_json(exported) -> None:
    vocabulary = exported.text.vocabulary(exported.spec.vocab_size)
    for words in ("Once upon a time", '{"name": "naïve 日本 🎉", "n": [1, 23]}\n\n'):
        ids = exported.text.encode(words, add_bos=False)
        assert b"".join(vocabulary.tokens[i] for i in ids) == words.encode()
    forced = 0
    for seed in range(10):
        text = "".join(
            exported.generate(
                "Once", json_schema=SCHEMA, temperature=1.0, seed=seed, max_new_tokens=200
            )
        )
        assert exported.finish_reason == "grammar"
        jsonschema.validate(json.loads(text), SCHEMA)
        forced += exported.constraint_cost.forced
    assert forced > 100
