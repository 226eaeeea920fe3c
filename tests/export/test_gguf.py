"""The GGUF reader: values against the gguf package, every malformed header refused at once."""

from __future__ import annotations

import struct
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from checkpoint_files import (
    ARRAY,
    BOOL,
    STRING,
    UINT32,
    gguf_bytes,
    gguf_pair,
    gguf_string,
    gguf_tensor,
)
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize, quantize

from edge_mmllm.errors import CheckpointError, CorruptCheckpoint, UsageError
from edge_mmllm_export.checkpoints import open_checkpoint

RNG = np.random.default_rng(0)
PLAIN = {"F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64"}
#: Types the gguf package has arithmetic for (Q8_1, Q8_K and Q1_0 it only sizes).
QUANTIZED = sorted(
    kind.name for kind in GGML_QUANT_SIZES if kind.name not in PLAIN | {"Q8_1", "Q8_K", "Q1_0"}
)


def stored_blocks(kind: GGMLQuantizationType, rows: int, columns: int) -> np.ndarray:
    """Rows of `kind`: quantized where the package can, else random bytes with sane scales."""
    values = RNG.standard_normal((rows, columns)).astype(np.float32)
    try:
        return quantize(values, kind)
    except NotImplementedError:
        block, size = GGML_QUANT_SIZES[kind]
        return RNG.integers(0, 60, (rows, columns // block * size), np.uint8)


def write(path: Path, tensors: dict[str, tuple[np.ndarray, GGMLQuantizationType]]) -> Path:
    writer = GGUFWriter(str(path), "llama")
    writer.add_uint32("llama.block_count", 3)
    writer.add_float32("llama.rope.freq_base", 10000.0)
    writer.add_bool("some.flag", True)
    writer.add_array("short", [1, 2, 3])
    writer.add_array("long", [f"token {i}" for i in range(5000)])
    writer.add_array("long.numbers", list(range(2000)))
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_rows(tmp_path: Path, name: str) -> None:
    kind = GGMLQuantizationType[name]
    data = stored_blocks(kind, 9, 768)
    path = write(tmp_path / "m.gguf", {"w": (data, kind)})
    with np.errstate(all="ignore"):
        (reference,) = (dequantize(t.data, t.tensor_type) for t in GGUFReader(path).tensors)
    checkpoint = open_checkpoint(path)
    assert checkpoint.tensors["w"].dtype == name
    assert checkpoint.tensors["w"].shape == (9, 768)
    assert checkpoint.tensors["w"].size_bytes == data.nbytes
    np.testing.assert_array_equal(checkpoint.read("w"), reference)
    np.testing.assert_array_equal(checkpoint.read("w", 2, 5), reference[2:5])


@pytest.mark.parametrize("dtype", ["f4", "f2", "f8", "i1", "i2", "i4", "i8"])
def test_plain_types_and_shapes(tmp_path: Path, dtype: str) -> None:
    writer = GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    values = (RNG.standard_normal((2, 3, 4)) * 9).astype(dtype)
    writer.add_tensor("w", values)
    writer.add_tensor("v", np.arange(5, dtype=dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.layout == "gguf"
    assert checkpoint.tensors["w"].shape == (2, 3, 4)
    np.testing.assert_array_equal(checkpoint.read("w"), values.astype(np.float32))
    np.testing.assert_array_equal(checkpoint.read("w", 1, 2), values[1:2].astype(np.float32))
    np.testing.assert_array_equal(checkpoint.read("v", 1, 3), [1, 2])


def test_bf16_and_a_quantized_vector(tmp_path: Path) -> None:
    values = RNG.standard_normal((1, 2048)).astype(np.float32)
    bf16, q8 = GGMLQuantizationType.BF16, GGMLQuantizationType.Q8_0
    tensors = {"b": (quantize(values, bf16), bf16), "q": (quantize(values[0], q8), q8)}
    checkpoint = open_checkpoint(write(tmp_path / "m.gguf", tensors))
    np.testing.assert_array_equal(checkpoint.read("b"), dequantize(tensors["b"][0], bf16))
    expected = dequantize(tensors["q"][0], q8)
    np.testing.assert_array_equal(checkpoint.read("q"), expected)
    np.testing.assert_array_equal(checkpoint.read("q", 5, 71), expected[5:71])  # not whole blocks


def test_metadata_is_the_config(tmp_path: Path) -> None:
    q8 = GGMLQuantizationType.Q8_0
    path = write(tmp_path / "m.gguf", {"w": (quantize(np.ones((2, 32), np.float32), q8), q8)})
    config = open_checkpoint(path).config
    assert config["general.architecture"] == "llama"
    assert config["llama.block_count"] == 3
    assert config["llama.rope.freq_base"] == 10000.0
    assert config["some.flag"] is True
    assert config["short"] == [1, 2, 3]
    long = config["long"]
    assert not isinstance(long, list)  # stays in the file until it is used
    assert len(long) == 5000
    assert long[4321] == "token 4321"
    assert list(long)[:2] == ["token 0", "token 1"]
    assert list(config["long.numbers"]) == list(range(2000))


def test_a_tile_costs_a_tile(tmp_path: Path) -> None:
    kind = GGMLQuantizationType.Q4_0
    data = RNG.integers(0, 60, (8192, 1024 // 32 * 18), np.uint8)  # 32 MiB as float32
    checkpoint = open_checkpoint(write(tmp_path / "m.gguf", {"w": (data, kind)}))
    checkpoint.read("w", 0, 64)
    tracemalloc.start()
    try:
        for row in range(0, 8192, 256):
            checkpoint.read("w", row, row + 256)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20  # 256 rows are 1 MiB


def test_reads_from_many_threads(tmp_path: Path) -> None:
    kind = GGMLQuantizationType.Q5_1
    data = quantize(RNG.standard_normal((128, 256)).astype(np.float32), kind)
    checkpoint = open_checkpoint(write(tmp_path / "m.gguf", {"w": (data, kind)}))
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda i: checkpoint.read("w", i * 2, i * 2 + 2), range(64)))
    np.testing.assert_array_equal(np.concatenate(parts), dequantize(data, kind))
    checkpoint.close()
    with pytest.raises(UsageError, match="closed"):
        checkpoint.read("w")


@pytest.mark.parametrize("name", ["Q8_1", "Q8_K", "Q1_0"])
def test_types_without_arithmetic(tmp_path: Path, name: str) -> None:
    kind = GGMLQuantizationType[name]
    block, size = GGML_QUANT_SIZES[kind]
    tensor = gguf_tensor("w", [block], int(kind), 0)
    (tmp_path / "m.gguf").write_bytes(gguf_bytes([], [tensor], b"\0" * size))
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=f"'w' has type {name}"):
        checkpoint.read("w")


# --- hostile files ---------------------------------------------------------------------------

U64 = struct.Struct("<Q").pack
HUGE = (1 << 62) + 5
GOOD = gguf_tensor("good", [8], 0, 0)
DATA = b"\0" * 64


def u32_pair(key: str, value: int) -> bytes:
    return gguf_pair(key, UINT32, struct.pack("<I", value))


HOSTILE = {
    "empty": (b"", "not a GGUF"),
    "another format": (b"PK\3\4" + b"\0" * 60, "not a GGUF"),
    "magic alone": (b"GGUF", "ends beyond the file"),
    "cut counts": (b"GGUF" + struct.pack("<IQ", 3, 1), "ends beyond the file"),
    "absurd tensor count": (gguf_bytes(tensor_count=HUGE), "tensor count is absurd"),
    "absurd pair count": (gguf_bytes(pair_count=HUGE), "metadata count is absurd"),
    "more pairs than bytes": (gguf_bytes(pair_count=9), "metadata count is absurd"),
    "absurd key length": (
        gguf_bytes([U64(HUGE)], data=DATA, pair_count=1),
        "the length of a metadata key is absurd",
    ),
    "absurd string length": (
        gguf_bytes([gguf_pair("bad", STRING, U64(HUGE))], data=DATA),
        "the length of metadata 'bad' is absurd",
    ),
    "absurd array of strings": (
        gguf_bytes([gguf_pair("bad", ARRAY, struct.pack("<IQ", STRING, HUGE))], data=DATA),
        "the item count of metadata 'bad' is absurd",
    ),
    "absurd array of numbers": (
        gguf_bytes([gguf_pair("bad", ARRAY, struct.pack("<IQ", 10, 1 << 61))], data=DATA),
        "the item count of metadata 'bad' is absurd",
    ),
    "array of arrays": (
        gguf_bytes([gguf_pair("bad", ARRAY, struct.pack("<IQ", ARRAY, 1))], data=DATA),
        "metadata 'bad' is an array of an unknown type",
    ),
    "unknown value type": (
        gguf_bytes([gguf_pair("bad", 77, b"")], data=DATA),
        "metadata 'bad' has an unknown type",
    ),
    "key twice": (gguf_bytes([u32_pair("bad", 1), u32_pair("bad", 2)]), "'bad' appears twice"),
    "key that is not UTF-8": (
        gguf_bytes([gguf_string(b"\xff\xfe") + struct.pack("<IB", BOOL, 1)]),
        "a metadata key is not UTF-8",
    ),
    "alignment 0": (gguf_bytes([u32_pair("general.alignment", 0)]), "alignment is absurd"),
    "alignment 12": (gguf_bytes([u32_pair("general.alignment", 12)]), "alignment is absurd"),
    "alignment 2^31": (gguf_bytes([u32_pair("general.alignment", 1 << 31)]), "alignment is absurd"),
    "alignment of text": (
        gguf_bytes([gguf_pair("general.alignment", STRING, gguf_string("32"))]),
        "alignment is absurd",
    ),
    "absurd tensor name": (
        gguf_bytes([], [U64(HUGE)], DATA, tensor_count=1),
        "the length of a tensor name is absurd",
    ),
    "five dimensions": (
        gguf_bytes([], [gguf_tensor("bad", [1] * 5, 0, 0)], DATA),
        "tensor 'bad' has 5 dimensions",
    ),
    "4 billion dimensions": (
        gguf_bytes([], [gguf_string("bad") + struct.pack("<I", 0xFFFFFFFF)], DATA),
        "tensor 'bad' has 4294967295 dimensions",
    ),
    "absurd shape": (
        gguf_bytes([], [gguf_tensor("bad", [1 << 40, 1 << 40], 0, 0)], DATA),
        "'bad' has an absurd shape",
    ),
    "shape that wraps round at 2^64": (
        gguf_bytes([], [gguf_tensor("bad", [1 << 32, 1 << 32], 0, 0)], DATA),
        "'bad' has an absurd shape",
    ),
    "part of a block": (
        gguf_bytes([], [gguf_tensor("bad", [33], 2, 0)], DATA),
        "'bad' has rows that are not whole Q4_0 blocks",
    ),
    "not aligned": (
        gguf_bytes([], [gguf_tensor("bad", [8], 0, 4)], DATA),
        "'bad' is not aligned",
    ),
    "name twice": (
        gguf_bytes([], [GOOD, gguf_tensor("good", [8], 0, 32)], DATA),
        "'good' appears twice",
    ),
    "overlap": (
        gguf_bytes([], [gguf_tensor("bad", [16], 0, 0), gguf_tensor("worse", [8], 0, 32)], DATA),
        "'bad' and 'worse' overlap",
    ),
    "offset beyond the file": (
        gguf_bytes([], [GOOD, gguf_tensor("bad", [8], 0, 1 << 62)], DATA),
        "'bad' lies beyond the end",
    ),
    "truncated data": (
        gguf_bytes([], [GOOD, gguf_tensor("bad", [16], 0, 32)], DATA),
        "'bad' lies beyond the end",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files(tmp_path: Path, case: str) -> None:
    content, message = HOSTILE[case]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(CorruptCheckpoint) as caught:
            open_checkpoint(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert message in str(caught.value)
    assert "hostile.gguf" in str(caught.value)
    assert peak < 4 << 20  # refused before anything of the claimed size was allocated


@pytest.mark.parametrize("kind", [4, 31, 36, 999, 0xFFFFFFFF])
def test_unknown_tensor_types(tmp_path: Path, kind: int) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes([], [gguf_tensor("bad", [32], kind, 0)], b"\0" * 999))
    with pytest.raises(CheckpointError, match="'bad' has an unknown type"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("version", "message"), [(1, "version 1"), (4, "version 4"), (3 << 24, "big-endian")]
)
def test_other_versions(tmp_path: Path, version: int, message: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes([], [GOOD], DATA, version=version))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)


def test_version_2_and_empty_tensors(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    tensors = [GOOD, gguf_tensor("none", [32, 0], 2, 32), gguf_tensor("one", [], 0, 32)]
    path.write_bytes(gguf_bytes([], tensors, DATA, version=2))
    checkpoint = open_checkpoint(path)
    assert checkpoint.read("none").shape == (0, 32)
    assert checkpoint.read("one").shape == ()
    assert checkpoint.read("good").shape == (8,)


def test_parts_of_a_split_file(tmp_path: Path) -> None:
    path = tmp_path / "m-00001-of-00002.gguf"
    path.write_bytes(gguf_bytes([gguf_pair("split.count", 2, struct.pack("<H", 2))]))
    with pytest.raises(CheckpointError, match="one of 2 parts") as caught:
        open_checkpoint(path)
    assert "--merge" in str(caught.value)


def test_truncation_anywhere_is_an_error(tmp_path: Path) -> None:
    q8 = GGMLQuantizationType.Q8_0
    path = write(tmp_path / "m.gguf", {"w": (quantize(np.ones((2, 32), np.float32), q8), q8)})
    whole = path.read_bytes()
    for size in [*range(0, 400, 7), *range(400, len(whole) - 96, 9001), len(whole) - 60]:
        path.write_bytes(whole[:size])
        with pytest.raises(CorruptCheckpoint):
            open_checkpoint(path)
