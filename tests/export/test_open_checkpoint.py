"""`open_checkpoint`: every form of SRC, and clear errors where there is none or more than one."""

from __future__ import annotations

import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_files import View, gguf_bytes, gguf_tensor, state_pickle, write_torch_zip
from safetensors.numpy import save_file

from edge_mmllm.errors import CheckpointError, CorruptCheckpoint, MissingDependency
from edge_mmllm_export.checkpoints import open_checkpoint

VALUES = np.arange(4, dtype=np.float32)


def safetensors(path: Path) -> Path:
    save_file({"w": VALUES}, path)
    return path


def torch_zip(path: Path) -> Path:
    view = View("0", 4, (4,), (1,))
    return write_torch_zip(path, state_pickle({"w": view}), {"0": VALUES.tobytes()})


def gguf(path: Path) -> Path:
    path.write_bytes(gguf_bytes([], [gguf_tensor("w", [4], 0, 0)], VALUES.tobytes()))
    return path


FILES = {
    "model.safetensors": (safetensors, "hub"),
    "other.safetensors": (safetensors, "hub"),
    "pytorch_model.bin": (torch_zip, "hub"),
    "model.pth": (torch_zip, "pth"),
    "model.pt": (torch_zip, "pth"),
    "model.gguf": (gguf, "gguf"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("as_text", [False, True])
def test_a_file_and_the_folder_that_holds_it(tmp_path: Path, name: str, as_text: bool) -> None:
    write, layout = FILES[name]
    path = write(tmp_path / name)
    (tmp_path / "config.json").write_text('{"model_type": "x"}')
    (tmp_path / "rwkv_vocab_v20230424.txt").write_text("1 'a' 1\n")
    (tmp_path / "README.md").write_text("hello")
    for source in (path, tmp_path):
        checkpoint = open_checkpoint(str(source) if as_text else source)
        assert checkpoint.layout == layout
        assert checkpoint.source == source
        assert checkpoint.files == (path,)
        np.testing.assert_array_equal(checkpoint.read("w"), VALUES)
        assert layout == "gguf" or checkpoint.config == {"model_type": "x"}
        assert checkpoint.text().spec.tokenizer == "none"
        checkpoint.close()


def test_bin_shards(tmp_path: Path) -> None:
    torch_zip(tmp_path / "pytorch_model-00001-of-00001.bin")
    index = {"weight_map": {"w": "pytorch_model-00001-of-00001.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.layout == "hub"
    np.testing.assert_array_equal(checkpoint.read("w"), VALUES)


def test_hub_names_win_and_safetensors_before_pickles(tmp_path: Path) -> None:
    torch_zip(tmp_path / "pytorch_model.bin")
    torch_zip(tmp_path / "optimizer.pt")
    path = safetensors(tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path).files == (path,)


@pytest.mark.parametrize(
    "names",
    [
        ("a.gguf", "b.gguf"),
        ("a.pth", "b.gguf"),
        ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
    ],
)
def test_ambiguous_folders(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match="several checkpoints") as caught:
        open_checkpoint(tmp_path)
    assert all(name in str(caught.value) for name in names)


def test_a_single_file_beside_an_index(tmp_path: Path) -> None:
    safetensors(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="several checkpoints"):
        open_checkpoint(tmp_path)


def test_absent(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        open_checkpoint(tmp_path / "missing")
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        open_checkpoint("neither a path nor an id")
    with pytest.raises(CheckpointError, match="no weights") as caught:
        open_checkpoint(tmp_path)
    assert "empty folder" in str(caught.value)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(CheckpointError, match="no weights") as caught:
        open_checkpoint(tmp_path)
    assert "notes.txt" in str(caught.value)
    with pytest.raises(CheckpointError, match=r"notes\.txt is not a checkpoint"):
        open_checkpoint(tmp_path / "notes.txt")


def test_config_with_infinity(tmp_path: Path) -> None:
    safetensors(tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"time_step_limit": [0.0, Infinity], "x": NaN}')
    config = open_checkpoint(tmp_path).config
    assert config["time_step_limit"] == [0.0, math.inf]
    assert math.isnan(config["x"])


@pytest.mark.parametrize("content", ["", "{", "[1]", "\ud800".encode("utf-8", "surrogatepass")])
def test_malformed_config(tmp_path: Path, content: str | bytes) -> None:
    safetensors(tmp_path / "model.safetensors")
    raw = content.encode() if isinstance(content, str) else content
    (tmp_path / "config.json").write_bytes(raw)
    with pytest.raises(CorruptCheckpoint, match=r"config\.json"):
        _ = open_checkpoint(tmp_path).config


# --- hub ids, with a stand-in for huggingface_hub --------------------------------------------


class Hub(types.ModuleType):
    """Serves the files of `remote`, or raises `failure`."""

    def __init__(self, remote: list[str], cache: Path, failure: Exception | None = None) -> None:
        super().__init__("huggingface_hub")
        self.remote, self.cache, self.failure = remote, cache, failure
        self.asked: list[list[str]] = []

    def snapshot_download(self, repo_id: str, *, allow_patterns: list[str]) -> str:
        from fnmatch import fnmatch

        if self.failure is not None:
            raise self.failure
        assert repo_id == "org/name"
        self.asked.append(allow_patterns)
        for name in self.remote:
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                write = FILES[name][0] if name in FILES else lambda path: path.write_text("{}")
                write(self.cache / name)
        return str(self.cache)

    def HfApi(self) -> Any:
        return types.SimpleNamespace(list_repo_files=lambda repo_id: self.remote)


@pytest.mark.parametrize(
    ("remote", "chosen"),
    [
        (["config.json", "model.safetensors", "pytorch_model.bin", "model.gguf"], "hub"),
        (["config.json", "pytorch_model.bin"], "hub"),
        (["model.pth"], "pth"),
        (["model.gguf", "config.json"], "gguf"),
    ],
)
def test_hub_ids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remote: list[str], chosen: str
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub(remote, tmp_path))
    checkpoint = open_checkpoint("org/name")
    assert checkpoint.layout == chosen
    assert len([p for p in tmp_path.iterdir() if p.suffix != ".json"]) == 1  # no weights twice
    np.testing.assert_array_equal(checkpoint.read("w"), VALUES)


def test_hub_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub([], tmp_path, OSError("no route to host\ndetails"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    with pytest.raises(CheckpointError, match="cannot get org/name") as caught:
        open_checkpoint("org/name")
    assert "no route to host" in str(caught.value)
    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub(["a.gguf", "b.gguf"], tmp_path))
    with pytest.raises(CheckpointError, match="no checkpoint that can be chosen") as caught:
        open_checkpoint("org/name")
    assert "a.gguf, b.gguf" in str(caught.value)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as if not installed
    with pytest.raises(MissingDependency, match=r"edge-mmllm\[export\]"):
        open_checkpoint("org/name")


def test_zoo(shared_data: Path) -> None:
    layouts = {
        "tiny-llava": "hub",
        "tiny-llava-mamba": "hub",
        "tiny-mamba": "hub",
        "tiny-mamba2": "hub",
        "tiny-rwkv7": "pth",
    }
    for name, layout in layouts.items():
        checkpoint = open_checkpoint(shared_data / "zoo" / name)
        assert checkpoint.layout == layout
        assert checkpoint.config["model_type"]
        assert checkpoint.text().spec.tokenizer == (
            "rwkv-world" if layout == "pth" else "tokenizers"
        )
        checkpoint.close()
