"""`fit`: will a model fit a device, and how fast would it decode?

Memory, in two figures that are not each other's bound:
- **RSS**: pages in memory, mapped weight files and libraries and states among them. What a device
  has to hold.
- **data**: private writable mappings (what RLIMIT_DATA and `--limit-memory` bound): no mapped files
  and no states, which lie in shared mappings, but all that is reserved and never touched.

Each is the larger of two moments: while the model loads (weights as they are and as the engine
packs them, at once) and while it runs (packed weights, states with the context full, scratch of a
chunk of 512 tokens). The coefficients are in `memory_model.json`, made by `benchmarks/fit.py
--derive` from measured bundles, of each kind of kernels by itself; the engine's own share belongs
to x86-64 and is taken for other machines too.

Decoding: `(bytes a step moves - last-level cache) / rate + layers x cost of a layer`. The rate and
the cost come from this machine's calibration; for a profile, from its bandwidth.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from edge_mmllm.errors import UsageError
from edge_mmllm.profiling.calibration import Calibration
from edge_mmllm.profiling.devices import THIS, Device
from edge_mmllm.profiling.facts import Facts

CHUNK = 512
_MODEL = Path(__file__).with_name("memory_model.json")
_FEATURES = ("int4", "int8", "scales", "half", "single")
#: A page fault on a mapped file brings its neighbours in: 64 kB (Linux, fault_around_bytes).
_FAULT_BYTES = 64 << 10
#: Attention over a long context: bytes of scores a token of context, in units of the width
#: (SmolLM2 at 4,000 tokens, both kinds of kernels: 26 MB more than at 512).
_SCORES = 11.5
#: A layer's cost beside its weights grows with about the root of its width (256 to 1,024 wide).
_UNIT_WIDTH = 768
#: Stock kernels keep float16 as float32, and go through it faster than through codes: measured.
_HALF_STOCK = 1.5
#: Private memory of `bench` beside the session's: needed between 20 and 60 MB where it was tried.
_INSTRUMENT_BYTES = 32 << 20
#: Quality names, from the most that may be lost to the least.
QUALITIES = ("any", "int4", "int8", "f16")


@dataclass(frozen=True)
class Memory:
    """Predicted peaks in bytes, and what they are made of."""

    rss_bytes: int
    data_bytes: int
    engine_bytes: int
    weights_bytes: int
    state_bytes: int
    scratch_bytes: int
    load_rss_bytes: int


@dataclass(frozen=True)
class Fit:
    """A prediction for one form of a model on one device.

    Attributes:
        kernels: `native` or `stock`.
        context: tokens that the states are filled with.
        memory: see `Memory`.
        fits: RSS within what the device leaves to a program.
        limit_bytes: the `--limit-memory` under which it should run: the predicted data with a
            margin of 8 %, and what `bench` itself takes (a thread that watches, loading anew).
        decode_tokens_per_s: None where the device's bandwidth is unknown and nothing calibrated.
        basis: what the speed rests on.
        notes: what the prediction does not know.
    """

    name: str
    scheme: str
    kernels: str
    context: int
    disk_bytes: int
    memory: Memory
    fits: bool
    limit_bytes: int
    decode_tokens_per_s: float | None
    basis: str
    gate: str
    quality: dict[str, float]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def fit(
    facts: Facts,
    device: Device,
    *,
    context: int | None = None,
    kernels: Sequence[str] = ("native", "stock"),
    calibration: Calibration | None = None,
) -> list[Fit]:
    """Predicts a model in one form, by each kind of kernels that can run it.

    Raises:
        UsageError: unknown kernels, or a context below 1.
    """
    if context is not None and context < 1:
        raise UsageError("context must be at least 1", found=str(context))
    tokens = facts.context(context)
    found = []
    for kind in kernels:
        if kind not in memory_model():
            raise UsageError("unknown kernels", expected="native | stock", found=repr(kind))
        if kind == "native" and facts.native is False:
            continue
        memory = predict_memory(facts, kind, tokens, device.cores)
        speed, basis = _speed(facts, kind, tokens, device, calibration)
        found.append(
            Fit(
                name=facts.name,
                scheme=facts.scheme,
                kernels=kind,
                context=tokens,
                disk_bytes=facts.disk_bytes,
                memory=memory,
                fits=memory.rss_bytes <= device.free_bytes,
                limit_bytes=int(1.08 * memory.data_bytes) + _INSTRUMENT_BYTES,
                decode_tokens_per_s=speed,
                basis=basis,
                gate=facts.gate,
                quality=facts.quality,
                notes=_notes(facts, kind),
            )
        )
    return found


def recommend(found: Iterable[Fit], min_quality: str = "any") -> Fit | None:
    """The best of what fits: bundles that failed the gate last, then the least loss (more bits),
    unless it decodes at less than a third of the fastest; then the fastest.

    Args:
        min_quality: the fewest bits wanted: `any`, `int4`, `int8`, `f16`.
    """
    if min_quality not in QUALITIES:
        raise UsageError("unknown quality", expected=" | ".join(QUALITIES), found=repr(min_quality))
    least = QUALITIES.index(min_quality)
    usable = [f for f in found if f.fits and quality_rank(f.scheme) >= least]
    if not usable:
        return None
    fastest = max(f.decode_tokens_per_s or 0.0 for f in usable)

    def key(one: Fit) -> tuple[bool, bool, int, float, int]:
        speed = one.decode_tokens_per_s or 0.0
        good = one.gate != "failed-accepted"
        return good, speed * 3 >= fastest, quality_rank(one.scheme), speed, -one.memory.rss_bytes

    return max(usable, key=key)


def quality_rank(scheme: str) -> int:
    """Place in `QUALITIES` of a scheme; more bits, less loss."""
    name = scheme.split(",")[0]
    return {"int4": 1, "int8": 2}.get(name, 3 if name in ("f16", "f32") else 0)


def predict_memory(facts: Facts, kernels: str, context: int, cpus: int) -> Memory:
    """Peaks of a run: loaded, a prompt of a chunk or more read, the context filled."""
    model = memory_model()[kernels]
    engine = memory_model()["engine"]
    engine_rss = engine["rss"]
    engine_data = engine["data"] + engine["data_per_cpu"] * max(cpus - 1, 0)
    unit = CHUNK * 4 * facts.hidden
    known, fallback = model["scratch"], model["scratch"]["default"]
    share = known.get(facts.architecture, fallback)
    scores = _SCORES * facts.hidden * max(context - CHUNK, 0)
    scores = scores if facts.state_bytes_per_token else 0.0
    base, base_data = model["scratch_base"], model["scratch_base_data"]
    if model["arena"]:
        base, base_data = arena_base(facts.hidden)
    scratch = base + share["rss_units"] * unit + scores
    scratch_data = base_data + share["data_units"] * unit + scores
    if model["arena"]:
        # onnxruntime's arena grows to the next power of two; a fifth of the scratch is not in it.
        need = max(0.8 * share["rss_units"] * unit, 1 << 24)
        scratch_data = base_data + 2 ** math.ceil(math.log2(need)) + scores
    state = facts.state_bytes(context)
    rows = facts.weights.lookup or facts.weights.table
    touched = rows * (1 - math.exp(-CHUNK * _FAULT_BYTES / rows)) if rows else 0.0

    def linear(name: str) -> float:
        terms = model[name]
        total = terms["base"] + sum(terms[f] * getattr(facts.weights, f) for f in _FEATURES)
        return float(total + terms["largest"] * facts.weights.largest)

    loaded, loading = linear("loaded_rss"), linear("load_peak_rss")
    running = loaded + touched + state + scratch
    others = float(facts.weights.others)  # an encoder leaves before the decoder comes
    rss = engine_rss + max(loading, running, others * model["others"])
    data = engine_data + max(
        linear("load_peak_data"), linear("loaded_data") + scratch_data, others * model["others"]
    )
    return Memory(
        rss_bytes=int(rss),
        data_bytes=int(data),
        engine_bytes=int(engine_rss),
        weights_bytes=int(loaded + touched),
        state_bytes=state,
        scratch_bytes=int(scratch),
        load_rss_bytes=int(engine_rss + loading),
    )


def arena_base(hidden: int) -> tuple[float, float]:
    """What stock kernels take beside a chunk's rows: (RSS, private) in bytes.

    Seen on tiny models (256 wide), where 14 MB were too many, and on those of 768 and 1,024; of
    private memory 20 to 35 MB that are reserved outside the arena's last region.
    """
    share = hidden / _UNIT_WIDTH
    return 14e6 * min(share, 1.0) ** 2, 12.5e6 + 22.5e6 * share


def moved_bytes(facts: Facts, context: int, kernels: str = "native") -> float:
    """What a decode step reads and writes after `context` tokens."""
    w = facts.weights
    half = w.half * (_HALF_STOCK if kernels == "stock" else 1)
    return w.step_bytes - w.half + half + facts.state_bytes_per_token * context


def step_units(kernels: str, facts: Facts) -> float:
    """Layers, weighted by what one of the architecture costs beside its weights."""
    units = memory_model()[kernels]["layer_units"]
    unit = float(units.get(facts.architecture, units["default"]))
    return facts.layers * unit * math.sqrt(facts.hidden / _UNIT_WIDTH)


def reference_layer_us(kernels: str) -> float:
    """The cost of a layer on the machine that the model was made on."""
    return float(memory_model()[kernels]["layer_us"])


@cache
def memory_model() -> dict[str, Any]:
    """The coefficients, see `benchmarks/fit.py`."""
    found: dict[str, Any] = json.loads(_MODEL.read_bytes())
    return found


def step_seconds(
    facts: Facts, kernels: str, context: int, rate: float, layer_us: float, cache_bytes: float
) -> float:
    """A decode step's time; at least a fifth of the bytes miss the cache."""
    moved = moved_bytes(facts, context, kernels)
    missed = max(moved - cache_bytes, 0.2 * moved)
    return missed / rate + step_units(kernels, facts) * layer_us / 1e6


def _speed(
    facts: Facts, kernels: str, context: int, device: Device, calibration: Calibration | None
) -> tuple[float | None, str]:
    if device.name == THIS and calibration is not None:
        if kernels in calibration.rates:
            r = calibration.rates[kernels]
            seconds = step_seconds(
                facts, kernels, context, r.bytes_per_s, r.layer_us, calibration.cache_bytes
            )
            return 1 / seconds, "calibrated on this machine"
        rate = calibration.read_bytes_per_s * float(memory_model()[kernels]["efficiency"])
        basis = "memory reads of this machine; these kernels were not calibrated"
        cache_bytes = float(calibration.cache_bytes)
    elif device.bandwidth_bytes_per_s is not None:
        rate = device.bandwidth_bytes_per_s * device.read_fraction
        rate *= float(memory_model()[kernels]["efficiency"])
        basis = "the profile's bandwidth, not calibrated; a layer's cost is another machine's"
        cache_bytes = 0.0
    else:
        return None, "unknown: edge-mmllm fit --calibrate BUNDLE..."
    layer_us = reference_layer_us(kernels)
    return 1 / step_seconds(facts, kernels, context, rate, layer_us, cache_bytes), basis


def _notes(facts: Facts, kernels: str) -> tuple[str, ...]:
    notes = []
    if facts.architecture not in memory_model()[kernels]["scratch"]:
        notes.append(f"scratch of {facts.architecture} was never measured: another's is taken")
    if facts.native is None and kernels == "native":
        notes.append("whether the native kernels know this architecture shows when it is exported")
    if facts.weights.others:
        notes.append("scratch of encoders is not counted")
    return tuple(notes)
