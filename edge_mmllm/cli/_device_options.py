"""Options of `bench` that say where it runs and under which limits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from edge_mmllm.cli._options import SIZE, Decorated

if TYPE_CHECKING:
    from edge_mmllm.cli._output import Progress
    from edge_mmllm.profiling.limits import Limits

_NAMES = (
    "device", "limit_memory", "target", "host_key", "identity", "remote_python", "remote_root",
)  # fmt: skip


@dataclass(frozen=True)
class DeviceOptions:
    """What was given."""

    device: str | None
    limit_memory: int | None
    target: str | None
    host_key: str | None
    identity: str | None
    remote_python: str
    remote_root: str | None

    def limits(self) -> Limits:
        """What each test's process is put under.

        Raises:
            UsageError: no such device.
        """
        from edge_mmllm.profiling.devices import find_device
        from edge_mmllm.profiling.limits import Limits

        known = Limits() if self.device is None else find_device(self.device).limits
        return Limits(self.limit_memory or known.memory_bytes, known.cpus)

    @property
    def label(self) -> str | None:
        """The device's name, for records."""
        return self.target or self.device

    @contextmanager
    def launcher(self, progress: Progress) -> Iterator[Callable[[Any], dict[str, Any]]]:
        """Runs a job: in a child here, or on the target.

        Raises:
            UsageError: no such target.
        """
        if self.target is None:
            from edge_mmllm.profiling.job import launch

            yield launch
            return
        from edge_mmllm.remote.bench import RemoteDevice, RemoteOptions

        options = RemoteOptions(
            host_key=self.host_key,
            identity=self.identity,
            root=self.remote_root,
            python=self.remote_python,
        )
        with RemoteDevice(self.target, options, progress=progress) as remote:
            yield remote.launch


def device_options(command: Decorated) -> Decorated:
    """`--device`, `--limit-memory`, `--target` and what goes with it."""
    for option in reversed(
        (
            click.option("--device", metavar="PROFILE",
                         help="Under that device's memory and cores; `fit --devices` lists them."),
            click.option("--limit-memory", type=SIZE, metavar="SIZE",
                         help="Under so much private memory (RLIMIT_DATA), e.g. 256MiB."),
            click.option("--target", metavar="URL",
                         help="Run there: ssh://user@host[:port], adb or adb:SERIAL."),
            click.option("--host-key", metavar="KEY",
                         help="Pin the target's host key: SHA256:..., or a public key's file."),
            click.option("--identity", metavar="FILE", help="Private key for the target."),
            click.option("--remote-python", default="python3", show_default=True, metavar="PATH",
                         help="The target's Python with the runtime's dependencies."),
            click.option("--remote-root", metavar="DIR",
                         help="Our folder there; default: .cache/edge-mmllm/remote in the home."),
        )
    ):  # fmt: skip
        command = option(command)
    return command


def device_given(given: dict[str, Any]) -> DeviceOptions:
    """Takes these options out of a command's."""
    return DeviceOptions(**{name: given.pop(name) for name in _NAMES})
