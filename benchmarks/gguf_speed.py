"""Our session over GGUF files beside a bare loop over llama.cpp's C API, in one process, by turns.

The bare loop is `Bare`: `llama_decode`, an arg-max over the logits where they lie, the next
`llama_decode`; nothing is checked, remembered or offered. Ours is what a user calls:
`session.prefill` and `session.generate_tokens`. Both compute on the same file with the same
threads. Flash attention is off in ours (`gguf.py` says why), so that the bare loop is measured
twice: with the same setting, which says what the session costs, and as llama.cpp comes.

Restore: a state of a recurrent model after 512 tokens is set aside, the session goes elsewhere and
comes back; the greedy continuation must be the same tokens, from memory and from a `.state` file.

    python benchmarks/gguf_speed.py [--only NAME ...] [--rounds 15] [--publish]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import numpy as np

MODELS = ("smollm2", "rwkv7-0.1b", "mamba-130m", "mamba2-130m")
#: Whose state is constant.
RECURRENT = MODELS[1:]
PREFILL, PAST, STEPS, CONTEXT, READ, CONTINUED = 512, 128, 64, 1024, 512, 64
WANTED_RATIO, WANTED_RESTORE_MS = 0.98, 5.0
OURS, SAME, DEFAULT = "our session", "bare loop, same settings", "bare loop, llama.cpp's own"
PACKAGES = ("edge-mmllm", "llama-cpp-python", "numpy")


class Bare:
    """llama.cpp's C API, plainly.

    Args:
        flash: None for llama.cpp's own choice.
    """

    def __init__(self, path: str, threads: int, flash: bool | None) -> None:
        import llama_cpp as c  # type: ignore[import-not-found]

        self._c = c
        self._log = c.llama_log_callback(lambda *_: None)
        c.llama_log_set(self._log, ctypes.c_void_p(0))
        parameters = c.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self._model = c.llama_model_load_from_file(path.encode(), parameters)
        self.vocab = c.llama_vocab_n_tokens(c.llama_model_get_vocab(self._model))
        settings = c.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = CONTEXT, PREFILL, PREFILL
        settings.n_threads = settings.n_threads_batch = threads
        if flash is not None:
            settings.flash_attn_type = int(flash)
        self._context = c.llama_init_from_model(self._model, settings)
        self._token = (c.llama_token * 1)()
        self._one = c.llama_batch_get_one(self._token, 1)

    def prefill(self, ids: list[int]) -> int:
        """Reads ids from an empty state; the likeliest next token."""
        c = self._c
        c.llama_memory_clear(c.llama_get_memory(self._context), True)
        tokens = (c.llama_token * len(ids))(*ids)
        if c.llama_decode(self._context, c.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError("llama_decode failed")
        return self._best()

    def _best(self) -> int:
        logits = self._c.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, shape=(self.vocab,)).argmax())

    def generate(self, token: int, count: int) -> list[int]:
        """`count` tokens, the first of them `token`."""
        decode, out = self._c.llama_decode, [token]
        while len(out) < count:
            self._token[0] = token
            if decode(self._context, self._one):
                raise RuntimeError("llama_decode failed")
            token = self._best()
            out.append(token)
        return out


def _timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def child(path: str, threads: int, rounds: int, restores: int) -> dict[str, Any]:
    """Everything about one file, in a process that has llama.cpp."""
    import edge_mmllm

    # In the file's own child: what we are given here was made by ourselves.
    session = edge_mmllm.load(path, threads=threads, context=None)
    ids = (np.arange(PREFILL) * 37 % 400 + 500).tolist()
    loops = {SAME: Bare(path, threads, False), DEFAULT: Bare(path, threads, None)}
    times: dict[str, dict[str, list[float]]] = {n: {"prefill": [], "decode": []} for n in
                                                (OURS, *loops)}  # fmt: skip
    said: dict[str, list[int]] = {}

    def ours_prefill(count: int) -> None:
        session.reset()
        session.prefill(ids[:count])

    def ours_decode() -> None:
        said[OURS] = list(session.generate_tokens(None, STEPS, ignore_eos=True))

    def bare_decode(name: str, first: int) -> None:
        said[name] = loops[name].generate(first, STEPS)

    for number in range(rounds + 1):
        names = list(times)
        for name in names[number % 3 :] + names[: number % 3]:  # nobody is always the first
            if name == OURS:
                prefill = _timed(lambda: ours_prefill(PREFILL))
                ours_prefill(PAST)
                decode = _timed(ours_decode)
            else:
                prefill = _timed(lambda name=name: loops[name].prefill(ids))  # type: ignore[misc]
                first = loops[name].prefill(ids[:PAST])
                decode = _timed(lambda name=name, first=first: bare_decode(name, first))  # type: ignore[misc]
            if number:  # the first round warms up
                times[name]["prefill"].append(prefill)
                times[name]["decode"].append(decode)
    found: dict[str, Any] = {"times": times, "same_tokens": said[OURS] == said[SAME]}
    if session.spec.context_length is None and restores:
        found["restore"] = _restoring(session, restores)
    session.close()
    return found


def _restoring(session: Any, runs: int) -> dict[str, Any]:
    """Times of snapshot, restore, save and load; whether what follows is the same."""
    session.reset()
    session.prefill((np.arange(READ) * 37 % session.spec.vocab_size).tolist())
    kept = session.snapshot()
    expected = list(session.generate_tokens(None, CONTINUED, ignore_eos=True))
    with tempfile.TemporaryDirectory() as scratch:
        path, agree = Path(scratch) / "s.state", []
        kept.save(path, everything=True)
        times: dict[str, list[float]] = {"restore": [], "load": []}
        for number in range(runs + 1):
            for name, back in (("restore", lambda: session.restore(kept)),
                               ("load", lambda: session.load_state(path))):  # fmt: skip
                session.step(1)  # somewhere else
                taken = _timed(back)
                if number:
                    times[name].append(1e3 * taken)
                else:
                    agree.append(
                        list(session.generate_tokens(None, CONTINUED, ignore_eos=True)) == expected
                    )
    return {"bytes": kept.size_bytes, "times": times, "identical": all(agree)}


def _paired(slow: list[float], fast: list[float]) -> float:
    """Median over rounds of how many times as fast the second is."""
    return float(np.median(np.array(slow) / np.array(fast)))


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--only", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--restores", type=int, default=21)
    parser.add_argument("--child", metavar="FILE", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        harness.raise_priority()
        given = child(arguments.child, arguments.threads, arguments.rounds, arguments.restores)
        print(json.dumps(given))
        return
    import artefacts

    report = harness.Reporter("gguf_speed", "Our session beside a bare loop (GGUF)", arguments)
    versions = harness.versions(arguments.peers, PACKAGES)
    rows, restores = [], []
    for name in arguments.only:
        path = artefacts.llama_cpp(name, arguments.cache, arguments.peers)
        command = [str(arguments.peers), __file__, "--child", str(path), "--threads",
                   str(arguments.threads), "--rounds", str(arguments.rounds), "--restores",
                   str(arguments.restores)]  # fmt: skip
        done = subprocess.run(
            command, env=harness.child_env(), capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(done.stderr[-1500:])
        found = json.loads(done.stdout.splitlines()[-1])
        sha = harness.tree_sha256(path)
        report.record(model=name, threads=arguments.threads, artefact_sha256=sha,
                      versions=versions, **found)  # fmt: skip
        times = found["times"]
        for who in times:
            tokens = {"prefill": PREFILL, "decode": STEPS - 1}
            rate = {k: harness.summary([n / t for t in times[who][k]]) for k, n in tokens.items()}
            cells = [
                cell
                for key in tokens
                for cell in (
                    f"{rate[key]['median']:.0f}", harness.percent(rate[key]["spread"]),
                    "-" if who == OURS
                    else f"{_paired(times[who][key], times[OURS][key]):.3f}",
                )
            ]  # fmt: skip
            rows.append([name if who == OURS else "", who, *cells])
        rows[-3].append("same tokens" if found["same_tokens"] else "OTHER TOKENS")
        rows[-2].append("")
        rows[-1].append("")
        if "restore" in found:
            kept = found["restore"]
            cells = [
                f"{harness.summary(kept['times'][key])[which]:.2f}"
                for key in ("restore", "load")
                for which in ("median", "max")
            ]
            same = "yes" if kept["identical"] else "NO"
            restores.append([name, f"{kept['bytes']:,}", *cells, same])
        print(name, "done", file=sys.stderr, flush=True)
    report.text(
        f"Q4_0, {arguments.threads} threads, one process a model, medians of {arguments.rounds} "
        f"rounds by turns; decode of {STEPS - 1} tokens after {PAST}. `ours : it` is the median "
        f"over rounds of how many times as fast ours is; wanted: {WANTED_RATIO} beside the same "
        "settings."
    )
    report.table(
        "Our session beside a bare loop over llama.cpp's C API",
        ["model", "who", f"prefill {PREFILL} tok/s", "spread", "ours : it", "decode tok/s",
         "spread", "ours : it", "greedy"],
        rows,
    )  # fmt: skip
    if restores:
        report.table(
            f"States of recurrent models after {READ} tokens, ms (wanted: below "
            f"{WANTED_RESTORE_MS:.0f})",
            ["model", "bytes", "restore", "worst", "load from file", "worst",
             f"same {CONTINUED} tokens"],
            restores,
        )  # fmt: skip
    report.close()


if __name__ == "__main__":
    main()
