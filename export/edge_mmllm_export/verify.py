"""The quality gate: the exported artefact, run by its real engine, against the float32 oracle.

Runs in a child process of its own, so that its memory is not the export's: `main` reads the
request as JSON on stdin, writes `golden.npz` into the draft bundle and prints the figures as JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edge_mmllm._children import die_with_parent, python_command
from edge_mmllm.bundle import GoldenMedia
from edge_mmllm.errors import EdgeError, ExportError, UsageError
from edge_mmllm_export import verify_media
from edge_mmllm_export.families.composite import Composite
from edge_mmllm_export.oracle import Oracle
from edge_mmllm_export.quantize.schemes import F32, QuantPlan, Scheme
from edge_mmllm_export.weights import Weight
from edge_mmllm_runtime.divergence import divergence
from edge_mmllm_runtime.perception import Perception

if TYPE_CHECKING:
    from edge_mmllm_runtime.prompted import Prompted
    from edge_mmllm_runtime.session import Session

Int64 = NDArray[np.int64]

#: Tokens judged; one forward of the oracle over them takes about a second per 100M parameters.
GATE_TOKENS = 256
#: Positions whose logits go into the golden vectors.
GOLDEN_ROWS = 8
_TEXT = Path(__file__).with_name("gate_text.txt")
#: Read of a text: more than enough for `GATE_TOKENS`.
_TEXT_CHARACTERS = 1 << 16
#: Exit statuses of the child.
_USAGE, _OUT_OF_MEMORY = 2, 3
#: By SIGKILL, as the kernel does where memory is short.
_KILLED = -9


@dataclass(frozen=True)
class Thresholds:
    """What a scheme must reach, over `GATE_TOKENS` of the gate's text.

    Set at about twice the worst that a sound export was seen to give (benchmarks/quality.py):
    int8 0.008 nats (SmolLM2), int4 in blocks of 32 0.16 (tiny-mamba2) to 0.51 (SmolLM2-135M,
    whose published weights are themselves 4-bit). Of GGUF's mixes (benchmarks/gguf_quality.py):
    three bits 0.50 nats, two bits 1.2 (tiny-mamba); bfloat16, whose products llama.cpp computes
    with activations in bfloat16, 2.4e-4, of which 1.5e-4 the engine's (SmolLM2).

    `kl_mean_of_engine` compares the engine with the oracle on the weights as stored: whatever
    rounding costs, a wrong scale, order or kernel, even in one layer, shows here. Sound exports
    give 0.007 nats at most, from the int8 activations of MatMulNBits.
    """

    kl_mean: float
    kl_p99: float
    top1_agreement_clear: float
    perplexity_change: float
    kl_mean_of_engine: float


THRESHOLDS = {
    "f32": Thresholds(1e-5, 1e-4, 1.0, 1e-3, 1e-5),
    "f16": Thresholds(1e-3, 1e-2, 0.99, 5e-3, 1e-5),
    "bf16": Thresholds(1e-3, 1e-2, 0.98, 5e-3, 5e-4),
    "int8": Thresholds(0.02, 0.15, 0.97, 0.03, 0.03),
    "int4": Thresholds(0.8, 4.0, 0.65, 0.6, 0.03),
    # MLC's q3 gives 0.7 (tiny-rwkv7) to 1.4 nats (tiny-mamba2), llama.cpp's Q3_K less.
    "int3": Thresholds(2.8, 10.0, 0.2, 2.0, 0.03),
    "int2": Thresholds(2.8, 10.0, 0.2, 2.0, 0.03),
    "int1": Thresholds(6.0, 15.0, 0.05, 20.0, 0.05),
}


@dataclass(frozen=True)
class Request:
    """What the child is told: paths as strings, for JSON.

    Attributes:
        scheme: whose thresholds apply.
        variant: the format's own word for how weights are stored, where one was given.
    """

    bundle: str
    source: str
    plan: QuantPlan
    scheme: str
    context: int | None
    text: str | None
    threads: int
    lora: str | None = None
    format: str = "onnx"
    variant: str | None = None

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Request:
        """Back from `asdict` and JSON."""
        plan = dict(fields["plan"])
        plan["overrides"] = tuple((p, Scheme(**s)) for p, s in plan["overrides"])
        return cls(**{**fields, "plan": QuantPlan(**plan)})


def thresholds(scheme: str) -> Thresholds:
    """The thresholds of an export's scheme. Raises: UsageError."""
    if scheme not in THRESHOLDS:
        raise UsageError(f"no thresholds for {scheme!r}", expected=" | ".join(THRESHOLDS))
    return THRESHOLDS[scheme]


def breaches(figures: dict[str, Any], limits: Thresholds) -> list[str]:
    """Every figure beyond its threshold, in words."""
    out = []
    for name, limit in asdict(limits).items():
        value = figures.get(name)
        if value is None:
            continue
        if not np.isfinite(value) or (value < limit if name.startswith("top1") else value > limit):
            side = "at least" if name.startswith("top1") else "at most"
            out.append(f"{name} {value:.4g} ({side} {limit:g})")
    return out


def judge(request: Request) -> dict[str, Any]:
    """Run the gate in a child. Returns its figures.

    Raises:
        UsageError: the text to judge by cannot be used.
        ExportError: the child failed; its message says why.
    """
    command = python_command("from edge_mmllm_export import verify; sys.exit(verify.main())")
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        output, errors = child.communicate(json.dumps(asdict(request)))
    except BaseException:
        child.kill()
        child.wait()
        raise
    if child.returncode in (_OUT_OF_MEMORY, _KILLED):
        raise ExportError(
            "the quality gate ran out of memory",
            found=f"exit status {child.returncode}",
            fix="more memory, --gate off and `edge-mmllm check` on a larger machine; "
            "--dry-run says what the gate needs",
        )
    if child.returncode == _USAGE:
        raise UsageError(errors.strip())
    if child.returncode != 0:
        raise ExportError(
            "the quality gate could not run the exported artefact",
            found=errors.strip()[-2000:] or f"exit status {child.returncode}",
            fix="report this; or export with --gate off, at your own risk",
        )
    figures: dict[str, Any] = json.loads(output)
    return figures


def gate_tokens(encode: Any, vocab_size: int, limit: int, text: str | None) -> tuple[Int64, str]:
    """The ids to judge by, and what they are.

    Without a tokenizer ids are drawn at random (seed 0): such a verdict finds broken kernels but
    says little about language.
    """
    if encode is None:
        ids = np.random.default_rng(0).integers(0, vocab_size, limit, dtype=np.int64)
        return ids, "random token ids (the bundle has no tokenizer)"
    content = gate_text(text)
    ids = np.asarray(encode(content)[:limit], np.int64)
    if len(ids) < 2:
        raise UsageError(
            "the gate's text is too short",
            where=text,
            expected="at least 2 tokens",
            found=repr(content),
        )
    return ids, Path(text).name if text else "built-in multilingual text"


def gate_text(path: str | None) -> str:
    """The beginning of the text to judge by; None: the built-in one.

    Raises:
        UsageError: it cannot be read, or is not UTF-8.
    """
    source = Path(path) if path else _TEXT
    try:
        with source.open(encoding="utf-8") as file:
            return file.read(_TEXT_CHARACTERS)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            "the gate's text cannot be read",
            where=str(source),
            expected="a text file in UTF-8",
            found=str(error),
        ) from error


def run(request: Request) -> dict[str, Any]:
    """The child's work: oracle and engine over the same tokens; golden vectors written."""
    from edge_mmllm.profiling.memory import peak_rss_bytes
    from edge_mmllm_export.checkpoints import open_checkpoint
    from edge_mmllm_export.formats import output_format
    from edge_mmllm_export.models import build
    from edge_mmllm_export.weights import Parameter, bind
    from edge_mmllm_runtime import load

    checkpoint = open_checkpoint(request.source, request.lora)
    model = build(checkpoint, request.context)

    def bind_weights(schemes: Callable[[Parameter], Scheme]) -> dict[str, Weight]:
        sources, ignored = model.sources(checkpoint.layout), model.ignored()
        return bind(checkpoint, model.parameters(), sources, ignored=ignored, schemes=schemes)

    weights = bind_weights(lambda _: F32)
    scheme = request.scheme
    stored = weights
    if scheme != "f32":
        planned, form = bind_weights(request.plan.of), output_format(request.format)
        stored = form.as_stored(model, planned, request.plan, request.variant, Path(request.bundle))
    limit = min(GATE_TOKENS, model.context_length or GATE_TOKENS)
    judged: list[_Judged] = []
    with load(request.bundle, threads=request.threads, context=None) as session:
        encode = None if session.spec.text.tokenizer == "none" else session.text.encode
        ids, text = gate_tokens(encode, model.vocab_size, limit, request.text)
        session.start(ids)
        candidate = session.prefill(ids, logits="all")
        if isinstance(model, Composite):
            judged = _media(session, model, weights, stored, ids, Path(request.bundle))
    oracle = Oracle(model, weights)
    reference = oracle.answer(ids)
    targets = np.append(ids[1:], -1)
    figures: dict[str, Any] = divergence(reference, candidate, targets).figures()
    # Whose doing: the numbers stored, or what the engine makes of them?
    exact = reference if stored is weights else Oracle(model, stored).answer(ids)
    figures["kl_mean_of_stored_weights"] = divergence(reference, exact).kl_mean
    figures["kl_mean_of_engine"] = divergence(exact, candidate).kl_mean
    broken = breaches(figures, thresholds(scheme))
    _write_golden(Path(request.bundle) / "golden.npz", ids, candidate)
    for one in judged:
        own = one.figures()
        figures[one.name] = _finite(own)
        broken += [f"{one.name}: {words}" for words in breaches(own, thresholds(scheme))]
        _write_golden(Path(request.bundle) / one.record.vectors, one.ids, one.candidate, one.start)
    figures["golden_media"] = [asdict(one.record) for one in judged]
    # Strict JSON knows no infinity; what is not finite is among the breaches.
    figures = _finite(figures) | {"text": text, "scheme": scheme, "breaches": broken}
    return {**figures, "peak_rss_bytes": peak_rss_bytes()}


def _finite(figures: dict[str, Any]) -> dict[str, Any]:
    return {
        k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in figures.items()
    }


@dataclass(frozen=True)
class _Judged:
    """What artefact and oracle say about a sample of one modality.

    Attributes:
        ids: with placeholder ids where rows stand.
        start: the first position that counts.
        record: the files of the golden vectors.
        candidate: of all positions, by the engine.
        prompts: the same prompt over the oracle's features, with the weights they and the
            decoder are computed from: the checkpoint's, then as stored.
    """

    name: str
    ids: Int64
    start: int
    record: GoldenMedia
    candidate: NDArray[np.float32]
    model: Composite
    prompts: tuple[tuple[dict[str, Weight], Prompted], ...]

    def figures(self) -> dict[str, Any]:
        """The divergences; runs the oracle."""
        (weights, prompt), (stored, own_prompt) = self.prompts
        reference = verify_media.oracle_logits(self.model, weights, prompt)[self.start :]
        exact = reference
        if stored is not weights:
            exact = verify_media.oracle_logits(self.model, stored, own_prompt)[self.start :]
        candidate = self.candidate[self.start :]
        targets = np.append(self.ids[self.start + 1 :], -1)
        out: dict[str, Any] = divergence(reference, candidate, targets).figures()
        out["kl_mean_of_stored_weights"] = divergence(reference, exact).kl_mean
        out["kl_mean_of_engine"] = divergence(exact, candidate).kl_mean
        return out


def _media(
    session: Session,
    model: Composite,
    weights: dict[str, Weight],
    stored: dict[str, Weight],
    text: Int64,
    folder: Path,
) -> list[_Judged]:
    """The artefact's answers about a sample of each modality; the sample goes into the bundle."""
    out = []
    own = session.perception
    for name in session.spec.modalities:
        if name not in verify_media.SAMPLES:
            continue
        suffix, make = verify_media.SAMPLES[name]
        record = GoldenMedia(name, f"golden_{name}.npz", f"golden_{name}{suffix}")
        path = folder / record.media
        path.write_bytes(make())
        limit = model.context_length or 1 << 20
        ids = verify_media.media_ids(session, name, path, text, limit)
        prompt = session.encode(ids, {name: [path]})
        session.start(prompt)
        candidate = session.prefill(prompt, logits="all")
        prompts = []
        for bound in (weights, stored):
            joined = session.spec.modalities[name].stages != model.modalities()[name].stages
            stages = verify_media.OracleStages(model, bound, joined=joined)
            session.perception = Perception(partial(_same, stages), session.spec, own.read_file)
            prompts.append((bound, session.encode(ids, {name: [path]})))
        session.perception = own

        start = verify_media.answers_from(prompts[0][1])
        out.append(_Judged(name, ids, start, record, candidate, model, tuple(prompts)))
    return out


def _same(stages: Any) -> Any:
    return stages


def _write_golden(path: Path, ids: Int64, logits: NDArray[np.float32], start: int = 0) -> None:
    """Inputs with the artefact's own answers, for `edge-mmllm check` on the device.

    Arrays: `ids` int64 `(n,)`; `top1` int32 `(n,)`; `margin` float32 `(n,)`, best minus second
    best logit; `rows` int64 `(r,)` and `logits` float16 `(r, vocab)`, those rows less their
    maximum. What the model says before `start` does not matter: no row, a margin of 0.
    """
    best_two = np.partition(logits, -2, axis=-1)[:, -2:]
    best_two[:start] = 0
    rows = np.unique(np.linspace(start, len(ids) - 1, GOLDEN_ROWS).astype(np.int64))
    kept = logits[rows] - logits[rows].max(axis=-1, keepdims=True)
    np.savez_compressed(
        path,
        ids=ids,
        top1=logits.argmax(axis=-1).astype(np.int32),
        margin=(best_two[:, 1] - best_two[:, 0]).astype(np.float32),
        rows=rows,
        logits=np.maximum(kept, -65000.0).astype(np.float16),
    )


def plan_scheme(plan: QuantPlan) -> str:
    """The coarsest scheme in a plan: its thresholds apply."""
    names = [plan.name, plan.embedding or plan.name]
    names += [name for name in (plan.encoder, plan.projector) if name is not None]
    names += [f"int{s.bits}" if s.quantized else f"f{s.bits}" for _, s in plan.overrides]
    order = list(THRESHOLDS)
    return max(names, key=order.index)


def main() -> int:
    """Entry point of the child: request on stdin, figures on stdout."""
    die_with_parent()
    request = Request.from_json(json.load(sys.stdin))
    try:
        figures = run(request)
    except EdgeError as error:
        sys.stderr.write(f"{error}\n")
        return _USAGE if isinstance(error, UsageError) else 1
    except MemoryError:
        return _OUT_OF_MEMORY
    json.dump(figures, sys.stdout)
    return 0
