"""Building and finding the native kernels, with compilers that only pretend."""

from __future__ import annotations

import os
import pickle
import stat
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import edge_mmllm
from edge_mmllm.errors import KernelError, UsageError
from edge_mmllm_export.exporter import ExportOptions, export
from edge_mmllm_runtime import native

REFERENCES = Path(__file__).parents[1] / "goldens" / "references"

WRITES = 'open(sys.argv[sys.argv.index("-o") + 1], "wb").write(b"a library")'


def _compiler(folder: Path, body: str, name: str = "c++") -> Path:
    """A program that keeps its arguments, then does `body`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(
        f"#!{sys.executable}\nimport os, sys\n"
        f"open({str(folder / 'arguments')!r}, 'w').write('\\n'.join(sys.argv[1:]))\n{body}\n"
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """No compiler, an empty cache."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("EDGE_MMLLM_CACHE", str(tmp_path / "a cache"))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("EDGE_MMLLM_KERNELS", "auto")


def _left(tmp_path: Path) -> list[str]:
    return sorted(str(p.name) for p in (tmp_path / "a cache").rglob("*") if p.is_file())


def test_built_where_it_is_looked_for(tmp_path):
    _compiler(tmp_path / "bin", WRITES)
    assert native.library() is None
    assert native.wanted("auto") is None
    place = native.build()
    assert native.library() == place == native.wanted("auto") == native.wanted("native")
    assert native.wanted("stock") is None
    assert place.read_bytes() == b"a library"
    told = (tmp_path / "bin" / "arguments").read_text().splitlines()
    assert [t for t in told if t.endswith(".cc")]
    assert _left(tmp_path) == [place.name]


def test_no_compiler():
    assert native.compiler() is None
    with pytest.raises(KernelError, match=r"no C\+\+ compiler"):
        native.build()


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("sys.stderr.write('line 7: error'); sys.exit(1)", "line 7: error"),
        ("sys.stderr.buffer.write(b'\\xff\\xfe error'); sys.exit(1)", "error"),
        ("sys.exit(3)", "status 3"),
        ("os.kill(os.getpid(), 9)", "status -9"),
        ("pass", "status 0"),
    ],
)
def test_a_compiler_that_fails(body, says, tmp_path):
    command = _compiler(tmp_path / "bin", body)
    with pytest.raises(KernelError, match=says) as caught:
        native.build()
    assert str(command) in str(caught.value)
    assert _left(tmp_path) == []
    assert native.library() is None


def test_a_compiler_that_is_none(tmp_path):
    for command in (str(tmp_path / "none"), str(tmp_path), 'c++ "'):
        with pytest.raises(KernelError, match="did not run"):
            native.build(command)
    assert _left(tmp_path) == []


def test_a_compiler_with_arguments_or_in_a_folder_with_spaces(tmp_path, monkeypatch):
    command = _compiler(tmp_path / "my bin", WRITES, "my c++")
    native.build(str(command))
    monkeypatch.setenv("CXX", f"{_compiler(tmp_path / 'bin', WRITES, 'ccache')} g++")
    native.build()
    assert (tmp_path / "bin" / "arguments").read_text().startswith("g++\n")


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    _compiler(tmp_path / "bin", WRITES)
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("EDGE_MMLLM_CACHE", str(tmp_path / "file"))
    assert native.library() is None
    with pytest.raises(KernelError, match="EDGE_MMLLM_CACHE"):
        native.build()


def test_no_home_to_look_in(monkeypatch):
    monkeypatch.delenv("EDGE_MMLLM_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert native.wanted("auto") is None
    with pytest.raises(KernelError, match="no home"):
        native.build(sys.executable)


def test_a_cache_that_may_not_be_looked_into(monkeypatch):
    def refused(path: str, **_: object) -> os.stat_result:
        raise PermissionError(13, "Permission denied", path)

    place = native.library_place()
    monkeypatch.setattr(native, "library_place", lambda: place)
    monkeypatch.setattr(os, "stat", refused)
    assert native.library() is None


def test_built_twice_at_once(tmp_path):
    _compiler(tmp_path / "bin", "import time; time.sleep(0.05)\n" + WRITES)
    with ThreadPoolExecutor(4) as pool:
        places = set(pool.map(lambda _: native.build(), range(4)))
    assert len(places) == 1
    assert _left(tmp_path) == [places.pop().name]


def test_a_library_of_another_machine_is_not_found(tmp_path, monkeypatch):
    _compiler(tmp_path / "bin", WRITES)
    native.build()
    monkeypatch.setattr(native.platform, "machine", lambda: "another")
    assert native.library() is None
    with pytest.raises(KernelError, match="not built for this machine"):
        native.wanted("native")


def test_the_environment_is_checked(monkeypatch):
    monkeypatch.setenv("EDGE_MMLLM_KERNELS", "natvie")
    with pytest.raises(UsageError, match=r"EDGE_MMLLM_KERNELS[\s\S]*natvie"):
        native.wanted("auto")
    assert native.wanted("stock") is None


def test_a_library_that_is_none(tmp_path):
    """What cannot be loaded is not the bundle's fault."""
    bundle = tmp_path / "bundle"
    export(REFERENCES / "llama", bundle, ExportOptions(gate=False, workers=1))
    _compiler(tmp_path / "bin", WRITES)
    native.build()
    for kernels in ("auto", "native"):
        with pytest.raises(KernelError, match="cannot load the native kernels") as caught:
            edge_mmllm.load(bundle, kernels=kernels)
        assert str(native.library()) in str(caught.value)
        assert pickle.loads(pickle.dumps(caught.value)).fix == caught.value.fix
    edge_mmllm.load(bundle, kernels="stock").close()
