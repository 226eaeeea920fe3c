"""Constrained answers: how many of 100 sampled ones fit the schema, and what the constraint costs.

SmolLM2-135M-Instruct, asked for a record, at temperature 1 with 100 seeds, under a bounded JSON
schema and without it; as an int4 ONNX bundle and as the GGUF file it comes from. Answers are
judged by the `jsonschema` package, which knows nothing of the library that made them.

Cost: time a token of constrained answers beside free ones of as many tokens (by turns, one seed
after another), the part that finds the allowed tokens, and how many were forced, which cost less
than a step. `regex` has no forced tokens: 64 letters, the price of the masks alone.

    python benchmarks/constrained.py [--answers 100] [--publish]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import harness
import numpy as np

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 24},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "city": {"type": "string", "maxLength": 20},
        "hobbies": {
            "type": "array",
            "items": {"enum": ["reading", "running", "cooking", "music"]},
            "minItems": 1,
            "maxItems": 3,
        },
        "active": {"type": "boolean"},
    },
    "required": ["name", "age", "city", "hobbies", "active"],
    "additionalProperties": False,
}
ASKED = "Describe a person as JSON with name, age, city, hobbies (a list) and active."
LETTERS, COUNT = "[a-z ]{64}", 160
ENGINES = ("onnx", "gguf")
PACKAGES = ("edge-mmllm", "llguidance", "jsonschema", "onnxruntime", "llama-cpp-python", "numpy")


def fits(text: str) -> bool:
    """Whether an answer is JSON that the schema allows."""
    import jsonschema  # type: ignore[import-untyped]

    try:
        jsonschema.validate(json.loads(text), SCHEMA)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def child(path: str, threads: int, answers: int) -> dict[str, Any]:
    """All answers of one engine."""
    import edge_mmllm
    from edge_mmllm_runtime.constrained import Constraint
    from edge_mmllm_runtime.sampling import Sampling

    bound, letters = Constraint.of(json_schema=SCHEMA), Constraint.of(regex=LETTERS)
    found: dict[str, Any] = {"valid": 0, "free_valid": 0, "reasons": {}, "forced": 0, "tokens": 0}
    times: dict[str, list[float]] = {"bound": [], "free": [], "letters": [], "masks_us": []}
    with edge_mmllm.load(path, threads=threads, context=1024) as session:
        asked = session.encode([{"role": "user", "content": ASKED}])
        session.cache_prompt(asked.ids.tolist())

        def answered(kind: str, seed: int, count: int, constraint: Constraint | None) -> str:
            """The answer; its time a token, from the first token's logits on."""
            stream = session.generate_tokens(
                asked, count, Sampling(1.0, seed=seed), constraint=constraint,
                ignore_eos=kind == "free",
            )  # fmt: skip
            session.reset()
            started = time.perf_counter()
            ids = list(stream)
            times[kind].append((time.perf_counter() - started) / max(1, len(ids)))
            return str(session.text.decode(ids))

        for seed in range(-1, answers):
            answered("letters", abs(seed), COUNT, letters)
            masks = session.constraint_cost.mask_us_per_token
            text = answered("bound", abs(seed), COUNT, bound)
            cost, reason = session.constraint_cost, str(session.finish_reason)
            count = cost.tokens
            answered("free", abs(seed), count, None)
            free = "".join(
                session.generate(asked, max_new_tokens=COUNT, temperature=1.0, seed=abs(seed))
                if seed >= 0
                else ()
            )
            if seed < 0:  # the first round warms up, and compiles
                found["compile_ms"] = cost.compile_ms
                found["table_and_regex_ms"] = session.guide(letters).compile_ms
                times = {key: [] for key in times}
                continue
            times["masks_us"].append(masks)
            found["valid"] += fits(text)
            found["free_valid"] += fits(free)
            found["reasons"][reason] = found["reasons"].get(reason, 0) + 1
            found["forced"] += cost.forced
            found["tokens"] += count
    return {**found, "times": times}


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--only", nargs="*", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--answers", type=int, default=100)
    parser.add_argument("--child", metavar="PATH", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        harness.raise_priority()
        print(json.dumps(child(arguments.child, arguments.threads, arguments.answers)))
        return
    import artefacts
    from smollm2 import smollm2_gguf

    report = harness.Reporter("constrained", "Constrained answers", arguments)
    rows = []
    for engine in arguments.only:
        path: Path = (
            artefacts.ours("smollm2", arguments.cache, "--quant", "int4")
            if engine == "onnx"
            else smollm2_gguf(arguments.cache)
        )
        command = [str(arguments.peers), __file__, "--child", str(path), "--threads",
                   str(arguments.threads), "--answers", str(arguments.answers)]  # fmt: skip
        done = subprocess.run(
            command, env=harness.child_env(), capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(done.stderr[-1500:])
        found = json.loads(done.stdout.splitlines()[-1])
        report.record(
            engine=engine, threads=arguments.threads, answers=arguments.answers,
            artefact_sha256=harness.tree_sha256(path), **found,
            versions=harness.versions(arguments.peers, PACKAGES),
        )  # fmt: skip
        ms = {k: 1e3 * float(np.median(v)) for k, v in found["times"].items() if k != "masks_us"}
        rows.append([
            engine, f"{found['valid']} of {arguments.answers}",
            f"{found['free_valid']} of {arguments.answers}",
            f"{100 * found['forced'] / max(1, found['tokens']):.0f} %",
            f"{ms['free']:.2f}", f"{ms['bound']:.2f} ({ms['bound'] / ms['free']:.2f}x)",
            f"{ms['letters']:.2f} ({ms['letters'] / ms['free']:.2f}x)",
            f"{np.median(found['times']['masks_us']):.0f}",
            f"{found['compile_ms']:.0f} + {found['table_and_regex_ms']:.0f}",
        ])  # fmt: skip
        print(engine, found["reasons"], file=sys.stderr, flush=True)
    report.text(
        "SmolLM2-135M-Instruct (ONNX int4; GGUF Q4_1), temperature 1, medians over answers of the "
        "time a token from the prompt's cached state on. A bounded schema of five properties; "
        "`letters` is a regular expression without forced tokens."
    )
    report.table(
        "Sampled answers that fit a JSON schema, and the cost of it",
        ["engine", "valid", "valid without", "forced", "free ms/token", "schema ms/token",
         "letters ms/token", "mask us/token", "compile ms (schema + table)"],
        rows,
    )  # fmt: skip
    report.close()


if __name__ == "__main__":
    main()
