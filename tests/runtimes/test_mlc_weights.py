"""The reader of MLC's weight files: what it gives, and what it refuses."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_mmllm.errors import BundleError, CorruptBundle, UnsafeBundle, UsageError
from edge_mmllm_runtime.mlc.weights import View, WeightFiles, read_views

#: One file: float16 at an odd place, bfloat16, words, raw float32.
HALF = np.arange(3, dtype="<f2") / 2
BRIEF = np.array([0x3F80, 0xC000], "<u2")  # 1, -2
WORDS = np.array([[1, 2], [3, 4], [5, 6]], "<u4")
EXACT = np.array([[0.5, 0.25], [0.1, 0.9]], "<f4")
STACKED = np.arange(12, dtype="<f2").reshape(2, 3, 2)


def _record(name: str, values: np.ndarray[Any, Any], dtype: str, offset: int) -> dict[str, Any]:
    return {
        "name": name,
        "shape": list(values.shape),
        "dtype": dtype,
        "format": "raw" if name == "exact" else "f32-to-bf16",
        "nbytes": values.nbytes,
        "byteOffset": offset,
    }


def write(folder: Path) -> dict[str, Any]:
    """A cache of two files; returns the index."""
    first = [("half", HALF, "float16"), ("brief", BRIEF, "float32"), ("words", WORDS, "uint32")]
    second = [("exact", EXACT, "float32"), ("stacked", STACKED, "float16")]
    shards = []
    for number, members in enumerate((first, second)):
        data, records = b"", []
        for name, values, dtype in members:
            records.append(_record(name, values, dtype, len(data)))
            data += values.tobytes()
        path = f"params_shard_{number}.bin"
        (folder / path).write_bytes(data)
        shards.append(
            {
                "dataPath": path,
                "format": "raw-shard",
                "nbytes": len(data),
                "records": records,
                "md5sum": hashlib.md5(data).hexdigest(),  # noqa: S324
            }
        )
    index = {"metadata": {"ParamSize": 5}, "records": shards}
    (folder / "tensor-cache.json").write_text(json.dumps(index))
    return index


def test_tensors_as_they_are(tmp_path: Path) -> None:
    write(tmp_path)
    with WeightFiles(tmp_path) as files:
        files.check_md5()
        assert files.metadata == {"ParamSize": 5}
        for name, expected in (("half", HALF), ("words", WORDS), ("exact", EXACT)):
            found = files.read(name)
            assert found.dtype == expected.dtype
            assert found.flags.aligned
            np.testing.assert_array_equal(found, expected)
        brief = files.read("brief")
        assert brief.dtype == np.float32
        assert brief.tolist() == [1.0, -2.0]
        with pytest.raises(UsageError, match="'nothing'"):
            files.read("nothing")


def test_views(tmp_path: Path) -> None:
    write(tmp_path)
    views = {
        "rows": View("words", 1, 3, (2, 2)),
        "turned": View("words", 0, 2, (2, 3), "transposed"),
        "second": View("stacked", 2, 4, (2, 3), "transposed"),
        "log": View("exact", 0, 1, (2,), "log"),
        "rest": View("exact", 1, 2, (1, 2), "one_minus"),
    }
    with WeightFiles(tmp_path, views=views) as files:
        np.testing.assert_array_equal(files.read("rows"), WORDS[1:])
        np.testing.assert_array_equal(files.read("turned"), WORDS.T)
        np.testing.assert_array_equal(files.read("second"), STACKED[1].T)
        np.testing.assert_allclose(files.read("log"), np.log(EXACT[0]))
        np.testing.assert_allclose(files.read("rest"), 1 - EXACT[1:])


def test_views_of_a_manifest() -> None:
    member = {"tensor": "words", "start": 1, "stop": 3, "shape": [2, 2], "undo": "same"}
    assert read_views({"views": {"rows": member}}) == {"rows": View("words", 1, 3, (2, 2))}
    assert read_views({}) == {}
    for change in ({"undo": "eval"}, {"start": -1}, {"shape": ["2"]}, {"tensor": 7}):
        with pytest.raises(CorruptBundle, match="rows"):
            read_views({"views": {"rows": {**member, **change}}})
    with pytest.raises(CorruptBundle):
        read_views({"views": [member]})


@pytest.mark.parametrize(
    "view",
    [
        View("nothing", 0, 1, (2,)),
        View("words", 0, 4, (4, 2)),
        View("words", 2, 2, (0, 2)),
        View("words", 0, 1, (3,)),
        View("words", 0, 3, (3, 3), "transposed"),
        View("half", 0, 3, (3,), "transposed"),
        View("stacked", 3, 5, (2, 3), "transposed"),
    ],
)
def test_views_that_do_not_fit(tmp_path: Path, view: View) -> None:
    write(tmp_path)
    with pytest.raises(CorruptBundle, match=r"views\.v"):
        WeightFiles(tmp_path, views={"v": view})


def _shard(**change: Any) -> Any:
    return lambda index: index["records"][0].update(change)


def _tensor(number: int, **change: Any) -> Any:
    return lambda index: index["records"][0]["records"][number].update(change)


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (_shard(dataPath="../manifest.json"), "dataPath"),
        (_shard(dataPath="/etc/passwd"), "dataPath"),
        (_shard(dataPath="nothing.bin"), "missing"),
        (_shard(nbytes=3), "another size"),
        (_shard(nbytes=0), "nbytes"),
        (_shard(nbytes=1 << 70), "nbytes"),
        (_shard(format="gzip"), "format"),
        (_shard(records={}), "records"),
        (_tensor(0, name="brief"), "name"),
        (_tensor(0, name=["half"]), "name"),
        (_tensor(0, shape=[4]), "nbytes"),
        (_tensor(0, shape=[-3]), "shape"),
        (_tensor(0, shape=[1 << 62, 1 << 62]), "nbytes"),
        (_tensor(0, dtype="object"), "dtype"),
        (_tensor(0, dtype="float64"), "dtype"),
        (_tensor(0, format="pickle"), "format"),
        (_tensor(0, nbytes=5), "nbytes"),
        (_tensor(2, byteOffset=-1), "byteOffset"),
        (_tensor(2, byteOffset=12), "byteOffset"),
        (_tensor(2, byteOffset=1 << 62), "byteOffset"),
    ],
)
def test_a_hostile_index(tmp_path: Path, spoil: Any, text: str) -> None:
    index = write(tmp_path)
    spoil(index)
    (tmp_path / "tensor-cache.json").write_text(json.dumps(index))
    with pytest.raises(BundleError) as caught:
        WeightFiles(tmp_path)
    assert text in str(caught.value)
    assert isinstance(caught.value, (CorruptBundle, UnsafeBundle))


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b'{"records": 1}', b'{"a": 1, "a": 2}', b"[" * 100_000, b"\xff"]
)
def test_no_index(tmp_path: Path, content: bytes) -> None:
    write(tmp_path)
    (tmp_path / "tensor-cache.json").write_bytes(content)
    with pytest.raises(CorruptBundle):
        WeightFiles(tmp_path)
    (tmp_path / "tensor-cache.json").unlink()
    with pytest.raises(CorruptBundle, match="cannot be read"):
        WeightFiles(tmp_path)


def test_an_index_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    write(tmp_path)
    with (tmp_path / "tensor-cache.json").open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(CorruptBundle, match="too large"):
        WeightFiles(tmp_path)


def test_changed_bytes_are_found(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "params_shard_0.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    files = WeightFiles(tmp_path)
    with pytest.raises(CorruptBundle, match="has changed"):
        files.check_md5()
