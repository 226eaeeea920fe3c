"""Sessions with pictures: placing, keeping, releasing, states; on a random LLaVA."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from family_files import IMAGE, golden, word_tokenizer
from PIL import Image

from edge_mmllm.errors import (
    CorruptBundle,
    CorruptMedia,
    SessionClosed,
    UnsupportedBundle,
    UsageError,
)
from edge_mmllm.spec import ModelSpec, TextSpec
from edge_mmllm.text import Text
from edge_mmllm_runtime.onnx import OnnxEngine
from edge_mmllm_runtime.prompted import Prompted, identities
from edge_mmllm_runtime.session import Session

ROWS = 9
PARTS = (
    "{% for m in messages %}{{ m.role }} {% if m.content is string %}{{ m.content }}"
    "{% else %}{% for p in m.content %}{% if p.type == 'image' %}<image>{% else %}{{ p.text }}"
    "{% endif %} {% endfor %}{% endif %} {% endfor %}{% if add_generation_prompt %}bot{% endif %}"
)
STRINGS = "{% for m in messages %}{{ m.role }} {{ m.content + '' }} {% endfor %}bot"
FIRST, SECOND = golden("llava").media["image"]


@pytest.fixture
def opened(families):
    """`opened(template=..., change=...)`: a session over the `llava` family with a tokenizer."""
    sessions = []

    def make(template=PARTS, change=lambda spec: spec, context=128, chunk=512):
        _, exported = families("llava")
        spec = replace(exported.spec, text=TextSpec("tokenizers", chat_template=template))
        spec = change(spec)
        engine = OnnxEngine(spec, lambda f: exported.folder / f, threads=1, context=context)
        text = Text(spec.text, word_tokenizer())
        session = Session(engine, spec, "0" * 64, lambda: text, context=context, chunk=chunk)
        sessions.append(session)
        return session

    yield make
    for session in sessions:
        session.close()


@pytest.fixture
def session(opened):
    return opened()


def ids_of(prompt: Prompted) -> list[int]:
    return [IMAGE if i < 0 else i for i in prompt.ids.tolist()]


# -- where pictures stand ---------------------------------------------------------------------


def test_a_placeholder_becomes_as_many_tokens_as_rows(session):
    prompt = session.encode("what <image> is <image> this", {"image": [FIRST, SECOND]})
    assert ids_of(prompt) == [4, *[IMAGE] * ROWS, 5, *[IMAGE] * ROWS, 6]
    assert [(s.start, s.count) for s in prompt.spans] == [(1, ROWS), (2 + ROWS, ROWS)]


def test_ids_take_one_placeholder_or_one_for_each_row(session):
    media = {"image": [FIRST, SECOND]}
    short = session.encode([4, IMAGE, 5, IMAGE, 6], media)
    long = session.encode([4, *[IMAGE] * ROWS, 5, *[IMAGE] * ROWS, 6], media)
    np.testing.assert_array_equal(short.ids, long.ids)


def test_a_question_without_a_place_is_asked_as_a_message(session, opened):
    asked = session.encode("what is this", {"image": [FIRST]})
    told = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text":
             "what is this"}]}]  # fmt: skip
    np.testing.assert_array_equal(asked.ids, session.encode(told, {"image": [FIRST]}).ids)
    assert ids_of(asked) == [1, *[IMAGE] * ROWS, 4, 5, 6, 2]
    base = opened(template=None)
    assert ids_of(base.encode("what", {"image": [FIRST]})) == [*[IMAGE] * ROWS, 4]


def test_a_part_may_bring_its_own_picture(session):
    parts = [{"type": "image", "image": FIRST}, {"type": "image"}, {"type": "image", "path":
             str(SECOND)}]  # fmt: skip
    mixed = session.encode([{"role": "user", "content": parts}], {"image": [SECOND]})
    plain = [{"role": "user", "content": [{"type": "image"}] * 3}]
    expected = session.encode(plain, {"image": [FIRST, SECOND, SECOND]})
    np.testing.assert_array_equal(mixed.ids, expected.ids)


def test_a_template_that_takes_strings_only(opened):
    session = opened(template=STRINGS)
    prompt = session.encode("what", {"image": [FIRST]})
    assert ids_of(prompt) == [1, *[IMAGE] * ROWS, 4, 2]


@pytest.mark.parametrize(
    ("prompt", "images"),
    [
        ("what <image>", [FIRST, SECOND]),
        ("what <image> <image>", [FIRST]),
        ("what <image>", []),
        ([4, IMAGE, IMAGE, 5], [FIRST]),
        ([4, 5], [FIRST]),
        ([{"role": "user", "content": "what"}], [FIRST]),
        ([{"role": "user", "content": [{"type": "image"}]}], []),
        ([{"role": "user", "content": [{"type": "image"}]}], [FIRST, SECOND]),
        ([{"role": "user", "content": "<image> what"}], []),
        ([{"role": "user", "content": [{"type": "audio", "audio": FIRST}]}], []),
        (None, [FIRST]),
    ],
)
def test_another_number_of_places_than_pictures(session, prompt, images):
    session.prefill([4, 5])
    before = session.version
    with pytest.raises(UsageError):
        session.generate(prompt, images=images or None)
    assert session.version == before


@pytest.mark.parametrize("given", [str(FIRST), FIRST, FIRST.read_bytes(), 3])
def test_one_picture_is_a_list_too(given, session):
    for prompt in ("what <image>", [IMAGE], [{"role": "user", "content": [{"type": "image"}]}]):
        with pytest.raises(UsageError, match=r"not a list[\s\S]*\[image, \.\.\.\]"):
            list(session.generate(prompt, images=given, max_new_tokens=1))
    assert session.position == 0


def test_a_part_that_the_template_would_leave_out(session):
    """An answer about a picture that nobody looked at would be wrong."""
    url = {"type": "image_url", "image_url": {"url": "data:"}}
    with pytest.raises(UsageError, match="image_url") as caught:
        list(session.generate([{"role": "user", "content": [url]}], max_new_tokens=1))
    assert "messages[0].content[0]" in str(caught.value)


def test_what_the_bundle_does_not_understand_is_named(session):
    with pytest.raises(UsageError, match="understands text and image only"):
        session.generate("what", audio=[FIRST])
    with pytest.raises(UsageError, match="understands text and image only"):
        session.generate("what", videos=[FIRST])


@pytest.mark.parametrize("kind", ["path", "text", "bytes", "file", "picture", "array"])
def test_every_form_of_a_picture(kind, session):
    data = FIRST.read_bytes()
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    source = {
        "path": FIRST,
        "text": str(FIRST),
        "bytes": data,
        "file": io.BytesIO(data),
        "picture": picture,
        "array": np.asarray(picture),
    }[kind]
    expected = session.prefill(session.encode("what", {"image": [FIRST]}))
    session.reset()
    session.perception.forget()
    found = session.prefill(session.encode("what", {"image": [source]}))
    np.testing.assert_array_equal(found, expected)
    assert session.perception.timings.encoded == 1


def test_a_picture_that_cannot_be_used_changes_nothing(session, tmp_path):
    session.prefill([4, 5])
    (tmp_path / "cut.png").write_bytes(FIRST.read_bytes()[:200])
    with pytest.raises(CorruptMedia):
        session.generate("what", images=[tmp_path / "cut.png"])
    with pytest.raises(UsageError, match="no such file"):
        session.generate("what", images=[tmp_path / "none.png"])
    assert session.tokens == (4, 5)


# -- encoded once -----------------------------------------------------------------------------


def test_a_second_question_skips_encoding(session):
    for question, encoded in (("what", 1), ("what is this", 0)):
        list(session.generate(question, images=[FIRST], max_new_tokens=1))
        told = session.perception.timings
        assert (told.items, told.encoded) == (1, encoded)
        assert (told.encode_ms > 0) == (told.project_ms > 0) == bool(encoded)
        assert told.prefill_ms > 0


def test_the_same_picture_under_another_name_is_the_same(session, tmp_path):
    (tmp_path / "copy").write_bytes(FIRST.read_bytes())
    a = session.encode("what", {"image": [FIRST]})
    b = session.encode("what", {"image": [tmp_path / "copy"]})
    np.testing.assert_array_equal(a.ids, b.ids)
    assert set(a.ids[a.ids < 0]).isdisjoint(session.encode("what", {"image": [SECOND]}).ids)


def test_features_are_dropped_beyond_the_limit_and_made_again(session):
    one = session.encode("<image> what", {"image": [FIRST]})
    expected = session.prefill(one)
    session.perception.limit_bytes = session.perception.size_bytes
    session.reset()
    session.prefill(session.encode("<image> what", {"image": [SECOND]}))
    assert session.perception.size_bytes == session.perception.limit_bytes
    session.reset()
    np.testing.assert_array_equal(session.prefill(one), expected)


def test_stages_are_loaded_when_used_and_released(session):
    engine = session.engine
    session.prefill([4, 5])
    assert set(engine._stages) == {"embed"}
    prompt = session.encode("what <image>", {"image": [FIRST]})
    session.reset()
    expected = session.prefill(prompt)
    assert session.perception.timings.load_ms > 0
    assert set(engine._stages) == {"embed", "encode_image", "project_image"}
    assert session.release("encode_image")
    assert not session.release("encode_image")
    assert set(engine._stages) == {"embed", "project_image"}
    session.perception.forget()
    session.reset()
    np.testing.assert_array_equal(session.prefill(prompt), expected)
    assert "encode_image" in engine._stages
    for wrong in ("decoder", "encode_audio", ""):
        with pytest.raises(UsageError, match="no such stage"):
            session.release(wrong)


def test_the_decoder_waits_until_the_pictures_are_encoded(session):
    engine = session.engine
    assert engine._session is None
    session.perception.keep_stages = False
    loaded = []
    run = engine.run_stage
    engine.run_stage = lambda name, given: loaded.append(engine._session) or run(name, given)
    prompt = session.encode("what <image>", {"image": [FIRST]})
    assert engine._session is None
    expected = session.prefill(prompt)
    assert loaded[:2] == [None, None]
    assert engine._session is not None
    assert set(engine._stages) == {"embed"}
    session.reset()
    np.testing.assert_array_equal(session.prefill(prompt), expected)


def test_a_session_that_did_nothing_can_be_closed(session):
    session.reset()
    session.snapshot()


def test_release_after_close(session):
    session.close()
    with pytest.raises(SessionClosed):
        session.release("encode_image")


# -- states -----------------------------------------------------------------------------------


def test_a_conversation_reads_only_what_is_new(session):
    turn = [{"role": "user", "content": [{"type": "image", "image": FIRST}]}]
    list(session.generate_tokens(turn, 2))
    tokens = session.tokens
    more = [*turn, {"role": "assistant", "content": "is"}, {"role": "user", "content": [
            {"type": "image", "image": SECOND}, {"type": "text", "text": "and"}]}]  # fmt: skip
    calls = []
    forward = session.engine.forward
    session.engine.forward = lambda x, p, rows: calls.append((p, len(x))) or forward(x, p, rows)
    reused = list(session.generate_tokens(more, 4, reuse=True))
    assert calls[0][0] >= 1 + ROWS
    assert session.tokens[: 1 + ROWS] == tokens[: 1 + ROWS]
    assert list(session.generate_tokens(more, 4)) == reused


def test_another_picture_is_not_the_same_prompt(session):
    """The placeholder's ids are equal, the identities are not."""
    list(session.generate_tokens("what <image>", 1, media={"image": [FIRST]}))
    again = list(session.generate_tokens("what <image>", 3, media={"image": [SECOND]}, reuse=True))
    expected = list(session.generate_tokens("what <image>", 3, media={"image": [SECOND]}))
    assert again == expected
    assert session.tokens[1] != session.encode("what <image>", {"image": [FIRST]}).ids[1]


def test_rewinding_into_a_picture(session):
    prompt = session.encode("what <image> is", {"image": [FIRST]})
    expected = session.prefill(prompt)
    assert session.rewind(4)
    np.testing.assert_allclose(session.prefill(prompt[4:]), expected, rtol=0, atol=1e-4)
    assert session.tokens == tuple(prompt.ids.tolist())


def test_the_prompt_cache_knows_pictures(session):
    turn = [{"role": "user", "content": [{"type": "image", "image": FIRST},
            {"type": "text", "text": "what"}]}]  # fmt: skip
    cached = session.cache_prompt(turn)
    assert cached >= 1 + ROWS
    session.reset()
    calls = []
    forward = session.engine.forward
    session.engine.forward = lambda x, p, rows: calls.append(p) or forward(x, p, rows)
    kept = session.prefill(session.encode(turn))
    assert calls == [cached]
    assert session.perception.timings.encoded == 0
    session.perception.forget()
    session.reset()
    session.prefill(session.encode(turn))
    assert session.perception.timings.encoded == 0  # the restored beginning holds the picture
    session.prompt_cache.clear()
    session.reset()
    np.testing.assert_allclose(session.prefill(session.encode(turn)), kept, rtol=0, atol=1e-4)
    other = [{"role": "user", "content": [{"type": "image", "image": SECOND},
             {"type": "text", "text": "what"}]}]  # fmt: skip
    session.cache_prompt(turn)
    session.reset()
    calls.clear()
    session.prefill(session.encode(other))
    assert calls == [0]


def test_many_prompts_share_a_picture(session):
    turns = [[{"role": "user", "content": [{"type": "image", "image": FIRST},
             {"type": "text", "text": word}]}] for word in ("what is", "this that")]  # fmt: skip
    alone = ["".join(session.generate(turn, max_new_tokens=3)) for turn in turns]
    assert session.generate_many(turns, max_new_tokens=3) == alone


def test_the_repetition_penalty_leaves_pictures_alone(session):
    given = session.generate_tokens("what", 3, media={"image": [FIRST]})
    list(given)
    list(session.generate("what", images=[FIRST], max_new_tokens=3, repetition_penalty=1.3))


def test_a_full_context_is_said_before_anything_is_encoded(opened):
    from edge_mmllm.errors import ContextFull

    session = opened(context=ROWS)
    with pytest.raises(ContextFull):
        session.generate("what <image>", images=[FIRST])
    assert not session.engine._stages


def test_identities():
    a, b = identities(b"a", 1000), identities(b"b", 1000)
    assert a.max() <= -2
    assert a.min() >= -(2**31) + 1
    assert len(set(a)) == 1000
    np.testing.assert_array_equal(a[:10], identities(b"a", 10))
    assert set(a).isdisjoint(b)


# -- a manifest that nobody vouches for -------------------------------------------------------


def _with(**changes):
    def change(spec: ModelSpec) -> ModelSpec:
        return replace(spec, modalities={"image": replace(spec.modalities["image"], **changes)})

    return change


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"layout": {"kind": "spiral"}}, UnsupportedBundle),
        ({"layout": {}}, CorruptBundle),
        ({"tokens": 0}, CorruptBundle),
        ({"tokens": 7}, CorruptBundle),  # the stages give nine
        ({"settings": {}}, CorruptBundle),
        ({"stages": ("project_image",)}, CorruptBundle),
        ({"stages": ("encode_image",)}, CorruptBundle),
        ({"stages": ("embed",)}, CorruptBundle),
        ({"stages": ("decoder",)}, CorruptBundle),
        ({"target": "states"}, CorruptBundle),
        ({"target": "states", "layout": {"kind": "beside", "sees": "run"}}, CorruptBundle),
    ],
)
def test_contradictions_are_found_on_use(changes, error, opened):
    session = opened(change=_with(**changes))
    with pytest.raises(error):
        session.prefill(session.encode("what <image>", {"image": [FIRST]}))
    assert session.position == 0
    session.prefill([4, 5])  # the text model still works


@pytest.mark.parametrize(
    "changes",
    [
        {"stages": []},
        {"stages": ["encode_audio"]},
        {"stages": "encode_image"},
        {"token_id": 96},
        {"token_id": -1},
        {"tokens": 1 << 40},
        {"placeholder": ""},
        {"placement": "back"},
        {"target": "files"},
        {"layout": []},
        {"settings": None},
    ],
)
def test_a_malformed_modality_is_refused(changes, families):
    _, exported = families("llava")
    document = json.loads(json.dumps(exported.spec.to_json()))
    document["modalities"]["image"] |= changes
    with pytest.raises(CorruptBundle):
        ModelSpec.from_json(document)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["modalities"].update(smell=d["modalities"]["image"]),
        lambda d: d["stages"].pop("embed"),
        lambda d: d["components"][0].update(slot="roof"),
        lambda d: d["components"][0].update(modality="smell"),
        lambda d: d["components"].append("clip"),
        lambda d: d["components"][0].pop("parameters"),
    ],
)
def test_a_malformed_composition_is_refused(change, families):
    _, exported = families("llava")
    document = json.loads(json.dumps(exported.spec.to_json()))
    change(document)
    with pytest.raises(CorruptBundle):
        ModelSpec.from_json(document)


def test_modalities_are_optional(families):
    """Manifests of text models from before have neither key."""
    _, exported = families("llava")
    document = json.loads(json.dumps(exported.spec.to_json()))
    del document["modalities"], document["components"]
    spec = ModelSpec.from_json(document)
    assert (spec.modalities, spec.components) == ({}, ())


# -- export, check, command line --------------------------------------------------------------
