"""Model libraries on another CPU: the engine, the TVM runtime's aarch64 wheel and a Python of
Debian's arm64 under qemu-user write what this machine writes.

`EDGE_MMLLM_ARM64_ROOT` names a folder with an arm64 system that has Python (`debootstrap
--foreign --arch=arm64`, packages unpacked) and, in `site/`, the aarch64 wheels of apache-tvm,
apache-tvm-ffi, numpy, tokenizers, pillow, jinja2 and markupsafe, unpacked, with the pure ones of
click and rich. Its `proc/cpuinfo` says what CPU there is.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.full
pytest.importorskip("tvm", reason="apache-tvm is not installed: pip install 'edge-mmllm[mlc]'")

from edge_mmllm_export.exporter import export  # noqa: E402
from edge_mmllm_export.mlc.link import find_linker  # noqa: E402
from edge_mmllm_export.mlc.targets import target_of  # noqa: E402
from edge_mmllm_export.planning import ExportOptions  # noqa: E402
from edge_mmllm_export.quantize.schemes import QuantPlan  # noqa: E402

REPO = Path(__file__).parents[2]
ROOT = os.environ.get("EDGE_MMLLM_ARM64_ROOT")
QEMU = shutil.which("qemu-aarch64")
COUNT = 16
#: CPU of qemu -> target that its flags choose.
CPUS = {"cortex-a53": "aarch64", "cortex-a76": "aarch64-dotprod"}
_FLAGS = "fp asimd aes pmull sha1 sha2 crc32"

#: Both ways: the prompt whole, and token by token.
PROGRAM = """
import json, sys
import edge_mmllm
ids = json.loads(sys.argv[2])
with edge_mmllm.load(sys.argv[1]) as session:
    whole = list(session.generate_tokens(ids, int(sys.argv[3]), ignore_eos=True))
    session.engine.clear()
    for position in range(len(ids) + len(whole) - 1):
        logits = session.engine.step(ids[position], position).reshape(-1)
        if position + 1 == len(ids):
            ids.append(int(logits.argmax()))
print(json.dumps([whole, ids[-len(whole):]]))
"""


@pytest.mark.skipif(QEMU is None, reason="no qemu-aarch64")
@pytest.mark.skipif(ROOT is None, reason="EDGE_MMLLM_ARM64_ROOT is not set")
@pytest.mark.parametrize("quant", ["f32", "int4"])
@pytest.mark.parametrize("name", ["tiny-rwkv7", "tiny-mamba2"])
def test_a_model_library_on_aarch64_writes_the_same_tokens(
    name: str, quant: str, tmp_path: Path
) -> None:
    assert ROOT is not None
    assert QEMU is not None
    find_linker(target_of("aarch64"))
    source = REPO / "examples/models" / name
    bundle, plan = tmp_path / "bundle", QuantPlan(name=quant)
    targets = ("native", *CPUS.values())
    export(source, bundle, ExportOptions(plan=plan, format="mlc", targets=targets, gate=False))
    ids = json.loads((source / "golden.json").read_text())["cases"][0]["input_ids"]
    arguments = ["-c", PROGRAM, str(bundle), json.dumps(ids), str(COUNT)]
    path = os.pathsep.join(sys.path)
    expected = _output([sys.executable, *arguments], {"PYTHONPATH": path})
    for cpu, target in CPUS.items():
        system = Path(ROOT)
        flags = f"{_FLAGS} asimddp" if target == "aarch64-dotprod" else _FLAGS
        (system / "proc").mkdir(exist_ok=True)
        (system / "proc" / "cpuinfo").write_text(f"processor\t: 0\nFeatures\t: {flags}\n")
        sources = [system / "site", REPO, REPO / "runtimes"]
        environment = {
            "PYTHONHOME": str(system / "usr"),
            "PYTHONPATH": os.pathsep.join(map(str, sources)),
        }
        python = sorted((system / "usr/bin").glob("python3.*[0-9]"))[0]
        command = [QEMU, "-cpu", cpu, "-L", ROOT, str(python), *arguments]
        assert _output(command, environment) == expected, cpu


def _output(command: list[str], environment: dict[str, str]) -> list[list[int]]:
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    found: list[list[int]] = json.loads(done.stdout.splitlines()[-1])
    return found
