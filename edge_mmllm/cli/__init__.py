"""The `edge-mmllm` command. One module for each sub-command, imported when it is invoked.

Parsing is apart from doing: each sub-command turns its arguments into one call of a public
function of the same name, and imports what that needs only then. So `--help` imports click and
nothing else.

    stdout   the answer of `run` and `chat`; with `--json` exactly one JSON document
    stderr   tables, progress bars, errors
    status   0 done, 1 failed, 2 wrong usage, 130 interrupted
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import click

from edge_mmllm.cli._errors import guarded

__all__ = ["COMMANDS", "main"]

#: Sub-command -> its line in `--help` (the command's own help begins with the same line).
COMMANDS = {
    "export": "Export a checkpoint to a quantized, judged bundle.",
    "adapter": "Make a GGUF file of a LoRA adapter, for `run --lora`.",
    "imatrix": "Compute an importance matrix for GGUF's K and I types.",
    "run": "Answer one prompt.",
    "chat": "Talk with a bundle's model.",
    "inspect": "Describe a checkpoint or a bundle.",
    "check": "Check a bundle's files and its answers on this device.",
    "bench": "Measure a bundle's speed and memory on this device.",
    "report": "Make a page or Markdown of results.",
    "compare": "Compare two files of results: what changed, and is it a regression?",
    "fit": "Predict whether models fit a device, and how fast they would decode there.",
    "kernels": "Build the native kernels, which are faster, or show whether they are there.",
    "doctor": "Show what is installed, what is missing, and what the machine offers.",
    "pack": "Pack a bundle's folder into one .edge file.",
    "unpack": "Unpack an .edge file, checking every byte.",
}


class LazyGroup(click.Group):
    """A group whose sub-commands are modules of this package, imported when invoked."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, in the order of `COMMANDS`."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Imports the sub-command's module."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"edge_mmllm.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list in `--help`, without importing anything."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Runs the command; errors become messages and exit statuses (see `_errors`)."""

        def call() -> Any:
            return super(LazyGroup, self).main(
                args,
                prog_name,
                complete_var,
                standalone_mode=False,
                windows_expand_args=windows_expand_args,
                **extra,
            )

        return guarded(call, args) if standalone_mode else call()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="edge-mmllm", prog_name="edge-mmllm")
def main() -> None:
    """Export, run and profile language models on small devices."""
