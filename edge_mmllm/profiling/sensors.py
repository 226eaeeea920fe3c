"""Energy, temperature and frequency, where a device has sensors for them.

Sources, below a root that tests make up:
    sys/class/powercap/intel-rapl:N/{name,energy_uj,max_energy_range_uj}   RAPL, microjoules
    sys/class/hwmon/hwmonN/{name,energyM_input,powerM_input,inM_input,currM_input}   INA219, INA226,
        INA3221 and their like: microjoules, microwatts, millivolts, milliamperes
    sys/class/power_supply/BAT*/{type,status,power_now,current_now,voltage_now}   microwatts, uA, uV
    sys/class/thermal/thermal_zoneN/{type,temp}                     thousandths of a degree Celsius
    sys/devices/system/cpu/cpuN/cpufreq/{scaling_cur_freq,scaling_governor}                     kHz
(the kernel's Documentation/power/powercap, hwmon/sysfs-interface, ABI/testing/sysfs-class-power.)

What no sensor tells is "not measured"; nothing is estimated from a processor's rated power.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

ROOT = Path("/")

#: Sensors that tell power, not energy, are read this often.
POLL_S = 0.1


class EnergySensor(Protocol):
    """Something that counts energy.

    Attributes:
        name: where the figure comes from, e.g. `RAPL package-0`.
        covers: what it counts: `cpu`, `board` or `battery` (the whole device).
    """

    name: str
    covers: str

    def start(self) -> None:
        """Counts anew."""
        ...

    def stop(self) -> float | None:
        """Joules since `start`; None where the sensor failed on the way."""
        ...


@dataclass(frozen=True)
class Energy:
    """What a run took.

    Attributes:
        status: `measured`, or `not measured`.
        source, covers: see `EnergySensor`.
        joules: over `seconds`, the machine's idle power and other processes included.
        joules_per_token: over all tokens read and made.
        watts: on average.
    """

    status: Literal["measured", "not measured"] = "not measured"
    source: str | None = None
    covers: str | None = None
    joules: float | None = None
    seconds: float | None = None
    joules_per_token: float | None = None
    watts: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


class Meter:
    """A context that measures energy with one sensor; `energy(tokens)` afterwards."""

    def __init__(self, sensor: EnergySensor | None) -> None:
        self._sensor = sensor
        self._joules: float | None = None
        self._seconds = 0.0

    def __enter__(self) -> Meter:
        self._started = time.perf_counter()
        if self._sensor is not None:
            self._sensor.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._sensor is not None:
            self._joules = self._sensor.stop()
        self._seconds = time.perf_counter() - self._started

    def energy(self, tokens: int) -> Energy:
        """The figures of the time inside the context."""
        if self._sensor is None or self._joules is None or self._seconds <= 0:
            return Energy()
        return Energy(
            "measured",
            self._sensor.name,
            self._sensor.covers,
            self._joules,
            self._seconds,
            self._joules / tokens if tokens else None,
            self._joules / self._seconds,
        )


class _Counter:
    """Files that count microjoules, each up to a range and then from 0 again."""

    def __init__(self, name: str, covers: str, files: list[tuple[Path, int | None]]) -> None:
        self.name, self.covers, self._files = name, covers, files
        self._before: list[int | None] = []

    def start(self) -> None:
        self._before = [_number(file) for file, _ in self._files]

    def stop(self) -> float | None:
        total = 0
        for (file, bound), before in zip(self._files, self._before, strict=True):
            now = _number(file)
            if now is None or before is None or (now < before and bound is None):
                return None
            total += now - before if now >= before else now + (bound or 0) - before
        return total * 1e-6


class _Power:
    """Something that tells watts: read by a thread, integrated over time (trapezoids)."""

    def __init__(self, name: str, covers: str, watts: Callable[[], float | None]) -> None:
        self.name, self.covers, self._watts = name, covers, watts
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._samples: list[tuple[float, float | None]] = [(time.perf_counter(), self._watts())]
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="energy", daemon=True)
        self._thread.start()

    def _poll(self) -> None:
        while not self._end.wait(POLL_S):
            self._samples.append((time.perf_counter(), self._watts()))

    def stop(self) -> float | None:
        self._end.set()
        if self._thread is not None:
            self._thread.join()
        self._samples.append((time.perf_counter(), self._watts()))
        joules = 0.0
        for (t0, w0), (t1, w1) in zip(self._samples, self._samples[1:], strict=False):
            if w0 is None or w1 is None:
                return None
            joules += (t1 - t0) * (w0 + w1) / 2
        return joules


def energy_sensor(root: Path = ROOT) -> EnergySensor | None:
    """The best sensor there is: the whole board's before the processor's before a battery's.

    A battery counts only while it discharges: on a charger its power says nothing.
    """
    return next(_hwmon(root), None) or _rapl(root) or _battery(root)


def _rapl(root: Path) -> EnergySensor | None:
    """All packages; their parts (`intel-rapl:0:0`) are counted in them."""
    files, names = [], []
    for zone in sorted((root / "sys/class/powercap").glob("intel-rapl:*")):
        if not re.fullmatch(r"intel-rapl:\d+", zone.name) or _number(zone / "energy_uj") is None:
            continue  # a part, or readable by root only
        if not (_text(zone / "name") or "").startswith("package"):
            continue  # psys counts the packages again
        files.append((zone / "energy_uj", _number(zone / "max_energy_range_uj")))
        names.append(_text(zone / "name") or zone.name)
    return _Counter("RAPL " + ", ".join(names), "cpu", files) if files else None


def _hwmon(root: Path) -> Iterator[EnergySensor]:
    """INA-style monitors. One with several channels is summed."""
    for chip in sorted((root / "sys/class/hwmon").glob("hwmon*")):
        name = _text(chip / "name") or ""
        if not name.startswith("ina"):
            continue
        energy = sorted(chip.glob("energy*_input"))
        if energy and all(_number(e) is not None for e in energy):
            yield _Counter(f"hwmon {name}", "board", [(e, None) for e in energy])
            continue
        power = sorted(chip.glob("power*_input"))
        pairs = [
            (chip / f"in{current.name[4:]}", current)
            for current in sorted(chip.glob("curr*_input"))
        ]
        pairs = [pair for pair in pairs if pair[0].exists()]
        if power:
            yield _Power(f"hwmon {name}", "board", partial(_sum, power, 1e-6))
        elif pairs:
            yield _Power(f"hwmon {name}", "board", partial(_products, pairs, 1e-6))


def _battery(root: Path) -> EnergySensor | None:
    for supply in sorted((root / "sys/class/power_supply").glob("*")):
        if _text(supply / "type") != "Battery" or _text(supply / "status") != "Discharging":
            continue
        name = f"power_supply {supply.name}"
        power = supply / "power_now"
        pair = (supply / "voltage_now", supply / "current_now")
        if _number(power) is not None:
            return _Power(name, "battery", partial(_sum, [power], 1e-6))
        if all(_number(p) is not None for p in pair):
            return _Power(name, "battery", partial(_products, [pair], 1e-12))
    return None


def _sum(files: list[Path], unit: float) -> float | None:
    values = [_number(file) for file in files]
    return None if None in values else unit * sum(abs(v or 0) for v in values)


def _products(pairs: list[tuple[Path, Path]], unit: float) -> float | None:
    total = 0.0
    for a, b in pairs:
        x, y = _number(a), _number(b)
        if x is None or y is None:
            return None
        total += abs(x * y) * unit
    return total


@dataclass(frozen=True)
class Climate:
    """How hot and how fast the processor is; None where it does not tell.

    Attributes:
        temperature_c: the hottest thermal zone, degrees Celsius.
        frequency_mhz: of the CPUs, on average.
        governor: what sets the frequency, e.g. `schedutil`; several are joined by commas.
    """

    temperature_c: float | None
    frequency_mhz: float | None
    governor: str | None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def read_climate(root: Path = ROOT) -> Climate:
    """Temperature, frequency and governor now."""
    zones = (root / "sys/class/thermal").glob("thermal_zone*/temp")
    heat = [t / 1000 for t in map(_number, zones) if t is not None]
    # A zone without a probe says 0 or an absurd figure.
    heat = [t for t in heat if 0 < t < 150]
    cpus = root / "sys/devices/system/cpu"
    speeds = [s / 1000 for s in map(_number, cpus.glob("cpu[0-9]*/cpufreq/scaling_cur_freq")) if s]
    governors = {_text(g) for g in cpus.glob("cpu[0-9]*/cpufreq/scaling_governor")} - {None}
    return Climate(
        max(heat, default=None),
        sum(speeds) / len(speeds) if speeds else None,
        ", ".join(sorted(str(g) for g in governors)) or None,
    )


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return None


def _number(path: Path) -> int | None:
    try:
        return int(_text(path) or "")
    except ValueError:
        return None
