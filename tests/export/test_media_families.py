"""Tiles, pictures of any size, videos and sounds: what `test_families.py` does not see."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import family_files
import numpy as np
import pytest
import references
from family_files import FOLDER, golden

from edge_mmllm.audio import PreparedAudio
from edge_mmllm.cli import main
from edge_mmllm.errors import (
    CheckpointError,
    CorruptBundle,
    UnsupportedArchitecture,
    UnsupportedMedia,
    UsageError,
)
from edge_mmllm.image import Prepared as Picture
from edge_mmllm.modality import Modality
from edge_mmllm.spec import ModelSpec
from edge_mmllm_export.exporter import export
from edge_mmllm_export.planning import ExportOptions
from edge_mmllm_export.quantize.schemes import QuantPlan
from edge_mmllm_runtime.check import check
from edge_mmllm_runtime.layouts import layout_of
from edge_mmllm_runtime.media import Prepared
from edge_mmllm_runtime.placing import _stepped

TOLERANCE = 1e-4


def layout(tokens=4, **kind):
    return layout_of(Modality((), "<i>", 9, tokens, kind, {}), "modalities.image")


def item(grid=(0, 0), size=(10, 10)):
    shape = Picture(np.empty(0, np.float32), size, size, grid)
    return Prepared(({},) * (1 + grid[0] * grid[1]), shape)


# -- Idefics3's tiles -------------------------------------------------------------------------

TILES = {"kind": "tiles", "fence": "<f>", "whole": "<w>", "tile": "<{row},{column}>"}


def test_a_picture_of_one_tile_has_no_names_of_tiles():
    assert layout(2, **TILES).text(item()) == "<f><w><i><i><f>"


def test_tiles_are_named_row_by_row():
    text = layout(1, **TILES).text(item((2, 1)))
    assert text == "<f><1,1><i>\n<f><2,1><i>\n\n<f><w><i><f>"
    assert layout(1, **TILES).count(item((2, 1))) == 3


# -- LLaVA-NeXT's lines -----------------------------------------------------------------------


def tiles(grid, side):
    """What the stages give: rows numbered tile by tile, the end of a line is -1."""
    count = 1 + grid[0] * grid[1]
    rows = np.arange(count * side**2, dtype=np.float32).reshape(count, -1, 1)
    return [np.concatenate([tile, [[-1]]]) for tile in rows]


def test_lines_run_over_all_tiles():
    found = layout(4, kind="unpadded", side=2).arrange(tiles((1, 2), 2), item((1, 2), (10, 20)))
    lines = [[0, 1, 2, 3], [4, 5, 8, 9, -1], [6, 7, 10, 11, -1]]
    assert found[:, 0].tolist() == [n for line in lines for n in line]


def test_padding_is_taken_off():
    """A picture of 4 x 1 in a square of two by two tiles keeps the middle lines only, and upright
    the middle columns."""
    own = layout(16, kind="unpadded", side=4)
    wide = own.arrange(tiles((2, 2), 4), item((2, 2), (10, 40)))[16:, 0]
    assert wide.tolist() == [28, 29, 30, 31, 44, 45, 46, 47, -1, 48, 49, 50, 51, 64, 65, 66, 67, -1]
    tall = own.arrange(tiles((2, 2), 4), item((2, 2), (40, 10)))[16:, 0]
    assert tall.tolist()[:6] == [19, 32, -1, 23, 36, -1]


@pytest.mark.parametrize("size", [(1, 1), (29, 41), (64, 33), (7, 500), (500, 7), (333, 332)])
@pytest.mark.parametrize("grid", [(1, 1), (1, 3), (2, 2)])
def test_as_many_rows_as_counted(size, grid):
    own, given = layout(9, kind="unpadded", side=3), item(grid, size)
    assert len(own.arrange(tiles(grid, 3), given)) == own.count(given)


# -- Qwen2-VL's positions ---------------------------------------------------------------------


def test_a_flat_config_as_published(families, tmp_path):
    """Releases have no text_config, and call the rope `mrope`."""
    shutil.copytree(FOLDER / "qwen2-vl", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    text |= {
        "model_type": "qwen2_vl",
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
    }
    (tmp_path / "config.json").write_text(json.dumps(config | text))
    loaded, (_, exported) = references.load(tmp_path), families("qwen2-vl")
    with exported.session() as session:
        found = family_files.oracle(loaded, session, golden("qwen2-vl"))
    np.testing.assert_allclose(found, golden("qwen2-vl").logits, rtol=0, atol=TOLERANCE)


@pytest.fixture
def session(families):
    with families("qwen2-vl")[1].session() as session:
        yield session


def test_text_can_be_taken_back(session):
    expected = session.prefill([4, 5, 6])
    session.prefill([7, 8])
    assert session.rewind(2)
    np.testing.assert_allclose(session.prefill([6]), expected, rtol=0, atol=TOLERANCE)


def test_a_picture_cannot_but_the_prompt_is_read_again(session):
    given = golden("qwen2-vl")
    prompt = session.encode(given.ids, given.media)
    session.prefill(prompt)
    assert not session.rewind(len(prompt) - 1)
    assert session.rewind(len(prompt))
    reused = list(session.generate_tokens(prompt, 4, reuse=True))
    assert tuple(reused) == given.greedy[:4]


def test_text_goes_on_behind_the_largest_position(session):
    """One more turn after a picture, in a restored state: as in one prompt."""
    given = golden("qwen2-vl")
    whole = session.encode(given.ids, given.media)
    last = max(span.start + span.count for span in whole.spans)
    session.prefill(whole[:last])
    kept = session.snapshot("int8"), session.snapshot()
    session.reset()
    session.restore(kept[1])
    assert len(kept[0].data) < len(kept[1].data)
    found = session.prefill(given.ids[last:], logits="all")
    np.testing.assert_allclose(found, given.logits[last:], rtol=0, atol=TOLERANCE)


def test_a_second_prompt_with_a_picture(session):
    """Its positions are counted from where the state is."""
    given = golden("qwen2-vl")
    whole = session.encode(given.ids, given.media)
    second = whole.spans[1].start
    expected = session.prefill(whole)
    session.reset()
    session.prefill(whole[:second])
    image = session.spec.modalities["image"].token_id
    rest = [image, *given.ids[second + whole.spans[1].count :].tolist()]
    found = session.prefill(session.encode(rest, {"image": given.media["image"][1:]}))
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


def test_text_goes_on_behind_the_last_frame():
    """Of a video of more frames than rows and columns, too."""
    steps = layout(0, kind="grid", merge=2).places(
        Prepared(({},), Picture(np.empty(0, np.float32), (4, 2), (4, 2), patch_grid=(3, 4, 2)))
    )
    assert steps.tolist() == [[0, 0, 1, 1, 2, 2], [0, 1, 0, 1, 0, 1], [0] * 6]
    found = _stepped(9, [(np.arange(2, 8), steps)])
    assert found[0].tolist() == [0, 1, 2, 2, 3, 3, 4, 4, 5]
    assert found[1].tolist() == [0, 1, 2, 3, 2, 3, 2, 3, 5]


def test_the_oracle_in_pieces(families):
    loaded, _ = families("qwen2-vl")
    ids = np.arange(4, 16)
    whole, parts = loaded.oracle().forward(ids), loaded.oracle()
    found = np.concatenate(
        [parts.forward(ids[:5]), parts.forward(ids[5:6]), parts.forward(ids[6:])]
    )
    np.testing.assert_allclose(found, whole, rtol=0, atol=TOLERANCE)


def test_rows_of_one_picture_stand_together(session):
    image = session.spec.modalities["image"].token_id
    count = len(session.encode([image], {"image": golden("qwen2-vl").media["image"][:1]}))
    with pytest.raises(UsageError, match="stand apart"):
        session.encode(
            [image, 4, *[image] * (count - 1)], {"image": golden("qwen2-vl").media["image"][:1]}
        )


def test_videos_and_pictures_share_their_stages(families):
    loaded, exported = families("qwen2-vl")
    spec = exported.spec
    assert spec.modalities["video"].stages == spec.modalities["image"].stages
    assert set(spec.stages) == {"encode_image", "project_image", "embed", "decoder"}
    assert len([c for c in spec.components if c.slot == "encoder"]) == 1
    assert not any(name.startswith("video") for name in loaded.weights)
    shared = families("video-llava")[1].spec
    assert shared.modalities["video"].stages == ("encode_video", "project_image")


@pytest.mark.parametrize("change", [{"shape": [2]}, {"dtype": "float32"}, {"shape": [1, 1]}])
def test_a_malformed_place_is_refused(change, families):
    document = json.loads(json.dumps(families("qwen2-vl")[1].spec.to_json()))
    document["states"][-1] |= change
    with pytest.raises(CorruptBundle):
        ModelSpec.from_json(document)


# -- manifests and configs that cannot be used -------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [
        {"kind": "unpadded"},
        {"kind": "unpadded", "side": 3},
        {"kind": "tiles", "fence": "", "whole": "a"},
        {"kind": "grid"},
        {"kind": "grid", "merge": 0},
        {"kind": "sound", "stride": 2},
        {"kind": "sound", "stride": 2, "pooled": 0},
    ],
)
def test_a_malformed_layout_is_refused(kind):
    with pytest.raises(CorruptBundle):
        layout(4, **kind)


@pytest.mark.parametrize(
    ("name", "file", "change", "error", "message"),
    [
        ("idefics3", "config", {"scale_factor": 3}, CheckpointError, "do not fill"),
        ("idefics3", "config", {"vision_config": {"model_type": "siglip"}}, CheckpointError,
         "model_type"),
        ("llava-next", "config", {"image_grid_pinpoints": [[16, 32]]}, CheckpointError,
         "put the tiles"),
        ("llava-next", "config", {"vision_feature_select_strategy": "full"}, CheckpointError,
         "put the tiles"),
        ("llava-next", "preprocessor_config", {"image_processor_type": "CLIPImageProcessor"},
         CheckpointError, "put the tiles"),
        ("qwen2-audio", "preprocessor_config", {"feature_size": 80}, CheckpointError,
         "what its feature extractor makes"),
        ("qwen2-audio", "preprocessor_config", {"chunk_length": 2}, CheckpointError,
         "what its feature extractor makes"),
        ("qwen2-audio", "config", {"audio_config": None}, CheckpointError, "no audio_config"),
        ("qwen2-vl", "config", {"text_config": {"rope_parameters": {"mrope_section": [2, 2, 2]}}},
         CheckpointError, "mrope_section does not fit"),
        ("qwen2-vl", "config", {"text_config": {"rope_parameters": {"mrope_section": "all"}}},
         CheckpointError, "mrope_section cannot be used"),
        ("llava-next", "config", {"model_type": "llava_onevision"}, UnsupportedArchitecture,
         "llava_onevision"),
        ("llava", "config", {"model_type": "llava_llama"}, UnsupportedArchitecture, "llava_llama"),
    ],
)  # fmt: skip
def test_configs_that_cannot_be_used(name, file, change, error, message, tmp_path):
    shutil.copytree(FOLDER / name, tmp_path, dirs_exist_ok=True)
    path = tmp_path / f"{file}.json"
    config = json.loads(path.read_text())
    for key, value in change.items():
        nested = isinstance(value, dict) and isinstance(config.get(key), dict)
        config[key] = {**config[key], **value} if nested else value
    path.write_text(json.dumps(config))
    with pytest.raises(error, match=message):
        references.load(tmp_path)


def test_a_sound_has_the_rows_of_its_frames(families):
    loaded, _ = families("qwen2-audio")
    tower = family_files.composite(loaded).pathways[0].encoder.component
    own = layout(0, kind="sound", stride=2, pooled=2)
    counts = [
        own.count(Prepared(({},), PreparedAudio(np.empty(0, np.float32), frames, 1.0)))
        for frames in range(3, 101)
    ]
    assert counts == [tower.tokens_of(frames) for frames in range(3, 101)]
    assert counts[61 - 3 : 64 - 3] == [15, 15, 16]


def test_a_sound_of_no_row_is_refused(families):
    with families("qwen2-audio")[1].session() as session, pytest.raises(UnsupportedMedia):
        session.encode([4, 95], {"audio": [(np.zeros(100, np.int16), 16000)]})


# -- the whole way ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("smolvlm", ("image",)),
        ("llava-next", ("image",)),
        ("qwen2-vl", ("image", "video")),
        ("qwen2-audio", ("audio",)),
        ("video-llava", ("image", "video")),
    ],
)
def test_export_check_and_run(name, kinds, tmp_path, capsys):
    options = ExportOptions(QuantPlan("int8"), workers=1, accept_quality_loss=True)
    bundle = export(FOLDER / name, tmp_path / "bundle", options)
    assert [entry.modality for entry in bundle.manifest.golden_media] == list(kinds)
    for kind in kinds:
        assert bundle.manifest.gate.figures[kind]["kl_mean_of_engine"] < 0.03
    assert check(bundle.root).ok
    for kind in kinds:
        folder = FOLDER / family_files.KINDS[kind]
        one, other = sorted(folder.iterdir())[:2]
        command = ["run", str(bundle.root), f"--{kind}", str(one), f"--{kind}", str(other),
                   "--prompt", "w11 w12", "--raw", "--json", "--max-new-tokens", "2"]  # fmt: skip
        assert main(command, standalone_mode=False) is None
        told = json.loads(capsys.readouterr().out)
        assert told["timings"]["encoded"] == told["timings"]["items"] == 2
        assert told["prompt_tokens"] > 4


def test_templates_may_look_for_the_key(families):
    """Qwen2-Audio's own asks whether a part has `audio`, not for its type."""
    _, exported = families("qwen2-audio")
    template = (
        "{% for m in messages %}{% for p in m.content %}{% if 'audio' in p %}"
        "<|audio_bos|><|AUDIO|><|audio_eos|>{% elif 'text' in p %}{{ p.text }}{% endif %}"
        "{% endfor %}{% endfor %}"
    )
    spec = replace(exported.spec, text=replace(exported.spec.text, chat_template=template))
    given = golden("qwen2-audio")
    with replace(exported, spec=spec).session() as session:
        prompt = session.encode("w11 w12", {"audio": given.media["audio"][:1]})
        begin, end = (session.text.encode(t)[0] for t in ("<|audio_bos|>", "<|audio_eos|>"))
        assert prompt.tokens[0] == begin
        assert prompt.tokens[prompt.spans[0].count + 1] == end
