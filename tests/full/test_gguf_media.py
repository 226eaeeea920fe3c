"""Pictures through GGUF bundles: llama.cpp's decoder and mtmd's encoders, against transformers'
logits, the oracle's features and the same session contract as every engine's."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.full
pytest.importorskip("llama_cpp")

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "export"))

import family_files  # noqa: E402
from family_files import FOLDER, golden  # noqa: E402
from references import load  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402

import edge_mmllm  # noqa: E402
from edge_mmllm.errors import CorruptBundle, SessionError  # noqa: E402
from edge_mmllm_export import exporter  # noqa: E402
from edge_mmllm_export.planning import ExportOptions  # noqa: E402
from edge_mmllm_export.quantize.schemes import QuantPlan  # noqa: E402
from edge_mmllm_export.verify_media import OracleStages  # noqa: E402
from edge_mmllm_runtime.gguf import media as gguf_media  # noqa: E402
from edge_mmllm_runtime.media import reader_of  # noqa: E402

NAMES = ("llava", "llava-siglip", "llava-next", "llava-next-llama", "idefics3", "smolvlm",
         "qwen2-vl", "qwen2-vl-video")  # fmt: skip
LLAVA = ROOT / "examples" / "models" / "tiny-llava"
MOST = 5e-3


def byte_level(source: Path, folder: Path) -> Path:
    """A copy whose tokenizer GGUF can say: the same ids, of other words."""
    shutil.copytree(source, folder)
    path = folder / "tokenizer.json"
    if path.is_file():
        document = json.loads(path.read_text())
        # llama.cpp wants a merge, and those want words.
        renamed = {"w4": "a", "w5": "b", "w6": "ab"}
        words = {renamed.get(word, word): i for word, i in document["model"]["vocab"].items()}
        document["model"] = {"type": "BPE", "vocab": words, "merges": ["a b"]}
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        document |= {"pre_tokenizer": level, "decoder": level, "post_processor": None}
        path.write_text(json.dumps(document))
    return folder


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            source = byte_level(FOLDER / name, root / "source")
            options = ExportOptions(QuantPlan("f32"), format="gguf", gate=False)
            made[name] = exporter.export(source, root / "bundle", options).root
        return made[name]

    return of


def close(found: np.ndarray, expected: np.ndarray) -> None:
    print("max |delta logit|", np.abs(found - expected).max())
    assert np.abs(found - expected).max() <= MOST
    assert (found.argmax(-1) == expected.argmax(-1)).all()


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(name, bundles):
    given = golden(name)
    with edge_mmllm.load(bundles(name), threads=1) as session:
        prompt = session.encode(given.ids, given.media)
        close(session.prefill(prompt, logits="all"), given.logits)
        assert session.perception.timings.encoded > 0
        session.reset()
        session.perception.restart()
        again = session.prefill(session.encode(given.ids, given.media), logits="all")
        close(again, given.logits)
        assert session.perception.timings.encoded == 0


@pytest.mark.parametrize("name", NAMES)
def test_the_pictures_matter(name, bundles):
    given = golden(name)
    with edge_mmllm.load(bundles(name), threads=1) as session:
        ids = given.ids  # one placeholder for each: another picture may have other rows
        marks = [m.token_id for m in session.spec.modalities.values()]
        ids = ids[~(np.isin(ids, marks) & np.append(False, ids[1:] == ids[:-1]))]
        if not name.startswith("qwen2"):
            ids = given.ids
        found = session.prefill(session.encode(ids, given.turned()), logits="all")
    assert np.abs(found[-1] - given.logits[-1]).max() > 0.1


@pytest.mark.parametrize("name", NAMES)
def test_whole_equals_piece_by_piece_and_snapshots_hold(name, bundles, tmp_path):
    """Pieces end inside pictures; a state is saved there, in a session that goes on."""
    given = golden(name)
    with edge_mmllm.load(bundles(name), threads=1) as session:
        prompt = session.encode(given.ids, given.media)
        last = max(span.start + span.count for span in prompt.spans)
        at, found = prompt.spans[0].start + 2, []
        session.prefill(prompt[:at])
        session.save_state(tmp_path / "inside.state")
        session.reset()
        for start in range(0, last, 5):
            found.append(session.prefill(prompt[start : min(start + 5, last)], logits="all"))
        found += [session.decode(int(i))[None] for i in given.ids[last:]]
        close(np.concatenate(found), given.logits)
        session.load_state(tmp_path / "inside.state")
        close(session.prefill(prompt[at:], logits="all"), given.logits[at:])
    with edge_mmllm.load(bundles(name), threads=1) as other:
        assert other.load_state(tmp_path / "inside.state") == at
        close(other.prefill(prompt[at:]), given.logits[-1])


@pytest.mark.parametrize("name", ["llava", "qwen2-vl"])
def test_rewinding(name, bundles):
    """A cache can be cut behind a picture; inside one, where rows share a place, it cannot."""
    given = golden(name)
    with edge_mmllm.load(bundles(name), threads=1) as session:
        prompt = session.encode(given.ids, given.media)
        session.prefill(prompt)
        last = max(span.start + span.count for span in prompt.spans)
        assert last < len(given.ids)
        assert session.rewind(last)
        rest = np.array(given.ids[last:])
        close(session.prefill(rest, logits="all"), given.logits[last:])
        inside = prompt.spans[0].start + 2
        assert session.rewind(inside) is (name == "llava")
        if name == "llava":
            close(session.prefill(prompt[inside:], logits="all"), given.logits[inside:])
        else:
            assert session.position == len(given.ids)
            assert session.rewind(prompt.spans[0].start)
            start = session.position
            close(session.prefill(prompt[start:], logits="all"), given.logits[start:])


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_the_oracles(name, bundles):
    loaded, given = load(FOLDER / name), golden(name)
    model = family_files.composite(loaded)
    oracle = OracleStages(model, loaded.weights, joined=True)
    with edge_mmllm.load(bundles(name), threads=1) as session:
        for modality, files in given.media.items():
            reader, declared = reader_of(modality), session.spec.modalities[modality]
            item = reader.prepare(files[0], reader.settings(declared.settings, ""))
            for run in item.runs:
                stage = declared.stages[0]
                found = session.engine.run_stage(stage, run)
                expected = oracle.run_stage(stage, run)
                print(name, np.abs(found - expected).max(), np.abs(expected).max())
                assert np.abs(found - expected).max() <= 1e-5 * max(1, np.abs(expected).max())


def test_without_what_is_put_right(bundles, monkeypatch):
    """mtmd on its own: float16 pixels and activations, and the class token of CLIP out of place."""
    given = golden("llava")
    with edge_mmllm.load(bundles("llava"), threads=1) as session:
        right = session.encode(given.ids, given.media).spans[0].rows()
    monkeypatch.setattr(gguf_media.Projector, "_between", lambda *_: False)
    with edge_mmllm.load(bundles("llava"), threads=1) as session:
        left = session.encode(given.ids, given.media).spans[0].rows()
    assert np.abs(left - right).max() > 0.1


def test_memory_of_the_encoder_is_given_back(bundles):
    given = golden("llava")
    with edge_mmllm.load(bundles("llava"), threads=1) as session:
        session.perception.keep_stages = False
        prompt = session.encode(given.ids, given.media)
        session.prefill(prompt)
        assert not session.release("encode_image")
        session.perception.forget()
        assert session.engine.load_stage("encode_image")
        assert not session.engine.load_stage("encode_image")
        assert session.release("encode_image")


def test_pixels_that_are_no_picture(bundles):
    with edge_mmllm.load(bundles("llava"), threads=1) as session:
        with pytest.raises(CorruptBundle, match="8 bits"):
            session.engine.run_stage("encode_image", {"pixels": np.full((3, 28, 28), 0.123, "f4")})
        with pytest.raises(CorruptBundle, match="no stage"):
            session.engine.run_stage("encode_video", {})


def test_a_graph_of_another_shape_is_an_error(bundles, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(bundles("llava"), folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["model"]["details"]["gguf"]["activations"][0] = "gelu"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    given = golden("llava")
    with (
        edge_mmllm.load(folder, threads=1) as session,
        pytest.raises(SessionError, match="something else"),
    ):
        session.prefill(session.encode(given.ids, given.media))


@pytest.mark.parametrize("quant", ["f32", "int4"])
def test_the_gate_judges_pictures(quant, tmp_path):
    bundle = exporter.export(
        LLAVA, tmp_path / "out", ExportOptions(QuantPlan(quant), format="gguf")
    )
    assert bundle.manifest.gate.verdict == "passed"
    assert [media.modality for media in bundle.manifest.golden_media] == ["image"]
    assert {f.path for f in bundle.manifest.files} >= {"model.gguf", "mmproj.gguf"}
    if quant == "f32":
        assert bundle.manifest.gate.figures["image"]["max_logit_difference"] < 1e-3


def test_the_same_answers_as_onnx(tmp_path):
    pytest.importorskip("onnxruntime")
    answers = {}
    for form in ("onnx", "gguf"):
        options = ExportOptions(QuantPlan("f32"), format=form, gate=False)
        exporter.export(LLAVA, tmp_path / form, options)
        with edge_mmllm.load(tmp_path / form, threads=1) as session:
            answers[form] = [
                "".join(
                    session.generate("Describe the image.", max_new_tokens=24, images=[picture])
                )
                for picture in sorted(LLAVA.glob("image_*.png"))
            ]
    assert answers["gguf"] == answers["onnx"]
    assert len(set(answers["gguf"])) > 1


def test_square_layers_and_features_of_two(tmp_path):
    """mtmd takes up and down for one another where both are square; features stand side by side."""
    source = tmp_path / "source"
    shutil.copytree(FOLDER / "llava", source)
    config = json.loads((source / "config.json").read_text())
    wide = config["vision_config"]["hidden_size"]
    config["vision_config"]["intermediate_size"] = wide
    config["vision_feature_layer"] = [-3, -2]
    (source / "config.json").write_text(json.dumps(config))
    tensors, rng = load_file(source / "model.safetensors"), np.random.default_rng(0)
    for name, tensor in tensors.items():
        shape = list(tensor.shape)
        if "mlp.fc1." in name and "vision" in name:
            shape[0] = wide
        elif "mlp.fc2.weight" in name:
            shape[1] = wide
        elif name.endswith("linear_1.weight"):
            shape[1] *= 2
        if shape != list(tensor.shape):
            tensors[name] = (rng.normal(size=shape) * 0.2).astype(tensor.dtype)
    save_file(tensors, source / "model.safetensors")
    options = ExportOptions(QuantPlan("f32"), format="gguf", gate=False)
    exporter.export(source, tmp_path / "out", options)
    loaded = load(source)
    oracle = OracleStages(family_files.composite(loaded), loaded.weights, joined=True)
    pixels = {"pixels": prepared(source)}
    with edge_mmllm.load(tmp_path / "out", threads=1) as session:
        found = session.engine.run_stage("encode_image", pixels)
    expected = oracle.run_stage("encode_image", pixels)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def prepared(source: Path) -> np.ndarray:
    """Pixels of a picture, as the checkpoint at `source` wants them."""
    model = family_files.composite(load(source))
    reader = reader_of("image")
    settings = reader.settings(model.modalities()["image"].settings, "")
    picture = golden("llava").media["image"][0]
    return np.asarray(reader.prepare(picture, settings).runs[0]["pixels"])


def thirty_seconds(folder: Path) -> Path:
    """The golden's Qwen2-Audio, for recordings as long as mtmd takes them."""
    byte_level(FOLDER / "qwen2-audio", folder)
    config = json.loads((folder / "config.json").read_text())
    config["audio_config"]["max_source_positions"] = 1500
    (folder / "config.json").write_text(json.dumps(config))
    prepared = json.loads((folder / "preprocessor_config.json").read_text())
    prepared |= {"chunk_length": 30, "n_samples": 480000, "nb_max_frames": 3000}
    (folder / "preprocessor_config.json").write_text(json.dumps(prepared))
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if n.endswith("embed_positions.weight"))
    drawn = np.random.default_rng(0).normal(size=(1500, 32)) * tensors[name].astype("f4").std()
    tensors[name] = drawn.astype(tensors[name].dtype)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_sounds_are_heard_as_onnx_hears_them(tmp_path):
    """Rows behind the end of a recording are not; the convolutions are ours, over our features."""
    source = thirty_seconds(tmp_path / "source")
    rng, found = np.random.default_rng(1), {}
    sounds = [(rng.normal(size=n).astype("f4") * 0.1, 16000) for n in (5000, 20000, 480000)]
    for form in ("onnx", "gguf"):
        options = ExportOptions(QuantPlan("f32"), format=form, gate=False)
        exporter.export(source, tmp_path / form, options)
        with edge_mmllm.load(tmp_path / form, threads=2) as session:
            token = session.spec.modalities["audio"].token_id
            rows, logits = [], []
            for sound in sounds:
                ids = np.array([1, 2, token, 3, 4])
                prompt = session.encode(ids, {"audio": [sound]})
                rows.append(prompt.spans[0].rows())
                if len(prompt) < 100:
                    session.reset()
                    logits.append(session.prefill(prompt, logits="all"))
            found[form] = rows, logits
    for ours, theirs in zip(*(found[form][0] for form in ("gguf", "onnx")), strict=True):
        print(ours.shape, np.abs(ours - theirs).max(), np.abs(theirs).max())
        assert ours.shape == theirs.shape
        assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()
    for ours, theirs in zip(*(found[form][1] for form in ("gguf", "onnx")), strict=True):
        close(ours, theirs)
