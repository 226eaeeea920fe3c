"""`edge-mmllm check`: hashes, golden vectors, and golden vectors made to do harm."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edge_mmllm
from edge_mmllm.bundle import GOLDEN_FILE, MANIFEST_FILE, open_bundle
from edge_mmllm.errors import CorruptBundle
from edge_mmllm_runtime.check import FLOAT_LIMITS, QUANTIZED_LIMITS, limits
from edge_mmllm_runtime.golden import read_golden

VOCAB = 96


@pytest.fixture
def bundle(chat_bundle: Path, tmp_path: Path) -> Path:
    """A judged bundle to damage."""
    return Path(shutil.copytree(chat_bundle, tmp_path / "bundle"))


def _relist(bundle: Path, **members: object) -> None:
    """Makes the manifest fit the files again, as an attacker would."""
    path = bundle / MANIFEST_FILE
    document = json.loads(path.read_text()) | members
    for entry in document["files"]:
        data = (bundle / entry["path"]).read_bytes()
        entry.update(size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    path.write_text(json.dumps(document))


def _arrays(bundle: Path) -> dict[str, Any]:
    with np.load(bundle / GOLDEN_FILE, allow_pickle=False) as data:
        return dict(data)


def test_a_sound_bundle(cli: Callable[..., Any], chat_bundle: Path) -> None:
    done = cli("check", chat_bundle, "--json")
    assert done.status == 0
    told = done.json
    assert told["ok"] is True
    assert [p["name"] for p in told["passes"]] == ["prefill", "decode"]
    for one in told["passes"]:
        assert one["top1_agreement_clear"] == 1.0
        assert one["clear_positions"] > 5
        assert one["rows"] >= 2
        assert one["kl_mean"] < 1e-5
        assert not one["breaches"]
    plain = cli("check", chat_bundle, "--threads", 1)
    assert plain.stdout == ""
    assert "the bundle is sound" in plain.stderr
    assert edge_mmllm.check(chat_bundle).ok


def test_a_flipped_bit_is_named(cli: Callable[..., Any], bundle: Path) -> None:
    data = bytearray((bundle / "weights.bin").read_bytes())
    data[1000] ^= 1
    (bundle / "weights.bin").write_bytes(data)
    done = cli("check", bundle)
    assert done.status == 1
    assert "weights.bin" in done.stderr
    assert "the bundle failed its check" in done.stderr
    told = cli("check", bundle, "--json")
    assert told.status == 1
    assert told.json["ok"] is False
    assert len(told.json["problems"]) == 1
    assert not told.json["passes"]


def test_all_damage_is_listed_at_once(cli: Callable[..., Any], bundle: Path) -> None:
    (bundle / "weights.bin").unlink()
    (bundle / "tokenizer.json").write_text("{}")
    (bundle / "note.txt").write_text("mine")
    told = cli("check", bundle, "--json").json
    assert len(told["problems"]) == 2
    assert told["extra"] == ["note.txt"]


def test_without_golden_vectors_only_hashes_are_checked(
    cli: Callable[..., Any], base_bundle: Path
) -> None:
    done = cli("check", base_bundle)
    assert done.status == 0
    assert "not judged" in done.stderr
    assert "only hashes" in done.stderr
    assert cli("check", base_bundle, "--json").json["passes"] == []


def test_weights_that_changed_with_their_hashes_are_found(
    cli: Callable[..., Any], bundle: Path
) -> None:
    # What no hash can tell: a bundle that is whole, but answers otherwise than where it was made.
    data = np.fromfile(bundle / "weights.bin", np.float32)
    rng = np.random.default_rng(0)
    (data * (1 + 0.2 * rng.standard_normal(data.shape))).astype(np.float32).tofile(
        bundle / "weights.bin"
    )
    _relist(bundle)
    told = cli("check", bundle, "--json")
    assert told.status == 1
    assert not told.json["problems"]
    assert all("kl_mean" in " ".join(p["breaches"]) for p in told.json["passes"])
    assert "kl_mean" in cli("check", bundle).stderr


def test_another_best_token_is_found(cli: Callable[..., Any], bundle: Path) -> None:
    arrays = _arrays(bundle)
    arrays["top1"] = (arrays["top1"] + 1) % VOCAB
    np.savez(bundle / GOLDEN_FILE, **arrays)
    _relist(bundle)
    told = cli("check", bundle, "--json")
    assert told.status == 1
    assert all("top1_agreement_clear 0" in p["breaches"][0] for p in told.json["passes"])


def test_logits_that_are_not_finite_are_found(cli: Callable[..., Any], bundle: Path) -> None:
    data = np.fromfile(bundle / "weights.bin", np.float32)
    data[:] = np.nan
    data.tofile(bundle / "weights.bin")
    _relist(bundle)
    told = cli("check", bundle, "--json")
    assert told.status == 1
    assert "not finite" in told.json["passes"][0]["breaches"][0]
    assert told.json["passes"][0]["kl_mean"] is None


def test_limits_follow_the_weights(chat_bundle: Path, base_bundle: Path) -> None:
    assert limits(open_bundle(chat_bundle)) == FLOAT_LIMITS
    assert limits(open_bundle(base_bundle)) == QUANTIZED_LIMITS


# -- golden.npz made to do harm -----------------------------------------------------------------


def _golden(rows: int = 2, n: int = 4, vocab: int = 8) -> dict[str, Any]:
    return {
        "ids": np.arange(n, dtype=np.int64),
        "top1": np.zeros(n, np.int32),
        "margin": np.ones(n, np.float32),
        "rows": np.arange(rows, dtype=np.int64),
        "logits": np.zeros((rows, vocab), np.float16),
    }


def _npy(array: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.asanyarray(array), **options)
    return stream.getvalue()


def _header(text: str, data: bytes = b"") -> bytes:
    """A `.npy` file with this header."""
    padded = text.ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded.encode() + data


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was run",))


HUGE = "{'descr': '<i8', 'fortran_order': False, 'shape': (1099511627776,), }"
HOSTILE: dict[str, dict[str, Any]] = {
    "a missing member": {"top1": None},
    "a pickle": {"ids": _npy(np.array([_Evil()], object), allow_pickle=True)},
    "a structured dtype": {"ids": np.zeros(4, [("a", "<i8")])},
    "another dtype": {"ids": np.arange(4, dtype=np.int32)},
    "big-endian": {"ids": np.arange(4, dtype=">i8")},
    "columns first": {"logits": np.asfortranarray(np.zeros((2, 8), np.float16))},
    "a huge shape over no data": {"ids": _header(HUGE)},
    "a negative shape": {"ids": _header(HUGE.replace("1099511627776", "-1"), b"\0" * 32)},
    "a shape that is no tuple": {"ids": _header(HUGE.replace("(1099511627776,)", "'x'"))},
    "a header that is code": {"ids": _header("__import__('os').abort()")},
    "a header without an end": {"ids": _header("{'descr': ((((((((((((((((")},
    "another npy version": {"ids": _npy(np.arange(4, dtype=np.int64), version=(2, 0))},
    "no npy": {"ids": b"hello"},
    "nothing": {"ids": b""},
    "cut short": {"ids": _npy(np.arange(4, dtype=np.int64))[:-8]},
    "a byte too many": {"ids": _npy(np.arange(4, dtype=np.int64)) + b"\0"},
    "no tokens": {n: a[:0] for n, a in _golden().items() if n in ("ids", "top1", "margin")},
    "too many tokens": _golden(n=5000),
    "too many rows": _golden(rows=65, n=70),
    "two dimensions": {"ids": np.zeros((2, 2), np.int64)},
    "ids outside the vocabulary": {"ids": np.full(4, 8, np.int64)},
    "negative ids": {"ids": np.full(4, -1, np.int64)},
    "another length": {"margin": np.ones(3, np.float32)},
    "another vocabulary": {"logits": np.zeros((2, 9), np.float16)},
    "best tokens outside the vocabulary": {"top1": np.full(4, 8, np.int32)},
    "a margin that is not a number": {"margin": np.full(4, np.nan, np.float32)},
    "a negative margin": {"margin": np.full(4, -1, np.float32)},
    "rows beyond the end": {"rows": np.array([0, 4])},
    "rows twice": {"rows": np.array([1, 1])},
    "negative rows": {"rows": np.array([-1, 1])},
    "infinite logits": {"logits": np.full((2, 8), -np.inf, np.float16)},
}


def _write(path: Path, members: dict[str, Any], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, value in members.items():
            if value is not None:
                data = value if isinstance(value, bytes) else _npy(value)
                archive.writestr(f"{name}.npy", data)


def test_what_is_well_formed_is_read(tmp_path: Path) -> None:
    _write(tmp_path / "golden.npz", _golden())
    assert read_golden(tmp_path / "golden.npz", 8).logits.dtype == np.float32


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_golden_vectors_are_a_typed_error(tmp_path: Path, name: str) -> None:
    _write(tmp_path / "golden.npz", _golden() | HOSTILE[name])
    with pytest.raises(CorruptBundle):
        read_golden(tmp_path / "golden.npz", 8)


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = _header("{'descr': '<i8', 'fortran_order': False, 'shape': (8388608,), }", b"\0" * 2**26)
    _write(tmp_path / "golden.npz", _golden() | {"ids": bomb}, zipfile.ZIP_DEFLATED)
    assert (tmp_path / "golden.npz").stat().st_size < 100_000
    read: list[int] = []
    plain = zipfile.ZipExtFile.read

    def counted(self: zipfile.ZipExtFile, n: int | None = -1) -> bytes:
        data = plain(self, n)
        read.append(len(data))
        return data

    monkeypatch.setattr(zipfile.ZipExtFile, "read", counted)
    with pytest.raises(CorruptBundle):
        read_golden(tmp_path / "golden.npz", 8)
    assert 0 < sum(read) < 100_000


def test_any_damage_to_the_file_is_a_typed_error_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "golden.npz"
    _write(path, _golden(), zipfile.ZIP_DEFLATED)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for cut in range(0, len(whole), 7):
        flipped = bytearray(whole)
        flipped[cut] ^= int(rng.integers(1, 256))
        for content in (whole[:cut], bytes(flipped)):
            path.write_bytes(content)
            try:
                read_golden(path, 8)
            except CorruptBundle:
                continue


def test_hostile_golden_vectors_fail_the_check(cli: Callable[..., Any], bundle: Path) -> None:
    _write(bundle / GOLDEN_FILE, _arrays(bundle) | {"ids": _header(HUGE)})
    _relist(bundle)
    done = cli("check", bundle, "--json")
    assert done.status == 1
    assert done.json["error"]["type"] == "CorruptBundle"
    assert GOLDEN_FILE in done.json["error"]["where"]
