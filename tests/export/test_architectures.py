"""Each architecture against transformers 5, and each lowering against the oracle.

Random references show every wrong operand; tolerances are absolute on logits of about +-10.
"""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import references
from references import DATA, FOLDER, NAMES, golden, load, oracle_logits

from edge_mmllm.errors import UnsupportedArchitecture
from edge_mmllm_export.models import ARCHITECTURES
from edge_mmllm_runtime.sampling import Sampling

#: Issue A's limits are 1e-3 and 2e-3; 3e-5 was seen, and a wrong epsilon already makes 1e-4.
ORACLE_TOLERANCE = 1e-4
ONNX_TOLERANCE = 1e-4
#: Whole, chunked and stepwise prefill, relative to the largest logit.
CHUNK_TOLERANCE = 2e-5
VOCAB = 96
LONG = np.random.default_rng(7).integers(0, VOCAB, 100)
VERY_LONG = np.random.default_rng(8).integers(0, VOCAB, 1024)
RECURRENT = [n for n in NAMES if "mamba" in n or "rwkv" in n]


def test_every_architecture_has_a_reference():
    covered = {json.loads((FOLDER / n / "config.json").read_text())["model_type"] for n in NAMES}
    blinkdl = {"rwkv4", "rwkv5", "rwkv6", "rwkv7"}  # test_rwkv.py
    assert covered | blinkdl | {"t5"} == set(ARCHITECTURES)  # test_t5.py


@pytest.mark.parametrize("name", NAMES)
def test_oracle_equals_transformers(name):
    _, expected = golden(name)
    assert expected.std() > 2
    np.testing.assert_allclose(oracle_logits(name), expected, rtol=0, atol=ORACLE_TOLERANCE)


@pytest.mark.parametrize(
    "name", [n for n in NAMES if (FOLDER / n / "config.transformers4.json").exists()]
)
def test_config_of_transformers_4(name, tmp_path):
    shutil.copy(FOLDER / name / "model.safetensors", tmp_path)
    shutil.copy(FOLDER / name / "config.transformers4.json", tmp_path / "config.json")
    ids, _ = golden(name)
    np.testing.assert_array_equal(load(tmp_path).oracle().forward(ids), oracle_logits(name))


@pytest.mark.parametrize(("given", "window"), [("absent", 4096), (None, None), (7, 7)])
def test_mistral_slides_unless_told_not_to(given, window, tmp_path):
    """As transformers' MistralConfig: an absent sliding_window is 4096, a null one is none."""
    shutil.copytree(FOLDER / "mistral-window", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["sliding_window"]
    if given != "absent":
        config["sliding_window"] = given
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert set(load(tmp_path).model.config.windows) == {window}


@pytest.mark.parametrize("inputs", ["ids", "embeds"])
@pytest.mark.parametrize("name", NAMES)
def test_onnx_equals_oracle(name, inputs, exports):
    ids, _ = golden(name)
    expected = oracle_logits(name)
    _, exported = exports(name, inputs=inputs)
    embed = set() if inputs == "ids" else {"embed"}
    assert set(exported.spec.stages) == {"decoder", "decoder_native"} | embed
    logits = exported.logits(ids)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=ONNX_TOLERANCE)
    np.testing.assert_array_equal(logits.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("name", ["llama", "mamba", "mamba2"])
def test_embeddings_as_input(name, exports):
    ids, _ = golden(name)
    loaded, exported = exports(name, inputs="embeds")
    with exported.session() as session:
        logits = session.prefill(loaded.weights["embed"].rows()[ids], logits="all")
    np.testing.assert_array_equal(logits, exported.logits(ids))


@pytest.mark.parametrize("name", NAMES)
def test_only_the_rows_asked_for(name, exports):
    ids, _ = golden(name)
    _, exported = exports(name)
    with exported.session() as session:
        last = session.prefill(ids)
    np.testing.assert_allclose(last, oracle_logits(name)[-1], rtol=0, atol=ONNX_TOLERANCE)


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("name", NAMES)
def test_oracle_whole_equals_chunked(name, chunk):
    loaded = load(FOLDER / name)
    whole = loaded.oracle().forward(LONG)
    oracle = loaded.oracle()
    parts = [oracle.forward(LONG[i : i + chunk]) for i in range(0, len(LONG), chunk)]
    assert oracle.position == len(LONG)
    _assert_close(np.concatenate(parts), whole)


@pytest.mark.parametrize("chunk", [7, 64])
@pytest.mark.parametrize("name", NAMES)
def test_onnx_whole_equals_chunked(name, chunk, exports):
    _, exported = exports(name)
    whole = exported.logits(LONG)
    with exported.session(chunk=chunk) as session:
        _assert_close(session.prefill(LONG, logits="all"), whole)


@pytest.mark.parametrize("chunk", [1, 5, 64, 511])
@pytest.mark.parametrize("name", RECURRENT)
def test_a_long_text_in_pieces(name, chunk, exports):
    """Errors of a recurrent state would add up."""
    _, exported = exports(name)
    with exported.session() as whole, exported.session(chunk=chunk) as session:
        expected = whole.prefill(VERY_LONG, logits="all")
        _assert_close(session.prefill(VERY_LONG, logits="all"), expected)
        if chunk == 1:
            session.reset()
            stepwise = np.stack([session.decode(int(i)) for i in VERY_LONG])
            _assert_close(stepwise, expected)


@pytest.mark.parametrize("inputs", ["ids", "embeds"])
@pytest.mark.parametrize("name", NAMES)
def test_onnx_whole_equals_token_by_token(name, inputs, exports):
    _, exported = exports(name, inputs=inputs)
    whole = exported.logits(LONG)
    with exported.session() as session:
        stepwise = np.stack([session.decode(int(i)) for i in LONG])
        assert session.position == len(LONG)
        _assert_close(stepwise, whole)
        session.reset()
        _assert_close(session.prefill(LONG, logits="all"), whole)


@pytest.mark.parametrize("name", NAMES)
def test_snapshot_restore_and_branch(name, exports, tmp_path):
    _, exported = exports(name)
    sampling = Sampling(temperature=1.0, seed=5)  # greedy repeats itself on random weights

    def answer(session):
        return list(session.generate_tokens(None, 24, sampling, ignore_eos=True))

    with exported.session() as session, exported.session(context=64) as other:
        session.prefill(LONG[:30])
        snapshot = session.snapshot()
        first = answer(session)
        assert len(set(first)) > 6
        for token in LONG[30:50]:  # another branch, which must leave no trace
            session.decode(int(token))
        session.restore(snapshot)
        assert session.position == 30
        assert answer(session) == first
        snapshot.save(tmp_path / "snapshot.npz")
        other.restore(type(snapshot).load(tmp_path / "snapshot.npz"))
        assert answer(other) == first


@pytest.mark.parametrize("name", NAMES)
def test_state_bytes(name, exports):
    """A kv state grows with the tokens in it, a recurrent one never."""
    _, exported = exports(name)
    with exported.session() as session:
        session.prefill(LONG[:10])
        ten = session.state_bytes
        session.prefill(LONG[:30])
        assert session.state_bytes == (ten if name in RECURRENT else 4 * ten)


@pytest.mark.parametrize(
    ("wrong", "near"), [("llama4", "llama"), ("mamba3", "mamba"), ("qwen2_moe", "qwen2")]
)
def test_unknown_architecture_names_the_nearest(wrong, near, tmp_path):
    _copy(tmp_path, "llama", model_type=wrong)
    with pytest.raises(
        UnsupportedArchitecture, match=f"nearest supported architecture is '{near}'"
    ):
        load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4}}, "yarn"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "part of each"),
        ({"hidden_act": "relu2"}, "relu2"),
    ],
)
def test_a_config_without_a_definition_is_refused(changes, message, tmp_path):
    _copy(tmp_path, "llama", **changes)
    with pytest.raises(UnsupportedArchitecture, match=message):
        load(tmp_path)


def test_head_sizes_that_the_kernel_does_not_take(tmp_path):
    """head_dim 8 works (rope outside the kernel, the `llama` reference); 12 is refused."""
    _copy(tmp_path, "llama", num_attention_heads=4, num_key_value_heads=1, head_dim=12)
    loaded = load(FOLDER / "llama")
    changed = references.open_checkpoint(tmp_path)
    loaded = references.Loaded(references.build(changed), loaded.weights)
    with pytest.raises(UnsupportedArchitecture, match="heads of size 12"):
        references.export(loaded, tmp_path)


@pytest.mark.skipif(
    not (DATA / "zoo").is_dir(), reason=f"the zoo is not in {DATA} (set EDGE_MMLLM_DATA)"
)
@pytest.mark.parametrize("name", ["tiny-mamba", "tiny-mamba2"])
def test_zoo(name, tmp_path):
    """A trained model: logits of transformers 5, and 32 greedy tokens through ONNX f32."""
    loaded = load(DATA / "zoo" / name)
    exported = references.export(loaded, tmp_path)
    with np.load(DATA / "zoo" / name / "golden.npz") as data:
        for i in range(4):
            ids, expected = data[f"input_ids_{i}"].astype(np.int64), data[f"logits_{i}"]
            oracle = loaded.oracle().forward(ids, np.array([len(ids) - 1]))[0]
            np.testing.assert_allclose(oracle, expected, rtol=0, atol=1e-3)
            with exported.session() as session:
                greedy = list(session.generate_tokens(ids.tolist(), 32, ignore_eos=True))
                assert greedy == data[f"greedy_{i}"].tolist()
                session.reset()
                np.testing.assert_allclose(session.prefill(ids), oracle, rtol=0, atol=2e-3)


def _assert_close(actual, expected):
    limit = CHUNK_TOLERANCE * np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=limit)


def _copy(folder, name, **changes):
    """A reference with another config."""
    shutil.copy(FOLDER / name / "model.safetensors", folder)
    config = json.loads((FOLDER / name / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
