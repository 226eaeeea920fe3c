"""Device profiles: `--device NAME`. The table is `devices.toml`, which says what each key means
and where each figure comes from; a file of one's own in the same form may be given by path.
"""

from __future__ import annotations

import difflib
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edge_mmllm._fields import Fields
from edge_mmllm._toml import read_toml
from edge_mmllm.errors import CorruptBundle, UsageError
from edge_mmllm.profiling.limits import Limits
from edge_mmllm.profiling.machine import Machine, read_machine

_TABLE = Path(__file__).with_name("devices.toml")
#: The name of the machine that runs the command; its figures are read, or calibrated.
THIS = "this"
#: A table of profiles is a few kB.
_MAX_TABLE_BYTES = 1 << 20


@dataclass(frozen=True)
class Device:
    """A profile.

    Attributes:
        name, title: for `--device`; for people.
        ram_bytes: what it has; `free_bytes`: what a program can have of it.
        cores: worth computing with.
        bandwidth_bytes_per_s: peak of the memory bus; None: unknown.
        read_fraction: of the peak, what decoding gets.
        isa, features: what kernels can count on.
        source: where the figures come from.
    """

    name: str
    title: str
    ram_bytes: int
    free_bytes: int
    cores: int
    bandwidth_bytes_per_s: float | None
    read_fraction: float
    isa: str
    features: tuple[str, ...]
    source: str

    @property
    def limits(self) -> Limits:
        """What a run here is put under to try the device's sizes: its memory and its cores. The
        speed of its memory and of its cores is not imitated."""
        return Limits(memory_bytes=self.free_bytes, cpus=self.cores)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def devices(path: str | os.PathLike[str] | None = None) -> dict[str, Device]:
    """All profiles of the table that comes with the package, or of the file `path`.

    Raises:
        UsageError: the file is no such table; the message names the member.
    """
    file = _TABLE if path is None else Path(path)
    with file.open("rb") as stream:
        data = stream.read(_MAX_TABLE_BYTES + 1)
    if len(data) > _MAX_TABLE_BYTES:
        raise UsageError("a table of devices cannot be that large", where=str(file))
    table = read_toml(data.decode("utf-8", errors="replace"), file.name)
    try:
        return {name: _device(name, Fields(table[name], name)) for name in table}
    except CorruptBundle as error:
        raise UsageError(
            "a device profile is not right",
            where=f"{file.name}: {error.where}",
            expected=error.expected,
            found=error.found,
            fix="see edge_mmllm/profiling/devices.toml for the form",
        ) from error


def find_device(name: str) -> Device:
    """The profile of that name; `this` is the machine here; `FILE.toml:NAME` one of a file.

    Raises:
        UsageError: there is none; the message names the nearest.
    """
    if name == THIS:
        return this_device()
    file, colon, own = name.rpartition(":")
    known = devices(file if colon else None)
    if own in known:
        return known[own]
    near = difflib.get_close_matches(own, known, 1)
    raise UsageError(
        "unknown device",
        expected=", ".join((THIS, *known)),
        found=own[:80],
        fix=f"--device {near[0]}" if near else None,
    )


def this_device(machine: Machine | None = None) -> Device:
    """The machine here, its bandwidth unknown until it is calibrated."""
    m = machine or read_machine()
    total = m.memory_limit_bytes or m.memory_bytes or 0
    free = m.available_bytes if m.available_bytes is not None else total
    return Device(
        name=THIS,
        title=m.cpu_model or m.architecture,
        ram_bytes=total,
        free_bytes=free,
        cores=m.default_threads,
        bandwidth_bytes_per_s=None,
        read_fraction=1.0,
        isa=m.architecture,
        features=m.cpu_features,
        source="read from this machine",
    )


def _device(name: str, fields: Fields) -> Device:
    ram, free = fields.integer("ram_mib", least=1), fields.integer("free_mib", least=1)
    if free > ram:
        raise fields.fail("free_mib", f"at most ram_mib, {ram}")
    peak, fraction = fields.number("bandwidth_gb_per_s"), fields.number("read_fraction")
    if not peak > 0:
        raise fields.fail("bandwidth_gb_per_s", "a number above 0")
    if not 0 < fraction <= 1:
        raise fields.fail("read_fraction", "a number above 0, at most 1")
    if not fields.text("source").strip():
        raise fields.fail("source", "where the figures come from")
    return Device(
        name=name,
        title=fields.text("title"),
        ram_bytes=ram << 20,
        free_bytes=free << 20,
        cores=fields.integer("cores", least=1),
        bandwidth_bytes_per_s=peak * 1e9,
        read_fraction=fraction,
        isa=fields.text("isa"),
        features=fields.texts("features"),
        source=fields.text("source"),
    )
