"""`edge-mmllm bench`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from edge_mmllm.cli._options import (
    POSITIVE,
    context_option,
    json_option,
    media_given,
    media_options,
    threads_option,
)
from edge_mmllm.cli._output import emit, progress_bars, size_text, table

if TYPE_CHECKING:
    from edge_mmllm.profiling.bench import BenchReport


@click.command("bench")
@click.argument("bundle", metavar="BUNDLE")
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
@media_options
@threads_option
@context_option
@json_option
def command(
    bundle: str,
    prompt_tokens: int,
    new_tokens: int,
    repetitions: int,
    threads: int | None,
    context: int | None,
    as_json: bool,
    **media: tuple[str, ...],
) -> None:
    """Measure a bundle's speed and memory on this device.

    Fixed token counts, no early stop; medians over the repetitions, with their spread. With
    --image the picture is encoded anew in every repetition, and the time to the first token is
    split.
    """
    from edge_mmllm.profiling.bench import bench

    with progress_bars(shown=not as_json) as progress:
        report = bench(
            bundle,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            threads=threads,
            context=context,
            repetitions=repetitions,
            media=media_given(media),
            progress=progress,
        )
    if as_json:
        emit(report.to_json())
    else:
        _show(report)


def _show(r: BenchReport) -> None:
    def spread(value: float | None) -> str:
        return "" if value is None else f" (spread {value:.1%})"

    after = (
        f"{size_text(r.rss_after_load_bytes)}: "
        f"{size_text(r.rss_after_load_anonymous_bytes)} anonymous, "
        f"{size_text(r.rss_after_load_file_bytes)} of files"
    )
    rows: list[tuple[str, object]] = [
        ("model", f"{r.architecture}, {r.parameters:,} parameters, {r.quantization}, "
         f"{size_text(r.size_bytes)}"),
        ("engine", f"{r.engine} {r.engine_version}, {r.threads} threads"),
        ("tokens", f"{r.prompt_tokens} + {r.new_tokens}, {r.repetitions} repetitions"),
        ("load", f"{r.load_ms:.0f} ms{spread(r.load_spread)}, first {r.first_load_ms:.0f} ms, "
         f"after {r.import_ms:.0f} ms of imports"),
        ("first token", f"{r.ttft_ms:.1f} ms{spread(r.ttft_spread)}"),
        *((f"  {name.removesuffix('_ms')}", f"{value:.1f} ms") for name, value in r.split.items()),
        ("prefill", f"{r.prefill_tokens_per_s:.1f} tokens/s"),
        ("decode", f"{r.decode_tokens_per_s:.1f} tokens/s{spread(r.decode_spread)}"),
        ("between tokens", f"p50 {r.itl_ms_p50:.2f} ms, p99 {r.itl_ms_p99:.2f} ms"),
        ("outside the engine", f"{r.python_us_per_token:.1f} us a token, {r.python_percent:.1f} %"),
        ("RSS before load", size_text(r.rss_before_load_bytes)),
        ("RSS after load", after),
        ("peak RSS", size_text(r.peak_rss_bytes)),
        ("state", f"{size_text(r.state_bytes)} of {size_text(r.state_capacity_bytes)} reserved"),
        ("load average", f"{r.machine.load_average} before, {r.load_average_after} after"),
    ]  # fmt: skip
    table(rows, f"bundle {r.bundle_sha256[:12]}")
