"""Our session over GGUF files beside a bare loop over llama.cpp's C API, by turns.

The bare loop is `Bare`: `llama_decode`, an arg-max over the logits where they lie, the next
`llama_decode`; nothing is checked, remembered or offered. Ours is what a user calls:
`session.prefill` and `session.generate_tokens`. Both compute on the same file with the same
threads, the bare loop with llama.cpp's own settings. Both are in one process, and in several
processes one after another: where the two copies of the model happen to lie in memory makes either
of them some 4 % faster for the whole life of a process. Each process therefore lays its memory out
anew, and makes the one or the other first. Beside the wall time, the CPU time of this process is
compared: what others do on the machine hardly touches it.

Restore: a state of a recurrent model after 512 tokens is set aside, the session goes elsewhere and
comes back; the greedy continuation must be the same tokens, from memory and from a `.state` file.

    python benchmarks/gguf_speed.py [--only NAME ...] [--processes 8] [--rounds 4]
        [--publish]
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
OURS, BARE = "our session", "bare loop"
PACKAGES = ("edge-mmllm", "llama-cpp-python", "numpy")


class Bare:
    """llama.cpp's C API, plainly."""

    def __init__(self, path: str, threads: int) -> None:
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


def _timed(call: Callable[[], object]) -> tuple[float, float]:
    """Seconds of wall time, and of this process's CPU time."""
    cpu, started = time.process_time(), time.perf_counter()
    call()
    return time.perf_counter() - started, time.process_time() - cpu


def child(path: str, threads: int, rounds: int, restores: int, seed: int) -> dict[str, Any]:
    """Everything about one file, in a process that has llama.cpp; `seed`: of its memory."""
    import edge_mmllm

    draw = np.random.default_rng(seed)
    between = [np.ones(int(size), np.uint8) for size in draw.integers(1 << 10, 1 << 22, 16)]
    bare = Bare(path, threads) if seed % 2 else None
    session = edge_mmllm.load(path, threads=threads)
    between.append(np.ones(int(draw.integers(1 << 10, 1 << 22)), np.uint8))
    ids = (np.arange(PREFILL) * 37 % 400 + 500).tolist()
    bare = bare or Bare(path, threads)
    times: dict[str, dict[str, list[tuple[float, float]]]] = {
        name: {"prefill": [], "decode": []} for name in (OURS, BARE)
    }
    said: dict[str, list[int]] = {}

    def prefill(name: str, count: int) -> int:
        if name == BARE:
            return bare.prefill(ids[:count])
        session.reset()
        return int(session.prefill(ids[:count]).argmax())

    def decode(name: str, first: int) -> None:
        if name == BARE:
            said[name] = bare.generate(first, STEPS)
        else:
            said[name] = list(session.generate_tokens(None, STEPS, ignore_eos=True))

    for number in range(rounds + 1):
        for name in (
            (OURS, BARE) if (number + seed // 2) % 2 else (BARE, OURS)
        ):  # nobody is always the first
            taken = _timed(lambda name=name: prefill(name, PREFILL))  # type: ignore[misc]
            first = prefill(name, PAST)
            steps = _timed(lambda name=name, first=first: decode(name, first))  # type: ignore[misc]
            if number:  # the first round warms up
                times[name]["prefill"].append(taken)
                times[name]["decode"].append(steps)
    del between
    found: dict[str, Any] = {"times": times, "same_tokens": said[OURS] == said[BARE]}
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
                taken, _ = _timed(back)
                if number:
                    times[name].append(1e3 * taken)
                else:
                    agree.append(
                        list(session.generate_tokens(None, CONTINUED, ignore_eos=True)) == expected
                    )
    return {"bytes": kept.size_bytes, "times": times, "identical": all(agree)}


def processed(path: Path, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """What one process found; states are restored in the first one alone."""
    command = [str(arguments.peers), __file__, "--child", str(path)]
    numbers = {"threads": arguments.threads, "rounds": arguments.rounds, "seed": seed,
               "restores": 0 if seed else arguments.restores}  # fmt: skip
    for name, value in numbers.items():
        command += [f"--{name}", str(value)]
    done = subprocess.run(
        command, env=harness.child_env(), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-1500:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--only", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--restores", type=int, default=21)
    parser.add_argument("--child", metavar="FILE", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        harness.raise_priority()
        given = child(
            arguments.child, arguments.threads, arguments.rounds, arguments.restores, arguments.seed
        )
        print(json.dumps(given))
        return
    import artefacts

    report = harness.Reporter("gguf_speed", "Our session beside a bare loop (GGUF)", arguments)
    versions = harness.versions(arguments.peers, PACKAGES)
    rows, restores = [], []
    for name in arguments.only:
        path = artefacts.llama_cpp(name, arguments.cache, arguments.peers)
        sha = harness.tree_sha256(path)
        every = [processed(path, seed, arguments) for seed in range(arguments.processes)]
        for found in every:
            report.record(model=name, threads=arguments.threads, artefact_sha256=sha,
                          versions=versions, **found)  # fmt: skip
        times = {
            who: {
                key: [t for found in every for t in found["times"][who][key]]
                for key in ("prefill", "decode")
            }
            for who in (OURS, BARE)
        }
        for key, tokens in (("prefill", PREFILL), ("decode", STEPS - 1)):
            rates, ratios = [], []
            for who in (OURS, BARE):
                rate = harness.summary([tokens / wall for wall, _ in times[who][key]])
                rates += [f"{rate['median']:.0f}", harness.percent(rate["spread"])]
            for kind in (0, 1):
                slow, fast = ([t[kind] for t in times[who][key]] for who in (BARE, OURS))
                ratios.append(f"{np.median(np.array(slow) / np.array(fast)):.3f}")
            same = "same tokens" if all(f["same_tokens"] for f in every) else "OTHER TOKENS"
            first = key == "prefill"
            rows.append([name if first else "", key, *rates, *ratios, same if first else ""])
        if "restore" in every[0]:
            kept = every[0]["restore"]
            cells = [
                f"{harness.summary(kept['times'][key])[which]:.2f}"
                for key in ("restore", "load")
                for which in ("median", "max")
            ]
            same = "yes" if kept["identical"] else "NO"
            restores.append([name, f"{kept['bytes']:,}", *cells, same])
        print(name, "done", file=sys.stderr, flush=True)
    report.text(
        f"Q4_0, {arguments.threads} threads, {arguments.processes} processes a model, medians of "
        f"all their rounds ({arguments.rounds} each, by turns); prefill of {PREFILL} tokens, "
        f"decode of {STEPS - 1} after {PAST}. "
        "`ours : bare` is the median over rounds of how many times as fast ours is, by wall time "
        f"and by CPU time; wanted: {WANTED_RATIO}."
    )
    report.table(
        "Our session beside a bare loop over llama.cpp's C API",
        ["model", "what", "ours tok/s", "spread", "bare tok/s", "spread", "ours : bare", "by CPU",
         "greedy"],
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
