"""`.state` files: round trips, what storage costs, and what a damaged or foreign file does."""

from __future__ import annotations

import json
import os
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
import toys

from edge_mmllm.errors import (
    ContextFull,
    CorruptState,
    SessionError,
    StateMismatch,
    UsageError,
)
from edge_mmllm.spec import CAPACITY, StateSpec
from edge_mmllm_runtime import statefile
from edge_mmllm_runtime.snapshot import Snapshot
from edge_mmllm_runtime.storage import BLOCK, pack, packed_bytes, unpack

IDS = np.random.default_rng(1).integers(0, toys.VOCAB, 100)


@pytest.fixture(params=["recurrent", "attention"])
def toy(request, tmp_path):
    (tmp_path / "toy").mkdir()
    return getattr(toys, request.param)(tmp_path / "toy")


@pytest.fixture
def saved(toy, tmp_path):
    """A state of 40 tokens in a file."""
    with toy.session() as session:
        session.prefill(IDS[:40])
        session.save_state(tmp_path / "s.state")
    return tmp_path / "s.state"


def test_a_state_survives_a_file_and_another_session(toy, tmp_path):
    with toy.session() as session:
        session.prefill(IDS[:40])
        size = session.save_state(tmp_path / "s.state")
        logits = session.logits
        expected = session.decode(5)
        state_bytes = toy.spec.state_bytes(40)
    assert (tmp_path / "s.state").stat().st_size == size
    assert state_bytes < size < state_bytes + 4096
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["s.state"]
    with toy.session() as other:
        other.prefill(IDS[:3])
        assert other.load_state(tmp_path / "s.state") == other.position == 40
        assert other.tokens == tuple(IDS[:40])
        assert np.array_equal(other.logits, logits)
        assert np.array_equal(other.decode(5), expected)
        other.restore(Snapshot.load(tmp_path / "s.state"))
        assert np.array_equal(other.decode(5), expected)


def test_extras_go_in_while_they_fit(toy, tmp_path):
    """256 logits take 1 KB, 2,000 ids 8 KB: only the first fit."""
    if toy.spec.context_length:
        toy = toys.attention(tmp_path, context=4096)
    path, ids = tmp_path / "s.state", np.tile(IDS, 20)
    with toy.session() as session:
        session.prefill(ids)
        snapshot = session.snapshot()
        bare = snapshot.save(path)
        assert bare < snapshot.size_bytes + 4096
        found = Snapshot.load(path)
        assert found.tokens is None
        assert np.array_equal(found.logits, snapshot.logits)
        assert snapshot.save(path, everything=True) > snapshot.size_bytes + 8000
        found = Snapshot.load(path)
        assert found.tokens == snapshot.tokens
        assert np.array_equal(found.data, snapshot.data)
        replace(snapshot, logits=np.zeros(2000, np.float32)).save(path)
        assert Snapshot.load(path).logits is None


def test_an_empty_state(toy, tmp_path):
    with toy.session() as session:
        session.save_state(tmp_path / "s.state")
        session.prefill(IDS[:5])
        assert session.load_state(tmp_path / "s.state") == 0
        assert session.tokens == ()
        expected = session.prefill(IDS)
        session.reset()
        assert np.array_equal(session.prefill(IDS), expected)


def test_the_layout_is_as_documented(tmp_path):
    """Reads the file with nothing but struct, json and zlib: see docs/state.md."""
    (tmp_path / "toy").mkdir()
    toy = toys.recurrent(tmp_path / "toy")
    with toy.session() as session:
        session.prefill(IDS[:40])
        session.save_state(tmp_path / "s.state")
        logits, (state,) = session.logits, session.engine.save(40).values()
        raw = (tmp_path / "s.state").read_bytes()
        assert raw[:8] == b"\x89EDGE\r\n\x1a"
        version, told, payload, checksum, header_checksum = struct.unpack_from("<IIQII", raw, 8)
        at = 32 + told
        assert (version, at % 64, len(raw)) == (1, 0, at + payload)
        assert json.loads(raw[32:at]) == {
            "bundle_sha256": "0" * 64, "position": 40, "storage": "f32",
            "states_bytes": 4 * toys.HIDDEN, "logits": toys.VOCAB, "tokens": 40,
        }  # fmt: skip
        assert checksum == zlib.crc32(raw[at:])
        assert header_checksum == zlib.crc32(raw[:28] + raw[32:at])
        values = np.frombuffer(raw, "<f4", toys.HIDDEN + toys.VOCAB, at)
        assert np.array_equal(values[: toys.HIDDEN], state[0])
        assert np.array_equal(values[toys.HIDDEN :], logits)
        assert np.array_equal(np.frombuffer(raw[-160:], "<i4"), IDS[:40])


# -- storage ------------------------------------------------------------------------------------

SPECS = (
    StateSpec("conv", (1, 3, 50), "float32", "conv"),
    StateSpec("ssm", (1, 4, 50), "float32", "recurrent"),
    StateSpec("k", (1, 2, CAPACITY, 24), "float32", "kv"),
    StateSpec("v", (1, 2, CAPACITY, 24), "float16", "kv"),
    StateSpec("h", (1, 7), "float16", "shift"),
    StateSpec("n", (1, 3), "int64", "recurrent"),
)


def states_at(position):
    rng = np.random.default_rng(0)
    return {s.name: (rng.standard_normal(s.at(position)) * 10).astype(s.dtype) for s in SPECS}


@pytest.mark.parametrize("position", [0, 1, 11])
def test_storage_is_as_documented(position):
    states = states_at(position)
    blocks = [-(-200 // BLOCK), *[-(-48 * position // BLOCK)] * 2]
    expected = {
        "f32": 4 * 350 + 48 * position * 6 + 14 + 24,
        "f16": 2 * 350 + 48 * position * 4 + 14 + 24,
        "int8": 2 * 150 + 200 + 48 * position * 2 + 4 * sum(blocks) + 14 + 24,
    }
    for storage, size in expected.items():
        data = pack(SPECS, states, position, storage)
        assert data.nbytes == packed_bytes(SPECS, position, storage) == size
        found = unpack(SPECS, data, position, storage)
        for spec in SPECS:
            a, b = states[spec.name], found[spec.name]
            assert (b.dtype, b.shape) == (a.dtype, a.shape)
            exact = spec.dtype == "int64" or storage == "f32"
            exact |= spec.dtype == "float16" and (storage == "f16" or spec.kind == "shift")
            if exact:
                assert np.array_equal(a, b)
            elif storage == "int8" and spec.kind != "conv":
                assert within_a_block(a, b, spec.dtype)
            else:
                assert np.array_equal(a.astype(np.float16), b)


def within_a_block(a, b, dtype):
    """Every value is within half a step of its block's own scale, and most are not exact."""
    a, b = (np.asarray(x, np.float32).reshape(-1) for x in (a, b))
    for begin in range(0, len(a), BLOCK):
        x, y = a[begin : begin + BLOCK], b[begin : begin + BLOCK]
        step = np.abs(x).max() / 127
        slack = 2e-3 * np.abs(x).max() if dtype == "float16" else 1e-6
        if np.abs(x - y).max() > step / 2 + slack:
            return False
    return not np.array_equal(a, b) or not len(a)


@pytest.mark.parametrize("values", [0.0, 1e-45, 1e-40, 3e38])
def test_int8_takes_extreme_blocks(values):
    spec = (StateSpec("s", (1, 70), "float32", "recurrent"),)
    state = {"s": np.full((1, 70), values, np.float32) * np.where(np.arange(70) % 2, -1, 1)}
    state["s"] = state["s"].astype(np.float32)
    found = unpack(spec, pack(spec, state, 3, "int8"), 3, "int8")["s"]
    assert np.allclose(found, state["s"], rtol=1e-6, atol=1e-38)


@pytest.mark.parametrize(
    ("storage", "value"), [("f16", 1e5), ("f16", np.nan), ("int8", np.inf), ("int8", np.nan)]
)
def test_a_value_that_does_not_fit_is_an_error(storage, value):
    spec = (StateSpec("s", (1, 70), "float32", "recurrent"),)
    state = {"s": np.ones((1, 70), np.float32)}
    state["s"][0, 66] = value
    with pytest.raises(SessionError, match="does not fit"):
        pack(spec, state, 3, storage)
    pack(spec, state, 3, "f32")


@pytest.mark.parametrize(("storage", "error"), [("f16", 2e-3), ("int8", 3e-2)])
def test_small_storage_drifts_a_little(toy, tmp_path, storage, error):
    with toy.session() as session:
        session.prefill(IDS[:40])
        exact, small = session.snapshot(), session.snapshot(storage)
        small.save(tmp_path / "s.state")
        expected = session.decode(5)
        session.restore(small)
        found = session.decode(5)
        assert session.load_state(tmp_path / "s.state") == 40
        assert np.array_equal(session.decode(5), found)
        assert 0 < np.abs(found - expected).max() < error * np.abs(expected).max()
        assert small.size_bytes < exact.size_bytes * (0.51 if storage == "f16" else 0.32)
        with pytest.raises(UsageError, match="storage"):
            session.snapshot("int4")


# -- distrust -----------------------------------------------------------------------------------


def test_a_state_of_another_bundle_is_refused(toy, saved):
    with toy.session(sha="1" * 64) as other:
        other.prefill(IDS[:2])
        with pytest.raises(StateMismatch, match="another bundle") as caught:
            other.load_state(saved)
        assert (caught.value.expected, caught.value.found) == ("1" * 64, "0" * 64)
        with pytest.raises(StateMismatch, match="another bundle"):
            other.restore(Snapshot.load(saved))
        assert other.tokens == tuple(IDS[:2])


def test_a_state_too_long_for_the_context(tmp_path):
    (tmp_path / "toy").mkdir()
    toy, path = toys.attention(tmp_path / "toy"), tmp_path / "s.state"
    with toy.session() as session:
        session.prefill(IDS[:40])
        session.save_state(path)
    with pytest.raises(ContextFull):
        Snapshot.load(path, context=39)
    with toy.session(39) as small:
        with pytest.raises(ContextFull):
            small.load_state(path)
        assert small.position == 0


def test_every_flipped_bit_is_found(toy, saved):
    raw = bytearray(saved.read_bytes())
    rng = np.random.default_rng(2)
    places = [*range(400), *rng.integers(400, len(raw), 100)]
    with toy.session() as session:
        session.prefill(IDS[:2])
        for place in places:
            bad = raw.copy()
            bad[place] ^= 1 << int(rng.integers(8))
            saved.write_bytes(bad)
            with pytest.raises((CorruptState, StateMismatch)):
                session.load_state(saved)
            with pytest.raises(CorruptState):
                Snapshot.load(saved)
        assert session.tokens == tuple(IDS[:2])


def test_every_other_length_is_found(toy, saved):
    raw = saved.read_bytes()
    bad = [raw[:n] for n in (*range(300), len(raw) // 2, len(raw) - 1)]
    for content in (*bad, raw + b"\0", b"nonsense" * 50, b"\0" * len(raw)):
        saved.write_bytes(content)
        with pytest.raises(CorruptState):
            Snapshot.load(saved)


def forged(header, payload=b"", *, told=None, size=None, version=1):
    """A file whose checksums are right, whatever it says."""
    text = json.dumps(header).encode() if told is None else told
    length = len(payload) if size is None else size
    prefix = struct.pack(
        "<8sIIQI", b"\x89EDGE\r\n\x1a", version, len(text), length, zlib.crc32(payload)
    )
    return prefix + struct.pack("<I", zlib.crc32(text, zlib.crc32(prefix))) + text + payload


GOOD = {
    "bundle_sha256": "0" * 64,
    "position": 3,
    "storage": "f32",
    "states_bytes": 4 * toys.HIDDEN,
    "logits": 0,
    "tokens": 0,
}


CONSISTENT = [
    forged(GOOD | {"states_bytes": 64}, bytes(64)),
    forged(GOOD | {"states_bytes": 0, "logits": 32}, bytes(128)),
    forged(GOOD | {"logits": 32}, bytes(256)),
]


@pytest.mark.parametrize(
    "content",
    [
        *CONSISTENT,
        forged(GOOD | {"position": -1}, bytes(128)),
        forged(GOOD | {"position": 3.0}, bytes(128)),
        forged(GOOD | {"position": True}, bytes(128)),
        forged(GOOD | {"position": 1 << 70}, bytes(128)),
        forged(GOOD | {"storage": "f64"}, bytes(128)),
        forged(GOOD | {"storage": ["f32"]}, bytes(128)),
        forged(GOOD | {"states_bytes": 1 << 50}, bytes(128)),
        forged(GOOD | {"states_bytes": 1 << 50}, bytes(128), size=1 << 50),
        forged(GOOD | {"logits": 1 << 52}, bytes(128)),
        forged(GOOD | {"tokens": 2}, bytes(136)),
        forged(GOOD | {"bundle_sha256": "0" * 63}, bytes(128)),
        forged(GOOD | {"bundle_sha256": None}, bytes(128)),
        forged(GOOD | {"shape": [1, 32]}, bytes(128)),
        forged({k: v for k, v in GOOD.items() if k != "tokens"}, bytes(128)),
        forged([GOOD], bytes(128)),
        forged(GOOD, bytes(128), version=2),
        forged(GOOD, bytes(128), size=64),
        forged(None, told=b"[" * 2000),
        forged(None, told=b'{"position":' + b"9" * 1900 + b"}"),
        forged(None, told=b"\xff\xfe"),
        forged(None, bytes(128), told=json.dumps(GOOD).encode() + b" " * 4000),
    ],
    ids=range(24),
)
def test_hostile_files_are_refused(content, tmp_path):
    """By themselves, but for those that contradict only the contract of the bundle."""
    (tmp_path / "toy").mkdir()
    path = tmp_path / "s.state"
    with toys.recurrent(tmp_path / "toy").session() as session:
        path.write_bytes(forged(GOOD, bytes(128)))
        assert session.load_state(path) == 3
        path.write_bytes(content)
        with pytest.raises(CorruptState, match="the state file") as caught:
            session.load_state(path)
        assert session.position == 3
    if "contradicts its bundle" in str(caught.value):
        assert content in CONSISTENT
        assert Snapshot.load(path).position == 3
    else:
        with pytest.raises(CorruptState):
            Snapshot.load(path)


def test_sizes_are_checked_before_memory_is_taken(tmp_path, monkeypatch):
    """A sparse file of a terabyte that says so truly."""
    (tmp_path / "toy").mkdir()
    path, size = tmp_path / "s.state", 1 << 40
    path.write_bytes(forged(GOOD | {"states_bytes": size}, size=size))
    os.truncate(path, path.stat().st_size + size)
    with toys.recurrent(tmp_path / "toy").session() as session:
        monkeypatch.setattr(np, "empty", lambda *a: pytest.fail("it took memory"))
        with pytest.raises(CorruptState, match="contradicts its bundle"):
            session.load_state(path)


def test_what_is_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, error in (("pipe", CorruptState), ("none", OSError), (".", (CorruptState, OSError))):
        with pytest.raises(error, match="regular file" if name == "pipe" else None):
            Snapshot.load(tmp_path / name)
        assert not statefile.is_state_file(tmp_path / name)


def test_a_file_is_replaced_not_written_over(toy, saved):
    """Who has the old one open, or is killed while writing, has a whole file."""
    before = saved.read_bytes()
    with saved.open("rb") as old, toy.session() as session:
        session.prefill(IDS)
        session.save_state(saved)
        assert old.read() == before
    assert saved.read_bytes() != before


def test_a_failed_write_leaves_the_old_file(toy, saved, monkeypatch):
    before = saved.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with toy.session() as session:
        session.prefill(IDS)
        with pytest.raises(OSError, match="No space"):
            session.save_state(saved)
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir() if p.is_file()] == ["s.state"]
