"""Ten thousand damaged GGUF files: none ends the process that inspects or loads them.

Validation sees all of them here, in this process. What it lets through is loaded by llama.cpp in
a child, as `load` does; one child takes many files, and a new one is started where it dies. What
it dies of is counted: `load` reports it as an error, and a rule of `gguf/check.py` should have
refused it first.
"""

from __future__ import annotations

import os
import select
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import edge_mmllm

pytestmark = pytest.mark.full
pytest.importorskip("llama_cpp")

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "runtimes"))

from gguf_bases import make_bases  # noqa: E402
from gguf_mutations import mutate, put_together, take_apart  # noqa: E402

from edge_mmllm._children import python_command  # noqa: E402
from edge_mmllm.errors import BundleError, CheckpointError, CorruptBundle  # noqa: E402
from edge_mmllm_export.checkpoints import open_checkpoint  # noqa: E402
from edge_mmllm_runtime.gguf import trial as gguf_trial  # noqa: E402
from edge_mmllm_runtime.gguf.check import BLOCKS, check_file  # noqa: E402

MUTATIONS, SEED = 10_000, 1_000_000
PATIENCE_S = 60

_LOADER = """
import os, sys
from pathlib import Path
from edge_mmllm.errors import EdgeError
from edge_mmllm_runtime.gguf import trial as gguf_trial
gguf_trial.die_with_parent()
gguf_trial._confine(0)
answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)
for line in sys.stdin:
    try:
        found = gguf_trial.describe(Path(line.rstrip()))
        answers.write("unsupported\\n" if "unsupported" in found else "loaded\\n")
    except EdgeError:
        answers.write("refused\\n")
    except Exception as error:
        answers.write(f"raised {error!r}"[:300].replace("\\n", " ") + "\\n")
"""


class _Child:
    """Loads one file after another, until it dies."""

    def __init__(self, errors: Path) -> None:
        self._errors = errors
        self._process: subprocess.Popen[str] | None = None

    def load(self, path: Path) -> str:
        if self._process is None:
            code = f"exec({_LOADER!r})"
            with self._errors.open("w") as errors:
                self._process = subprocess.Popen(
                    python_command(code),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                    env={**os.environ, "GGML_NO_BACKTRACE": "1"},
                )
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{path}\n")
        process.stdin.flush()
        ready = select.select([process.stdout], [], [], PATIENCE_S)[0]
        answer = process.stdout.readline().strip() if ready else "hung"
        if answer and answer != "hung":
            return answer
        self.close()
        lines = self._errors.read_text(errors="replace").splitlines()
        said = [line for line in lines if "ASSERT" in line or "what()" in line] or lines[-1:]
        return f"{answer or 'crashed'} {process.returncode} {' '.join(said)[-160:]}"

    def close(self) -> None:
        process, self._process = self._process, None
        if process:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    made = make_bases(tmp_path_factory.mktemp("bases"))
    return {name: take_apart(raw) for name, raw in made.items()}


@pytest.fixture
def child(tmp_path):
    made = _Child(tmp_path / "errors")
    yield made
    made.close()


def test_the_bases_are_sound(bases, child, tmp_path) -> None:
    path = tmp_path / "model.gguf"
    for name, sound in bases.items():
        path.write_bytes(sound.raw)
        check_file(path, exact=True)
        assert child.load(path) == "loaded", name


def test_no_damage_ends_a_process(bases, child, tmp_path) -> None:
    path, names = tmp_path / "model.gguf", list(bases)
    counts: Counter[str] = Counter()
    deaths, surprises = [], []
    for seed in range(SEED, SEED + MUTATIONS):
        name = names[seed % len(names)]
        raw, what = mutate(bases[name], seed)
        path.write_bytes(raw)
        try:
            check_file(path)
        except BundleError:
            counts["refused by validation"] += 1
        else:
            answer = child.load(path)
            counts[answer.split()[0]] += 1
            told = f"{answer}: seed {seed}, {name}, {what}"
            if answer.startswith(("crashed", "hung")):
                deaths.append(told)
            elif answer.startswith("raised"):
                surprises.append(told)
    print(dict(counts), *deaths, sep="\n")
    assert not surprises
    assert counts["refused by validation"] > MUTATIONS // 2
    assert counts["loaded"] > MUTATIONS // 100, "the damage is too coarse to reach llama.cpp"
    # Each of these is an error to who loads the file; that there are few is what validation is for.
    assert len(deaths) <= MUTATIONS // 1000, deaths


def test_a_death_is_a_refusal(bases, tmp_path, monkeypatch) -> None:
    """What validation does not know of: llama.cpp's own assertion, in the child."""
    path = tmp_path / "model.gguf"
    raw = bases["llama gpt2"].raw
    path.write_bytes(raw.replace(b"[PAD39]", b"[PAD38]"))
    with pytest.raises(CorruptBundle, match="appear twice"):
        check_file(path)
    with pytest.raises(CorruptBundle, match=r"crashed on it \(signal 6\).*GGML_ASSERT"):
        gguf_trial.try_file(path, len(raw))


def test_a_split_file_is_the_whole_one(bases, tmp_path) -> None:
    sound = bases["llama gpt2"]
    cut = len(sound.tensors) // 2
    (start,) = struct.unpack("<Q", sound.tensors[cut][-8:])

    def string(text: str) -> bytes:
        return struct.pack("<Q", len(text)) + text.encode()

    def says(number: int) -> list[bytes]:
        return [
            string("split.no") + struct.pack("<IH", 2, number),
            string("split.count") + struct.pack("<IH", 2, 2),
            string("split.tensors.count") + struct.pack("<Ii", 5, len(sound.tensors)),
        ]

    moved = [
        t[:-8] + struct.pack("<Q", struct.unpack("<Q", t[-8:])[0] - start)
        for t in sound.tensors[cut:]
    ]
    whole = tmp_path / "whole.gguf"
    parts = [tmp_path / f"m-0000{i}-of-00002.gguf" for i in (1, 2)]
    whole.write_bytes(sound.raw)
    first, second = sound.data[:start], sound.data[start:]
    parts[0].write_bytes(put_together([*sound.pairs, *says(0)], sound.tensors[:cut], first))
    parts[1].write_bytes(put_together(says(1), moved, second))
    found = []
    for path in (parts[0], whole):
        with edge_mmllm.load(path, threads=1) as session:
            found.append(session.prefill([5, 6, 7]))
    assert np.array_equal(*found)
    parts[1].write_bytes(parts[1].read_bytes()[:-64])
    with pytest.raises(CorruptBundle, match="truncated"):
        edge_mmllm.load(parts[0])


def test_the_exporters_reader(bases, tmp_path) -> None:
    """It has rules of its own: other errors, nothing else raised, and no absurd allocation."""
    path, names = tmp_path / "model.gguf", list(bases)
    opened = 0
    for seed in range(SEED, SEED + 2000):
        raw, _ = mutate(bases[names[seed % len(names)]], seed)
        path.write_bytes(raw)
        try:
            checkpoint = open_checkpoint(path)
            opened += 1
            checkpoint.text()
            for name in list(checkpoint.tensors)[:3]:
                checkpoint.read(name, 0, 1)
        except CheckpointError:
            pass
    assert opened > 100


def test_sizes_of_blocks() -> None:
    from gguf import GGML_QUANT_SIZES

    known = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
    known[9] = (32, 36)  # Q8_1: two halves and 32 bytes; the gguf package says 40
    assert known.items() <= BLOCKS.items()
