"""llama-bench's own JSON as records of ours, so that its figures stand in the same table.

`llama-bench -o json` prints a list, `-o jsonl` a line for each test; files of real runs are in
`tests/goldens/llama_bench`. A test reads `n_prompt` tokens, or makes
`n_gen`, at a depth of `n_depth` tokens; `samples_ts` are tokens/s, `samples_ns` durations, one
for each repetition. It measures no memory, no first token (reading a prompt and making a token
are tests of their own) and no time between two tokens: these stay missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from edge_mmllm.profiling.stats import bootstrap_interval, iqr, median, spread

_MARKS = ("n_prompt", "n_gen", "avg_ts")


def is_llama_bench(document: Any) -> bool:
    """Whether a document is one of llama-bench's."""
    first = document[0] if isinstance(document, list) and document else document
    return isinstance(first, dict) and all(mark in first for mark in _MARKS)


def from_llama_bench(document: Any) -> list[dict[str, Any]]:
    """Records of a document; entries that are not tests of its kind are left out.

    A prompt test and a generation test of the same model and settings make one record, as ours
    have both.
    """
    tests = document if isinstance(document, list) else [document]
    made: dict[tuple[Any, ...], dict[str, Any]] = {}
    for test in tests:
        if not isinstance(test, dict) or not all(mark in test for mark in _MARKS):
            continue
        rates = _numbers(test.get("samples_ts")) or _numbers([test["avg_ts"]])
        prompt, new = _count(test["n_prompt"]), _count(test["n_gen"])
        depth = _count(test.get("n_depth"))
        if not rates or (prompt and new):  # -pg mixes both into one rate
            continue
        same = ("model_filename", "n_threads", "n_gpu_layers", "type_k", "type_v", "flash_attn")
        key = (*(str(test.get(name)) for name in same), depth)
        record = made.setdefault(key, _record(test, depth))
        what = "decode_tokens_per_s" if new else "prefill_tokens_per_s"
        if what in record:  # another length: a record of its own
            made[(*key, prompt, new)] = record = _record(test, depth)
        record[what] = median(rates)
        record[f"{what}_values"] = rates
        record[f"{what}_ci95"] = bootstrap_interval(rates)
        record["repetitions"] = len(rates)
        if new:
            record["new_tokens"] = new
            record["decode_spread"] = spread(rates)
            record["decode_tokens_per_s_iqr"] = iqr(rates)
        else:
            record["prompt_tokens"] = prompt
    return list(made.values())


def _record(test: Mapping[str, Any], depth: int) -> dict[str, Any]:
    file = str(test.get("model_filename") or "?").replace("\\", "/")
    build = f"{test.get('build_number', '?')} ({test.get('build_commit', '?')})"
    architecture, quantization = _model(str(test.get("model_type") or ""))
    return {
        "schema_version": 2,
        "tool": "llama-bench",
        "name": PurePath(file).name or "?",
        "status": "ok",
        "started_utc": test.get("test_time"),
        "architecture": architecture,
        "parameters": test.get("model_n_params"),
        "size_bytes": test.get("model_size"),
        "quantization": quantization,
        "engine": "llama.cpp",
        "engine_version": build,
        "threads": test.get("n_threads"),
        "depth": depth,
        "machine": {"cpu_model": test.get("cpu_info"), "system": None},
    }


def _model(said: str) -> tuple[str, str]:
    """Architecture and quantization of `llama ?B (guessed) all F32`, `qwen2 1B Q4_K - Medium` or
    `llama 135M IQ2_XXS - 2.0625 bpw`: name, size, type."""
    name, _, rest = said.partition(" ")
    _, _, kind = rest.replace("(guessed) ", "").partition(" ")
    for word in ("all ", "mostly "):
        kind = kind.removeprefix(word)
    return name or "?", kind.partition(" - ")[0].strip() or "?"


def _numbers(values: Any) -> list[float]:
    if not isinstance(values, Sequence) or isinstance(values, str):
        return []
    return [
        float(v)
        for v in values
        if isinstance(v, (int, float)) and not isinstance(v, bool) and 0 < v < 1e12
    ]


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
