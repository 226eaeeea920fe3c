"""`edge-mmllm bench`."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import click

from edge_mmllm.cli._device_options import device_given, device_options
from edge_mmllm.cli._options import (
    POSITIVE,
    context_option,
    json_option,
    media_given,
    media_options,
    threads_option,
)
from edge_mmllm.cli._output import emit, grid, progress_bars, say, size_text, table


@click.command("bench")
@click.argument("bundles", nargs=-1, required=True, metavar="BUNDLE...")
@click.option("--plan", "plan_file", metavar="FILE",
              help="Tests to run with each bundle, in TOML: see docs/results.md.")  # fmt: skip
@click.option("--out", metavar="FILE", help="Append each result to this file, in JSONL.")
@click.option(
    "--prompt-tokens",
    type=POSITIVE,
    default=512,
    show_default=True,
    metavar="N",
    help="Tokens of the prompt.",
)
@click.option("--new-tokens", type=POSITIVE, default=64, show_default=True, metavar="N",
              help="Tokens decoded after it.")  # fmt: skip
@click.option("--repetitions", type=POSITIVE, default=5, show_default=True, metavar="N",
              help="Timed runs, after one to warm up.")  # fmt: skip
@click.option("--rounds", type=POSITIVE, default=1, show_default=True, metavar="N",
              help="Times to run every test, each in a process of its own: `compare` then knows "
              "how processes differ.")  # fmt: skip
@click.option("--sustained", type=click.FloatRange(min=0), default=0.0, metavar="S",
              help="Decode for S seconds more: does it keep its speed?")  # fmt: skip
@click.option("--operators", is_flag=True, help="Time by operator and layer, in runs of their own.")
@media_options
@device_options
@threads_option
@context_option
@json_option
def command(
    bundles: tuple[str, ...],
    plan_file: str | None,
    out: str | None,
    prompt_tokens: int,
    new_tokens: int,
    repetitions: int,
    rounds: int,
    sustained: float,
    operators: bool,
    threads: int | None,
    context: int | None,
    as_json: bool,
    **more: Any,
) -> None:
    """Measure a bundle's speed and memory on this device.

    Each test runs in a process of its own. Fixed token counts, no early stop; medians over the
    repetitions, with their spread. With --image the picture is encoded anew in every repetition,
    and the time to the first token is split. With --plan the options above it do not count.
    With --device or --limit-memory a test that does not fit says so; the speed of the device is
    not imitated. With --target all of it happens there.
    """
    from edge_mmllm.errors import EdgeError
    from edge_mmllm.profiling.job import Job, error_from_json
    from edge_mmllm.profiling.plan import Plan, read_plan
    from edge_mmllm.profiling.runner import jsonl_writer, run_plan

    where = device_given(more)
    job = Job(
        "",
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repetitions=repetitions,
        threads=threads,
        context=context,
        media=media_given(more),
        sustained_s=sustained,
        operators=operators,
    )
    plan = Plan((job,), rounds=rounds) if plan_file is None else read_plan(plan_file)
    limits = where.limits()
    if limits.any:
        plan = replace(plan, tests=tuple(replace(test, limits=limits) for test in plan.tests))
    if any(test.repetitions < 5 for test in plan.tests) and out is not None:
        say("note: fewer than 5 repetitions tell little about the spread")
    with (
        progress_bars(shown=not as_json) as progress,
        nullcontext() if out is None else jsonl_writer(out) as write,
        where.launcher(progress) as launch,
    ):
        records = run_plan(
            bundles, plan, launch=launch, write=write, progress=progress, device=where.label
        )
    failed = [r for r in records if r["status"] != "ok"]
    if len(records) == 1:
        if failed:
            raise error_from_json(failed[0]["error"])
        if as_json:
            emit(records[0])
        else:
            _show(records[0])
        return
    if as_json:
        emit({"results": records})
    else:
        _show_all(records)
    if len(failed) == len(records):
        raise error_from_json(failed[0]["error"])
    if failed:
        raise EdgeError(f"{len(failed)} of {len(records)} tests failed; the others are above")


def _spread(value: float | None) -> str:
    return "" if value is None else f" (spread {value:.1%})"


def _show(r: dict[str, Any]) -> None:
    after = (
        f"{size_text(r['rss_after_load_bytes'])}: "
        f"{size_text(r['rss_after_load_anonymous_bytes'])} anonymous, "
        f"{size_text(r['rss_after_load_file_bytes'])} of files"
    )
    split = r["split"] or {k: v for k, v in r["phases_ms"].items() if "tokenize" in k}
    used, energy, memory = r["used"], r["energy"], r["memory"]
    rows: list[tuple[str, object]] = [
        ("model", f"{r['architecture']}, {r['parameters']:,} parameters, {r['quantization']}, "
         f"{size_text(r['size_bytes'])}"),
        ("engine", f"{r['engine']} {r['engine_version']}, {r['threads']} threads"),
        ("tokens", f"{r['prompt_tokens']} + {r['new_tokens']}, {r['repetitions']} repetitions"),
        ("load", f"{r['load_ms']:.0f} ms{_spread(r['load_spread'])}, "
         f"first {r['first_load_ms']:.0f} ms, after {r['import_ms']:.0f} ms of imports"),
        ("first token", f"{r['ttft_ms']:.1f} ms{_spread(r['ttft_spread'])}"),
        *((f"  {name.removesuffix('_ms')}", f"{value:.2f} ms") for name, value in split.items()),
        ("prefill", f"{r['prefill_tokens_per_s']:.1f} tokens/s"),
        ("decode", f"{r['decode_tokens_per_s']:.1f} tokens/s{_spread(r['decode_spread'])}"
         f"{_between(r['decode_tokens_per_s_ci95'])}"),
        ("between tokens", f"p50 {r['itl_ms_p50']:.2f} ms, p90 {r['itl_ms_p90']:.2f} ms, "
         f"p99 {r['itl_ms_p99']:.2f} ms, longest {r['itl_ms_max']:.2f} ms"),
        ("outside the engine", f"{r['python_us_per_token']:.1f} us a token, "
         f"{r['python_percent']:.1f} %"),
        ("RSS before load", size_text(r["rss_before_load_bytes"])),
        ("RSS after load", after),
        ("peak RSS", f"{size_text(r['peak_rss_bytes'])}, "
         f"PSS {size_text(r['peak_pss_bytes'])}"),
        ("  of it", f"weights mapped and resident {size_text(memory['weights_resident_bytes'])}, "
         f"packed {size_text(memory['packed_bytes'])}, "
         f"scratch {size_text(memory['scratch_bytes'])}"),
        ("state", f"{size_text(r['state_bytes'])} of {size_text(r['state_capacity_bytes'])} "
         "reserved"),
        ("CPU", f"{used['cpus']:.2f} CPUs, {used['major_faults']} page faults from disk, "
         f"{used['involuntary_switches']} times put aside"),
        ("energy", f"{energy['joules_per_token'] * 1e3:.1f} mJ a token, {energy['watts']:.2f} W "
         f"({energy['source']})" if energy["status"] == "measured" else energy["status"]),
        ("load average", f"{r['machine']['load_average']} before, {r['load_average_after']} after"),
        *(("noisy", reason) for reason in r["noise"]),
    ]  # fmt: skip
    table(rows, f"bundle {r['bundle_sha256'][:12]}")


def _between(interval: list[float] | None) -> str:
    return "" if interval is None else f", 95 % between {interval[0]:.1f} and {interval[1]:.1f}"


def _show_all(records: list[dict[str, Any]]) -> None:
    heads = ("bundle", "test", "first token ms", "prefill/s", "decode/s", "p99 ms", "peak", "noise")
    rows = []
    for r in sorted(records, key=lambda r: (str(r["name"]), str(r["test"]))):
        if r["status"] != "ok":
            rows.append((r["name"], r["test"], *[""] * 5, f"failed: {r['error']['what']}"))
            continue
        rows.append(
            (
                r["name"],
                r["test"],
                f"{r['ttft_ms']:.1f}",
                f"{r['prefill_tokens_per_s']:.0f}",
                f"{r['decode_tokens_per_s']:.1f}",
                f"{r['itl_ms_p99']:.2f}",
                size_text(r["peak_rss_bytes"]),
                "noisy" if r["noise"] else "",
            )
        )
    grid(heads, rows)
