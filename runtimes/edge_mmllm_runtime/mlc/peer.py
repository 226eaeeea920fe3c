"""`run --engine mlc-llm`: a transformer bundle through an installed mlc_llm.

mlc_llm compiles a library of its own from the bundle's configuration (kept in its cache), takes
the weights as they lie there, and owns loop, sampling and states. It gives text and nothing else:
no logits, no states, so no `Session`. It gets our own token ids, so that both engines are asked
the same.

Source: `MLCEngine.completions.create` of mlc-llm (`python/mlc_llm/serve/engine.py`). Never run
against mlc_llm itself, which no registry has for this project's machines: structural.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from edge_mmllm.errors import EdgeError, SessionError, UnsupportedBundle, UsageError

if TYPE_CHECKING:
    from edge_mmllm.bundle import Bundle
    from edge_mmllm_runtime.answer import Answer, AnswerSettings

#: What `--engine` takes.
NAME = "mlc-llm"


def answer(
    path: str | os.PathLike[str],
    prompt: str,
    settings: AnswerSettings,
    *,
    raw: bool = False,
    write: Callable[[str], object] = lambda piece: None,
) -> Answer:
    """One prompt, one answer; as `edge_mmllm_runtime.answer.run`.

    Raises:
        UnsupportedBundle: not an MLC bundle, or a model that mlc-llm has no definition of.
        EdgeError: mlc_llm is not installed.
        UsageError: a setting that mlc-llm has not.
        SessionError: mlc_llm failed.
    """
    from edge_mmllm.bundle import open_bundle
    from edge_mmllm.spec import TOKENIZER_FILES
    from edge_mmllm.text import Text

    bundle = open_bundle(path)
    _check(bundle)
    options = _options(settings)
    if importlib.util.find_spec("mlc_llm") is None:
        raise EdgeError("mlc_llm is not installed", fix="install it as https://llm.mlc.ai says")
    spec = bundle.spec.text
    file = TOKENIZER_FILES.get(spec.tokenizer)
    text = Text(spec, bundle.file(file).read_bytes() if file else None)
    chat = text.has_chat_template and not raw
    ids = text.encode_chat([{"role": "user", "content": prompt}]) if chat else text.encode(prompt)
    try:
        engine, load_ms = _loaded(bundle)
        try:
            return _answered(engine, bundle, ids, options, write, load_ms)
        finally:
            engine.terminate()
    except Exception as error:
        raise SessionError("mlc_llm failed", where=str(bundle.root), found=repr(error)) from error


def _check(bundle: Bundle) -> None:
    """Whether mlc-llm has this model. Raises: UnsupportedBundle."""
    manifest = bundle.manifest
    if manifest.engine != "mlc":
        raise UnsupportedBundle(
            "mlc-llm reads MLC bundles", expected="mlc", found=manifest.engine,
            fix="export with --format mlc",
        )  # fmt: skip
    told = bundle.spec.details.get("mlc")
    if not isinstance(told, dict) or told.get("stock") is not True:
        raise UnsupportedBundle(
            f"mlc-llm has no definition of this model ({bundle.spec.architecture})",
            fix="leave out --engine: the bundle's own library runs it",
        )


def _options(settings: AnswerSettings) -> dict[str, Any]:
    """What its API calls the settings. Raises: UsageError."""
    sampling = settings.sampling
    if settings.constraint is not None or sampling.top_k or sampling.min_p:
        raise UsageError("mlc-llm has no top_k and no min_p, and constraints are not handed to it")
    if sampling.repetition_penalty != 1:
        raise UsageError("the repetition penalty is not handed to mlc-llm")
    options: dict[str, Any] = {
        "max_tokens": settings.max_new_tokens, "temperature": sampling.temperature,
        "top_p": sampling.top_p, "stop": list(settings.stop) or None, "seed": sampling.seed,
    }  # fmt: skip
    return {name: value for name, value in options.items() if value is not None}


def _loaded(bundle: Bundle) -> tuple[Any, float]:
    """Its engine over the bundle's folder, and the time to make it in ms."""
    started = time.perf_counter()
    engine = importlib.import_module("mlc_llm").MLCEngine(str(bundle.root), device="cpu")
    return engine, (time.perf_counter() - started) * 1e3


def _answered(
    engine: Any,
    bundle: Bundle,
    ids: list[int],
    options: dict[str, Any],
    write: Callable[[str], object],
    load_ms: float,
) -> Answer:
    from edge_mmllm_runtime.answer import Answer

    pieces: list[str] = []
    times: list[float] = []
    reason, counted = "length", None
    started = time.perf_counter()
    usage = {"include_usage": True}
    for told in engine.completions.create(prompt=ids, stream=True, stream_options=usage, **options):
        counted = told.usage.completion_tokens if told.usage else counted
        for choice in told.choices:
            reason = choice.finish_reason or reason
            if choice.text:
                times.append(time.perf_counter())
                pieces.append(choice.text)
                write(choice.text)
    decode_s = times[-1] - times[0] if len(times) > 1 else 0.0
    new = counted if counted is not None else len(times)
    return Answer(
        text="".join(pieces),
        prompt_tokens=len(ids),
        new_tokens=new,
        finish_reason="eos" if reason == "stop" else reason,
        ttft_ms=(times[0] - started) * 1e3 if times else None,
        decode_tokens_per_s=(new - 1) / decode_s if decode_s > 0 else None,
        load_ms=load_ms,
        threads=0,
        engine=NAME,
        engine_version=str(getattr(importlib.import_module("mlc_llm"), "__version__", "unknown")),
        bundle_sha256=bundle.sha256,
    )
