"""Reasons to distrust a run: what else the machine did, and how far the repetitions lie apart.

On a busy two-core machine prefill of a recurrent model was seen to fall to a tenth: a figure from
such a run is no figure of the model.
"""

from __future__ import annotations

from collections.abc import Mapping

from edge_mmllm.profiling.counters import Used
from edge_mmllm.profiling.machine import Machine

#: CPUs' worth of other processes' work, and IQR over median, from which a run is noisy.
OTHERS_CPUS = 0.15
SPREAD = 0.10
#: Others' load before the run, as a share of the CPUs.
_LOAD_SHARE = 0.5
#: Times a second that a thread of ours was put aside.
_SWITCHES_PER_S = 200
_DROP = 0.10


def reasons(
    machine: Machine,
    used: Used,
    spreads: Mapping[str, float | None],
    *,
    governor: str | None = None,
    temperature_rise_c: float | None = None,
    sustained_drop: float | None = None,
) -> tuple[str, ...]:
    """Sentences; none for a quiet run.

    Args:
        machine: before the run.
        used: during the timed repetitions.
        spreads: name of a figure -> its spread.
        governor, temperature_rise_c: see `sensors.Climate`.
        sustained_drop: share of the speed that a long run lost.
    """
    found = []
    if used.others_cpus is not None and used.others_cpus > OTHERS_CPUS:
        found.append(f"other processes used {used.others_cpus:.2f} CPUs meanwhile")
    # A minute's average still holds the bench's own test before this one: it only stands in
    # where others' CPU time cannot be read.
    load, cpus = machine.load_average, machine.affinity_cpus
    if used.others_cpus is None and load is not None and load > _LOAD_SHARE * cpus:
        found.append(f"the load average was {load:.2f} before it, on {cpus} CPUs")
    for name, value in spreads.items():
        if value is not None and value > SPREAD:
            found.append(f"{name} spreads by {100 * value:.0f} % (IQR over median)")
    switches = used.involuntary_switches
    if switches is not None and switches / used.wall_s > _SWITCHES_PER_S:
        found.append(f"put aside for others {switches / used.wall_s:.0f} times a second")
    if governor is not None and "powersave" in governor:
        found.append(f"the CPU governor is {governor}")
    if temperature_rise_c is not None and temperature_rise_c > 15:
        found.append(f"it grew {temperature_rise_c:.0f} degrees warmer")
    if sustained_drop is not None and sustained_drop > _DROP:
        found.append(f"a long run lost {100 * sustained_drop:.0f} % of its speed")
    return tuple(found)
