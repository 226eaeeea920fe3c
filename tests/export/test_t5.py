"""T5 and Flan-T5 against transformers 5, and their ONNX stages against the oracle."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import references
from checkpoint_files import entry, safetensors_bytes
from seeded import seeded

from edge_mmllm.errors import CorruptState, TensorMismatch, UnsupportedArchitecture, UsageError
from edge_mmllm_export.exporter import export
from edge_mmllm_export.ops.memory import RelativeBias
from edge_mmllm_export.planning import ExportOptions
from edge_mmllm_export.quantize.schemes import QuantPlan
from edge_mmllm_export.weights import Source, Weight
from edge_mmllm_runtime import load
from edge_mmllm_runtime.answer import AnswerSettings, run
from edge_mmllm_runtime.check import check
from edge_mmllm_runtime.continuation import StateFiles
from edge_mmllm_runtime.sampling import Sampling

FOLDER = Path(__file__).resolve().parents[1] / "goldens" / "encoder_decoders"
NAMES = ["t5", "flan-t5"]
#: On logits of about +-15; 6e-5 was seen.
TOLERANCE = 2e-4
#: Relative to the largest logit.
CHUNK_TOLERANCE = 2e-5


@cache
def golden(name):
    """Prompt `(seq,)`, answer `(n,)` and transformers' logits `(n, vocab)`."""
    with np.load(FOLDER / name / "golden.npz") as data:
        return data["prompt"], data["answer"], data["logits"]


@pytest.mark.parametrize("name", NAMES)
def test_oracle_equals_transformers(name):
    prompt, answer, expected = golden(name)
    oracle = references.load(FOLDER / name).oracle()
    oracle.start(prompt)
    assert expected.std() > 2
    np.testing.assert_allclose(oracle.forward(answer), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("chunk", [1, 7])
@pytest.mark.parametrize("name", NAMES)
def test_oracle_whole_equals_chunked(name, chunk):
    prompt, answer, expected = golden(name)
    oracle = references.load(FOLDER / name).oracle()
    oracle.start(prompt)
    parts = [oracle.forward(answer[i : i + chunk]) for i in range(0, len(answer), chunk)]
    np.testing.assert_allclose(np.concatenate(parts), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("both_ways", [True, False])
def test_buckets_of_the_published_sizes(both_ways):
    """32 buckets up to distance 128: transformers' bucket of each distance from -300 to 300."""
    with np.load(FOLDER / "buckets.npz") as data:
        expected = data["both_ways" if both_ways else "behind"]
    table = Weight("bias", (32, 1), "vector", _Numbers(), Source("bias"))
    found = RelativeBias(table, 128, both_ways).by_distance()[0]
    last = 256 if both_ways else 128
    index = np.clip(np.arange(-300, 301), -128, 128 if both_ways else 0) + 128
    assert len(found) == last + 1
    np.testing.assert_array_equal(found[index], expected)


@pytest.mark.parametrize("inputs", ["ids", "embeds"])
@pytest.mark.parametrize("name", NAMES)
def test_onnx_equals_transformers(name, inputs, tmp_path):
    prompt, answer, expected = golden(name)
    exported = exported_to(tmp_path, name, inputs)
    embed = {"embed"} if inputs == "embeds" else set()
    assert set(exported.spec.stages) == {"encode_text", "decoder"} | embed
    with exported.session() as session:
        session.start(prompt)
        whole = session.prefill(answer, logits="all")
    np.testing.assert_allclose(whole, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_onnx_whole_equals_chunked_equals_stepwise(name, tmp_path):
    prompt, answer, _ = golden(name)
    exported = exported_to(tmp_path, name)
    with exported.session() as session, exported.session(chunk=7) as chunked:
        session.start(prompt)
        whole = session.prefill(answer, logits="all")
        chunked.start(prompt)
        assert_close(chunked.prefill(answer, logits="all"), whole)
        session.start(prompt)
        assert session.position == 0
        assert_close(np.stack([session.decode(int(i)) for i in answer]), whole)


def test_a_prompt_is_encoded_once_for_all_steps(tmp_path, monkeypatch):
    prompt, _, _ = golden("t5")
    exported = exported_to(tmp_path, "t5")
    with exported.session() as session:
        runs = []
        remember = session.engine.remember
        monkeypatch.setattr(
            session.engine, "remember", lambda *a, **k: (runs.append(a[0]), remember(*a, **k))
        )
        assert len(list(session.generate_tokens(prompt.tolist(), 9, ignore_eos=True))) == 9
        assert runs == ["encode_text"]
        assert session.engine.release("encode_text")
        session.decode(3)  # the memory does not need its stage any more
        assert session.position == 10


@pytest.mark.parametrize("name", NAMES)
def test_generation_begins_at_the_start_token(name, tmp_path):
    """Greedy, as transformers' generate: the prompt goes to the encoder alone."""
    prompt, _, _ = golden(name)
    oracle = references.load(FOLDER / name).oracle()
    oracle.start(prompt)
    expected, token = [], 0
    for _ in range(12):
        token = int(oracle.forward(np.array([token]))[0].argmax())
        expected.append(token)
    exported = exported_to(tmp_path, name)
    with exported.session() as session:
        for _ in range(2):  # the second starts from nothing again
            assert list(session.generate_tokens(prompt.tolist(), 12, ignore_eos=True)) == expected
        assert session.tokens == (0, *expected[:-1])
        session.start(prompt)
        first = session.prefill([0])
        session.start(prompt[::-1].copy())
        assert np.abs(session.prefill([0]) - first).max() > 0.1


@pytest.mark.parametrize("storage", ["f32", "f16", "int8"])
def test_snapshot_restore_and_branch(storage, tmp_path):
    prompt, answer, _ = golden("flan-t5")
    exported = exported_to(tmp_path, "flan-t5")
    sampling = Sampling(temperature=1.0, seed=5)
    with exported.session() as session, exported.session(context=64) as other:
        session.start(prompt)
        session.prefill(answer[:20])
        snapshot = session.snapshot(storage)
        assert snapshot.memory == len(prompt)
        session.restore(snapshot)
        first = list(session.generate_tokens(None, 12, sampling, ignore_eos=True))
        assert len(set(first)) > 6
        session.start(prompt[:3])  # another prompt, of another length
        session.prefill(answer[:4])
        session.restore(snapshot)
        assert (session.position, session.engine.memory_rows) == (20, len(prompt))
        assert list(session.generate_tokens(None, 12, sampling, ignore_eos=True)) == first
        snapshot.save(tmp_path / "x.state")
        other.load_state(tmp_path / "x.state")
        assert list(other.generate_tokens(None, 12, sampling, ignore_eos=True)) == first


def test_a_state_file_whose_memory_is_of_another_size_is_refused(tmp_path):
    prompt, answer, _ = golden("t5")
    exported = exported_to(tmp_path, "t5")
    with exported.session() as session:
        session.start(prompt)
        session.prefill(answer[:5])
        replace(session.snapshot(), memory=3).save(tmp_path / "x.state")
        with pytest.raises(CorruptState, match="contradicts"):
            session.load_state(tmp_path / "x.state")


def test_bytes_of_the_state_count_the_memory(tmp_path):
    prompt, answer, _ = golden("t5")
    row = 3 * 2 * 2 * 16 * 4  # layers, k and v, heads, width, float32
    with exported_to(tmp_path, "t5").session() as session:
        session.start(prompt)
        assert session.state_bytes == row * len(prompt)
        session.prefill(answer[:5])
        assert session.state_bytes == row * (len(prompt) + 5)
        session.reset()
        assert session.state_bytes == 0


def test_what_an_encoder_decoder_cannot_do_is_said(tmp_path):
    prompt, answer, _ = golden("t5")
    with exported_to(tmp_path, "t5").session() as session:
        for call in (lambda: session.prefill(answer), lambda: session.decode(3)):
            with pytest.raises(UsageError, match="the encoder has read nothing"):
                call()
        with pytest.raises(UsageError, match="no beginning of one can be kept"):
            session.cache_prompt(prompt.tolist())
        session.start(prompt)
        session.prefill(answer)
        assert session.rewind(3)  # a decoder's own tokens can be cut
        session.reset()
        with pytest.raises(UsageError, match="the encoder has read nothing"):
            session.prefill(answer)


def test_a_long_prompt_takes_no_room_of_the_context(tmp_path):
    prompt, _, _ = golden("t5")
    with exported_to(tmp_path, "t5").session(context=8) as session:
        long = np.tile(prompt, 5).tolist()
        assert len(list(session.generate_tokens(long, 20, ignore_eos=True))) == 8
        assert session.finish_reason == "context"


def test_a_bundle_from_export_to_check(tmp_path):
    """Gate, golden vectors and manifest know the encoder."""
    options = ExportOptions(plan=QuantPlan("f32"), tokenizer="none", workers=1)
    source = _changed(tmp_path / "source", "flan-t5")
    bundle = export(source, tmp_path / "bundle", options)
    assert bundle.spec.decoder_start_id == 0
    assert bundle.spec.stages["encode_text"].fills
    assert bundle.manifest.gate.verdict == "passed"
    assert check(tmp_path / "bundle", threads=1).ok


def test_run_encodes_the_prompt_and_decodes_an_answer(tmp_path):
    """From text to text, with a byte tokenizer; the stage gives its memory back."""
    config = json.loads((FOLDER / "flan-t5" / "config.json").read_text()) | {"vocab_size": 300}
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    shapes = references.open_checkpoint(FOLDER / "flan-t5").tensors
    sizes = {n: tuple(300 if d == 96 else d for d in i.shape) for n, i in shapes.items()}
    write_tensors(folder, {name: seeded(name, shape) for name, shape in sizes.items()})
    options = ExportOptions(plan=QuantPlan("f32"), tokenizer="bytes", workers=1)
    export(folder, tmp_path / "bundle", options)
    settings = AnswerSettings(max_new_tokens=8)
    files = StateFiles(save=tmp_path / "x.state")
    given = run(tmp_path / "bundle", "Hello there", settings, threads=1, files=files)
    assert (given.prompt_tokens, given.new_tokens) == (11, 8)
    files = StateFiles(load=tmp_path / "x.state")
    with pytest.raises(UsageError, match="cannot read more of a prompt"):
        run(tmp_path / "bundle", "More", settings, threads=1, files=files)
    with load(tmp_path / "bundle", threads=1) as session:
        text = "".join(session.generate("Hello there", max_new_tokens=8))
        assert text == given.text
        assert session.release("encode_text")
        assert not session.release("encode_text")
        assert "".join(session.generate("Hello there", max_new_tokens=8)) == text
        both = session.generate_many(["Hello there", "Something else, longer"], max_new_tokens=8)
        assert both[0] == text != both[1]


def test_a_picture_goes_through_the_encoder(tmp_path):
    """LLaVA's tower and projector before a T5: the gate judges rows of a picture in the prompt
    of the encoder, and the decoder answers from them."""
    llava = references.ROOT / "tests" / "goldens" / "families" / "llava"
    folder = tmp_path / "source"
    shutil.copytree(llava, folder)
    whole = json.loads((llava / "config.json").read_text())
    text = json.loads((FOLDER / "flan-t5" / "config.json").read_text())
    width = whole["text_config"]["hidden_size"]
    (folder / "config.json").write_text(
        json.dumps(whole | {"text_config": text | {"d_model": width}})
    )
    checkpoint, t5 = (
        references.open_checkpoint(llava),
        references.open_checkpoint(FOLDER / "flan-t5"),
    )
    tensors = {n: checkpoint.read(n) for n in checkpoint.tensors if "language_model" not in n}
    for name, info in t5.tensors.items():
        shape = tuple(width if d == text["d_model"] else d for d in info.shape)
        tensors[f"language_model.{name}"] = seeded(name, shape)
    write_tensors(folder, tensors)
    options = ExportOptions(plan=QuantPlan("f32"), tokenizer="none", workers=1)
    bundle = export(folder, tmp_path / "bundle", options)
    stages = {"encode_image", "project_image", "embed", "encode_text", "decoder"}
    assert set(bundle.spec.stages) == stages
    assert bundle.manifest.gate.figures["image"]["kl_mean_of_engine"] < 1e-5
    assert check(tmp_path / "bundle", threads=1).ok
    image, answers = whole["image_token_index"], []
    pictures = sorted((llava.parent / "pictures").iterdir())
    with load(tmp_path / "bundle", threads=1) as session:
        for picture in pictures:
            session.start(session.encode([4, image, 5, 6], {"image": [picture]}))
            assert session.engine.memory_rows == 3 + bundle.spec.modalities["image"].tokens
            answers.append(session.prefill([bundle.spec.decoder_start_id]))
            media = {"image": [picture]}
            first = list(session.generate_tokens([4, image, 5, 6], 1, media=media, ignore_eos=True))
            assert first == [answers[-1].argmax()]
    assert np.abs(answers[0] - answers[1]).max() > 1e-3


def write_tensors(folder, tensors):
    """A `model.safetensors` of float32 arrays."""
    header, data = {}, b""
    for name, array in tensors.items():
        values = array.astype("<f4").tobytes()
        header[name] = entry("F32", list(array.shape), len(data), len(data) + len(values))
        data += values
    (folder / "model.safetensors").write_bytes(safetensors_bytes(header, data))


def exported_to(folder, name, inputs="ids"):
    return references.export(references.load(FOLDER / name), folder, inputs)


def assert_close(actual, expected):
    limit = CHUNK_TOLERANCE * np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=limit)


class _Numbers:
    """A checkpoint of one table, whose row i holds i."""

    def read(self, name, start=0, stop=None):
        return np.arange(32, dtype=np.float32)[start:stop, None]


def test_a_head_that_is_a_copy_of_the_embedding_is_stored_once(tmp_path):
    """transformers 5 writes `tie_word_embeddings: true` for every T5: the tensors tell."""
    model = references.load(_changed(tmp_path, "flan-t5", tie_word_embeddings=True)).model
    assert not model.config.tied
    assert model.config.scaled  # what the key means without `scale_decoder_outputs`
    shutil.rmtree(tmp_path)
    given = {"tie_word_embeddings": True, "scale_decoder_outputs": False}
    model = references.load(_changed(tmp_path, "flan-t5", **given)).model
    assert (model.config.tied, model.config.scaled) == (False, False)


def test_an_untied_config_without_a_head_is_refused(tmp_path):
    with pytest.raises(TensorMismatch, match=r"missing: lm_head\.weight"):
        references.load(_changed(tmp_path, "t5", tie_word_embeddings=False))


def test_an_unknown_feed_forward_is_refused(tmp_path):
    with pytest.raises(UnsupportedArchitecture, match="gated-tanh"):
        references.load(_changed(tmp_path, "t5", feed_forward_proj="gated-tanh"))


def _changed(folder, name, **changes):
    """A reference with another config."""
    folder.mkdir(exist_ok=True)
    shutil.copy(FOLDER / name / "model.safetensors", folder)
    config = json.loads((FOLDER / name / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder
