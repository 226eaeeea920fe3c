"""`check`: is a bundle whole, and does it answer on this device as it did where it was made?"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from edge_mmllm.bundle import Bundle, verify_bundle
from edge_mmllm_runtime import load
from edge_mmllm_runtime.divergence import CLEAR_MARGIN, divergence
from edge_mmllm_runtime.engine import Float32, Int64
from edge_mmllm_runtime.golden import Golden, read_golden
from edge_mmllm_runtime.placing import Media
from edge_mmllm_runtime.session import Session

#: Tokens read one by one in the second pass: enough for two stored rows of an export's eight.
_STEPS = 64


@dataclass(frozen=True)
class Limits:
    """How far answers may be from the golden vectors.

    Float kernels differ between CPUs by rounding alone, and the stored float16 logits by 1e-7
    nats: 1e-4 is far from both. Quantized kernels also round activations to 8 bits, in ways
    that depend on the CPU's dot products. How much that can matter shows where it is left out
    altogether (`accuracy_level` 1 for 4), or done for one token instead of many: a mean KL
    divergence of 0.002 on a Mamba-2 of 6M, 0.007 and 0.008 on SmolLM2-135M (0.044 at the worst
    of 256 positions), no clear position changed. A broken kernel or a weight out of place costs
    whole nats. The limits lie in between, by the logarithm.
    """

    kl_mean: float
    top1_agreement_clear: float


FLOAT_LIMITS = Limits(kl_mean=1e-4, top1_agreement_clear=1.0)
QUANTIZED_LIMITS = Limits(kl_mean=0.1, top1_agreement_clear=0.95)


@dataclass(frozen=True)
class Pass:
    """One way to read the golden tokens.

    Attributes:
        name: `prefill` (all at once) or `decode` (the last ones token by token); after a
            modality's name where a sample of it stands in the prompt.
        positions: compared by their best token.
        clear_positions: of those, where the stored margin is at least `CLEAR_MARGIN`.
        top1_agreement_clear: share of the clear ones with the same best token; None without one.
        rows: compared by KL divergence.
        kl_mean: golden || here, in nats; None without rows, infinite for logits not finite.
        breaches: every figure beyond its limit, in words.
    """

    name: str
    positions: int
    clear_positions: int
    top1_agreement_clear: float | None
    rows: int
    kl_mean: float | None
    breaches: tuple[str, ...]


@dataclass(frozen=True)
class CheckReport:
    """What `check` found.

    Attributes:
        problems: files that are missing or altered, in words; the model is not run if any is.
        extra: files that the manifest does not list (they do no harm).
        passes: the golden vectors' verdicts; empty where they were not run.
        note: why the golden vectors were not run, if so.
        engine, engine_version, threads: None where the model was not run.
    """

    bundle_sha256: str
    files: int
    size_bytes: int
    problems: tuple[str, ...]
    extra: tuple[str, ...]
    passes: tuple[Pass, ...]
    note: str | None
    engine: str | None
    engine_version: str | None
    threads: int | None

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems and not any(p.breaches for p in self.passes)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"ok": self.ok, **asdict(self)}


def check(path: str | os.PathLike[str], threads: int | None = None) -> CheckReport:
    """Checks a bundle: every file's hash, then its golden vectors on this device.

    The golden tokens are read as they are, whatever the model would say (teacher-forced), so
    that one small difference does not lead to others.

    Args:
        path: the bundle's folder.
        threads: see `load`.

    Raises:
        BundleError: the manifest or the golden vectors cannot be used at all.
        MissingDependency: the engine's package is not installed.
    """
    verification = verify_bundle(path)
    bundle = verification.bundle
    if verification.problems:
        problems = tuple(str(problem) for problem in verification.problems)
        return _report(bundle, verification.extra, problems, note="a file is not as it should be")
    if bundle.manifest.golden is None:
        note = "the bundle was not judged: it has no golden vectors, only hashes were checked"
        return _report(bundle, verification.extra, (), note=note)
    with load(path, threads=threads) as session:
        sizes = session.spec.vocab_size, session.spec.extra_ids
        golden = read_golden(bundle.file(bundle.manifest.golden), *sizes)
        passes = run_golden(session, golden, limits(bundle))
        for entry in bundle.manifest.golden_media:
            own = read_golden(bundle.file(entry.vectors), *sizes)
            media = {entry.modality: [bundle.file(entry.media)]}
            passes += run_golden(session, own, limits(bundle), media)
        return _report(bundle, verification.extra, (), passes=passes, session=session)


def limits(bundle: Bundle) -> Limits:
    """The limits of a bundle's weights."""
    quantized = any(group.bits < 16 for group in bundle.manifest.quantization.groups)
    return QUANTIZED_LIMITS if quantized else FLOAT_LIMITS


def run_golden(
    session: Session, golden: Golden, allowed: Limits, media: Media | None = None
) -> tuple[Pass, ...]:
    """Both passes over the golden vectors.

    Args:
        media: modality -> what stands at the placeholder ids.

    Raises:
        ContextFull: they have more tokens than the session's context.
        UsageError: the placeholder ids are not as many as the rows.
    """
    n, of = len(golden.ids), "".join(f"{name} " for name in media or ())
    prompt = session.encode(golden.ids, media)
    session.start(prompt)
    whole = session.prefill(prompt, logits="all")
    start = max(n - _STEPS, n // 2, *(span.start + span.count for span in prompt.spans), 0)
    start = max([start, *(look.start + 1 for look in prompt.looks)])
    found = [_compare(f"{of}prefill", golden, whole, 0, allowed)]
    if 0 < start < n:
        session.start(prompt)
        session.prefill(prompt[:start])
        steps = np.stack([session.decode(int(token)) for token in golden.ids[start:]])
        found.append(_compare(f"{of}decode", golden, steps, start, allowed))
    return tuple(found)


def _compare(name: str, golden: Golden, logits: Float32, start: int, allowed: Limits) -> Pass:
    """Judges `logits` of the positions from `start` on."""
    clear = golden.margin[start:] >= CLEAR_MARGIN
    same = logits.argmax(axis=-1) == golden.top1[start:]
    agreement = float(same[clear].mean()) if clear.any() else None
    stored: Int64 = np.flatnonzero(golden.rows >= start)
    kl: float | None = None
    if len(stored):
        here = logits[golden.rows[stored] - start]
        finite = bool(np.isfinite(here).all())
        kl = divergence(golden.logits[stored], here).kl_mean if finite else float("inf")
    breaches = []
    if not np.isfinite(logits).all():
        breaches.append("logits that are not finite")
    if agreement is not None and agreement < allowed.top1_agreement_clear:
        expected = allowed.top1_agreement_clear
        breaches.append(f"top1_agreement_clear {agreement:.4g} (at least {expected:g})")
    if kl is not None and kl > allowed.kl_mean:
        breaches.append(f"kl_mean {kl:.4g} (at most {allowed.kl_mean:g})")
    return Pass(name, len(logits), int(clear.sum()), agreement, len(stored), kl, tuple(breaches))


def _report(
    bundle: Bundle,
    extra: tuple[str, ...],
    problems: tuple[str, ...],
    *,
    passes: tuple[Pass, ...] = (),
    note: str | None = None,
    session: Session | None = None,
) -> CheckReport:
    engine = None if session is None else session.engine
    return CheckReport(
        bundle_sha256=bundle.sha256,
        files=len(bundle.manifest.files),
        size_bytes=bundle.size_bytes,
        problems=problems,
        extra=extra,
        passes=passes,
        note=note,
        engine=None if engine is None else engine.name,
        engine_version=None if engine is None else engine.version,
        threads=None if engine is None else engine.threads,
    )
