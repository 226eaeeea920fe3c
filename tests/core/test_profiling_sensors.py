"""Energy, heat and counters from made-up sysfs trees: what is measured, and what is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_mmllm.profiling import sensors
from edge_mmllm.profiling.counters import Counters, read_counters, used_between
from edge_mmllm.profiling.machine import read_machine
from edge_mmllm.profiling.noise import reasons
from edge_mmllm.profiling.sensors import Meter, energy_sensor, read_climate
from edge_mmllm.profiling.sustained import drop


def tree(root: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        path = root / "sys" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


RAPL = "class/powercap/intel-rapl:0"


def test_no_sensor_is_not_measured(tmp_path: Path) -> None:
    assert energy_sensor(tmp_path) is None
    with Meter(energy_sensor(tmp_path)) as meter:
        pass
    told = meter.energy(10).to_json()
    assert told["status"] == "not measured"
    assert set(told.values()) == {"not measured", None}


def test_rapl_counts_packages_and_survives_the_end_of_its_range(tmp_path: Path) -> None:
    tree(tmp_path, {
        f"{RAPL}/name": "package-0", f"{RAPL}/energy_uj": 9_000_000,
        f"{RAPL}/max_energy_range_uj": 10_000_000,
        f"{RAPL}:0/name": "core", f"{RAPL}:0/energy_uj": 5,
        "class/powercap/intel-rapl:1/name": "psys", "class/powercap/intel-rapl:1/energy_uj": 5,
    })  # fmt: skip
    with Meter(energy_sensor(tmp_path)) as meter:
        (tmp_path / "sys" / RAPL / "energy_uj").write_text("1000000\n")  # past its range
    told = meter.energy(4)
    assert (told.status, told.source, told.covers) == ("measured", "RAPL package-0", "cpu")
    assert told.joules == pytest.approx(2)
    assert told.joules_per_token == pytest.approx(0.5)


def test_a_counter_that_went_away_is_not_measured(tmp_path: Path) -> None:
    tree(tmp_path, {f"{RAPL}/name": "package-0", f"{RAPL}/energy_uj": 1})
    with Meter(energy_sensor(tmp_path)) as meter:
        (tmp_path / "sys" / RAPL / "energy_uj").unlink()
    assert meter.energy(4).status == "not measured"


@pytest.mark.parametrize(
    ("files", "source", "watts"),
    [
        ({"class/hwmon/hwmon0/name": "ina226", "class/hwmon/hwmon0/power1_input": 3_000_000},
         "hwmon ina226", 3.0),
        ({"class/hwmon/hwmon0/name": "ina3221", "class/hwmon/hwmon0/in1_input": 5000,
          "class/hwmon/hwmon0/curr1_input": 400}, "hwmon ina3221", 2.0),
        ({"class/power_supply/BAT0/type": "Battery", "class/power_supply/BAT0/status":
          "Discharging", "class/power_supply/BAT0/power_now": 7_500_000}, "power_supply BAT0", 7.5),
        ({"class/power_supply/bms/type": "Battery", "class/power_supply/bms/status": "Discharging",
          "class/power_supply/bms/voltage_now": 4_000_000,
          "class/power_supply/bms/current_now": -500_000}, "power_supply bms", 2.0),
    ],
)  # fmt: skip
def test_power_is_integrated(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    files: dict[str, object],
    source: str,
    watts: float,
) -> None:
    monkeypatch.setattr(sensors, "POLL_S", 0.001)
    tree(tmp_path, files)
    with Meter(energy_sensor(tmp_path)) as meter:
        pass
    told = meter.energy(0)
    assert told.source == source
    assert told.joules is not None
    assert told.seconds is not None
    assert told.joules <= watts * told.seconds
    assert told.joules_per_token is None
    assert told.watts == pytest.approx(told.joules / told.seconds)


def test_a_battery_on_a_charger_says_nothing(tmp_path: Path) -> None:
    tree(tmp_path, {
        "class/power_supply/BAT0/type": "Battery", "class/power_supply/BAT0/status": "Charging",
        "class/power_supply/BAT0/power_now": 7_500_000, "class/power_supply/AC/type": "Mains",
    })  # fmt: skip
    assert energy_sensor(tmp_path) is None


def test_the_boards_sensor_comes_first(tmp_path: Path) -> None:
    tree(tmp_path, {
        f"{RAPL}/name": "package-0", f"{RAPL}/energy_uj": 1,
        "class/hwmon/hwmon0/name": "coretemp", "class/hwmon/hwmon0/power1_input": 1,
        "class/hwmon/hwmon1/name": "ina219", "class/hwmon/hwmon1/energy1_input": 500_000,
    })  # fmt: skip
    sensor = energy_sensor(tmp_path)
    assert sensor is not None
    assert (sensor.name, sensor.covers) == ("hwmon ina219", "board")


def test_climate(tmp_path: Path) -> None:
    assert read_climate(tmp_path).to_json() == {
        "temperature_c": None, "frequency_mhz": None, "governor": None
    }  # fmt: skip
    tree(tmp_path, {
        "class/thermal/thermal_zone0/temp": 41_500, "class/thermal/thermal_zone1/temp": 63_000,
        "class/thermal/thermal_zone2/temp": -274_000, "class/thermal/thermal_zone3/temp": "x",
        "devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": 1_400_000,
        "devices/system/cpu/cpu1/cpufreq/scaling_cur_freq": 1_800_000,
        "devices/system/cpu/cpu0/cpufreq/scaling_governor": "schedutil",
        "devices/system/cpu/cpu1/cpufreq/scaling_governor": "powersave",
    })  # fmt: skip
    told = read_climate(tmp_path)
    assert told.temperature_c == 63
    assert told.frequency_mhz == pytest.approx(1600)
    assert told.governor == "powersave, schedutil"


def test_counters(tmp_path: Path) -> None:
    now = read_counters()
    assert now.cpu_user_s > 0
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/stat").write_text("cpu  100 0 100 1000 50 0 0 0 0 0\ncpu0 1 2 3 4 5\n")
    assert read_counters(tmp_path).machine_busy_s == pytest.approx(2.0)
    (tmp_path / "proc/stat").write_text("nonsense\n")
    assert read_counters(tmp_path).machine_busy_s is None


def counted(wall: float, user: float, busy: float | None, switches: int) -> Counters:
    return Counters(wall, user, 0.0, 1, 0, 0, switches, busy)


def test_what_was_used_between() -> None:
    used = used_between(counted(10, 1, 50, 0), counted(12, 4, 54, 10))
    assert used.cpus == pytest.approx(1.5)
    assert used.others_cpus == pytest.approx(0.5)
    assert used.involuntary_switches == 10
    assert used_between(counted(10, 1, None, 0), counted(12, 4, 54, 10)).others_cpus is None


def test_noise_is_flagged_and_quiet_is_quiet() -> None:
    from dataclasses import replace

    machine = replace(read_machine(), load_average=0.0, affinity_cpus=2)
    quiet = used_between(counted(0, 0, 0, 0), counted(1, 1, 1, 1))
    busy = used_between(counted(0, 0, 0, 0), counted(1, 1, 2, 900))
    assert reasons(machine, quiet, {"decode": 0.02}) == ()
    assert len(reasons(machine, busy, {"decode": 0.3})) == 3
    loaded = replace(machine, load_average=4.83)
    assert reasons(loaded, quiet, {"decode": None}) == ()  # it may be our own test before
    unseen = used_between(counted(0, 0, None, 0), counted(1, 1, None, 1))
    assert "4.83" in reasons(loaded, unseen, {"decode": None})[0]
    told = reasons(machine, quiet, {}, governor="powersave", temperature_rise_c=20,
                   sustained_drop=0.4)  # fmt: skip
    assert len(told) == 3


def test_throttling() -> None:
    assert drop([10.0] * 4) is None
    assert drop([10, 10, 8, 7, 6, 5, 5, 5, 5, 5]) == pytest.approx(0.5)
