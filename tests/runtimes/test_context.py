"""The context over the onnxruntime engine: prefill, decode, snapshots, limits."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
import toys

from edge_mmllm.errors import (
    Cancelled,
    ContextFull,
    CorruptBundle,
    SessionClosed,
    SessionError,
    StateMismatch,
    UsageError,
)
from edge_mmllm_runtime import context as context_module

IDS = np.random.default_rng(1).integers(0, toys.VOCAB, 100)
MODELS = {
    "recurrent": toys.recurrent,
    "embeds": lambda folder: toys.recurrent(folder, embeds=True),
    "attention": toys.attention,
}


@pytest.fixture(params=MODELS)
def toy(request, tmp_path):
    return MODELS[request.param](tmp_path)


def close_to(found, expected):
    return np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("chunk", [1, 7, 64, 512])
def test_prefill_in_chunks_equals_the_reference(toy, chunk):
    expected = toy.reference(IDS)
    with toy.session(chunk=chunk) as session:
        assert close_to(session.prefill(IDS, logits="all"), expected)
        assert session.position == len(IDS)
        session.reset()
        last = session.prefill(list(IDS))
        assert last.shape == (toys.VOCAB,)
        assert close_to(last, expected[-1])


def test_logits_of_chosen_positions(toy):
    with toy.session(chunk=16) as session:
        every = session.prefill(IDS, logits="all")
        for chosen in ([0], [99], [3, 50, 17, 50], np.array([15, 16, 98])):
            session.reset()
            rows = session.engine.forward
            wanted = []
            session.engine.forward = lambda c, p, r, rows=rows, wanted=wanted: (
                wanted.append(len(r)) or rows(c, p, r)
            )
            found = session.prefill(IDS, logits=chosen)
            session.engine.forward = rows
            assert sum(wanted) == len({*np.asarray(chosen).tolist(), 99})
            assert found.shape == (len(chosen), toys.VOCAB)
            assert close_to(found, every[np.asarray(chosen)])
            assert close_to(session.logits, every[-1])
        for bad in ([], [100], [-1], "first", [[1]], [0.5], None, 3, [True]):
            with pytest.raises(UsageError, match="logits"):
                session.prefill(IDS, logits=bad)
        assert session.position == 100


def test_token_by_token_equals_the_reference(toy):
    expected = toy.reference(IDS)
    with toy.session() as session:
        found = np.stack([session.decode(int(i)) for i in IDS])
    assert close_to(found, expected)


def test_steps_and_chunks_mix(toy):
    expected = toy.reference(IDS)
    with toy.session(chunk=8) as session:
        session.prefill(IDS[:5])
        for i in IDS[5:8]:
            session.decode(i)
        session.prefill(IDS[8:50])
        session.decode(IDS[50])
        assert close_to(session.prefill(IDS[51:], logits="all"), expected[51:])


def test_reset_forgets_everything(toy):
    with toy.session() as session:
        first = session.prefill(IDS)
        session.decode(3)
        session.reset()
        assert (session.position, session.tokens, session.logits) == (0, (), None)
        assert np.array_equal(session.prefill(IDS), first)


def test_results_are_the_callers(toy):
    with toy.session() as session:
        first = session.decode(1)
        kept = first.copy()
        session.decode(2)
        assert np.array_equal(first, kept)
        prefilled = session.prefill([1, 2])
        kept = prefilled.copy()
        session.decode(2)
        assert np.array_equal(prefilled, kept)


def test_embeddings_equal_ids(tmp_path):
    toy = toys.recurrent(tmp_path, embeds=True)
    with toy.session() as session:
        expected = session.prefill(IDS, logits="all")
        embeddings = session.engine.embed(IDS)
        session.reset()
        assert np.array_equal(session.prefill(embeddings, logits="all"), expected)
        assert session.tokens == (-1,) * len(IDS)
        with pytest.raises(UsageError, match=r"wrong shape"):
            session.prefill(embeddings[:, 1:])


def test_branches_are_exact(toy):
    with toy.session() as session:
        session.prefill(IDS[:40])
        snapshot = session.snapshot()
        runs = []
        for ids in (IDS[40:], IDS[40:60][::-1], IDS[40:]):
            session.restore(snapshot)
            assert session.position == 40
            assert session.tokens == tuple(IDS[:40])
            runs.append([session.decode(i) for i in ids])
        assert all(np.array_equal(a, b) for a, b in zip(runs[0], runs[2], strict=True))
        assert not np.array_equal(runs[0][5], runs[1][5])
        assert close_to(np.stack(runs[0]), toy.reference(IDS)[40:])


def test_snapshot_holds_used_kv_only_and_fits_other_contexts(tmp_path):
    toy = toys.attention(tmp_path)
    with toy.session() as session:
        session.prefill(IDS[:40])
        snapshot = session.snapshot()
        expected = session.decode(5)
    assert snapshot.size_bytes == toy.spec.state_bytes(40)
    with toy.session(48) as smaller:
        smaller.restore(snapshot)
        assert close_to(smaller.decode(5), expected)
    with toy.session(39) as too_small:
        too_small.prefill(IDS[:3])
        with pytest.raises(ContextFull):
            too_small.restore(snapshot)
        assert too_small.tokens == tuple(IDS[:3])


def test_snapshot_of_another_bundle_is_refused(toy):
    with toy.session() as session, toy.session(sha="1" * 64) as other:
        session.prefill(IDS[:4])
        other.prefill(IDS[:2])
        with pytest.raises(StateMismatch):
            other.restore(session.snapshot())
        assert other.position == 2


def test_damaged_snapshot_is_refused_whole(toy):
    with toy.session() as session:
        session.prefill(IDS[:4])
        snapshot = session.snapshot()
        expected = session.decode(1)
        session.restore(snapshot)
        for damage in (
            {"data": snapshot.data[:0]},
            {"data": snapshot.data[4:]},
            {"data": np.append(snapshot.data, snapshot.data[:4])},
            {"storage": "f16"},
            {"position": -1},
            {"position": 3},
            {"position": 1 << 60, "tokens": None},
            {"logits": np.zeros(3, np.float32)},
        ):
            if damage.get("position", 0) > 4 and not toy.spec.states[0].grows:
                continue  # a constant state fits any position
            with pytest.raises((StateMismatch, ContextFull)):
                session.restore(replace(snapshot, **damage))
        assert np.array_equal(session.decode(1), expected)


def test_a_constant_state_has_no_last_position(tmp_path):
    with toys.recurrent(tmp_path).session() as session:
        session.prefill(IDS[:40])
        near = session.snapshot()
        expected = [session.decode(5), *session.prefill(IDS[40:], logits="all")]
        size = session.state_bytes
        for start in (1 << 16, (1 << 31) - 2, (1 << 40) + 1):
            far = replace(near, position=start, tokens=None)
            session.restore(far)
            found = [session.decode(5), *session.prefill(IDS[40:], logits="all")]
            assert session.position == start + 61
            assert np.array_equal(found, expected)
            assert (session.tokens, session.state_bytes) == (None, size)
            again = session.snapshot()
            session.reset()
            session.restore(again)
            assert session.position == start + 61


def test_context_full_changes_nothing(tmp_path):
    toy = toys.attention(tmp_path)
    with toy.session(50, chunk=8) as session:
        session.prefill(IDS[:45])
        with pytest.raises(ContextFull) as caught:
            session.prefill(IDS[45:55])
        assert (caught.value.position, caught.value.requested) == (45, 10)
        assert caught.value.capacity == 50
        found = session.prefill(IDS[45:50], logits="all")
        assert close_to(found, toy.reference(IDS[:50])[45:])
        with pytest.raises(ContextFull):
            session.decode(1)
        assert session.position == 50


@pytest.mark.parametrize("error", [Cancelled("enough"), KeyboardInterrupt()])
def test_cancelled_prefill_is_undone(toy, error):
    seen = []

    def progress(done, total):
        seen.append((done, total))
        if done == 32:
            raise error

    with toy.session(chunk=16) as session:
        session.prefill(IDS[:10])
        with pytest.raises(type(error)):
            session.prefill(IDS[10:90], progress=progress)
        assert seen == [(16, 80), (32, 80)]
        assert session.tokens == tuple(IDS[:10])
        found = session.prefill(IDS[10:], logits="all")
        assert close_to(found, toy.reference(IDS)[10:])


def test_failing_engine_leaves_the_state(toy, monkeypatch):
    with toy.session(chunk=16) as session:
        session.prefill(IDS[:10])
        forward, calls = session.engine.forward, []

        def fail(*arguments):
            calls.append(1)
            if len(calls) == 3:
                raise SessionError("broken")
            return forward(*arguments)

        monkeypatch.setattr(session.engine, "forward", fail)
        with pytest.raises(SessionError, match="broken"):
            session.prefill(IDS[10:])
        monkeypatch.undo()
        assert close_to(session.prefill(IDS[10:]), toy.reference(IDS)[-1])


@pytest.mark.parametrize(
    "bad",
    [[], [-1], [toys.VOCAB], [1.5], [True], ["a"], [1 << 70], np.array([[1]]), np.array([0.5])],
    ids=str,
)
def test_bad_ids_are_refused_before_anything_happens(bad, tmp_path):
    with toys.recurrent(tmp_path).session() as session:
        session.prefill(IDS[:4])
        version = session.version
        with pytest.raises(UsageError):
            session.prefill(bad)
        assert (session.version, session.position) == (version, 4)


def test_positions_must_be_the_next_ones(toy):
    with toy.session() as session:
        session.prefill(IDS[:4], positions=[0, 1, 2, 3])
        with pytest.raises(UsageError):
            session.prefill(IDS[:2], positions=[0, 1])
        session.prefill(IDS[4:6], positions=np.array([4, 5]))
        assert session.position == 6


def test_recurrent_state_stays_constant(tmp_path):
    with toys.recurrent(tmp_path).session() as session:
        sizes = {session.state_bytes}
        for _ in range(50):
            session.decode(1)
            sizes.add(session.state_bytes)
        session.prefill(np.tile(IDS, 50))
        sizes.add(session.state_bytes)
    assert sizes == {4 * toys.HIDDEN}


def test_kv_state_grows_by_what_is_used(tmp_path):
    with toys.attention(tmp_path).session(64) as session:
        per_token = 2 * toys.LAYERS * toys.KV_HEADS * toys.HEAD_DIM * 4
        session.prefill(IDS[:10])
        assert session.state_bytes == 10 * per_token
        assert session.state_capacity_bytes == 64 * per_token


def test_remembered_tokens_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(context_module, "REMEMBERED_TOKENS", 8)
    with toys.recurrent(tmp_path).session() as session:
        session.prefill(IDS[:8])
        assert session.tokens == tuple(IDS[:8])
        session.decode(1)
        assert session.tokens is None
        snapshot = session.snapshot()
        session.reset()
        assert session.tokens == ()
        session.restore(snapshot)
        assert session.tokens is None


def test_closed_session(toy):
    session = toy.session()
    snapshot = session.snapshot()
    session.close()
    session.close()
    for call in (
        lambda: session.prefill([1]),
        lambda: session.decode(1),
        session.reset,
        session.snapshot,
        lambda: session.restore(snapshot),
        lambda: session.state_capacity_bytes,
    ):
        with pytest.raises(SessionClosed):
            call()


def test_graph_and_manifest_must_agree(tmp_path):
    toy = toys.recurrent(tmp_path)
    state = toy.spec.states[0]
    for spec in (
        replace(toy.spec, states=()),
        replace(toy.spec, states=(replace(state, shape=(1, 7)),)),
        replace(toy.spec, states=(replace(state, dtype="float16"),)),
        replace(toy.spec, vocab_size=7),
        replace(toy.spec, stages={}),
    ):
        with pytest.raises(CorruptBundle):
            replace(toy, spec=spec).engine()
    (tmp_path / "decoder.onnx").write_bytes(b"not a graph")
    with pytest.raises(CorruptBundle):
        toy.engine()


def test_embed_stage_is_loaded_late_and_checked(tmp_path):
    toy = toys.recurrent(tmp_path, embeds=True)
    embed = (tmp_path / "embed.onnx").read_bytes()
    (tmp_path / "embed.onnx").write_bytes((tmp_path / "decoder.onnx").read_bytes())
    with toy.session() as session:
        with pytest.raises(CorruptBundle, match=r"embed\.onnx"):
            session.prefill(IDS)
        (tmp_path / "embed.onnx").write_bytes(embed)
        assert close_to(session.prefill(IDS), toy.reference(IDS)[-1])


def test_states_are_not_copied_by_a_step(toy):
    with toy.session() as session:
        session.prefill(IDS[:4])
        engine = session.engine
        before = {n: tuple(a.ctypes.data for a in p) for n, p in engine._states.pairs.items()}
        changed = [a.copy() for pair in engine._states.pairs.values() for a in pair]
        session.decode(1)
        session.decode(2)
        after = {n: tuple(a.ctypes.data for a in p) for n, p in engine._states.pairs.items()}
        now = [a for pair in engine._states.pairs.values() for a in pair]
        assert before == after
        assert all(address % 64 == 0 for pair in before.values() for address in pair)
        assert not any(np.array_equal(a, b) for a, b in zip(changed, now, strict=True))


@pytest.mark.parametrize(
    "intrude",
    [
        lambda s: s.decode(1),
        lambda s: s.prefill([1, 2]),
        lambda s: s.reset(),
        lambda s: s.rewind(0),
        lambda s: s.snapshot(),
    ],
)
def test_a_callback_cannot_use_the_session(toy, intrude):
    with toy.session(chunk=8) as session, toy.session() as other:
        expected = other.prefill(IDS[:3])
        session.prefill(IDS[:3])
        with pytest.raises(SessionError, match="in use"):
            session.prefill(IDS[3:40], progress=lambda done, total: intrude(session))
        assert session.position == 3
        session.reset()
        np.testing.assert_array_equal(session.prefill(IDS[:3]), expected)


def test_another_thread_cannot_use_the_session(toy):
    inside, done = threading.Event(), threading.Event()

    def wait(*_):
        inside.set()
        done.wait(30)

    with toy.session(chunk=8) as session:
        worker = threading.Thread(
            target=session.prefill, args=(IDS[:20],), kwargs={"progress": wait}
        )
        worker.start()
        inside.wait(30)
        with pytest.raises(SessionError, match="in use"):
            session.decode(1)
        done.set()
        worker.join()
        assert session.position == 20
