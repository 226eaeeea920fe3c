"""What `fit` predicts beside what is measured: peak memory, private memory, decode speed.

Bundles of two sets. From the first the coefficients of `edge_mmllm/profiling/memory_model.json` are
derived (`--derive`), and of it `SPEED` calibrates this machine's decoding, in about a minute, as
`edge-mmllm fit --calibrate` does. The second set is only predicted: its errors are the ones that
count. Each measurement is a child of its own: 512 tokens of prompt, 64 decode steps, all threads.

    python benchmarks/fit.py [--derive] [--limits] [--only native stock] [--publish]

`--limits` runs SmolLM2 int4 under the limit that `fit` names, and 30 % below.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import artefacts
import harness
import numpy as np

from edge_mmllm.errors import DoesNotFit
from edge_mmllm.profiling import fit as fit_module
from edge_mmllm.profiling.calibration import Calibration, calibrate
from edge_mmllm.profiling.devices import this_device
from edge_mmllm.profiling.facts import Facts, bundle_facts
from edge_mmllm.profiling.fit import CHUNK, arena_base, fit, memory_model
from edge_mmllm.profiling.limits import Limits
from edge_mmllm.profiling.probe import Probe, ProbeRequest, probe
from edge_mmllm.profiling.stats import median

PROMPT, NEW = 512, 64
CONTEXT = 576
#: Name -> model of `artefacts` (or a folder below the shared zoo), options of the export.
DERIVED_FROM = {
    "smollm2 int8": ("smollm2", "--quant", "int8"),
    "smollm2 f16": ("smollm2", "--quant", "f16"),
    "mamba-130m int4": ("mamba-130m", "--quant", "int4"),
    "mamba2-130m int4": ("mamba2-130m", "--quant", "int4"),
    "rwkv4-169m int4": ("rwkv4-169m", "--quant", "int4"),
    "rwkv7-0.1b int4": ("rwkv7-0.1b", "--quant", "int4"),
    "mamba-370m int4": ("mamba-370m", "--quant", "int4"),
    "mamba2-130m int4 block 128": ("mamba2-130m", "--quant", "int4", "--block-size", "128"),
    "rwkv4-169m int4 block 128": ("rwkv4-169m", "--quant", "int4", "--block-size", "128"),
    "tiny-mamba int4": ("zoo/tiny-mamba", "--quant", "int4"),
    "tiny-mamba2 f32": ("zoo/tiny-mamba2", "--quant", "f32"),
}
PREDICTED = {
    "smollm2 int4": ("smollm2", "--quant", "int4"),
    "smollm2 int4 block 128": ("smollm2", "--quant", "int4", "--block-size", "128"),
    "mamba-130m int4 block 128": ("mamba-130m", "--quant", "int4", "--block-size", "128"),
    "rwkv6-0.4b int4": ("rwkv6-0.4b", "--quant", "int4"),
    "rwkv7-0.4b int4": ("rwkv7-0.4b", "--quant", "int4"),
    "mamba2-130m int8": ("mamba2-130m", "--quant", "int8"),
    "tiny-rwkv7 int4": ("zoo/tiny-rwkv7", "--quant", "int4"),
    "tiny-llava int4": ("zoo/tiny-llava", "--quant", "int4"),
}
#: What a calibration of a minute takes: small and large, attention and recurrence.
SPEED = ("smollm2 int8", "mamba-130m int4", "rwkv7-0.1b int4", "mamba-370m int4")
FEATURES = ("int4", "int8", "scales", "half", "single")
#: A head counts once more while stock kernels load.
TERMS = {
    "loaded_rss": (), "load_peak_rss": ("largest",),
    "loaded_data": (), "load_peak_data": ("largest",),
}  # fmt: skip


def bundle(name: tuple[str, ...], arguments: argparse.Namespace) -> Path | None:
    """A bundle, made where it is not there; None without its checkpoint."""
    model, options = name[0], name[1:]
    if not model.startswith("zoo/"):
        return artefacts.ours(model, arguments.cache, *options)
    source = arguments.shared / model
    if not source.is_dir():
        return None
    stem = "-".join([model.replace("/", "-"), *(o.lstrip("-") for o in options)])
    out: Path = arguments.cache / "benchmarks" / f"fit-{stem}"
    out.parent.mkdir(parents=True, exist_ok=True)
    artefacts.run(artefacts.export_command(source, out, *options, "--gate", "off"))
    return out


def measure(path: Path, facts: Facts, kernels: str, runs: int) -> Probe:
    """The median run by peak RSS, with the quietest step."""
    longest = min(facts.context_length or 1024, 1024)
    request = ProbeRequest(str(path), min(PROMPT, longest - NEW), NEW, None, longest, kernels)
    found = [probe(request) for _ in range(runs)]
    found.sort(key=lambda p: p.peak_rss_bytes)
    chosen = found[len(found) // 2]
    return Probe(
        **{
            **asdict(chosen),
            "peak_data_bytes": max(p.peak_data_bytes for p in found),
            "load_peak_data_bytes": max(p.load_peak_data_bytes for p in found),
            "step_ms": median([p.step_ms for p in found]),
            "step_best_ms": min(p.step_best_ms for p in found),
        }
    )


def derive(points: dict[str, list[tuple[Facts, Probe]]]) -> dict[str, Any]:
    """The coefficients of the memory model."""
    every = [p for found in points.values() for _, p in found]
    one_cpu = probe(_tiny(points), Limits(cpus=1))
    cpus = this_device().cores
    data = median([p.engine_data_bytes for p in every])
    made: dict[str, Any] = {
        "engine": {
            "rss": int(median([p.engine_rss_bytes for p in every])),
            "data": one_cpu.engine_data_bytes,
            "data_per_cpu": int((data - one_cpu.engine_data_bytes) / max(cpus - 1, 1)),
        }
    }
    for kind, found in points.items():
        made[kind] = {"arena": kind == "stock", "others": 2.0}
        for term, more in TERMS.items():
            made[kind][term] = _linear(found, term, more if kind == "stock" else ())
        made[kind] |= _scratch(found, kind, made[kind]) | _layers(kind)
    return made


def _tiny(points: dict[str, list[tuple[Facts, Probe]]]) -> ProbeRequest:
    return ProbeRequest(str(PATHS["tiny-mamba2 f32"]), 16, 4, 1, None, "stock")


def _linear(found: list[tuple[Facts, Probe]], term: str, more: tuple[str, ...]) -> dict[str, float]:
    """Non-negative least squares on relative errors."""
    engine = "engine_" + term.rsplit("_", 1)[1] + "_bytes"
    names = (*FEATURES, *more)
    rows = np.array([[1e6] + [getattr(f.weights, n) for n in names] for f, _ in found])
    sizes = np.array([getattr(p, term + "_bytes") - getattr(p, engine) for _, p in found])
    weight = 1 / (sizes + 60e6)
    active = list(range(rows.shape[1]))
    while True:
        solved, *_ = np.linalg.lstsq(rows[:, active] * weight[:, None], sizes * weight, rcond=None)
        if (solved >= 0).all():
            break
        active.pop(int(np.argmin(solved)))
    values = dict.fromkeys(("base", *FEATURES, "largest"), 0.0)
    for i, value in zip(active, solved, strict=True):
        name = ("base", *names)[i]
        values[name] = round(float(value) * (1e6 if i == 0 else 1), 0 if i == 0 else 3)
    return values


def _scratch(found: list[tuple[Facts, Probe]], kind: str, made: dict[str, Any]) -> dict[str, Any]:
    """Scratch of a chunk, in units of 512 float32 rows of the width, by architecture."""
    base = 14e6  # of native kernels; see `arena_base` for stock ones
    shares: dict[str, dict[str, list[float]]] = {}
    for f, p in found:
        unit = CHUNK * 4 * f.hidden
        rss_base, data_base = arena_base(f.hidden) if kind == "stock" else (base, base)
        rows = f.weights.lookup or f.weights.table
        touched = rows * (1 - math.exp(-CHUNK * (64 << 10) / rows))
        data = p.peak_data_bytes - p.loaded_data_bytes - data_base
        rss = p.peak_rss_bytes - p.loaded_rss_bytes - touched - f.state_bytes(CONTEXT) - rss_base
        if p.peak_rss_bytes <= p.load_peak_rss_bytes:
            rss = min(rss, data)  # hidden below the peak of loading
        share = shares.setdefault(f.architecture, {"rss_units": [], "data_units": []})
        if f.hidden >= 512 and f.weights.half == 0:  # else the base outweighs it, or loading does
            share["rss_units"].append(max(rss, 0) / unit)
            share["data_units"].append(max(data, 0) / unit)
    means = {
        name: {key: round(float(np.mean(values)), 1) for key, values in share.items() if values}
        for name, share in shares.items()
    }
    means = {name: share for name, share in means.items() if share}
    means["default"] = means["rwkv7"]  # the largest
    means["rwkv6"] = means["rwkv5"] = means["rwkv7"]
    return {"scratch": means, "scratch_base": base, "scratch_base_data": base}


def _layers(kind: str) -> dict[str, Any]:
    """What a layer of width 768 costs beside its bytes, relative to Mamba's: steps of the bundles
    of `DERIVED_FROM` at a load average of 1.8, two threads of Zen 4."""
    native = {"llama": 2.2, "mamba": 1.0, "mamba2": 1.2, "rwkv4": 0.7, "rwkv7": 1.4}
    stock = {"llama": 0.6, "mamba": 1.0, "mamba2": 1.2, "rwkv4": 1.2, "rwkv7": 1.9}
    units = native if kind == "native" else stock
    units |= {"rwkv6": units["rwkv7"], "rwkv5": units["rwkv7"], "default": units["llama"]}
    return {"layer_units": units, "layer_us": 43.0 if kind == "native" else 100.0,
            "efficiency": 0.9 if kind == "native" else 0.6}  # fmt: skip


PATHS: dict[str, Path] = {}


def collect(
    names: dict[str, tuple[str, ...]], kinds: list[str], arguments: argparse.Namespace,
    told: Callable[..., Any],
) -> dict[str, list[tuple[str, Facts, Probe]]]:  # fmt: skip
    """Kind of kernels -> (name, facts, measurement)."""
    found: dict[str, list[tuple[str, Facts, Probe]]] = {kind: [] for kind in kinds}
    for name, made in names.items():
        path = bundle(made, arguments)
        if path is None:
            print(f"{name}: not here, left out", flush=True)
            continue
        PATHS[name] = path
        facts = bundle_facts(path)
        for kind in kinds:
            if kind == "native" and not facts.native:
                continue
            got = measure(path, facts, kind, arguments.runs)
            found[kind].append((name, facts, got))
            told(case=name, kernels=kind, measured=asdict(got))
    return found


def compare(
    sets: dict[str, dict[str, list[tuple[str, Facts, Probe]]]],
    calibration: Calibration | None, kinds: list[str], report: harness.Reporter,
) -> None:  # fmt: skip
    """The tables of errors."""
    device = this_device()
    for label, found in sets.items():
        rows, errors = [], {"rss": [0.0], "data": [0.0], "speed": [0.0]}
        for kind in kinds:
            for name, facts, got in found[kind]:
                (told,) = fit(
                    facts, device, context=CONTEXT, kernels=(kind,), calibration=calibration
                )
                speed = told.decode_tokens_per_s or 0.0
                pairs = {
                    "rss": (told.memory.rss_bytes, got.peak_rss_bytes),
                    "data": (told.memory.data_bytes, got.peak_data_bytes),
                    "speed": (speed, 1e3 / got.step_best_ms),
                }
                row = [f"{name}, {kind}"]
                for key, (predicted, measured) in pairs.items():
                    if not predicted:
                        row += ["-", f"{measured:.0f}", "-"]
                        continue
                    error = predicted / measured - 1
                    errors[key].append(abs(error))
                    scale = 1 if key == "speed" else 1e-6
                    row += [
                        f"{predicted * scale:.0f}", f"{measured * scale:.0f}", f"{error:+.0%}"
                    ]  # fmt: skip
                rows.append(row)
                report.record(case=name, set=label, kernels=kind, predicted=told.to_json(),
                              measured=asdict(got))  # fmt: skip
        report.table(
            f"{label}: predicted, measured, error; MB and tokens/s",
            ["bundle", "RSS", "", "", "private", "", "", "decode", "", ""],
            rows,
        )
        report.text(
            "Largest error: "
            + ", ".join(f"{key} {max(values):.0%}" for key, values in errors.items())
            + "; within the aim (memory 10 %, decode 20 %): "
            + ", ".join(
                f"{key} {sum(e <= aim for e in errors[key][1:])} of {len(errors[key]) - 1}"
                for key, aim in (("rss", 0.1), ("data", 0.1), ("speed", 0.2))
            )
        )


def under_limits(arguments: argparse.Namespace, kinds: list[str], report: harness.Reporter) -> None:
    """SmolLM2 int4 at the limit that `fit` names, and 30 % below."""
    path = bundle(PREDICTED["smollm2 int4"], arguments)
    assert path is not None
    facts, rows = bundle_facts(path), []
    for kind in kinds:
        (told,) = fit(facts, this_device(), context=1024, kernels=(kind,))
        for label, size in (
            ("as fit says", told.limit_bytes),
            ("30 % below", int(0.7 * told.limit_bytes)),
        ):
            request = ProbeRequest(str(path), PROMPT, 16, None, 1024, kind)
            try:
                got = probe(request, Limits(memory_bytes=size))
                private, rss = got.peak_data_bytes / 1e6, got.peak_rss_bytes / 1e6
                result = f"runs, {private:.0f} MB private, RSS {rss:.0f} MB"
            except DoesNotFit as error:
                result = " ".join(str(error).split())[:160]
            rows.append([f"{kind}, {label}", f"{size / 1e6:.0f}", result])
            report.record(case="limits", kernels=kind, limit=label, limit_bytes=size, result=result)
    report.table("SmolLM2 int4 under RLIMIT_DATA", ["case", "limit MB", "result"], rows)


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--derive", action="store_true", help="make memory_model.json anew")
    parser.add_argument("--limits", action="store_true", help="run at and below the limit")
    parser.add_argument(
        "--only", nargs="*", choices=("native", "stock"), default=["native", "stock"]
    )
    parser.add_argument("--no-speed", action="store_true", help="memory only, no calibration")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--shared", type=Path, default=harness.ROOT.parent / "shared/data")
    arguments = parser.parse_args()
    report = harness.Reporter("fit", "Fit: predicted and measured", arguments)
    missing = artefacts.kernels()
    kinds = [k for k in arguments.only if k == "stock" or missing is None]
    before = os.getloadavg()[0]
    sets = {"Derived from": collect(DERIVED_FROM, kinds, arguments, lambda **_: None)}
    if arguments.derive:
        made = derive({k: [(f, p) for _, f, p in v] for k, v in sets["Derived from"].items()})
        place = Path(fit_module.__file__).with_name("memory_model.json")
        place.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
        memory_model.cache_clear()
    calibration = None
    if not arguments.no_speed:
        calibration = calibrate([PATHS[n] for n in SPEED], kernels=kinds)
    sets["Only predicted"] = collect(PREDICTED, kinds, arguments, lambda **_: None)
    told = "Not calibrated"
    if calibration is not None:
        told = (
            f"Calibration: {calibration.wall_s:.0f} s; memory reads "
            f"{calibration.read_bytes_per_s / 1e9:.0f} GB/s with {calibration.threads} threads; "
        ) + "; ".join(
            f"{k}: {r.bytes_per_s / 1e9:.0f} GB/s, {r.layer_us:.0f} us a layer"
            for k, r in calibration.rates.items()
        )
    report.text(f"{told}. Load average {before:.1f} before, {os.getloadavg()[0]:.1f} after.")
    compare(sets, calibration, kinds, report)
    if arguments.limits:
        under_limits(arguments, kinds, report)
    report.close()


if __name__ == "__main__":
    main()
