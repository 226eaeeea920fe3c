"""`edge-mmllm run`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from edge_mmllm.cli._options import (
    constraint_given,
    constraint_options,
    context_option,
    json_option,
    lora_given,
    lora_option,
    media_given,
    media_options,
    mmproj_option,
    sampling_options,
    threads_option,
)
from edge_mmllm.cli._output import emit, printable, progress_bars, size_text
from edge_mmllm.errors import UsageError

if TYPE_CHECKING:
    from edge_mmllm_runtime.answer import Answer, AnswerSettings
    from edge_mmllm_runtime.perception import Timings


@click.command("run")
@click.argument("bundle", metavar="BUNDLE")
@click.option("--prompt", required=True, metavar="TEXT", help="The prompt; - reads it from stdin.")
@media_options
@sampling_options
@constraint_options
@threads_option
@context_option
@lora_option
@mmproj_option
@click.option("--raw", is_flag=True, help="Continue the text as it is: no chat template.")
@click.option(
    "--state", metavar="PATH", help="Go on from this state file: the prompt is what comes next."
)
@click.option(
    "--save-state",
    metavar="PATH",
    help="Write the state after the answer here; may be the same file.",
)
@click.option(
    "--state-storage",
    type=click.Choice(["f32", "f16", "int8"]),
    default="f32",
    show_default=True,
    help="How --save-state holds it; f32 is exact.",
)
@click.option(
    "--engine",
    type=click.Choice(["mlc-llm"]),
    help="Run an MLC bundle of a transformer by an installed mlc_llm instead.",
)
@json_option
def command(bundle: str, prompt: str, **given: Any) -> None:
    """Answer one prompt.

    The answer goes to stdout as it comes, what it cost to stderr. A prompt goes through the
    bundle's chat template where it has one. With --state it is the next turn of a conversation
    that an earlier run saved with --save-state.
    """
    from edge_mmllm_runtime.answer import run
    from edge_mmllm_runtime.continuation import StateFiles

    as_json = given["as_json"]
    with contextlib.ExitStack() as waiting:
        bars = waiting.enter_context(progress_bars(shown=not as_json, transient=True))
        answer = run(
            bundle,
            _stdin() if prompt == "-" else prompt,
            answer_settings(given),
            threads=given["threads"],
            context=given["context"],
            lora=lora_given(given["lora"]),
            mmproj=given["mmproj"],
            raw=given["raw"],
            media=media_given(given),
            files=StateFiles(given["state"], given["save_state"], given["state_storage"]),
            engine=given["engine"],
            write=(lambda piece: None) if as_json else writer(waiting.close),
            progress=lambda done, total: bars("prompt", done, total),
        )
    if as_json:
        emit(answer.to_json())
        return
    click.echo()
    click.echo(cost(answer), err=True)


def answer_settings(given: dict[str, Any]) -> AnswerSettings:
    """The settings out of `sampling_options` and `constraint_options`. Raises: UsageError."""
    from edge_mmllm_runtime.answer import AnswerSettings
    from edge_mmllm_runtime.sampling import Sampling

    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    sampling = Sampling(*(given[name] for name in names))
    constraint = constraint_given(given)
    return AnswerSettings(given["max_new_tokens"], sampling, tuple(given["stop"]), constraint)


def writer(before: Callable[[], None] = lambda: None) -> Callable[[str], None]:
    """Writes pieces to stdout at once; on a terminal without control characters.

    Args:
        before: called before each piece.
    """
    stdout = sys.stdout
    if hasattr(stdout, "reconfigure"):
        stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8
    plain = stdout.isatty()

    def write(piece: str) -> None:
        before()
        stdout.write(printable(piece) if plain else piece)
        stdout.flush()

    return write


def cost(answer: Answer) -> str:
    """One line about an answer."""
    parts = [f"{answer.prompt_tokens} + {answer.new_tokens} tokens ({answer.finish_reason})"]
    if answer.restored_tokens:
        parts[0] = f"{answer.restored_tokens} restored + {parts[0]}"
    if answer.load_ms is not None:
        parts.append(f"load {answer.load_ms:.0f} ms")
    if answer.ttft_ms is not None:
        parts.append(f"first token {answer.ttft_ms:.0f} ms")
    if answer.timings.items:
        parts.append(f"({split(answer.timings)})")
    if answer.decode_tokens_per_s is not None:
        parts.append(f"{answer.decode_tokens_per_s:.1f} tokens/s")
    if answer.constraint is not None:
        cost, new = answer.constraint, answer.constraint.tokens
        parts.append(
            f"constraint {cost.mask_us_per_token:.0f} us/token ({cost.forced} of {new} forced)"
        )
    if answer.saved_state_bytes is not None:
        parts.append(f"state saved in {size_text(answer.saved_state_bytes)}")
    return ", ".join(parts)


def split(timings: Timings) -> str:
    """Where the time to the first token went; stages that were not run are left out."""
    times = {
        "load": timings.load_ms,
        "preprocess": timings.preprocess_ms,
        "encode": timings.encode_ms,
        "project": timings.project_ms,
        "prefill": timings.prefill_ms,
    }
    shown = [f"{name} {value:.0f} ms" for name, value in times.items() if value]
    if timings.encoded < timings.items:
        shown.append(f"{timings.items - timings.encoded} of {timings.items} encoded before")
    return ", ".join(shown)


def _stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError("the prompt on stdin is not UTF-8", found=str(error)) from error
