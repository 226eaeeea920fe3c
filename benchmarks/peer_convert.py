"""llama.cpp's own converter of hub checkpoints, as whole processes.

Its script comes with the source archive of llama-cpp-python, not with the wheel: the archive, 77
MB, is downloaded once and the part kept in the cache. It runs in the interpreter of the peers.

    python benchmarks/peer_convert.py [--cache .cache]
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from smollm2 import CACHE

VERSION = "0.3.36"
PACKAGE = "llama-cpp-python"
#: What is kept of the archive, below `vendor/llama.cpp`.
_PARTS = ("convert_hf_to_gguf.py", "conversion/", "gguf-py/", "LICENSE")

_QUANTIZE = """
import ctypes, sys, llama_cpp as c
from gguf import LlamaFileType
log = c.llama_log_callback(lambda *_: None)
c.llama_log_set(log, ctypes.c_void_p(0))
p = c.llama_model_quantize_default_params()
p.ftype, p.nthread = LlamaFileType["MOSTLY_" + sys.argv[3]].value, 2
sys.exit(c.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(p)))
"""


def converter(cache: Path = CACHE) -> Path:
    """The script; downloads the archive on first use."""
    folder = cache / f"llama.cpp-convert-{VERSION}"
    script = folder / "convert_hf_to_gguf.py"
    if script.is_file():
        return script
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch]
        subprocess.run([*pip, "--no-binary", PACKAGE, f"{PACKAGE}=={VERSION}"], check=True)
        (archive,) = Path(scratch).glob("*.tar.gz")
        part = Path(scratch) / "part"
        with tarfile.open(archive) as tar:
            for member in tar:
                name = member.name.partition("/vendor/llama.cpp/")[2]
                if member.isfile() and name.startswith(_PARTS):
                    member.name = name
                    tar.extract(member, part, filter="data")
        part.replace(folder)
    return script


def command(python: Path, script: Path, source: Path, out: Path, kind: str) -> list[str]:
    """Convert a checkpoint to `f32`, `f16`, `bf16` or `q8_0`."""
    return [str(python), str(script), str(source), "--outfile", str(out), "--outtype", kind]


def mixed_command(
    python: Path, script: Path, source: Path, out: Path, draft: Path, kind: str
) -> list[str]:
    """Convert to float16, then quantize that: two processes one after the other."""
    first = command(python, script, source, draft, "f16")
    second = [str(python), "-c", _QUANTIZE, str(draft), str(out), kind]
    return ["sh", "-c", f"{shlex.join(first)} && {shlex.join(second)}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cache", type=Path, default=CACHE)
    print(converter(parser.parse_args().cache))


if __name__ == "__main__":
    main()
