"""The PyTorch zip reader: values, strides, and pickles that must never run."""

from __future__ import annotations

import hashlib
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from checkpoint_files import View, bf16_bytes, state_pickle, tensor_pickle, write_torch_zip
from numpy.lib.stride_tricks import as_strided

from edge_mmllm.errors import CheckpointError, CorruptCheckpoint, UnsafeCheckpoint
from edge_mmllm_export.checkpoints import open_checkpoint
from edge_mmllm_export.checkpoints.files import WeightFile

RNG = np.random.default_rng(0)
MATRIX = RNG.standard_normal((600, 40)).astype(np.float32)


def write_one(path: Path, view: View, data: bytes) -> Path:
    return write_torch_zip(path, state_pickle({"bad": view}), {view.key: data})


@pytest.mark.parametrize(
    ("storage", "dtype"),
    [
        ("DoubleStorage", "f8"),
        ("FloatStorage", "f4"),
        ("HalfStorage", "f2"),
        ("LongStorage", "i8"),
        ("IntStorage", "i4"),
        ("ShortStorage", "i2"),
        ("CharStorage", "i1"),
        ("ByteStorage", "u1"),
        ("BoolStorage", "?"),
    ],
)
def test_values_of_every_storage(tmp_path: Path, storage: str, dtype: str) -> None:
    values = (RNG.standard_normal((5, 6)) * 9).astype(dtype)
    view = View("0", 30, (5, 6), (6, 1), storage=storage)
    path = write_torch_zip(tmp_path / "m.pth", state_pickle({"w": view}), {"0": values.tobytes()})
    checkpoint = open_checkpoint(path)
    assert checkpoint.layout == "pth"
    np.testing.assert_array_equal(checkpoint.read("w"), values.astype(np.float32))
    np.testing.assert_array_equal(checkpoint.read("w", 1, 3), values[1:3].astype(np.float32))
    assert checkpoint.tensors["w"].size_bytes == values.nbytes


def test_bf16_and_scalar(tmp_path: Path) -> None:
    values = np.array([1.5, -0.25, 8.0], np.float32)
    views = {
        "v": View("0", 3, (3,), (1,), storage="BFloat16Storage"),
        "s": View("0", 3, (), (), offset=1, storage="BFloat16Storage"),
    }
    path = write_torch_zip(tmp_path / "m.pth", state_pickle(views), {"0": bf16_bytes(values)})
    checkpoint = open_checkpoint(path)
    np.testing.assert_array_equal(checkpoint.read("v"), values)
    assert checkpoint.read("s").shape == ()
    assert checkpoint.read("s") == -0.25


@pytest.mark.parametrize(
    ("shape", "strides", "offset"),
    [
        ((40, 600), (1, 40), 0),  # transposed
        ((600,), (40,), 7),  # a column
        ((100, 10), (120, 4), 3),  # every third row, every fourth column
        ((20, 4, 5), (800, 5, 1), 40),  # a slice with a gap between rows
        ((5, 20, 4), (1, 800, 5), 40),  # the same, axes turned
        ((10, 30), (40, 1), 10),  # a block
        ((6, 5), (1, 1), 0),  # overlapping windows
        ((600, 1, 40), (40, 999, 1), 0),  # an axis of one: its stride says nothing
        ((0, 40), (40, 1), 0),
    ],
)
def test_strided_views(
    tmp_path: Path, shape: tuple[int, ...], strides: tuple[int, ...], offset: int
) -> None:
    view = View("0", MATRIX.size, shape, strides, offset)
    path = write_torch_zip(tmp_path / "m.pth", state_pickle({"w": view}), {"0": MATRIX.tobytes()})
    expected = as_strided(MATRIX.reshape(-1)[offset:], shape, [s * 4 for s in strides])
    checkpoint = open_checkpoint(path)
    whole = checkpoint.read("w")
    assert whole.shape == shape
    assert whole.flags.c_contiguous
    np.testing.assert_array_equal(whole, expected)
    if shape[0] > 4:
        np.testing.assert_array_equal(checkpoint.read("w", 2, 4), expected[2:4])


def test_a_transposed_tile_is_read_in_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    view = View("0", MATRIX.size, (40, 600), (1, 40))
    path = write_torch_zip(tmp_path / "m.pth", state_pickle({"w": view}), {"0": MATRIX.tobytes()})
    checkpoint = open_checkpoint(path)
    sizes: list[int] = []
    read_into = WeightFile.read_into

    def count(self: WeightFile, buffer: memoryview, offset: int) -> None:
        sizes.append(len(buffer))
        read_into(self, buffer, offset)

    monkeypatch.setattr(WeightFile, "read_into", count)
    np.testing.assert_array_equal(checkpoint.read("w", 3, 7), MATRIX.T[3:7])
    assert sizes == [16] * 600  # four neighbours at a time, nothing that is not wanted
    sizes.clear()
    np.testing.assert_array_equal(checkpoint.read("w"), MATRIX.T)
    assert sizes == [MATRIX.nbytes]


def test_nested_state_dict_and_bin_layout(tmp_path: Path) -> None:
    inner = tensor_pickle(View("0", 4, (2, 2), (2, 1)))
    key = b"X\x01\0\0\0w"
    nested = b"}X\x0a\0\0\0state_dict}" + key + inner + b"ssX\x05\0\0\0epochK\x03s"
    values = np.arange(4, dtype=np.float32)
    path = write_torch_zip(
        tmp_path / "pytorch_model.bin", b"\x80\x02" + nested + b".", {"0": values.tobytes()}
    )
    checkpoint = open_checkpoint(path)
    assert checkpoint.layout == "hub"
    np.testing.assert_array_equal(checkpoint.read("w"), values.reshape(2, 2))


# --- pickles that must not run ---------------------------------------------------------------


class _Runs:
    """Pickles to a call of `function(*arguments)`."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("nested", [False, True])
def test_a_call_is_refused_and_does_not_run(tmp_path: Path, protocol: int, nested: bool) -> None:
    marker = tmp_path / "ran"
    trap = _Runs(os.system, f"touch {marker}")
    payload = pickle.dumps({"a": [({"deep": trap},)]} if nested else trap, protocol)
    pickle.loads(payload)
    assert marker.exists()  # the trap is real
    marker.unlink()
    path = write_torch_zip(tmp_path / "evil.pth", payload)
    with pytest.raises(UnsafeCheckpoint) as caught:
        open_checkpoint(path)
    assert not marker.exists()
    text = str(caught.value)
    assert "evil.pth" in text
    assert "nothing of it was run" in text
    # protocols 0 and 1 stumble over an opcode, 2 and 3 over the global, 4 and 5 over FRAME
    named = {2: "posix.system", 3: "posix.system"} if not nested else {2: "posix.system"}
    if protocol in named:
        assert named[protocol] in text


@pytest.mark.parametrize(
    ("opcodes", "named"),
    [
        (b"cbuiltins\neval\nX\x03\0\0\x001+1\x85R.", "builtins.eval"),
        (b"cos\nsystem\n.", "os.system"),
        (b"ctorch\nload\n.", "torch.load"),
        (b"ctorch\nFloatStorage.__init__.__globals__\n.", "torch.FloatStorage.__init__"),
        (b"ctorch.hub\nload\n.", "torch.hub.load"),
        (b"ctorch.storage\n_load_from_bytes\n.", "torch.storage._load_from_bytes"),
        (b"ccollections\nOrderedDict.update\n.", "collections.OrderedDict.update"),
        (
            b"X\x02\0\0\0osX\x06\0\0\0system\x93.",
            "BINUNICODE",
        ),
        (b"\x8c\x02os\x8c\x06system\x93.", "SHORT_BINUNICODE"),
        (b"(ios\nsystem\n.", "INST"),
        (b"ccollections\nOrderedDict\n)\x81.", "NEWOBJ"),
        (b"(cos\nsystem\no.", "os.system"),
        (b"\x82\x01.", "EXT1"),
        (b"P1\n.", "PERSID"),
        (b"ctorch\nFloatStorage\n)R.", "REDUCE"),
        (b"X\x01\0\0\0a)R.", "REDUCE"),
        (b"}}b.", "BUILD"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n}b.", "BUILD"),
        (b"\xff.", "0xff"),
    ],
)
def test_opcodes_and_globals_off_the_list(tmp_path: Path, opcodes: bytes, named: str) -> None:
    path = write_torch_zip(tmp_path / "evil.pth", b"\x80\x02" + opcodes)
    with pytest.raises(UnsafeCheckpoint) as caught:
        open_checkpoint(path)
    expected = "STACK_GLOBAL" if named == "BINUNICODE" else named
    assert expected in str(caught.value)
    assert "evil.pth" in str(caught.value)


def test_a_trap_behind_sound_tensors(tmp_path: Path) -> None:
    sound = state_pickle({"w": View("0", 4, (4,), (1,))})
    marker = tmp_path / "ran"
    call = b"cos\nsystem\nX" + struct.pack("<I", len(f"touch {marker}"))
    trap = call + f"touch {marker}".encode() + b"\x85R0"
    path = write_torch_zip(tmp_path / "evil.pth", sound[:-1] + trap + b".", {"0": b"\0" * 16})
    with pytest.raises(UnsafeCheckpoint, match=r"os\.system"):
        open_checkpoint(path)
    assert not marker.exists()


MALFORMED = {
    "empty": b"",
    "no STOP": b"\x80\x02}",
    "cut text": b"\x80\x02X\xff\xff\xff\x7fabc",
    "memo that was never set": b"\x80\x02h\x07.",
    "no mark": b"\x80\x02t.",
    "stack of nothing": b"\x80\x02R.",
    "tuple of too many": b"\x80\x02N\x87.",
    "list as a dict": b"\x80\x02](NNu.",
    "protocol 9": b"\x80\x09}.",
    "a tuple nested without end, hashed": b"\x80\x02}N" + b"\x85" * 300_000 + b"Ns.",
    "storage of wrong parts": b"\x80\x02X\x01\0\0\0aQ.",
    "tensor of wrong parts": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(NNNNtR.",
    "tensor of too few": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_pickles(tmp_path: Path, case: str) -> None:
    path = write_torch_zip(tmp_path / "bad.pth", MALFORMED[case])
    with pytest.raises(CorruptCheckpoint, match=r"bad\.pth"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    "pickled", [b"}.", b"N.", b"].", b"}X\x01\0\0\0a}X\x01\0\0\0b}sss."[:-2] + b"."]
)
def test_a_pickle_without_tensors(tmp_path: Path, pickled: bytes) -> None:
    path = write_torch_zip(tmp_path / "bad.pth", b"\x80\x02" + pickled)
    with pytest.raises(CheckpointError, match="not a flat state dict"):
        open_checkpoint(path)


# --- views and zips that do not hold together ------------------------------------------------

BAD_VIEWS = {
    "beyond the storage": View("0", 4, (5,), (1,)),
    "offset beyond": View("0", 4, (4,), (1,), offset=1),
    "stride beyond": View("0", 4, (2, 2), (3, 1)),
    "negative offset": View("0", 4, (2,), (1,), offset=-1),
    "negative stride": View("0", 4, (2,), (-1,), offset=3),
    "negative size": View("0", 4, (-2,), (1,)),
    "absurd shape": View("0", 4, (1 << 40, 1 << 40), (0, 0)),
    "expanded a billion times": View("0", 4, (1 << 30,), (0,)),
    "strides missing": View("0", 4, (2, 2), (1,)),
    "storage longer than its entry": View("0", 1 << 40, (4,), (1,)),
    "storage of a negative length": View("0", -4, (), ()),
    "number beyond 2^64": View("0", 4, (2,), (1,), offset=1 << 900),
}


@pytest.mark.parametrize("case", BAD_VIEWS)
def test_views_outside_their_storage(tmp_path: Path, case: str) -> None:
    path = write_one(tmp_path / "m.pth", BAD_VIEWS[case], b"\0" * 16)
    with pytest.raises(CorruptCheckpoint, match=r"tensor 'bad' does not fit") as caught:
        open_checkpoint(path)
    assert "m.pth" in str(caught.value)


def test_storage_that_is_not_there(tmp_path: Path) -> None:
    path = write_torch_zip(tmp_path / "m.pth", state_pickle({"bad": View("7", 4, (4,), (1,))}))
    with pytest.raises(CorruptCheckpoint, match="tensor 'bad' does not fit its storage '7'"):
        open_checkpoint(path)


def test_deflated_entries(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pth"
    write_torch_zip(path, b"\x80\x02}.", {"0": b"\0" * (1 << 20)}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="compressed") as caught:
        open_checkpoint(path)
    assert "bomb.pth" in str(caught.value)
    assert "zip -0" in str(caught.value)


def test_truncated_zip(tmp_path: Path) -> None:
    path = write_one(tmp_path / "m.pth", View("0", 4, (4,), (1,)), b"\0" * 16)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(CorruptCheckpoint, match=r"m\.pth is not a PyTorch zip"):
        open_checkpoint(path)


def test_overlapping_entries(tmp_path: Path) -> None:
    """Two directory records that point at one local header: the classic overlap bomb."""
    path = tmp_path / "m.pth"
    write_torch_zip(
        path, state_pickle({"w": View("0", 4, (4,), (1,))}), {"0": b"\0" * 16, "1": b""}
    )
    raw = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo("archive/data/0").header_offset
    record = raw.rindex(b"archive/data/1") - 46  # the directory record of the second storage
    raw[record + 20 : record + 28] = struct.pack("<II", 16, 16)
    raw[record + 42 : record + 46] = struct.pack("<I", offset)
    path.write_bytes(raw)
    with pytest.raises(CorruptCheckpoint, match="overlap") as caught:
        open_checkpoint(path)
    assert "archive/data/1" in str(caught.value)


def test_sizes_that_contradict(tmp_path: Path) -> None:
    path = write_one(tmp_path / "m.pth", View("0", 4, (4,), (1,)), b"\0" * 16)
    raw = bytearray(path.read_bytes())
    record = raw.rindex(b"archive/data/0") - 46
    raw[record + 24 : record + 28] = struct.pack("<I", 1 << 30)  # uncompressed size
    path.write_bytes(raw)
    with pytest.raises(CorruptCheckpoint, match="contradicts itself"):
        open_checkpoint(path)


def test_formats_that_are_not_zip(tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + b"rest")
    with pytest.raises(CheckpointError, match=r"before 1\.6") as caught:
        open_checkpoint(path)
    assert "weights_only=True" in str(caught.value)
    marker = tmp_path / "ran"
    path.write_bytes(pickle.dumps(_Runs(os.system, f"touch {marker}"), 2))
    with pytest.raises(UnsafeCheckpoint, match="bare pickle"):
        open_checkpoint(path)
    assert not marker.exists()
    for content in (b"", b"GGUF" + b"\0" * 99, b"\0" * 99):
        path.write_bytes(content)
        with pytest.raises(CorruptCheckpoint, match=r"old\.pth"):
            open_checkpoint(path)


def test_torchscript_and_foreign_zips(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", b"\x80\x02}.")
        archive.writestr("m/constants.pkl", b"\x80\x02).")
    with pytest.raises(CheckpointError, match="TorchScript"):
        open_checkpoint(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", b"hello")
    with pytest.raises(CheckpointError, match=r"0 data\.pkl"):
        open_checkpoint(path)


def test_big_endian(tmp_path: Path) -> None:
    path = tmp_path / "m.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", state_pickle({"w": View("0", 1, (1,), (1,))}))
        archive.writestr("m/data/0", b"\0" * 4)
        archive.writestr("m/byteorder", b"big")
    with pytest.raises(CheckpointError, match="big-endian"):
        open_checkpoint(path)


# --- published layouts -----------------------------------------------------------------------

# First 16 digits of sha256 over f"{name} {shape} " and the float32 bytes of each tensor in order
# of name, made with torch 2.13: torch.load(path, weights_only=True).
PUBLISHED = {
    "rwkv/tiny-rwkv-4v0-660K.pth": "44bfa3c35937290e",
    "rwkv/tiny-rwkv-5v2-730K.pth": "46199a4a5a083d57",
    "rwkv/tiny-rwkv-6v0-1m.pth": "111fa50e49dc78ab",
    "rwkv/tiny-rwkv-7v0-834K.pth": "29624912869a9418",
    "zoo/tiny-rwkv7/tiny-rwkv7.pth": "561bb351748e7386",  # BF16
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_rwkv_equals_torch(shared_data: Path, name: str) -> None:
    checkpoint = open_checkpoint(shared_data / name)
    digest = hashlib.sha256()
    for tensor, info in sorted(checkpoint.tensors.items()):
        digest.update(f"{tensor} {info.shape} ".encode())
        digest.update(checkpoint.read(tensor).tobytes())
    assert digest.hexdigest()[:16] == PUBLISHED[name]
