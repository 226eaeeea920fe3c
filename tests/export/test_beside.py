"""Pictures that stand beside the tokens, in cross_kv states: who sees which, and when."""

from __future__ import annotations

from dataclasses import replace

import family_files
import numpy as np
import projectors
import pytest
import references
from family_files import golden
from test_idefics import loaded as idefics

from edge_mmllm.errors import CheckpointError, SessionError, UsageError
from edge_mmllm.modality import Modality
from edge_mmllm_export.checkpoints.view import Renames
from edge_mmllm_export.families.composite import Composite, Part, Pathway, scoped
from edge_mmllm_export.ops.numpy import NumpyOps
from edge_mmllm_export.oracle import Oracle
from edge_mmllm_export.weights import Parameter, Source, Weight
from edge_mmllm_runtime.layouts import Beside
from edge_mmllm_runtime.media import reader_of

IMAGE, EVER = 7, 1 << 62
FIRST, SECOND = golden("llava").media["image"]
SETTINGS = {
    "layout": {"kind": "whole", "size": [16, 16], "shortest_edge": None, "longest_edge": None,
               "crop": None, "square": False},
    "resample": "bilinear", "rescale": 1 / 255, "mean": None, "std": None,
    "pixel_limit": 1 << 20,
}  # fmt: skip
IDS = np.array([1, 2, IMAGE, 3, 4, 5, IMAGE, 6, 8, 9, 10, 11])


class Flat:
    """An encoder of one matrix: four patches of 8 x 8."""

    name, image_size, tokens = "flat", 16, 4

    def __init__(self, width: int) -> None:
        self.width = width

    def parameters(self):
        return [Parameter("patch", (self.width, 192))]

    def sources(self, layout, prefix):
        return {"patch": Source(f"{prefix}patch")}

    def encode(self, op, w, pixels):
        return op.linear(op.patches(pixels, (3, 16, 16), 8), w["patch"])[0]


class Matrix:
    """A checkpoint of one tensor."""

    def __init__(self, values):
        self.values = values

    def read(self, name, start=0, stop=None):
        return self.values[start:stop]


def composed(sees="latest", width=None):
    backbone = idefics(projectors.Golden("idefics"))
    width = width or backbone.model.memory_width
    modality = Modality((), "<image>", IMAGE, 4, {"kind": "beside", "sees": sees}, SETTINGS,
                        target="states")  # fmt: skip
    path = Pathway("image", Part(Flat(width), "eyes."), None, modality)
    model = Composite("idefics", backbone.model, Renames(()), [path])
    values = np.random.default_rng(5).standard_normal((width, 192)).astype(np.float32)
    name = "image.encoder.patch"
    eyes = Weight(name, values.shape, "matrix", Matrix(values), Source("eyes.patch"))
    return references.Loaded(model, {**backbone.weights, name: eyes})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    loaded = composed()
    return loaded, family_files.export(loaded, tmp_path_factory.mktemp("beside"))


def features(loaded, source):
    reader = reader_of("image")
    _, source = reader.identify(source)
    (run,) = reader.prepare(source, reader.settings(SETTINGS, "here")).runs
    weights = scoped(loaded.weights, "image.encoder.")
    return Flat(loaded.model.pathways[0].width).encode(NumpyOps({}), weights, run["pixels"])


def expected(loaded, looks, ids=IDS):
    oracle = Oracle(loaded.model, loaded.weights, keep_weights=True)
    for source, span in looks:
        oracle.look(features(loaded, source), span)
    return oracle.forward(ids)


def test_stages(made):
    _, exported = made
    stages = set(exported.spec.stages)
    assert {"encode_image", "remember_image", "embed", "decoder"} <= stages
    assert "project_image" not in stages
    assert exported.spec.modalities["image"].stages == ("encode_image",)
    slots = [c.slot for c in exported.spec.components]
    assert slots == ["encoder", "backbone"]


@pytest.mark.parametrize("chunk", [1, 5, 512])
def test_each_token_sees_the_last_picture_before_it(made, chunk):
    loaded, exported = made
    wanted = expected(loaded, [(FIRST, (2, 6)), (SECOND, (6, EVER))])
    blind = expected(loaded, [])
    assert np.abs(wanted - blind)[3:].max() > 0.05
    with exported.session(chunk=chunk) as session:
        prompt = session.encode(IDS, {"image": [FIRST, SECOND]})
        assert len(prompt) == len(IDS)
        assert not prompt.spans
        found = session.prefill(prompt, logits="all")
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)


def test_what_follows_sees_it_too(made):
    loaded, exported = made
    wanted = expected(loaded, [(FIRST, (2, 6)), (SECOND, (6, EVER))])
    with exported.session() as session:
        prompt = session.encode(IDS, {"image": [FIRST, SECOND]})
        session.prefill(prompt[:8])
        steps = np.stack([session.decode(int(i)) for i in IDS[8:]])
    np.testing.assert_allclose(steps, wanted[8:], rtol=0, atol=1e-4)


def test_pictures_are_known_by_their_content(made):
    _, exported = made
    with exported.session() as session:
        one = session.encode(IDS[:5], {"image": [FIRST]})
        two = session.encode(IDS[:5], {"image": [SECOND]})
        assert one.ids[2] != two.ids[2]
        assert one.ids[2] < 0
        assert one.tokens[2] == IMAGE
        a = session.prefill(one)
        list(session.generate_tokens(two, 1, reuse=True))
        session.reset()
        assert np.abs(session.prefill(two) - a).max() > 0.01


def test_nothing_is_seen_after_it_was_forgotten(made):
    """A rewound state would still see a later picture: it reads anew."""
    loaded, exported = made
    with exported.session() as session:
        session.prefill(session.encode(IDS, {"image": [FIRST, SECOND]}))
        assert not session.rewind(2)
        plain = np.array([1, 2, 3, 4, 5, 6, 8, 9])
        list(session.generate_tokens(plain.tolist(), 1, reuse=True))
        assert session.engine.memory_rows == 0
        session.reset()
        np.testing.assert_allclose(
            session.prefill(plain), expected(loaded, [], plain)[-1], rtol=0, atol=1e-4
        )


def test_a_failure_leaves_nothing_half_seen(made):
    _, exported = made

    def stop(done, total):
        raise SessionError("stop")

    with exported.session(chunk=4) as session:
        with pytest.raises(SessionError, match="stop"):
            session.prefill(session.encode(IDS, {"image": [FIRST, SECOND]}), progress=stop)
        assert (session.position, session.engine.memory_rows) == (0, 0)


def test_the_whole_prompt_is_wanted(made):
    _, exported = made
    with exported.session() as session:
        session.prefill([1, 2])
        with pytest.raises(UsageError, match="come with the whole prompt"):
            session.prefill(session.encode(IDS, {"image": [FIRST, SECOND]}))
        assert session.tokens == (1, 2)


def test_widths_must_fit():
    with pytest.raises(CheckpointError, match="do not fit the backbone"):
        composed(width=11)


@pytest.mark.parametrize(
    ("sees", "positions", "spans"),
    [
        ("latest", [], []),
        ("latest", [3], [(3, EVER)]),
        ("latest", [3, 4, 9], [(3, 4), (4, 9), (9, EVER)]),
        ("run", [3, 9], [(3, 9), (9, EVER)]),
        ("run", [3, 4, 9], [(3, 9), (4, 9), (9, EVER)]),
        ("run", [3, 8, 9, 10], [(3, 8), (8, EVER), (9, EVER), (10, EVER)]),
    ],
)
def test_spans(sees, positions, spans):
    """`run` as `get_cross_attention_token_mask` of transformers 5.23 (Mllama)."""
    from edge_mmllm._fields import Fields

    model = composed(sees).model
    modality = replace(model.modalities()["image"], layout={"kind": "beside", "sees": sees})
    layout = Beside(modality, Fields(modality.layout, "layout"))
    assert layout.seen_by(positions) == spans


@pytest.mark.parametrize(
    ("text", "tidy"),
    [
        ("a<image>b", "a|<image>|b"),
        ("<image><image>b", "|<image>|<image>|b"),
        ("a|<image>|b", "a|<image>|b"),
        ("a|<image>|<image>|", "a|<image>|<image>|"),
    ],
)
def test_fences(text, tidy):
    """As `IdeficsProcessor` of transformers 5.23 writes them; a text that has them keeps them."""
    layout = beside(fence="|")
    assert layout.tidy(text.replace("<image>", layout.text(None))) == tidy


def test_sight_ends_with_the_document():
    """As `image_attention_mask_for_packed_input_ids` of transformers 5.23."""
    layout = beside(until=2)
    ids = [2, 7, 5, 2, 5, 7, 7, 5, 2, 2]
    assert layout.seen_by([1, 5, 6], ids) == [(1, 4), (5, 6), (6, 9)]


def beside(**keys):
    from edge_mmllm._fields import Fields

    model = composed().model
    modality = replace(
        model.modalities()["image"], layout={"kind": "beside", "sees": "latest"} | keys
    )
    return Beside(modality, Fields(modality.layout, "layout"))
