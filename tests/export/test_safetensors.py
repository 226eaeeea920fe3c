"""The safetensors reader: values against the safetensors package, every malformed file refused."""

from __future__ import annotations

import json
import struct
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from checkpoint_files import bf16_bytes, entry, safetensors_bytes
from safetensors.numpy import save_file

from edge_mmllm.errors import CheckpointError, CorruptCheckpoint, TensorMismatch, UsageError
from edge_mmllm_export.checkpoints import open_checkpoint
from edge_mmllm_export.checkpoints.safetensors import SafetensorsFile

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    "dtype",
    ["f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?"],
)
def test_values_of_every_dtype(tmp_path: Path, dtype: str) -> None:
    values = (RNG.standard_normal((7, 3, 5)) * 9).astype(dtype)
    save_file({"w": values, "before": np.zeros(3, np.int8)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.layout == "hub"
    assert checkpoint.tensors["w"].shape == (7, 3, 5)
    assert checkpoint.tensors["w"].size_bytes == values.nbytes
    expected = values.astype(np.float32)
    whole = checkpoint.read("w")
    assert whole.dtype == np.float32
    assert whole.flags.c_contiguous
    np.testing.assert_array_equal(whole, expected)
    np.testing.assert_array_equal(checkpoint.read("w", 2, 5), expected[2:5])
    np.testing.assert_array_equal(checkpoint.read("w", 4), expected[4:])
    assert checkpoint.read("w", 3, 3).shape == (0, 3, 5)


def test_bf16_scalar_and_empty(tmp_path: Path) -> None:
    values = np.array([1.5, -2.0, 3.0e38, 0.0078125, np.inf, np.nan], np.float32)
    data = bf16_bytes(values)
    header = {
        "b": entry("BF16", [3, 2], 0, 12),
        "s": entry("BF16", [], 12, 14),
        "e": entry("F32", [0, 4], 14, 14),
    }
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors_bytes(header, data + data[:2]))
    checkpoint = open_checkpoint(path)
    expected = np.frombuffer(
        b"".join(b"\0\0" + data[i : i + 2] for i in range(0, 12, 2)), "<f4"
    ).reshape(3, 2)
    np.testing.assert_array_equal(checkpoint.read("b"), expected)
    assert checkpoint.read("s").shape == ()
    assert checkpoint.read("s") == 1.5
    assert checkpoint.read("e").shape == (0, 4)


def test_a_tile_costs_a_tile(tmp_path: Path) -> None:
    values = RNG.standard_normal((4096, 1024)).astype(np.float16)  # 8 MiB
    save_file({"w": values}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    tracemalloc.start()
    try:
        for row in range(0, 4096, 64):
            checkpoint.read("w", row, row + 64)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20  # 64 rows: 256 KiB as float32, 128 KiB of scratch


def test_reads_from_many_threads(tmp_path: Path) -> None:
    values = RNG.standard_normal((512, 64)).astype(np.float32)
    save_file({"w": values}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda i: checkpoint.read("w", i * 4, i * 4 + 4), range(128)))
    np.testing.assert_array_equal(np.concatenate(parts), values)


def test_shards(tmp_path: Path) -> None:
    first, second = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(4, np.float16)
    save_file({"a": first}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": second}, tmp_path / "model-00002-of-00002.safetensors")
    index = {
        "weight_map": {f: f"model-0000{i}-of-00002.safetensors" for i, f in ((1, "a"), (2, "b"))}
    }
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint.tensors) == {"a", "b"}
    assert [p.name[:11] for p in checkpoint.files] == ["model-00001", "model-00002"]
    np.testing.assert_array_equal(checkpoint.read("a"), first)
    np.testing.assert_array_equal(checkpoint.read("b"), second.astype(np.float32))
    checkpoint.close()
    with pytest.raises(UsageError, match="closed"):
        checkpoint.read("a")


def test_index_lists_all_that_is_missing(tmp_path: Path) -> None:
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "one.safetensors")
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(
        json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.st", "c": "three.st"}})
    )
    with pytest.raises(CorruptCheckpoint, match=r"three\.st, two\.st") as caught:
        open_checkpoint(tmp_path)
    assert "2 of 3 shards" in str(caught.value)
    path.write_text(json.dumps({"weight_map": dict.fromkeys("axyz", "one.safetensors")}))
    with pytest.raises(TensorMismatch) as mismatch:
        open_checkpoint(tmp_path)
    for name in ("x (one.safetensors)", "y (one.safetensors)", "z (one.safetensors)"):
        assert name in str(mismatch.value)


@pytest.mark.parametrize("name", ["../one.safetensors", "/etc/passwd", "a\\b", "..", ""])
def test_index_stays_in_its_folder(tmp_path: Path, name: str) -> None:
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "one.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CorruptCheckpoint, match="outside its folder"):
        open_checkpoint(folder)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {"a": 1}}'])
def test_malformed_index(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CorruptCheckpoint, match=r"index\.json"):
        open_checkpoint(tmp_path)


F32_PAIR = {"good": entry("F32", [2], 0, 8)}

HOSTILE = {
    "empty": (b"", "too short"),
    "seven bytes": (b"\0" * 7, "too short"),
    "header longer than the file": (struct.pack("<Q", 1000) + b"{}", "longer than the file"),
    "header of 2^63": (struct.pack("<Q", 1 << 63) + b"{}", "longer than the file"),
    "no header": (safetensors_bytes(b""), "not JSON"),
    "header is a list": (safetensors_bytes(b"[]"), "not JSON"),
    "header is cut": (safetensors_bytes(b'{"a": {'), "not valid JSON"),
    "nested without end": (safetensors_bytes(b'{"a":' + b"[" * 200_000), "not valid JSON"),
    "not UTF-8": (safetensors_bytes(b'{"\xff": 1}'), "not valid JSON"),
    "duplicate key": (
        safetensors_bytes(
            b'{"bad":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
            b'"bad":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
            b"\0" * 4,
        ),
        "duplicate keys 'bad'",
    ),
    "truncated data": (
        safetensors_bytes(F32_PAIR | {"bad": entry("F32", [4], 8, 24)}, b"\0" * 20),
        "'bad' lies beyond the end",
    ),
    "overlap": (
        safetensors_bytes(F32_PAIR | {"bad": entry("F32", [2], 4, 12)}, b"\0" * 12),
        "'good' and 'bad' overlap",
    ),
    "same range twice": (
        safetensors_bytes(F32_PAIR | {"bad": entry("F32", [2], 0, 8)}, b"\0" * 8),
        "'bad' and 'good' overlap",
    ),
    "hole": (
        safetensors_bytes(F32_PAIR | {"bad": entry("F32", [2], 12, 20)}, b"\0" * 20),
        "hole before tensor 'bad'",
    ),
    "bytes left over": (safetensors_bytes(F32_PAIR, b"\0" * 9), "belong to no tensor"),
    "shape and range differ": (
        safetensors_bytes({"bad": entry("F32", [3], 0, 8)}, b"\0" * 8),
        "'bad' has a size",
    ),
    "unknown dtype": (
        safetensors_bytes({"bad": entry("F31", [2], 0, 8)}, b"\0" * 8),
        "'bad' has a malformed",
    ),
    "negative dimension": (
        safetensors_bytes({"bad": entry("F32", [-2, -1], 0, 8)}, b"\0" * 8),
        "'bad' has a malformed",
    ),
    "fractional dimension": (
        safetensors_bytes({"bad": entry("F32", [2.0], 0, 8)}, b"\0" * 8),
        "'bad' has a malformed",
    ),
    "boolean dimension": (
        safetensors_bytes({"bad": entry("F32", [True], 0, 4)}, b"\0" * 4),
        "'bad' has a malformed",
    ),
    "shape beyond 2^64": (
        safetensors_bytes({"bad": entry("F32", [1 << 40, 1 << 40], 0, 8)}, b"\0" * 8),
        "'bad' has a malformed",
    ),
    "empty but absurd": (
        safetensors_bytes({"bad": entry("F32", [0, 1 << 60], 0, 0)}),
        "'bad' has a malformed",
    ),
    "a thousand dimensions": (
        safetensors_bytes({"bad": entry("F32", [1] * 1000, 0, 4)}, b"\0" * 4),
        "'bad' has a malformed",
    ),
    "offsets reversed": (
        safetensors_bytes({"bad": entry("F32", [2], 8, 0)}, b"\0" * 8),
        "'bad' has a malformed",
    ),
    "offsets missing": (
        safetensors_bytes({"bad": {"dtype": "F32", "shape": [2]}}),
        "'bad' has a malformed",
    ),
    "entry is a number": (safetensors_bytes({"bad": 7}), "'bad' has a malformed"),
    "metadata is a list": (safetensors_bytes({"__metadata__": []}), "__metadata__"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files(tmp_path: Path, case: str) -> None:
    content, message = HOSTILE[case]
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(content)
    with pytest.raises(CorruptCheckpoint) as caught:
        SafetensorsFile(path)
    assert message in str(caught.value)
    assert "hostile.safetensors" in str(caught.value)


def test_a_file_that_shrinks_after_opening(tmp_path: Path) -> None:
    save_file({"w": np.zeros((64, 64), np.float32)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(CorruptCheckpoint, match="ends early"):
        checkpoint.read("w")


def test_wrong_calls(tmp_path: Path) -> None:
    save_file({"model.w": np.zeros((4, 2), np.float32)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(TensorMismatch, match=r"near it: model\.w"):
        checkpoint.read("modl.w")
    for start, stop in ((-1, 2), (0, 5), (3, 2)):
        with pytest.raises(UsageError, match=r"model\.w"):
            checkpoint.read("model.w", start, stop)


def test_float8_needs_scales(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors_bytes({"w": entry("F8_E4M3", [4], 0, 4)}, b"\0" * 4))
    checkpoint = open_checkpoint(path)
    assert checkpoint.tensors["w"].dtype == "F8_E4M3"
    with pytest.raises(CheckpointError, match="'w' has dtype F8_E4M3"):
        checkpoint.read("w")
