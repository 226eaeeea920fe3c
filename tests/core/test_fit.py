"""`fit`: what it predicts follows from what it is told (how well: benchmarks/fit.py)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge_mmllm.bundle import QuantGroup
from edge_mmllm.errors import UsageError
from edge_mmllm.profiling import calibration as calibration_module
from edge_mmllm.profiling.calibration import (
    Calibration,
    Rate,
    cache_bytes,
    calibrate,
    load_calibration,
    solve_rate,
    store_calibration,
)
from edge_mmllm.profiling.devices import find_device
from edge_mmllm.profiling.facts import Facts, Weights, bundle_facts, sort_weights
from edge_mmllm.profiling.fit import fit, predict_memory, recommend, step_seconds

MB = 1_000_000
FACTS = Facts(
    name="m", scheme="int4, block 32", architecture="llama", parameters=135 * MB, hidden=576,
    layers=30, vocab=49152, weights=Weights(int4=48 * MB, int8=28 * MB, scales=13 * MB),
    disk_bytes=92 * MB, state_constant_bytes=0, state_bytes_per_token=46080, context_length=8192,
    native=True, gate="passed", quality={},
)  # fmt: skip


def test_memory_grows_with_weights_context_and_cores() -> None:
    for kind in ("native", "stock"):
        base = predict_memory(FACTS, kind, 512, 2)
        long = predict_memory(FACTS, kind, 8192, 2)
        assert long.state_bytes - base.state_bytes == 46080 * (8192 - 512)
        assert long.rss_bytes > base.rss_bytes
        # States lie in shared mappings: only the scores of attention count as private.
        assert long.data_bytes - base.data_bytes < long.rss_bytes - base.rss_bytes
        assert predict_memory(FACTS, kind, 512, 4).data_bytes > base.data_bytes
        heavy = replace(FACTS, weights=replace(FACTS.weights, int4=96 * MB))
        assert predict_memory(heavy, kind, 512, 2).rss_bytes > base.rss_bytes + 48 * MB


def test_speed_comes_from_the_device_or_its_calibration() -> None:
    pi, fast = find_device("pi-zero-2"), find_device("phone-high")
    (slow,) = fit(FACTS, pi, kernels=("native",))
    (quick,) = fit(FACTS, fast, kernels=("native",))
    assert slow.decode_tokens_per_s < quick.decode_tokens_per_s  # type: ignore[operator]
    this = find_device("this")
    (unknown,) = fit(FACTS, this, kernels=("native",))
    assert unknown.decode_tokens_per_s is None
    made = Calibration("cpu", 2, 30e9, 0, {"native": Rate(10e9, 50.0, ())}, (0.1, 0.1), 1.0, "")
    (known,) = fit(FACTS, this, kernels=("native",), calibration=made)
    assert known.decode_tokens_per_s == pytest.approx(
        1 / step_seconds(FACTS, "native", 1024, 10e9, 50.0, 0)
    )


def test_what_is_recommended() -> None:
    device = find_device("pi-4")
    forms = [replace(FACTS, scheme=s) for s in ("int4, block 32", "int8, block 32", "f16")]
    found = [one for f in forms for one in fit(f, device, kernels=("stock",))]
    assert recommend(found) == found[2]  # all fit alike: the least loss
    bad = [replace(found[2], gate="failed-accepted"), *found[:2]]
    assert recommend(bad) == found[1]
    assert recommend([replace(f, fits=False) for f in found]) is None
    assert recommend(found[:1], "int8") is None
    with pytest.raises(UsageError, match="unknown quality"):
        recommend(found, "best")


def test_a_model_without_a_native_program_has_no_native_fit() -> None:
    kinds = [f.kernels for f in fit(replace(FACTS, native=False), find_device("pi-4"))]
    assert kinds == ["stock"]
    with pytest.raises(UsageError, match="at least 1"):
        fit(FACTS, find_device("pi-4"), context=0)


def test_groups_are_sorted_by_what_engines_make_of_them() -> None:
    def group(name: str, bits: float, block: int | None, size: int) -> QuantGroup:
        return QuantGroup(name, "x", bits, block, None, 1, size)

    tied = sort_weights([group("embedding", 8, 32, 850), group("matrix", 4, 32, 450)])
    assert (tied.int8, tied.int4, tied.scales, tied.table) == (800, 400, 100, 850)
    untied = sort_weights(
        [group("embedding", 8, 32, 900), group("head", 16, None, 100),
         group("image encoder matrix", 8, 32, 70)]
    )  # fmt: skip
    assert (untied.lookup, untied.half, untied.largest, untied.others) == (900, 100, 200, 70)
    assert untied.step_bytes == 100


def test_a_rate_is_solved_from_steps() -> None:
    small = replace(FACTS, weights=Weights(int4=10 * MB), layers=6, state_bytes_per_token=0)
    points = [(f, step_seconds(f, "native", 112, 8e9, 70.0, 4 * MB)) for f in (small, FACTS)]
    rate = solve_rate("native", points, 4 * MB)
    assert rate.bytes_per_s == pytest.approx(8e9, rel=1e-3)
    assert rate.layer_us == pytest.approx(70.0, rel=1e-3)
    assert solve_rate("native", points[1:], 0).bytes_per_s > 0


def test_a_calibration_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a/fit.json"
    monkeypatch.setattr(calibration_module, "_cpu", lambda: "cpu")
    made = Calibration("cpu", 2, 3e10, 5, {"stock": Rate(1e9, 2.0, ("b",))}, (0.5, None), 9.0, "t")
    store_calibration(made, file)
    assert load_calibration(file) == made
    assert [p.name for p in file.parent.iterdir()] == ["fit.json"]
    monkeypatch.setattr(calibration_module, "_cpu", lambda: "another")
    assert load_calibration(file) is None
    for broken in ("", "[]", "{}", '{"version": 9}', "{"):
        file.write_text(broken)
        assert load_calibration(file) is None


def test_the_cache_is_read_from_sysfs(tmp_path: Path) -> None:
    for name, size in (("index0", "32K"), ("index3", "32768K"), ("index9", "?")):
        folder = tmp_path / "sys/devices/system/cpu/cpu0/cache" / name
        folder.mkdir(parents=True)
        (folder / "size").write_text(size + "\n")
    assert cache_bytes(tmp_path) == 32 << 20
    assert cache_bytes(tmp_path / "nothing") == 0


def test_calibrating_measures(base_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration_module, "_READ_S", 0.01)
    monkeypatch.setattr(calibration_module, "_ROUNDS", 1)
    made = calibrate([base_bundle], threads=1, kernels=("stock",))
    assert made.read_bytes_per_s > 1e6
    assert made.rates["stock"].bytes_per_s > 0


def test_fit_of_a_bundle(
    cli: Callable[..., Any], base_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGE_MMLLM_CACHE", str(tmp_path))
    done = cli("fit", base_bundle, "--device", "pi-zero-2", "--context", 64, "--json")
    assert done.status == 0
    told = done.json
    assert told["device"]["name"] == "pi-zero-2"
    assert told["fits"][told["recommended"]]["fits"]
    facts = bundle_facts(base_bundle)
    assert {one["memory"]["state_bytes"] for one in told["fits"]} == {facts.state_bytes(64)}
    done = cli("fit", base_bundle, "--device", "pi-zero-2")
    assert done.status == 0
    assert "recommended" in done.stderr
    assert done.stdout == ""


def test_fit_says_what_is_wrong(cli: Callable[..., Any], base_bundle: Path) -> None:
    assert cli("fit").status == 2
    assert cli("fit", base_bundle, "--device", "toaster", "--json").json["error"]["type"] == (
        "UsageError"
    )
    done = cli("fit", base_bundle, "--calibrate", "--device", "pi-4", "--json")
    assert done.status == 2
    listed = cli("fit", "--devices", "--json")
    assert json.dumps(listed.json).count("GB/s") >= 5
