"""The command line as a whole: lazy, clear about errors, one JSON document."""

from __future__ import annotations

import errno
import importlib
import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from edge_mmllm.cli import COMMANDS
from edge_mmllm.cli._errors import clean_termination
from edge_mmllm.cli._options import last_part, parse_size
from edge_mmllm.cli._output import emit, printable, size_text

HEAVY = ("numpy", "rich", "jinja2", "tokenizers", "onnxruntime", "onnx", "PIL", "edge_mmllm_export")
PROBE = """
import json, sys
from edge_mmllm.cli import main
try:
    main(sys.argv[1:], prog_name="edge-mmllm")
except SystemExit as end:
    print(json.dumps([end.code, sorted(sys.modules)]), file=sys.stderr)
"""


@pytest.mark.parametrize("words", [["--help"], ["--version"], *[[c, "--help"] for c in COMMANDS]])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *words], capture_output=True, text=True, check=True
    )
    code, modules = json.loads(done.stderr)
    assert code == 0
    assert "edge-mmllm" in done.stdout
    assert "click" in modules
    assert not set(HEAVY) & set(modules)
    if words == ["--help"]:
        assert all(name in done.stdout for name in COMMANDS)
        assert not [m for m in modules if m.startswith("edge_mmllm.cli.") and "._" not in m]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_there_and_its_help_begins_as_the_list_says(name: str) -> None:
    command = importlib.import_module(f"edge_mmllm.cli.{name}").command
    assert isinstance(command, click.Command)
    assert command.name == name
    assert (command.help or "").splitlines()[0] == COMMANDS[name]
    assert "--json" in [o for p in command.params for o in p.opts] or name == "chat"


@pytest.mark.parametrize(
    "words",
    [["frobnicate"], ["check"], ["check", "x", "--nonsense"], ["bench", "x", "--threads=0"]],
)
def test_wrong_usage_is_status_2(cli: Callable[..., Any], words: list[str]) -> None:
    plain = cli(*words)
    assert plain.status == 2
    assert plain.stdout == ""
    assert "Error: " in plain.stderr
    if words != ["frobnicate"]:
        machine = cli(*words, "--json")
        assert machine.status == 2
        assert machine.json["error"]["type"] == "UsageError"
        assert machine.json["error"]["what"] in plain.stderr


@pytest.mark.parametrize("command", ["run", "check", "bench", "chat", "inspect", "pack"])
def test_a_bundle_that_is_not_there(cli: Callable[..., Any], tmp_path: Path, command: str) -> None:
    missing = tmp_path / "missing"
    more = {"run": ["--prompt", "x"], "pack": [tmp_path / "x.edge"]}.get(command, [])
    done = cli(command, missing, *more)
    assert done.status == 1
    assert done.stdout == ""
    assert str(missing) in done.stderr
    assert "Traceback" not in done.stderr
    if command != "chat":
        found = cli(command, missing, *more, "--json").json["error"]
        assert set(found) == {"type", "what", "where", "expected", "found", "fix"}
        assert str(missing) in (found["where"] or "") + found["what"]


def test_a_checkpoint_is_not_a_bundle(cli: Callable[..., Any], chat_checkpoint: Path) -> None:
    done = cli("check", chat_checkpoint, "--json")
    assert done.status == 1
    assert done.json["error"]["type"] == "CorruptBundle"
    assert done.json["error"]["expected"] == "manifest.json"


@pytest.mark.parametrize(
    ("error", "status", "kind", "text"),
    [
        (KeyboardInterrupt(), 130, "Interrupted", "interrupted"),
        (MemoryError(), 1, "EdgeError", "out of memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 1, "EdgeError", "out of memory"),
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), 1, "EdgeError", "a/b"),
        (ModuleNotFoundError("no", name="onnxruntime"), 1, "MissingDependency",
         "pip install 'edge-mmllm[runtime-onnx]'"),
        (ModuleNotFoundError("no", name="onnx.helper"), 1, "MissingDependency",
         "pip install 'edge-mmllm[export]'"),
        (ImportError("libz.so: cannot open", name="onnxruntime.capi"), 1, "EdgeError",
         "libz.so: cannot open"),
    ],
)  # fmt: skip
def test_expected_errors_are_messages(
    cli: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    status: int,
    kind: str,
    text: str,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("edge_mmllm_runtime.check.check", fail)
    plain, machine = cli("check", "x"), cli("check", "x", "--json")
    assert plain.status == machine.status == status
    assert text in plain.stderr
    assert plain.stdout == ""
    assert machine.json["error"]["type"] == kind


@pytest.mark.parametrize(
    "error", [ValueError("a bug"), EOFError("a bug"), ImportError("a bug", name="os"), OSError("?")]
)
def test_an_unexpected_error_keeps_its_traceback(
    cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("edge_mmllm_runtime.check.check", fail)
    with pytest.raises(type(error)) as caught:
        cli("check", "x", "--json")
    assert caught.value is error


def test_onnxruntime_missing_names_the_pip_line(
    cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, chat_bundle: Path
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    done = cli("run", chat_bundle, "--prompt", "x")
    assert done.status == 1
    assert "onnxruntime is not installed" in done.stderr
    assert "pip install 'edge-mmllm[runtime-onnx]'" in done.stderr


def test_a_closed_pipe_is_silent(chat_bundle: Path) -> None:
    command = [sys.executable, "-m", "edge_mmllm", "inspect", str(chat_bundle), "--json"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.close()
    _, stderr = child.communicate(timeout=60)
    assert stderr == b""
    assert child.returncode != 0


def test_sigterm_unwinds() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), clean_termination():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GiB", 2 << 30), ("512MiB", 512 << 20), ("1.5GB", 1_500_000_000), ("1048576", 1 << 20),
     ("10 kb", 10_000), ("1KiB", 1024), ("0.5GiB", 1 << 29), ("7B", 7)],
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "2G", "0", "-1", "GiB", "1e9", "9999999TiB", "nan", "1.2.3MB"]
)
def test_what_is_no_size(cli: Callable[..., Any], text: str) -> None:
    with pytest.raises(ValueError, match="size"):
        parse_size(text)
    done = cli("export", "x", "--out", "y", f"--max-ram={text}")
    assert done.status == 2
    assert "size" in done.stderr


def test_sizes_for_people() -> None:
    assert [size_text(n) for n in (0, 1023, 1536, 3 << 20, 5 << 40)] == [
        "0 B", "1023 B", "1.5 KiB", "3.0 MiB", "5.0 TiB",
    ]  # fmt: skip
    assert size_text(None) == "unknown"


def test_names_cannot_drive_the_terminal() -> None:
    assert printable("a\x1b[2Jb\x9b\r\x07\tc\n") == "a\ufffd[2Jb\ufffd\ufffd\ufffd\tc\n"


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    emit({"a": float("nan"), "b": [float("inf"), 1.5], "c": "é"})
    assert capsys.readouterr().out == '{"a": null, "b": [null, 1.5], "c": "\\u00e9"}\n'


def test_only_the_last_part_of_a_path_is_recorded(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    assert last_part(str(tmp_path / "model")) == "model"
    assert last_part(str(tmp_path / "out" / "new")) == "new"
    assert last_part("./here") == "here"
    assert last_part("org/name") == "org/name"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("words", ["run {} --prompt x --max-new-tokens 2", "chat {}", "check {}"])
def test_standard_streams_may_be_closed(base_bundle: Path, words: str, closed: str) -> None:
    words = words.format(shlex.quote(str(base_bundle)))
    command = f"{shlex.quote(sys.executable)} -m edge_mmllm {words} {closed}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    # The bundle has no tokenizer: wrong usage for run and chat.
    assert done.returncode == (0 if words.startswith("check") else 2)
    assert "Traceback" not in done.stderr


def test_a_full_disk_behind_stdout_is_one_message(base_bundle: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    with Path("/dev/full").open("w") as full:
        words = [sys.executable, "-m", "edge_mmllm", "inspect", base_bundle, "--json"]
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode != 0
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr
