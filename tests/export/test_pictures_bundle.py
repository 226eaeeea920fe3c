"""A bundle with pictures as its users meet it: export, check, run, inspect, bench, chat."""

from __future__ import annotations

import json

import family_files
import pytest
from family_files import golden, word_tokenizer

from edge_mmllm.bundle import open_bundle
from edge_mmllm_export.exporter import export
from edge_mmllm_export.planning import ExportOptions
from edge_mmllm_export.quantize.schemes import QuantPlan

IMAGE, ROWS = 95, 9
PARTS = (
    "{% for m in messages %}{{ m.role }} {% if m.content is string %}{{ m.content }}"
    "{% else %}{% for p in m.content %}{% if p.type == 'image' %}<image>{% else %}{{ p.text }}"
    "{% endif %} {% endfor %}{% endif %} {% endfor %}{% if add_generation_prompt %}bot{% endif %}"
)
STRINGS = "{% for m in messages %}{{ m.role }} {{ m.content + '' }} {% endfor %}bot"
FIRST, SECOND = golden("llava").media["image"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "tokenizer.json").write_bytes(word_tokenizer())
    options = ExportOptions(
        QuantPlan("int8"), tokenizer=str(folder / "tokenizer.json"), workers=1,
        accept_quality_loss=True,
    )  # fmt: skip
    return export(family_files.FOLDER / "llava", folder / "bundle", options)


def test_an_export_is_judged_on_a_picture(bundle):
    manifest = bundle.manifest
    (entry,) = manifest.golden_media
    assert (entry.modality, entry.vectors, entry.media) == (
        "image", "golden_image.npz", "golden_image.png",
    )  # fmt: skip
    figures = manifest.gate.figures["image"]
    assert figures["positions"] > 20
    assert figures["kl_mean_of_engine"] < 0.03
    groups = {g.group: g.scheme for g in manifest.quantization.groups}
    assert groups["image encoder matrix"] == "int8-b32"
    assert groups["image projector matrix"] == "f16"
    names = {file.path for file in manifest.files}
    assert {"encode_image.bin", "project_image.bin", "weights.bin"} <= names


def test_check_reads_the_picture(bundle):
    from edge_mmllm_runtime.check import check

    report = check(bundle.root)
    assert [p.name for p in report.passes] == [
        "prefill", "decode", "image prefill", "image decode",
    ]  # fmt: skip
    assert report.ok


def test_check_finds_another_picture(bundle, tmp_path):
    """Golden vectors of one picture do not fit another."""
    from edge_mmllm_runtime import load
    from edge_mmllm_runtime.check import limits, run_golden
    from edge_mmllm_runtime.golden import read_golden

    opened = open_bundle(bundle.root)
    with load(bundle.root) as session:
        vectors = read_golden(opened.file("golden_image.npz"), session.spec.vocab_size)
        passes = run_golden(session, vectors, limits(opened), {"image": [FIRST]})
    assert any(p.breaches for p in passes)


def test_run_and_inspect(bundle, capsys):
    from edge_mmllm.cli import main

    command = ["run", str(bundle.root), "--image", str(FIRST), "--image", str(SECOND),
               "--prompt", "what is this", "--max-new-tokens", "3", "--raw", "--json"]  # fmt: skip
    assert main(command, standalone_mode=False) is None
    told = json.loads(capsys.readouterr().out)
    assert told["prompt_tokens"] == 2 * ROWS + 3
    assert told["timings"]["encoded"] == 2
    main(["inspect", str(bundle.root)], standalone_mode=False)
    shown = capsys.readouterr().err
    for words in ("clip (image)", "mlp (image)", "output projector  none", "'<image>': 9 tokens"):
        assert " ".join(words.split()) in " ".join(shown.split())


def test_bench_splits_the_first_token(bundle):
    from edge_mmllm.profiling.bench import bench

    report = bench(
        bundle.root, prompt_tokens=4, new_tokens=2, repetitions=1, media={"image": [FIRST]}
    )
    assert report.prompt_tokens == ROWS + 4
    assert set(report.split) == {"preprocess_ms", "encode_ms", "project_ms", "prefill_ms"}
    assert all(value > 0 for value in report.split.values())
    assert bench(bundle.root, prompt_tokens=4, new_tokens=2, repetitions=1).split == {}


def test_chat_attaches_pictures(bundle):
    from edge_mmllm_runtime import load
    from edge_mmllm_runtime.answer import AnswerSettings
    from edge_mmllm_runtime.chat import Conversation, chat

    notes: list[str] = []

    class Now:
        def __enter__(self):
            return lambda: False

        def __exit__(self, *error):
            return None

    with load(bundle.root) as session:
        talk = Conversation(session, AnswerSettings(max_new_tokens=1), raw=True)
        assert "/image PATH" in talk.help
        lines = [f"/image {FIRST}", "what", "is", "/image", "/image none.png", "/audio x"]
        turns = chat(talk, iter(lines), lambda piece: None, notes.append, Now)
        assert turns == 2
        assert len(talk.messages[0]["content"]) == 2
        assert isinstance(talk.messages[2]["content"], str)
        talk.reset()
        assert talk.messages == []
    assert "goes with what you say next" in notes[0]
    assert any("no such file" in note for note in notes)
    assert any("understands text and image only" in note for note in notes)
