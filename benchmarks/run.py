"""Every benchmark with its defaults, one after another: `make bench`.

Speed comes first, before the machine is warm with other work. What fails is reported at the end
and does not stop the others. Without the peers' environment ours is measured alone.

    python benchmarks/run.py [--publish] [--quick]
"""

from __future__ import annotations

import argparse
import subprocess
import sys

import harness

SCRIPTS: dict[str, tuple[str, ...]] = {
    "speed.py": (),
    "recurrent.py": (),
    "mlc.py": (),
    "export_cost.py": ("--large",),
    "blip2.py": (),
    "memory.py": (),
    "honesty.py": (),
    "footprint.py": (),
    "device_size.py": (),
    "quality.py": (),
    "protection.py": (),
    "accuracy.py": (),
    "accuracy_gguf.py": (),
    "picture.py": (),
    "state.py": (),
    "gguf_speed.py": (),
    "constrained.py": (),
    "streaming.py": (),
}
QUICK: dict[str, tuple[str, ...]] = {
    "speed.py": ("--quick", "--wait", "5"),
    "recurrent.py": ("--quick", "--wait", "5"),
    "mlc.py": ("--quick", "--wait", "5"),
    "export_cost.py": ("--rounds", "1", "--wait", "5"),
    "memory.py": ("--runs", "1"),
    "honesty.py": ("--rounds", "3"),
    "footprint.py": (),
    "accuracy.py": ("--pictures", "100"),
    "picture.py": ("--runs", "1", "--rounds", "2", "--wait", "5"),
    "state.py": ("--runs", "5", "--only", "rwkv7-0.1b", "tiny-mamba2"),
    "gguf_speed.py": ("--rounds", "3", "--restores", "5", "--only", "smollm2", "rwkv7-0.1b"),
    "constrained.py": ("--answers", "10"),
    "streaming.py": ("--tokens", "100000", "--rounds", "5"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--publish", action="store_true", help="put the tables into RESULTS.md")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, no quality table")
    arguments = parser.parse_args()
    failed = []
    for script, options in (QUICK if arguments.quick else SCRIPTS).items():
        print(f"\n# {script}", flush=True)
        command = [sys.executable, str(harness.HERE / script), *options]
        command += ["--publish"] if arguments.publish else []
        if subprocess.run(command, env=harness.child_env(), check=False).returncode:
            failed.append(script)
    if failed:
        print(f"\nfailed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
