"""One engine in one child process, driven through its pipes; it blocks on read between commands.

    python engines.py ENGINE ARTEFACT THREADS CONTEXT

answers each JSON line on stdin with one on stdout: `{"prefill": N}`, `{"decode": N, "past": P}`,
`{"exit": true}`. Prefill times one call over N tokens from an empty state; decode times each of N
steps after P tokens, with the arg-max of the logits, as greedy decoding needs it. Every time comes
with the number of involuntary context switches during it: 0 means that nobody interrupted us.

No import of the SDK outside `Ours`: the peers run under an interpreter of their own.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
#: Ids below this are plain tokens in every model measured here; no end of sequence among them.
FIRST_ID, LAST_ID = 500, 2000


class Engine(Protocol):
    """What is measured."""

    def prefill(self, ids: Ids) -> None:
        """Read tokens from an empty state; logits of the last one."""

    def step(self, token: int) -> int:
        """Read one token; returns the most likely next one."""


class Ours:
    """edge-mmllm's session, as a user has it; an ONNX bundle's with its `native` kernels or
    onnxruntime's."""

    def __init__(self, path: str, threads: int, context: int, kernels: str = "auto") -> None:
        import edge_mmllm

        self.kernels = kernels
        self.session = edge_mmllm.load(path, threads=threads, context=context, kernels=kernels)

    def prefill(self, ids: Ids) -> None:
        self.session.reset()
        self.session.prefill(ids)

    def step(self, token: int) -> int:
        return int(self.session.step(token).argmax())


class Genai:
    """onnxruntime-genai's generator: greedy, sharing the cache buffer as its config says.

    `threads` None leaves the number to genai.
    """

    def __init__(self, path: str, threads: int | None, context: int) -> None:
        import onnxruntime_genai as og  # type: ignore[import-not-found]

        config = og.Config(path)
        # No end of sequence: the number of tokens is fixed.
        options = {} if threads is None else {"intra_op_num_threads": threads}
        overlay = {
            "model": {"eos_token_id": [3], "decoder": {"session_options": options}},
            "search": {"max_length": context, "do_sample": False},
        }
        config.overlay(json.dumps(overlay))
        self._og, self._context, self._model = og, context, og.Model(config)

    def prefill(self, ids: Ids) -> None:
        parameters = self._og.GeneratorParams(self._model)
        parameters.set_search_options(max_length=self._context, do_sample=False)
        self._generator = self._og.Generator(self._model, parameters)
        self._generator.append_tokens(ids.astype(np.int32))

    def step(self, token: int) -> int:
        # Chooses from the logits at hand; from the second call on it first runs the model.
        self._generator.generate_next_token()
        return 0


class LlamaCpp:
    """llama.cpp through its C API: llama_decode and nothing around it."""

    def __init__(self, path: str, threads: int, context: int) -> None:
        import llama_cpp as c  # type: ignore[import-not-found]

        self._c = c
        self._log = c.llama_log_callback(lambda *_: None)
        c.llama_log_set(self._log, ctypes.c_void_p(0))
        c.llama_backend_init()
        self._model = c.llama_model_load_from_file(path.encode(), c.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self._vocab = c.llama_vocab_n_tokens(c.llama_model_get_vocab(self._model))
        parameters = c.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = context
        parameters.n_ubatch = 512
        parameters.n_threads = parameters.n_threads_batch = threads
        self._context = c.llama_init_from_model(self._model, parameters)
        self._token = (c.llama_token * 1)()

    def _decode(self, tokens: Any, count: int) -> None:
        if self._c.llama_decode(self._context, self._c.llama_batch_get_one(tokens, count)):
            raise RuntimeError("llama_decode failed")

    def prefill(self, ids: Ids) -> None:
        self._c.llama_memory_clear(self._c.llama_get_memory(self._context), True)
        self._decode((self._c.llama_token * len(ids))(*ids.tolist()), len(ids))
        self._c.llama_synchronize(self._context)

    def step(self, token: int) -> int:
        self._token[0] = token
        self._decode(self._token, 1)
        logits = self._c.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, shape=(self._vocab,)).argmax())


ENGINES: dict[str, Callable[[str, int, int], Engine]] = {
    "ours native": lambda path, threads, context: Ours(path, threads, context, "native"),
    "ours stock": lambda path, threads, context: Ours(path, threads, context, "stock"),
    "ours mlc": Ours,
    "genai": Genai,
    "genai, default threads": lambda path, _, context: Genai(path, None, context),
    "llama.cpp": LlamaCpp,
}


def tokens(count: int) -> Ids:
    """Fixed pseudo-random ids: speed does not depend on them."""
    return np.random.default_rng(0).integers(FIRST_ID, LAST_ID, count, dtype=np.int64)


def _interruptions() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def timed(call: Callable[[], object]) -> tuple[float, int]:
    """Seconds, and involuntary context switches of all threads meanwhile."""
    before, started = _interruptions(), time.perf_counter()
    call()
    return time.perf_counter() - started, _interruptions() - before


def profiled(engine: Ours, command: dict[str, int]) -> dict[str, dict[str, tuple[int, float]]]:
    """Node type -> (nodes, microseconds) of a prefill and of a step: medians for each node; by
    kind of phase, means, of the native kernels."""
    if engine.kernels == "native":
        return _native_profiled(engine, command)
    engine.prefill(tokens(command["past"]))
    for token in tokens(command["decode"]).tolist():
        engine.step(token)
    for _ in range(3):
        engine.prefill(tokens(command["prefill"]))
    path = Path(engine.session.engine._session.end_profiling())  # type: ignore[attr-defined]
    events = json.loads(path.read_text())
    path.unlink()
    runs: list[dict[str, tuple[str, float]]] = [{}]
    for event in events:
        if event["name"] == "model_run":
            runs.append({})
        elif event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            runs[-1][event["name"]] = (event["args"]["op_name"], event["dur"])
    runs = [r for r in runs if r]
    parts = {"decode": runs[1 : 1 + command["decode"]], "prefill": runs[-3:]}
    out: dict[str, dict[str, tuple[int, float]]] = {}
    for part, these in parts.items():
        totals: dict[str, tuple[int, float]] = {}
        for name, (op, _) in these[0].items():
            count, total = totals.get(op, (0, 0.0))
            typical = float(np.median([r[name][1] for r in these if name in r]))
            totals[op] = (count + 1, total + typical)
        out[part] = totals
    return out


def _native_profiled(
    engine: Ours, command: dict[str, int]
) -> dict[str, dict[str, tuple[int, float]]]:
    """As `profiled`; empty where the library cannot count."""
    import native_profile

    def steps() -> None:
        for token in steps_tokens:
            engine.step(token)

    steps_tokens, ids, runs = tokens(command["decode"]).tolist(), tokens(command["prefill"]), 3
    engine.prefill(tokens(command["past"]))
    engine.step(FIRST_ID)
    decode = native_profile.profiled(len(steps_tokens), steps)
    engine.prefill(ids)
    prefill = native_profile.profiled(runs, lambda: [engine.prefill(ids) for _ in range(runs)])
    return {"decode": decode or {}, "prefill": prefill or {}}


def enable_profiling() -> None:
    """Make our runtime's sessions record their nodes."""
    import tempfile

    from edge_mmllm_runtime import onnx

    plain = onnx.session_options

    def options(*args: Any, **kwargs: Any) -> Any:
        made = plain(*args, **kwargs)
        made.enable_profiling = True
        made.profile_file_prefix = str(Path(tempfile.gettempdir()) / "edge_mmllm_profile")
        return made

    onnx.session_options = options


def serve(engine: Engine) -> None:
    """Answer commands until told to exit."""
    for line in sys.stdin:
        command = json.loads(line)
        if "exit" in command:
            return
        if "profile" in command:
            assert isinstance(engine, Ours)
            print(json.dumps(profiled(engine, command["profile"])), flush=True)
            continue
        if "prefill" in command:
            ids = tokens(command["prefill"])
            times = [timed(lambda ids=ids: engine.prefill(ids))]  # type: ignore[misc]
        else:
            engine.prefill(tokens(command["past"]))
            engine.step(FIRST_ID)  # genai's first step runs no model
            times = [
                timed(lambda token=token: engine.step(token))  # type: ignore[misc]
                for token in tokens(command["decode"]).tolist()
            ]
        print(json.dumps(times), flush=True)


def main() -> None:
    name, artefact, threads, context = sys.argv[1:5]
    # Answers leave through a copy of stdout; what libraries print goes to stderr.
    sys.stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if sys.argv[5:] == ["profile"]:
        enable_profiling()
    engine = ENGINES[name](str(Path(artefact)), int(threads), int(context))
    print(json.dumps("ready"), flush=True)
    serve(engine)


if __name__ == "__main__":
    main()
