"""`edge-mmllm chat`."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import click

from edge_mmllm.cli._options import (
    constraint_options,
    context_option,
    lora_given,
    lora_option,
    mmproj_option,
    sampling_options,
    threads_option,
)
from edge_mmllm.cli._output import say
from edge_mmllm.cli.run import answer_settings, writer


@click.command("chat")
@click.argument("bundle", metavar="BUNDLE")
@click.option("--system", metavar="TEXT", help="A system message to begin with.")
@sampling_options
@constraint_options
@threads_option
@context_option
@lora_option
@mmproj_option
@click.option("--raw", is_flag=True, help="No chat template: continue the text, turn by turn.")
def command(bundle: str, **given: Any) -> None:
    """Talk with a bundle's model.

    /reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer, /image PATH
    (/video, /audio) puts a picture before what is said next. Answers go to stdout, everything
    else to stderr.
    """
    from edge_mmllm_runtime import load
    from edge_mmllm_runtime.chat import Conversation, chat

    settings = answer_settings(given)
    lora = lora_given(given["lora"])
    sizes = {"threads": given["threads"], "context": given["context"]}
    with load(bundle, **sizes, lora=lora, mmproj=given["mmproj"]) as session:
        talk = Conversation(session, settings, system=given["system"], raw=given["raw"])
        at_terminal = sys.stdin.isatty()
        if at_terminal:
            say(talk.help)
        chat(talk, _typed() if at_terminal else _piped(), writer(), say, interruptible)


def _typed() -> Iterator[str]:
    """Lines from a terminal, with editing and history where the system has them."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - importing it is what makes input() use it
    while True:
        try:
            yield input("> ") if sys.stdout.isatty() else _ask()
        except EOFError:
            say("")
            return
        except KeyboardInterrupt:
            say("\n(Ctrl-D ends the conversation)")


def _ask() -> str:
    """As `input`, which would write its prompt to a stdout that is not the terminal."""
    click.echo("> ", nl=False, err=True)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")


def _piped() -> Iterator[str]:
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # the tokenizer says what is wrong
    for line in sys.stdin:
        yield line.rstrip("\n")


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C sets a flag, so that it cannot hit between a token and its state; twice, it raises."""
    pressed = False

    def press(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    try:
        before = signal.signal(signal.SIGINT, press)
    except ValueError:  # not the main thread: Ctrl-C does not come here
        yield lambda: False
        return
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
