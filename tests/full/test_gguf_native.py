"""A GGUF file with an `mmproj` file, from elsewhere: mtmd prepares pictures and places rows."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.full
pytest.importorskip("llama_cpp")

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "export"))
sys.path.insert(0, str(ROOT / "tests" / "full"))

from family_files import FOLDER, golden  # noqa: E402
from test_gguf_media import LLAVA, byte_level, thirty_seconds  # noqa: E402

import edge_mmllm  # noqa: E402
from edge_mmllm.errors import CorruptBundle, UsageError  # noqa: E402
from edge_mmllm_export import exporter  # noqa: E402
from edge_mmllm_export.planning import ExportOptions  # noqa: E402
from edge_mmllm_export.quantize.schemes import QuantPlan  # noqa: E402
from edge_mmllm_runtime.answer import run  # noqa: E402
from edge_mmllm_runtime.gguf.native import MARK  # noqa: E402


def files(source: Path, folder: Path) -> tuple[Path, Path]:
    options = ExportOptions(QuantPlan("f32"), format="gguf", gate=False)
    bundle = exporter.export(source, folder, options)
    return bundle.file("model.gguf"), bundle.file("mmproj.gguf")


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return files(LLAVA, tmp_path_factory.mktemp("llava") / "out")


def test_the_same_answer_as_of_the_bundle(llava):
    """The pictures are of the encoder's shape: nothing to fit, and mtmd resizes as Pillow does."""
    model, projector = llava
    for picture in sorted(LLAVA.glob("image_*.png"))[:2]:
        asked = {"media": {"image": [picture]}, "threads": 1}
        theirs = run(model.parent, "Describe the image.", **asked)
        ours = run(model, "Describe the image.", mmproj=projector, **asked)
        assert ours.text == theirs.text
        assert ours.prompt_tokens == theirs.prompt_tokens
        assert ours.timings.encoded == 1


def test_a_second_question_and_a_state(llava, tmp_path):
    model, projector = llava
    picture = LLAVA / "image_1.png"
    with edge_mmllm.load(model, mmproj=projector, threads=1) as session:
        first = "".join(session.generate("Describe the image.", [picture], max_new_tokens=12))
        session.save_state(tmp_path / "a.state")
        session.perception.restart()
        session.release("encode_image")
        again = "".join(session.generate("Describe the image.", [picture], max_new_tokens=12))
        assert again == first
        assert session.perception.timings.encoded == 0
        session.perception.forget()
        assert "".join(session.generate(f"{MARK}\nDescribe the image.", [picture])) != ""
        with pytest.raises(UsageError, match="audio"):
            list(session.generate("What?", audio=[(np.zeros(16000, "f4"), 16000)]))
    with (
        edge_mmllm.load(model, threads=1) as other,
        pytest.raises(edge_mmllm.errors.StateMismatch),
    ):
        other.load_state(tmp_path / "a.state")


@pytest.mark.parametrize("name", ["llava-next", "idefics3", "qwen2-vl"])
def test_other_projectors(name, tmp_path):
    """Tiles with text between them, and rows with places of their own."""
    model, projector = files(byte_level(FOLDER / name, tmp_path / "source"), tmp_path / "out")
    picture = golden(name).media["image"][0]
    with edge_mmllm.load(model, mmproj=projector, threads=1) as session:
        prompt = session.encode(f"a{MARK}b", {"image": [picture]})
        assert sum(span.count for span in prompt.spans) > 0
        assert (prompt.places is not None) is (name == "qwen2-vl")
        whole = session.prefill(prompt)
        assert np.isfinite(whole).all()
        session.reset()
        session.chunk = 3
        np.testing.assert_allclose(session.prefill(prompt), whole, atol=1e-3)


def test_sounds(tmp_path):
    model, projector = files(thirty_seconds(tmp_path / "source"), tmp_path / "out")
    sound = (np.random.default_rng(0).normal(size=24000).astype("f4") * 0.1, 24000)
    with edge_mmllm.load(model, mmproj=projector, threads=2) as session:
        prompt = session.encode(f"a{MARK}b", {"audio": [sound]})
        assert sum(span.count for span in prompt.spans) == 750


def test_what_is_no_projector(llava, tmp_path):
    model, projector = llava
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(projector.read_bytes()[:5000])
    for given, error, words in (
        (model, CorruptBundle, "cannot use"),
        (bad, CorruptBundle, "beyond the file"),
        (LLAVA / "config.json", UsageError, "no GGUF file"),
    ):
        with pytest.raises(error, match=words):
            edge_mmllm.load(model, mmproj=given)
    with pytest.raises(UsageError, match="a bundle has its own"):
        edge_mmllm.load(model.parent, mmproj=projector)


def test_a_projector_of_another_model(llava, tmp_path):
    _, other = files(byte_level(FOLDER / "llava-next", tmp_path / "source"), tmp_path / "out")
    with pytest.raises(CorruptBundle, match="cannot use"):
        edge_mmllm.load(llava[0], mmproj=other)
