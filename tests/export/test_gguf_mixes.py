"""K and I types: what is left to llama.cpp and what is not, and what goes wrong in its process.

llama.cpp itself is in tests/full/test_gguf_mixes.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import fake_llama_cpp
import gguf
import numpy as np
import pytest
from references import ROOT, load

from edge_mmllm.cli import export as cli
from edge_mmllm.errors import ExportError, MissingDependency, OutOfSpace, UsageError
from edge_mmllm_export import exporter
from edge_mmllm_export.gguf import imatrix
from edge_mmllm_export.gguf import layout as gguf_layout
from edge_mmllm_export.gguf import mixes as gguf_mixes
from edge_mmllm_export.gguf import types as gguf_types
from edge_mmllm_export.gguf import write as ours
from edge_mmllm_export.gguf.imatrix import Entry, Imatrix
from edge_mmllm_export.gguf.layout import Wanted
from edge_mmllm_export.planning import ExportOptions
from edge_mmllm_export.quantize.schemes import QuantPlan, Scheme
from edge_mmllm_export.weights import Parameter, Source, Weight


def options(kind="Q4_K_M", **more):
    return ExportOptions(format="gguf", gguf_type=kind, gate=False, **more)


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A random Mamba in bfloat16, as large as K types need."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import random_models

    folder = tmp_path / "mamba"
    folder.mkdir()
    random_models.write(random_models.mamba(256, 2, 96), folder)
    return folder


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """llama_cpp is the stand-in, here and in children."""

    def install(what):
        monkeypatch.setenv("FAKE_LLAMA_CPP", what)
        monkeypatch.syspath_prepend(str(fake_llama_cpp.install(tmp_path)))
        monkeypatch.delitem(sys.modules, "llama_cpp", raising=False)

    return install


def laid(source, kind="Q4_K_M", plan=None, overrides=()):
    plan = ours.plan_for(kind, plan or QuantPlan())
    loaded = load(source, plan)
    file = gguf_layout.layout(loaded.model, loaded.weights, Wanted(plan, kind, overrides))
    return {t.tensor.name: t for t in file.tensors}


def test_sizes_and_numbers_are_the_formats():
    for kind in gguf_types.KINDS:
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
        assert gguf_types.row_bytes(kind, 512) == 512 // block * size, kind
        assert gguf_types.block_size(kind) == (block if block > 1 else None)
    for word in gguf_types.MIXES:
        assert gguf.LlamaFileType["MOSTLY_" + word].value
    assert set(gguf_types.MIXES) >= gguf_types.NEED_IMATRIX
    assert set(gguf_types.KINDS_NEED_IMATRIX) <= set(gguf_types.KINDS)


def test_the_command_line_has_the_same_words():
    assert gguf_types.WORDS == cli.GGUF_TYPES
    assert gguf_types.KINDS == cli.GGUF_KINDS


def test_what_is_left_to_llama_cpp(source):
    tensors = laid(source)
    assert {n for n, t in tensors.items() if t.open} == {
        "token_embd.weight",
        *(f"blk.{i}.ssm_{n}.weight" for i in range(2) for n in ("in", "out")),
    }
    dtype = load(source).weights["embed"].checkpoint.tensors
    assert {t.dtype for t in dtype.values()} == {"F16"}
    assert tensors["blk.0.ssm_in.weight"].draft == "F16"  # exact, no larger than it need be
    assert tensors["blk.0.ssm_x.weight"].kind == "Q8_0"  # protected
    assert tensors["blk.0.ssm_x.weight"].draft is None
    assert tensors["blk.0.ssm_a"].kind == tensors["blk.0.ssm_conv1d.weight"].kind == "F32"


def test_overrides_in_either_words(source):
    plan = QuantPlan(overrides=(("layers.0.out", Scheme(8)),), embedding="f16")
    tensors = laid(source, plan=plan, overrides=(("layers.1.*", "IQ4_NL"), ("*.1.dt", "F32")))
    assert not any(t.open for n, t in tensors.items() if n != "blk.0.ssm_in.weight")
    kinds = {n: t.kind for n, t in tensors.items()}
    assert kinds["blk.0.ssm_out.weight"] == "Q8_0"
    assert tensors["token_embd.weight"].kind == "F16"
    assert kinds["blk.1.ssm_in.weight"] == kinds["blk.1.ssm_out.weight"] == "IQ4_NL"
    assert kinds["blk.1.ssm_x.weight"] == "Q8_0"  # fewer bits than it is held to
    assert kinds["blk.1.ssm_dt.weight"] == "F32"  # more
    assert tensors["blk.1.ssm_in.weight"].draft == "F16"


def test_our_types_beside_theirs(source):
    loaded = load(source, ours.plan_for("Q4_0", QuantPlan()))
    wanted = Wanted(ours.plan_for("Q4_0", QuantPlan()), "Q4_0", (("*.out", "Q6_K"),))
    file = gguf_layout.layout(loaded.model, loaded.weights, wanted)
    assert (file.word, file.file_type) == ("Q4_0", "MOSTLY_Q4_0")
    assert {t.tensor.name for t in file.tensors if t.draft} == {
        "blk.0.ssm_out.weight",
        "blk.1.ssm_out.weight",
    }
    assert not any(t.open for t in file.tensors)


def test_overrides_that_are_wrong(source):
    with pytest.raises(UsageError, match="matches no tensor"):
        laid(source, overrides=(("layers.9.*", "Q6_K"),))
    with pytest.raises(UsageError, match="is no type"):
        laid(source, overrides=(("layers.0.*", "Q4_K_M"),))
    with pytest.raises(UsageError, match="for --format gguf"):
        ExportOptions(gguf_overrides=(("*", "Q6_K"),))
    with pytest.raises(UsageError, match="exclude each other"):
        options(imatrix="a", imatrix_text="b")


def test_an_encoder_is_ours_to_write():
    plan = ours.plan_for("Q4_K_M", QuantPlan())
    p = Parameter("image.encoder.layers.0.attn.q", (64, 256))
    w = Weight(p.name, p.shape, p.role, None, Source("x"), plan.of(p))
    assert Wanted(plan, "Q4_K_M").of(w) == "Q8_0"
    assert Wanted(plan, "Q4_K_M", (("image.*", "F16"),)).of(w) == "F16"
    with pytest.raises(UsageError, match="the language model alone"):
        Wanted(plan, "Q4_K_M", (("image.*", "Q6_K"),)).of(w)
    assert Wanted(plan, "Q4_K_M").of(replace(w, name="layers.0.attn.q")) is None


def test_without_llama_cpp(source, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_mixes.importlib.util, "find_spec", lambda _: None)
    for act in (
        lambda: exporter.export(source, tmp_path / "out", options()),
        lambda: exporter.plan_export(source, options()),
    ):
        with pytest.raises(MissingDependency, match=r"pip install 'edge-mmllm\[gguf\]'"):
            act()
    assert not (tmp_path / "out").exists()
    exporter.export(source, tmp_path / "out", options("Q5_1"))  # ours need nothing


@pytest.mark.parametrize("kind", sorted(gguf_types.NEED_IMATRIX))
def test_types_that_need_a_matrix(kind, source, tmp_path):
    with pytest.raises(UsageError, match="without an importance matrix") as caught:
        exporter.export(source, tmp_path / "out", options(kind))
    assert "--imatrix FILE" in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["mamba"]


def test_a_matrix_for_nothing(source, tmp_path):
    path = tmp_path / "m.gguf"
    imatrix.write(Imatrix({"a": Entry(np.ones((1, 4), np.float32), np.ones(1, np.float32))}), path)
    with pytest.raises(UsageError, match="for the types that llama"):
        exporter.export(source, tmp_path / "out", options("Q4_0", imatrix=str(path)))


def matrix_of(source, **changes):
    entries = {
        n: Entry(np.ones((1, t.shape[-1]), np.float32), np.ones(1, np.float32))
        for n, t in laid(source).items()
        if len(t.shape) == 2
    }
    return Imatrix({n: e for n, e in (entries | changes).items() if e is not None})


def test_a_matrix_of_another_model(source, tmp_path, fake):
    fake("lies")
    wrong = Entry(np.ones((1, 8), np.float32), np.ones(1, np.float32))
    for change, message in (
        ({"blk.1.ssm_out.weight": None}, "no entry: blk.1.ssm_out.weight"),
        ({"blk.0.ssm_in.weight": wrong}, "blk.0.ssm_in.weight: 8 for 256"),
    ):
        imatrix.write(matrix_of(source, **change), tmp_path / "m.gguf")
        with pytest.raises(UsageError, match="not of this model") as caught:
            exporter.plan_export(source, options(imatrix=str(tmp_path / "m.gguf")))
        assert message in str(caught.value)


def test_what_llama_cpp_would_do_is_the_plan(source, fake):
    """The stand-in takes what is left to it to Q4_K."""
    fake("says")
    plan = exporter.plan_export(source, options())
    kinds = {(g.group, g.scheme): g.tensors for g in plan.groups}
    assert kinds[("matrix", "Q4_K")] == 4
    assert kinds[("embedding", "Q4_K")] == 1
    weights = load(source).weights.values()
    written = 2 * sum(w.size for w in weights if w.role in ("matrix", "embedding"))
    assert plan.disk_bytes > sum(g.size_bytes for g in plan.groups) + written
    assert plan.peak_ram_bytes >= gguf_mixes.ram_bytes(2 * 96 * 256)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("says", "the moon is full"),
        ("abort", "ended by signal 6"),
        ("raises", "MemoryError"),
        ("lies", "5 tensors otherwise than it said"),
    ],
)
def test_llama_cpp_fails(what, message, source, tmp_path, fake):
    fake(what)
    with pytest.raises(ExportError, match=message):
        exporter.export(source, tmp_path / "out", options())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fake", "mamba"]


def test_no_space_is_said(source, tmp_path, fake, monkeypatch):
    fake("says")
    usage = gguf_mixes.shutil.disk_usage

    def full(path):
        return usage(path)._replace(free=1 << 10)

    monkeypatch.setattr(gguf_mixes.shutil, "disk_usage", full)
    monkeypatch.setattr(exporter, "check_free_space", lambda *_: None)
    with pytest.raises(OutOfSpace):
        exporter.export(source, tmp_path / "out", options())
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_ended_it_leaves_no_child_and_no_files(how, source, tmp_path, fake):
    fake("sleep")
    command = [sys.executable, "-m", "edge_mmllm", "export", str(source), "--format", "gguf"]
    command += ["--gguf-type", "Q4_K_M", "--gate", "off", "--out", str(tmp_path / "out")]
    path = os.pathsep.join([str(tmp_path / "fake"), *sys.path])
    child = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": path}, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    parts = _wait(lambda: list(tmp_path.glob(".out.edge-part-*/model.gguf")))
    assert parts[0].with_name("draft.gguf").is_file()
    (grandchild,) = _children(child.pid)
    child.send_signal(how)
    assert child.wait(60) != 0
    _wait(lambda: not Path(f"/proc/{grandchild}").exists() or _zombie(grandchild))
    if how == signal.SIGKILL:  # the next export to the same place sweeps
        exporter.export(source, tmp_path / "out", options("Q4_0"))
        assert not list((tmp_path / "out").glob("draft*"))
    else:
        assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out.edge-part-*"))


def _wait(what, seconds=60):
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def _children(pid):
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(c) for t in tasks for c in (t / "children").read_text().split()]


def _zombie(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("*.down=Q6_K", "Q6_K"),
        ("*.down=q6_k", "Q6_K"),
        ("*.down=F16", "F16"),
        ("*.down=f16", None),
        ("*.down=int8", None),
        ("Q6_K", None),
    ],
)
def test_overrides_of_the_command_line(text, kind):
    assert cli._gguf_kind(text) == kind
