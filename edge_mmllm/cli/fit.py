"""`edge-mmllm fit`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from edge_mmllm.cli._options import context_option, json_option, threads_option
from edge_mmllm.cli._output import emit, grid, progress_bars, say, size_text, table
from edge_mmllm.cli.inspect import is_bundle
from edge_mmllm.errors import UsageError

if TYPE_CHECKING:
    from edge_mmllm.profiling.calibration import Calibration
    from edge_mmllm.profiling.devices import Device
    from edge_mmllm.profiling.facts import Facts
    from edge_mmllm.profiling.fit import Fit

_QUALITIES = ("any", "int4", "int8", "f16")


@click.command("fit")
@click.argument("sources", nargs=-1, metavar="SRC|BUNDLE...")
@click.option("--device", default="this", show_default=True, metavar="PROFILE",
              help="A profile (pi-zero-2, ...), FILE.toml:NAME, or this machine.")  # fmt: skip
@click.option("--kernels", type=click.Choice(("both", "native", "stock")), default="both",
              show_default=True, help="What runs it.")  # fmt: skip
@click.option("--min-quality", type=click.Choice(_QUALITIES), default="any", show_default=True,
              help="Recommend nothing with fewer bits.")  # fmt: skip
@click.option("--calibrate", "calibrates", is_flag=True,
              help="Measure this machine with the bundles given, and remember it.")  # fmt: skip
@click.option("--devices", "lists", is_flag=True, help="List the device profiles.")
@threads_option
@context_option
@json_option
def command(
    sources: tuple[str, ...],
    device: str,
    kernels: str,
    min_quality: str,
    calibrates: bool,
    lists: bool,
    threads: int | None,
    context: int | None,
    as_json: bool,
) -> None:
    """Predict whether models fit a device, and how fast they would decode there.

    Of a checkpoint every quantization is planned; a bundle is taken as it is. Memory is told in
    two figures: RSS is what the device has to hold; "private" is what --limit-memory (RLIMIT_DATA)
    bounds, without mapped weights and states.
    """
    from edge_mmllm.profiling.calibration import (
        calibrate,
        load_calibration,
        store_calibration,
    )
    from edge_mmllm.profiling.devices import devices, find_device
    from edge_mmllm.profiling.fit import fit, recommend

    if lists:
        _show_devices(list(devices().values()), as_json)
        return
    if not sources:
        raise UsageError("no checkpoint or bundle was named", fix="edge-mmllm fit SRC")
    profile = find_device(device)
    if calibrates:
        foreign = [s for s in sources if not is_bundle(s)]
        if foreign or device != "this":
            raise UsageError(
                "only bundles calibrate, and only this machine",
                found=foreign[0] if foreign else f"--device {device}",
                fix="export it first; two bundles of different sizes calibrate best",
            )
        with progress_bars(shown=not as_json) as progress:
            calibration = calibrate(sources, threads=threads, progress=progress)
        place = store_calibration(calibration)
        if not as_json:
            _show_calibration(calibration, str(place))
    kinds = ("native", "stock") if kernels == "both" else (kernels,)
    known = load_calibration()
    found = [
        one
        for source in sources
        for facts in _facts(source)
        for one in fit(facts, profile, context=context, kernels=kinds, calibration=known)
    ]
    best = recommend(found, min_quality)
    if as_json:
        emit(
            {
                "device": profile.to_json(),
                "calibration": None if known is None else known.to_json(),
                "fits": [one.to_json() for one in found],
                "recommended": None if best is None else found.index(best),
            }
        )
    else:
        _show(profile, found, best, min_quality)


def _facts(source: str) -> list[Facts]:
    if is_bundle(source):
        from edge_mmllm.profiling.facts import bundle_facts

        return [bundle_facts(source)]
    from edge_mmllm_export.fitting import checkpoint_facts  # noqa: TID251

    return checkpoint_facts(source)


def _show(device: Device, found: list[Fit], best: Fit | None, min_quality: str) -> None:
    rows = []
    for one in found:
        speed = one.decode_tokens_per_s
        verdict = "recommended" if one is best else "fits" if one.fits else "does not fit"
        rows.append(
            (
                one.name, one.scheme, one.kernels, size_text(one.disk_bytes),
                size_text(one.memory.rss_bytes), size_text(one.memory.data_bytes),
                size_text(one.memory.state_bytes),
                "unknown" if speed is None else f"{speed:.1f}", one.gate, verdict,
            )
        )  # fmt: skip
    grid(
        ("model", "quantization", "kernels", "disk", "peak RSS", "private", "state in RSS",
         "tokens/s", "gate", "verdict"), rows,
    )  # fmt: skip
    notes = sorted({note for one in found for note in one.notes})
    bases = sorted({one.basis for one in found})
    shown: list[tuple[str, object]] = [
        ("device", f"{device.name}: {device.title}, {device.cores} cores, {device.isa}"),
        ("memory for a program", f"{size_text(device.free_bytes)} of "
         f"{size_text(device.ram_bytes)}"),
        ("context", f"{found[0].context} tokens, all of them used" if found else "-"),
        ("speed from", "; ".join(bases)),
        *(("note", note) for note in notes),
    ]  # fmt: skip
    if best is None:
        why = "" if min_quality == "any" else f" with --min-quality {min_quality}"
        shown.append(("recommended", f"none{why}: nothing fits"))
    else:
        shown.append(("recommended", f"{best.scheme}, {best.kernels} kernels"))
        shown.append(("try it", f"edge-mmllm bench BUNDLE --limit-memory {best.limit_bytes}"))
    table(shown, "predicted, not measured")


def _show_calibration(made: Calibration, place: str) -> None:
    rows: list[tuple[str, object]] = [
        ("machine", f"{made.cpu}, {made.threads} threads"),
        ("memory reads", f"{made.read_bytes_per_s / 1e9:.1f} GB/s"),
    ]
    for kind, rate in made.rates.items():
        rows.append((kind, f"{rate.bytes_per_s / 1e9:.1f} GB/s of weights, "
                     f"{rate.layer_us:.0f} us a layer"))  # fmt: skip
    rows.append(("load average", f"{made.load_average[0]} before, {made.load_average[1]} after"))
    table(rows, f"calibrated in {made.wall_s:.0f} s: {place}")
    if (made.load_average[0] or 0) > 1:
        say("note: the machine was busy; calibrate it again when it is quiet")


def _show_devices(known: list[Device], as_json: bool) -> None:
    if as_json:
        emit({"devices": [device.to_json() for device in known]})
        return
    rows = []
    for d in known:
        rate = "-" if d.bandwidth_bytes_per_s is None else f"{d.bandwidth_bytes_per_s / 1e9:.1f}"
        rows.append((d.name, d.title, size_text(d.ram_bytes), size_text(d.free_bytes), d.cores,
                     rate, d.isa))  # fmt: skip
    grid(("profile", "device", "RAM", "for a program", "cores", "GB/s peak", "ISA"), rows)
