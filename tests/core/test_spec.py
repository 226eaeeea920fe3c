"""ModelSpec: sizes, and reading it back from JSON that nobody vouches for."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from edge_mmllm.errors import CorruptBundle
from edge_mmllm.spec import CAPACITY, MEMORY, ModelSpec, Stage, StateSpec

_DROP = object()


def test_json_round_trip(sample_spec: ModelSpec) -> None:
    assert ModelSpec.from_json(json.loads(json.dumps(sample_spec.to_json()))) == sample_spec


def test_from_json_ignores_members_of_a_later_release(sample_spec: ModelSpec) -> None:
    assert ModelSpec.from_json({**sample_spec.to_json(), "later": 1}) == sample_spec


def test_kv_state_grows_and_others_do_not() -> None:
    kv = StateSpec("k", (1, 2, CAPACITY, 4), "float16", "kv")
    conv = StateSpec("c", (1, 3, 8), "float32", "conv")
    assert (kv.grows, conv.grows) == (True, False)
    assert kv.at(10) == (1, 2, 10, 4)
    assert (kv.size_bytes(1), kv.size_bytes(10)) == (16, 160)
    assert conv.size_bytes(1) == conv.size_bytes(1_000_000) == 96


def test_cross_kv_holds_what_was_read_whatever_the_position() -> None:
    state = StateSpec("x", (1, 2, MEMORY, 4), "float32", "cross_kv")
    assert not state.grows
    assert (state.at(10), state.at(10, 3)) == ((1, 2, 0, 4), (1, 2, 3, 4))
    assert (state.size_bytes(10), state.size_bytes(10, 3)) == (0, 96)


def encoder_decoder(spec: ModelSpec) -> ModelSpec:
    states = tuple(
        StateSpec(f"layers.0.cross.{n}", (1, 2, MEMORY, 4), "float32", "cross_kv") for n in "kv"
    )
    reader = Stage("encode_text.onnx", ("input_ids",), (), fills=tuple(s.name for s in states))
    stages = {**spec.stages, "encode_text": reader}
    return replace(spec, states=spec.states + states, stages=stages, decoder_start_id=0)


def test_an_encoder_decoder_comes_back(sample_spec: ModelSpec) -> None:
    spec = encoder_decoder(sample_spec)
    assert ModelSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("decoder_start_id", None, "model.decoder_start_id"),
        ("decoder_start_id", 300, "model.decoder_start_id"),
        ("stages.encode_text", _DROP, "model.decoder_start_id"),
        ("stages.encode_text.fills", ["layers.0.cross.k"], "model.stages"),
        ("stages.encode_text.fills", _DROP, "model.stages"),
        ("stages.decoder.fills", ["layers.0.cross.k"], "model.stages"),
        ("states.2.shape", [1, 2, 3, 4], "model.states[2].shape"),
        ("states.2.shape", [1, 2, -1, 4], "model.states[2].shape"),
        ("states.2.kind", "kv", "model.states[2].shape"),
    ],
)
def test_an_encoder_decoder_that_contradicts_itself(
    sample_spec: ModelSpec, path: str, value: object, named: str
) -> None:
    document = encoder_decoder(sample_spec).to_json()
    with pytest.raises(CorruptBundle) as caught:
        ModelSpec.from_json(_change(document, path, value))
    assert caught.value.where == named


def test_state_bytes_sums_all_states(sample_spec: ModelSpec) -> None:
    assert sample_spec.state_bytes(10) == 1 * 2 * 10 * 4 * 4 + 3 * 8 * 2


def _change(document: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    document = json.loads(json.dumps(document))
    *way, last = path.split(".")
    here: Any = document
    for part in way:
        here = here[int(part)] if part.isdigit() else here[part]
    if value is _DROP:
        del here[last]
    else:
        here[int(last) if last.isdigit() else last] = value
    return document


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("architecture", _DROP, "model.architecture"),
        ("architecture", 3, "model.architecture"),
        ("vocab_size", "300", "model.vocab_size"),
        ("vocab_size", 0, "model.vocab_size"),
        ("vocab_size", True, "model.vocab_size"),
        ("vocab_size", 3.0, "model.vocab_size"),
        ("vocab_size", 2**63, "model.vocab_size"),
        ("layers", -1, "model.layers"),
        ("context_length", 0, "model.context_length"),
        ("states", {}, "model.states"),
        ("states.0", [], "model.states[0]"),
        ("states.0.shape", "1,2", "model.states[0].shape"),
        ("states.0.shape", [1, 0, -1, 4], "model.states[0].shape"),
        ("states.0.shape", [1, -1, -1, 4], "model.states[0].shape"),
        ("states.0.shape", [1, -2, 4], "model.states[0].shape"),
        ("states.1.shape", [1, -1, 4], "model.states[1].shape"),
        ("states.0.dtype", "complex64", "model.states[0].dtype"),
        ("states.0.kind", ["kv"], "model.states[0].kind"),
        ("states.1.name", "layers.0.attn.k", "model.states"),
        ("stages.decoder", None, "model.stages.decoder"),
        ("stages.decoder.inputs", "input_ids", "model.stages.decoder.inputs"),
        ("stages.decoder.outputs", [1], "model.stages.decoder.outputs"),
        ("text", None, "model.text"),
        ("text.tokenizer", "sentencepiece", "model.text.tokenizer"),
        ("text.bos_id", 300, "model.text.bos_id"),
        ("text.bos_id", -1, "model.text.bos_id"),
        ("text.eos_ids", 2, "model.text.eos_ids"),
        ("text.add_bos", "yes", "model.text.add_bos"),
        ("text.chat_template", {}, "model.text.chat_template"),
        ("details", [], "model.details"),
    ],
)
def test_from_json_names_what_is_wrong(
    sample_spec: ModelSpec, path: str, value: object, named: str
) -> None:
    with pytest.raises(CorruptBundle) as caught:
        ModelSpec.from_json(_change(sample_spec.to_json(), path, value))
    assert caught.value.where == named


@pytest.mark.parametrize("value", [None, [], "model", 3])
def test_from_json_refuses_what_is_no_object(value: object) -> None:
    with pytest.raises(CorruptBundle, match="expected: an object"):
        ModelSpec.from_json(value)
