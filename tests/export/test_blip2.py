"""BLIP-2 and InstructBLIP: pictures before the prompt, and instructions that the Q-Former reads."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import references
from family_files import FOLDER, golden

import edge_mmllm
from edge_mmllm.errors import CheckpointError, UsageError
from edge_mmllm_export.exporter import export
from edge_mmllm_export.planning import ExportOptions
from edge_mmllm_export.quantize.schemes import QuantPlan
from edge_mmllm_runtime.check import check

INSTRUCTED = ["instructblip-llama", "instructblip-t5"]


@pytest.mark.parametrize("name", INSTRUCTED)
def test_a_second_question_is_projected_anew_and_not_encoded(name, families):
    _, exported = families(name)
    given = golden(name)
    with exported.session() as session:
        first = session.encode(given.prompt, given.media)
        first.load()
        assert session.perception.timings.encoded == 1
        second = session.encode("w9 w9 w4", given.media)
        assert not set(first.ids[:5]) & set(second.ids[:5])
        before = first.spans[0].rows().copy()
        after = second.spans[0].rows()
        assert session.perception.timings.encoded == 0
        assert session.perception.timings.project_ms > 0
        assert np.abs(before - after).max() > 0.01
        session.encode(given.prompt, given.media).load()
        assert session.perception.timings.project_ms == 0
        session.perception.forget()
        again = session.encode(given.prompt, given.media).spans[0].rows()
        np.testing.assert_array_equal(again, before)


def test_ids_alone_do_not_say_the_instruction(families, tmp_path):
    """They are read back as text, which takes a tokenizer."""
    from dataclasses import replace

    from edge_mmllm.spec import TextSpec

    _, exported = families(INSTRUCTED[0])
    given = golden(INSTRUCTED[0])
    mute = replace(exported, spec=replace(exported.spec, text=TextSpec("none")))
    with mute.session() as session, pytest.raises(UsageError, match="no tokenizer"):
        session.encode(given.ids, given.media)


@pytest.mark.parametrize("name", [*INSTRUCTED, "blip2-t5", "idefics", "mllama"])
def test_a_bundle_carries_all_that_it_needs(name, tmp_path):
    given = golden(name)
    options = ExportOptions(plan=QuantPlan("f32"))
    bundle = export(FOLDER / name, tmp_path / "bundle", options)
    assert bundle.manifest.gate.verdict == "passed"
    has = (tmp_path / "bundle" / "qformer_tokenizer.json").is_file()
    assert has == name.startswith("instructblip")
    with edge_mmllm.load(tmp_path / "bundle", threads=1) as session:
        found = session.generate_tokens(
            given.prompt, len(given.greedy), ignore_eos=True, media=given.media
        )
        assert tuple(found) == given.greedy
    assert check(tmp_path / "bundle", threads=1).ok


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("blip2-opt", {"image_token_index": None}, "image_token_index"),
        ("blip2-opt", {"num_query_tokens": 0}, "num_query_tokens"),
        ("blip2-opt", {"qformer_config": None}, "qformer_config"),
        ("instructblip-t5", None, "Q-Former reads the instruction"),
    ],
)
def test_checkpoints_that_cannot_be_used(name, change, message, tmp_path):
    shutil.copytree(FOLDER / name, tmp_path, dirs_exist_ok=True)
    if change is None:
        shutil.rmtree(tmp_path / "qformer_tokenizer")
    else:
        config = json.loads((tmp_path / "config.json").read_text()) | change
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        references.load(tmp_path)
