"""GGUF files through llama.cpp: the session's contract, text, state files, hostile files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import edge_mmllm
from edge_mmllm.errors import (
    CorruptBundle,
    CorruptState,
    SessionClosed,
    StateMismatch,
    UnsupportedBundle,
)

pytestmark = pytest.mark.full
pytest.importorskip("llama_cpp")

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

TINY = {"mamba": (64, 2), "mamba2": (64, 2), "rwkv6": (128, 2), "rwkv7": (128, 2)}
KINDS = ["smollm2", *TINY]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    import random_gguf
    import random_models
    from smollm2 import smollm2_gguf

    made = {"smollm2": smollm2_gguf()}
    for name, (width, layers) in TINY.items():
        folder = tmp_path_factory.mktemp(name)
        random_models.write(getattr(random_models, name)(width, layers, 512), folder)
        made[name] = folder / "model.gguf"
        random_gguf.write(folder, made[name])
    return made


@pytest.fixture(scope="module", params=KINDS)
def session(request, files):
    context = 2048 if request.param == "smollm2" else None
    with edge_mmllm.load(files[request.param], threads=2, context=context) as made:
        yield made


@pytest.fixture(autouse=True)
def fresh(request):
    """An empty context for each test, in chunks of the usual size."""
    if "session" in request.fixturenames:
        made = request.getfixturevalue("session")
        made.chunk = 512
        made.reset()


def ids(session, count: int) -> np.ndarray:
    return np.random.default_rng(1).integers(5, min(500, session.spec.vocab_size), count)


def near(found, expected) -> None:
    """Chunks differ by rounding: of quantized activations, and where llama.cpp takes another
    kernel for one token. See `test_the_logits_of_a_bare_loop` for what is exact."""
    difference = np.sqrt(np.mean((found - expected) ** 2)) / np.std(expected)
    smollm2 = expected.shape[-1] > 512  # Q4_1, activations rounded to 8 bits
    assert difference <= (5e-2 if smollm2 else 1e-3)


def greedy(session, count: int) -> list[int]:
    return list(session.generate_tokens(None, count, ignore_eos=True))


def test_whole_is_chunked_is_stepwise(session) -> None:
    prompt = ids(session, 70)
    whole = session.prefill(prompt, logits="all")
    assert whole.shape == (70, session.spec.vocab_size)
    assert np.isfinite(whole).all()
    session.reset()
    session.chunk = 16
    near(session.prefill(prompt, logits="all"), whole)
    session.reset()
    near(np.stack([session.decode(int(i)) for i in prompt]), whole)
    session.reset()
    session.prefill(prompt[:33])
    near(session.prefill(prompt[33:]), whole[-1])


def test_the_logits_of_a_bare_loop(session, files, request) -> None:
    import ctypes

    import llama_cpp.llama_cpp as api

    prompt = ids(session, 40).tolist()
    found = [session.prefill(prompt[:32]), *(session.decode(i) for i in prompt[32:])]
    path = files[request.node.callspec.params["session"]]
    model = api.llama_model_load_from_file(str(path).encode(), api.llama_model_default_params())
    params = api.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_threads, params.n_threads_batch = 1024, 512, 2, 2
    params.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_AUTO
    context = api.llama_init_from_model(model, params)
    expected = []
    for part in (prompt[:32], *([i] for i in prompt[32:])):
        tokens = (ctypes.c_int32 * len(part))(*part)  # the batch only points to it
        assert api.llama_decode(context, api.llama_batch_get_one(tokens, len(part))) == 0
        last = api.llama_get_logits_ith(context, -1)
        expected.append(np.ctypeslib.as_array(last, (session.spec.vocab_size,)).copy())
    api.llama_free(context)
    api.llama_model_free(model)
    assert np.array_equal(np.stack(found), np.stack(expected))


def test_the_last_row_is_the_row_of_the_whole(session) -> None:
    prompt = ids(session, 20)
    whole = session.prefill(prompt, logits="all")
    session.reset()
    near(session.prefill(prompt), whole[-1])
    assert np.abs(whole[-1] - whole[0]).max() > 1e-3


def test_branches_continue_alike(session) -> None:
    session.prefill(ids(session, 40))
    snapshot = session.snapshot()
    first = greedy(session, 24)
    session.prefill(ids(session, 9))
    session.restore(snapshot)
    assert session.position == 40
    assert greedy(session, 24) == first
    session.reset()
    session.restore(snapshot)
    assert greedy(session, 24) == first


def test_a_snapshot_is_exact_and_its_size_is_known(session) -> None:
    session.prefill(ids(session, 40))
    snapshot = session.snapshot()
    assert snapshot.size_bytes == session.state_bytes
    logits = [session.decode(7)]
    session.restore(snapshot)
    logits.append(session.decode(7))
    assert np.array_equal(*logits)


def test_state_files(session, tmp_path) -> None:
    session.prefill(ids(session, 30))
    path = tmp_path / "a.state"
    size = session.save_state(path)
    assert size == path.stat().st_size
    expected = session.decode(9)
    session.reset()
    assert session.load_state(path) == 30
    assert np.array_equal(session.decode(9), expected)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptState):
        session.load_state(path)
    assert session.position == 31


def test_states_of_another_release(session) -> None:
    session.prefill(ids(session, 5))
    states = session.engine.save(5)
    state = states["llama.cpp"]
    state[0] ^= 1
    with pytest.raises(StateMismatch, match="release"):
        session.engine.load(states, 5)
    state[0] ^= 1
    with pytest.raises(StateMismatch, match="5 tokens"):
        session.engine.load(states, 6)


def test_rewind_or_not(session) -> None:
    prompt = ids(session, 30)
    whole = session.prefill(prompt, logits="all")
    if session.spec.context_length is None:
        assert not session.rewind(20)
        assert session.position == 30
        assert session.rewind(0)
        near(session.prefill(prompt), whole[-1])
        return
    assert session.rewind(20)
    near(session.prefill(prompt[20:]), whole[-1])


def test_a_cancelled_prefill_is_undone(session) -> None:
    session.prefill(ids(session, 10))
    expected = session.snapshot()
    session.chunk = 16

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.prefill(ids(session, 40), progress=stop)
    assert session.position == 10
    after = session.decode(3)
    session.restore(expected)
    assert np.array_equal(session.decode(3), after)


def test_reuse_reads_only_what_is_new(session) -> None:
    prompt = ids(session, 20).tolist()
    fresh = list(session.generate_tokens(prompt, 12, ignore_eos=True))
    session.reset()
    session.prefill(prompt[:15])
    assert list(session.generate_tokens(prompt, 12, ignore_eos=True, reuse=True)) == fresh


def test_the_cache_grows_to_the_context(files) -> None:
    with edge_mmllm.load(files["smollm2"], threads=2, context=2048) as session:
        prompt = ids(session, 1500)
        small = session.state_capacity_bytes
        session.prefill(prompt[:1000])
        snapshot = session.snapshot()
        expected = session.prefill(prompt[1000:])
        assert session.state_capacity_bytes == 2 * small
        assert session.engine.capacity == 2048
        full = session.snapshot()
        session.restore(snapshot)
        assert np.array_equal(session.prefill(prompt[1000:]), expected)
    with edge_mmllm.load(files["smollm2"], threads=2, context=2048) as session:
        session.restore(full)  # into a cache that is still small
        assert session.position == 1500
        assert np.array_equal(session.logits, expected)
        greedy(session, 2)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc")
def test_a_file_is_mapped_or_read(files, tmp_path) -> None:
    own = tmp_path / "own.gguf"  # which no session of another test can have mapped still
    shutil.copyfile(files["rwkv7"], own)
    found = []
    for mmap in (True, False):
        with edge_mmllm.load(own, threads=1, mmap=mmap) as session:
            maps = Path("/proc/self/maps").read_text()
            assert (str(own.resolve()) in maps) == mmap
            found.append(session.prefill(ids(session, 30)))
    assert np.array_equal(*found)


def test_threads_are_those_asked_for(files) -> None:
    from edge_mmllm.profiling.machine import default_threads

    for asked, expected in ((1, 1), (2, 2), (None, default_threads())):
        with edge_mmllm.load(files["rwkv7"], threads=asked) as session:
            context = session.engine._context
            api = session.engine._api
            assert session.engine.threads == expected
            assert api.llama_n_threads(context) == api.llama_n_threads_batch(context) == expected


def test_text_of_the_files_own_tokenizer(files) -> None:
    with edge_mmllm.load(files["smollm2"], threads=2, context=512) as session:
        text = session.text
        for words in ("Once upon a time", "  naïve 日本 🎉\n\n", "<|im_start|>user\nHi<|im_end|>"):
            found = text.encode(words)
            assert text.decode(found, skip_special_tokens=False) == words
            stream = text.stream()
            shown = "".join(stream.push(i) for i in found) + stream.flush()
            assert shown == text.decode(found)
        assert text.decode(text.encode("a<|im_end|>")) == "a"
        asked = [{"role": "user", "content": "Name three colours."}]
        answer = "".join(session.generate(asked, max_new_tokens=16))
        assert "Red" in answer
    with pytest.raises(SessionClosed):
        text.encode("a")


def test_the_same_tokens_as_tokenizers(files, tmp_path) -> None:
    from edge_mmllm.text import Text
    from edge_mmllm_export.checkpoints import open_checkpoint

    with edge_mmllm.load(files["smollm2"], threads=2, context=512) as session:
        assets = open_checkpoint(files["smollm2"]).text()
        theirs = Text(assets.spec, assets.tokenizer_json)
        words = (ROOT / "README.md").read_text(encoding="utf-8")
        assert session.text.encode(words) == theirs.encode(words)


def test_the_command_line_runs_a_file(files) -> None:
    words = ["run", files["smollm2"], "--prompt", "Name three colours.", "--json"]
    words += ["--max-new-tokens", 16, "--context", 512]
    done = subprocess.run(
        [sys.executable, "-m", "edge_mmllm", *map(str, words)], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert "Red" in told["text"]
    assert told["engine"] == "gguf"
    assert not done.stderr


def test_files_that_llama_refuses(files, tmp_path) -> None:
    data = files["rwkv7"].read_bytes()
    path = tmp_path / "bad.gguf"
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(CorruptBundle, match="truncated"):
        edge_mmllm.load(path)
    path.write_bytes(b"GGUF" + b"\xff" * 100)
    with pytest.raises(UnsupportedBundle, match="version"):
        edge_mmllm.load(path)
    path.write_bytes(data.replace(b"blk.1.attn_norm.weight", b"blk.1.attn_worm.weight"))
    with pytest.raises(CorruptBundle, match=r"llama\.cpp cannot use"):
        edge_mmllm.load(path)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", r"crashed on it \(signal 11\)"),
        ("import sys; print('[' * 10**6); sys.exit()", "crashed on it"),
        ("import time; time.sleep(60)", "not loaded within 1 s"),
        (
            "from edge_mmllm_runtime.gguf import trial as t; t.describe = lambda _: b'x' * 2**33;"
            "t.main('x', 0)",
            "MemoryError",
        ),
        (
            "from edge_mmllm_runtime.gguf import llama, trial as t; import os\n"
            "t._confine(0)\nwhile True: os.write(2, bytes(1 << 20))",
            "crashed on it|signal 25|File too large",
        ),
    ],
)
def test_what_becomes_of_the_child(files, monkeypatch, code, message) -> None:
    from edge_mmllm_runtime.gguf import trial as gguf_trial

    python = gguf_trial.python_command
    monkeypatch.setattr(gguf_trial, "python_command", lambda _: python(code))
    monkeypatch.setattr(gguf_trial, "_PATIENCE_S", 1 if "sleep" in code else 60)
    with pytest.raises(CorruptBundle, match=message):
        edge_mmllm.load(files["rwkv7"])


def test_a_file_that_changes_meanwhile(files, tmp_path, monkeypatch) -> None:
    from edge_mmllm_runtime.gguf import file as gguf_file

    path = tmp_path / "model.gguf"
    path.write_bytes(files["rwkv7"].read_bytes())
    try_file = gguf_file.try_file

    def swap(place, size):
        told = try_file(place, size)
        path.write_bytes(files["rwkv7"].read_bytes())
        return told

    monkeypatch.setattr(gguf_file, "try_file", swap)
    with pytest.raises(CorruptBundle, match="changed while"):
        edge_mmllm.load(path)


def test_what_is_no_decoder_alone(files, monkeypatch) -> None:
    from edge_mmllm_runtime.gguf import file as gguf_file

    monkeypatch.setattr(gguf_file, "try_file", lambda *_: {"unsupported": "t5"})
    with pytest.raises(UnsupportedBundle, match="t5"):
        edge_mmllm.load(files["rwkv7"])
