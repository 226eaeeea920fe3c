"""T5 through llama.cpp: its encoder reads, its decoder answers, against transformers' logits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

pytestmark = pytest.mark.full
pytest.importorskip("llama_cpp")

import edge_mmllm  # noqa: E402
from edge_mmllm.errors import UnsupportedArchitecture, UsageError  # noqa: E402
from edge_mmllm_export import exporter  # noqa: E402
from edge_mmllm_export.planning import ExportOptions  # noqa: E402
from edge_mmllm_export.quantize.schemes import QuantPlan  # noqa: E402
from edge_mmllm_runtime.gguf.llama import Model  # noqa: E402

FOLDER = Path(__file__).resolve().parents[1] / "goldens" / "encoder_decoders"
NAMES = ("t5", "flan-t5")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    root = tmp_path_factory.mktemp("t5")
    options = ExportOptions(QuantPlan("f32"), format="gguf", gate=False)
    return {n: exporter.export(FOLDER / n, root / n, options).root for n in NAMES}


def golden(name):
    with np.load(FOLDER / name / "golden.npz") as data:
        return data["prompt"], data["answer"], data["logits"]


def close(found, expected):
    print("max |delta logit|", np.abs(found - expected).max())
    assert np.abs(found - expected).max() <= 5e-3
    assert (found.argmax(-1) == expected.argmax(-1)).all()


@pytest.mark.parametrize("chunk", [512, 5, 1])
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(name, chunk, bundles):
    prompt, answer, expected = golden(name)
    with edge_mmllm.load(bundles[name], threads=1) as session:
        with pytest.raises(UsageError, match="has read nothing"):
            session.prefill(answer)
        session.chunk = chunk
        session.start(prompt)
        close(session.prefill(answer, logits="all"), expected)
        session.start(prompt[::-1].copy())
        other = session.prefill(answer, logits="all")
        assert np.abs(other - expected).max() > 0.1
        session.start(prompt)
        close(np.stack([session.decode(int(i)) for i in answer]), expected)


@pytest.mark.parametrize("name", NAMES)
def test_snapshots_know_what_the_encoder_read(name, bundles, tmp_path):
    prompt, answer, expected = golden(name)
    with edge_mmllm.load(bundles[name], threads=1) as session:
        empty = session.snapshot()
        session.start(prompt)
        begun = session.snapshot()
        session.prefill(answer[:3])
        session.save_state(tmp_path / "a.state")
        session.start(prompt[:5])
        session.prefill(answer)
        session.restore(begun)
        close(session.prefill(answer, logits="all"), expected)
        assert session.rewind(4)
        close(session.prefill(answer[4:], logits="all"), expected[4:])
        session.restore(empty)
        with pytest.raises(UsageError, match="has read nothing"):
            session.prefill(answer)
    with edge_mmllm.load(bundles[name], threads=1) as other:
        assert other.load_state(tmp_path / "a.state") == 3
        close(other.prefill(answer[3:], logits="all"), expected[3:])


def test_a_prompt_longer_than_a_batch(bundles):
    """All of it is one batch of the encoder's; the caches make room."""
    prompt, answer, _ = golden("t5")
    long = np.resize(prompt, 1300)
    with edge_mmllm.load(bundles["t5"], threads=1) as session:
        session.start(long)
        first = session.prefill(answer)
        session.start(prompt)
        session.prefill(answer)
        session.start(long)
        np.testing.assert_allclose(session.prefill(answer), first, atol=1e-4)


@pytest.mark.parametrize("quant", ["f32", "int8"])
def test_the_gate_judges_it(quant, tmp_path):
    options = ExportOptions(QuantPlan(quant), format="gguf", accept_quality_loss=True)
    manifest = exporter.export(FOLDER / "t5", tmp_path / "out", options).manifest
    assert manifest.gate.figures["top1_agreement"] > 0.9
    assert manifest.model.stages["encode_text"].file == "model.gguf"
    if quant == "f32":
        assert manifest.gate.verdict == "passed"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"feed_forward_proj": "gated-silu"}, "gated silu"),
        ({"relative_attention_max_distance": 256}, "up to 256"),
    ],
)
def test_what_llama_cpp_has_no_graph_for(change, words, tmp_path):
    shutil.copytree(FOLDER / "flan-t5", tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    options = ExportOptions(QuantPlan("f32"), format="gguf", gate=False)
    with pytest.raises(UnsupportedArchitecture, match=words):
        exporter.export(tmp_path / "source", tmp_path / "out", options)


def unigram(folder: Path) -> Path:
    """The golden with a tokenizer as T5 has it: pieces with scores, a table of characters."""
    shutil.copytree(FOLDER / "t5", folder)
    words = [
        "\u2581",
        "\u2581the",
        "\u2581cat",
        "s",
        "\u2581sat",
        "at",
        "c",
        "t",
        "h",
        "e",
        ",",
        "a",
    ]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(word, -2.0 - 0.1 * i) for i, word in enumerate(words)]
    tokenizer = Tokenizer(models.Unigram(pieces, 2, byte_fallback=False))
    split = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>", "<extra_id_0>"])
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", None, [("</s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_its_tokenizer_is_written_for_llama_cpp(tmp_path):
    options = ExportOptions(QuantPlan("f32"), format="gguf", gate=False)
    bundle = exporter.export(unigram(tmp_path / "source"), tmp_path / "out", options)
    model = Model(bundle.file("model.gguf"))
    with edge_mmllm.load(bundle.root, threads=1) as session:
        for text in ("the cat sat", "cats  at the cat, eh", "the <extra_id_0> cat", "x the"):
            expected = session.text.encode(text)
            assert model.tokenize(text.encode()) == expected, text
            assert len(expected) > 2
        assert isinstance("".join(session.generate("the cat", max_new_tokens=4)), str)
    model.close()
