"""Limits of a measured child, device profiles, and the small TOML reader."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_mmllm import _toml
from edge_mmllm.errors import DoesNotFit, EdgeError, UsageError
from edge_mmllm.profiling import devices as devices_module
from edge_mmllm.profiling.devices import devices, find_device
from edge_mmllm.profiling.limits import Limits, chosen_cpus, ended
from edge_mmllm.profiling.probe import ProbeRequest, probe

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_DATA: Linux")
REQUEST = {"prompt_tokens": 8, "new_tokens": 2, "threads": 1, "context": 64, "kernels": "stock"}


@linux
def test_a_child_under_a_limit_fits_or_says_so(base_bundle: Path) -> None:
    request = ProbeRequest(str(base_bundle), **REQUEST)
    free = probe(request, Limits(cpus=1))
    assert 0 < free.engine_data_bytes < free.loaded_data_bytes <= free.peak_data_bytes
    assert free.engine_rss_bytes < free.peak_rss_bytes
    loose = int(1.4 * free.peak_data_bytes)  # samples miss what lasts less than 2 ms
    assert probe(request, Limits(loose, 1)).peak_data_bytes <= loose
    for share in (0.05, 0.3, 0.6, 0.8):  # at import, at load, while it runs
        with pytest.raises(DoesNotFit, match="does not fit") as told:
            probe(request, Limits(int(share * free.peak_data_bytes), 1))
        assert "RLIMIT_DATA" in str(told.value)


@linux
def test_bench_under_a_limit(cli: Callable[..., Any], base_bundle: Path) -> None:
    few = ("--prompt-tokens", 8, "--new-tokens", 2, "--repetitions", 1, "--json")
    done = cli("bench", base_bundle, *few, "--limit-memory", "30MiB")
    assert done.status == 1
    assert done.json["error"]["type"] == "DoesNotFit"
    assert "Traceback" not in done.stderr
    done = cli("bench", base_bundle, *few, "--device", "pi-4")
    assert done.status == 0
    done = cli("bench", base_bundle, *few, "--device", "pi-44")
    assert done.status == 2
    assert done.json["error"]["fix"] == "--device pi-4"


@pytest.mark.parametrize(
    ("status", "printed", "kind"),
    [
        (1, "terminate called after throwing an instance of 'std::bad_alloc'", DoesNotFit),
        (-6, "", DoesNotFit),
        (-11, "", DoesNotFit),
        (1, "MemoryError", DoesNotFit),
        (3, "Traceback\nValueError: something else", EdgeError),
    ],
)
def test_how_a_child_ended(status: int, printed: str, kind: type[EdgeError]) -> None:
    with pytest.raises(EdgeError) as told:
        ended(status, printed, Limits(1 << 20), "here")
    assert type(told.value) is kind
    with pytest.raises(EdgeError) as free:
        ended(-11, "", Limits(), "here")
    assert type(free.value) is EdgeError  # without a limit nobody knows


def test_limits_of_nothing() -> None:
    for given in ({"memory_bytes": 0}, {"cpus": -1}):
        with pytest.raises(UsageError, match="at least 1"):
            Limits(**given)
    assert len(chosen_cpus(1, frozenset({0, 1, 2, 3}))) == 1
    assert chosen_cpus(9, frozenset({0, 1})) == {0, 1}


def test_every_profile_has_sources() -> None:
    known = devices()
    assert {"pi-zero-2", "pi-4", "pi-5", "phone-mid", "phone-high"} <= set(known)
    for name, device in known.items():
        assert "GB/s" in device.source, name
        assert 0 < device.free_bytes <= device.ram_bytes
    assert find_device("this").cores >= 1


def test_the_small_reader_reads_our_table_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    file = Path(devices_module.__file__).with_name("devices.toml")
    text = file.read_text()
    whole = _toml.read_toml(text, "devices.toml")
    monkeypatch.setattr(_toml, "_parser", lambda: None)
    assert _toml.read_toml(text, "devices.toml") == whole
    with pytest.raises(UsageError, match="tomli"):
        _toml.read_toml("[a]\nwhen = 2026-01-01", "x.toml")
    with pytest.raises(UsageError, match="tomli"):
        _toml.read_toml("[[test]]", "x.toml")


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ("ram_mib = 0", "board.ram_mib"),
        ("free_mib = 9999", "board.free_mib"),
        ("read_fraction = 1.5", "board.read_fraction"),
        ('source = ""', "board.source"),
        ('cores = "four"', "board.cores"),
    ],
)
def test_a_table_of_ones_own(tmp_path: Path, change: str, where: str) -> None:
    fields = {
        "title": '"a board"', "ram_mib": "100", "free_mib": "50", "cores": "1",
        "bandwidth_gb_per_s": "1.0", "read_fraction": "0.5", "isa": '"x"', "features": "[]",
        "source": '"me"',
    }  # fmt: skip
    file = tmp_path / "mine.toml"

    def write() -> None:
        lines = [f"{k} = {v}" for k, v in fields.items()]
        file.write_text("[board]\n" + "\n".join(lines))

    write()
    assert find_device(f"{file}:board").limits == Limits(50 << 20, 1)
    name, _, value = change.partition(" = ")
    fields[name] = value
    write()
    with pytest.raises(UsageError, match="device profile") as told:
        find_device(f"{file}:board")
    assert where in str(told.value)
