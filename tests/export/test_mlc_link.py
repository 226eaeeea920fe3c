"""Which compiler links for a target; none of them has to be there."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import platform
import sys
from pathlib import Path

import pytest

from edge_mmllm.errors import ExportError, UsageError
from edge_mmllm_export.mlc.link import COMMAND, Linker, find_linker
from edge_mmllm_export.mlc.targets import TARGETS

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="shell scripts stand in")
ARM64, ARMV7, ANDROID = (TARGETS[n] for n in ("aarch64", "armv7", "aarch64-android"))


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty PATH, on a host that is no target, without zig."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    for name in (COMMAND, "ANDROID_NDK", "ANDROID_NDK_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    return folder


def tool(path: Path, script: str = "exit 0") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_the_platforms_gcc_comes_first(tools: Path) -> None:
    gcc = tool(tools / "aarch64-linux-gnu-gcc")
    tool(tools / "clang")
    tool(tools / "ld.lld")
    assert find_linker(ARM64) == Linker((gcc,), "gcc")


def test_clang_only_where_it_finds_the_targets_libc(tools: Path) -> None:
    tool(tools / "ld.lld")
    clang = tool(tools / "clang", "exit 1")
    with pytest.raises(ExportError):
        find_linker(ARM64)
    tool(tools / "clang", "exit 0")
    expected = (clang, "--target=aarch64-linux-gnu", "-fuse-ld=lld")
    assert find_linker(ARM64) == Linker(expected, "clang")


def test_zig_knows_targets_by_other_names(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: importlib.machinery.ModuleSpec(name, None)
    )
    command = (sys.executable, "-m", "ziglang", "cc", "-target", "arm-linux-gnueabihf.2.17")
    assert find_linker(ARMV7) == Linker(command, "zig")
    zig = tool(tools / "zig")
    assert find_linker(ARMV7).command[0] == zig


def test_the_hosts_own_compiler_links_for_the_host(
    tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gcc = tool(tools / "gcc")
    with pytest.raises(ExportError):
        find_linker(ARM64)
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    assert find_linker(ARM64) == Linker((gcc,), "gcc")


def test_none_says_what_to_install(tools: Path) -> None:
    with pytest.raises(ExportError, match=r"gcc-arm-linux-gnueabihf.*ziglang") as error:
        find_linker(ARMV7)
    assert error.value.where == "--target armv7"


def test_ones_own_command(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(COMMAND, "my-cc --sysroot '/a b'")
    expected = Linker(("my-cc", "--sysroot", "/a b"), "own")
    assert find_linker(ARM64) == expected
    assert find_linker(ANDROID) == expected


def test_android_needs_its_ndk(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="ANDROID_NDK") as error:
        find_linker(ANDROID)
    assert error.value.found == "not set"
    ndk = tools.parent / "ndk"
    ndk.mkdir()
    monkeypatch.setenv("ANDROID_NDK", str(ndk))
    with pytest.raises(UsageError, match="aarch64-linux-android21-clang"):
        find_linker(ANDROID)
    system = f"{platform.system().lower()}-x86_64"
    folder = ndk / "toolchains" / "llvm" / "prebuilt" / system / "bin"
    clang = tool(folder / "aarch64-linux-android21-clang")
    assert find_linker(ANDROID) == Linker((clang,), "ndk")


def test_a_failure_shows_the_compilers_last_words(tools: Path) -> None:
    linker = Linker((tool(tools / "cc", "echo no such luck >&2; exit 3"),), "gcc")
    with pytest.raises(ExportError, match="no such luck"):
        linker.share([Path("a.o")], Path("b.so"))
    with pytest.raises(ExportError, match="cannot be run"):
        Linker((str(tools / "absent"),), "gcc").run([])
