"""Libraries without a runtime: built, linked with plain gcc, and run; other CPUs under qemu-user.

Run by `make test-full` in an environment of its own with `edge-mmllm[mlc]`.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_mmllm import load
from edge_mmllm.bundle import open_bundle
from edge_mmllm_export.checkpoints import open_checkpoint
from edge_mmllm_export.exporter import export
from edge_mmllm_export.models import build
from edge_mmllm_export.oracle import Oracle
from edge_mmllm_export.planning import ExportOptions
from edge_mmllm_export.quantize.schemes import QuantPlan
from edge_mmllm_export.weights import bind

pytestmark = pytest.mark.full
pytest.importorskip("tvm", reason="apache-tvm is not installed: pip install 'edge-mmllm[mlc]'")

from edge_mmllm_export.mlc.library import build_library  # noqa: E402
from edge_mmllm_export.mlc.quant import quantize  # noqa: E402
from edge_mmllm_export.mlc.targets import target_of  # noqa: E402
from edge_mmllm_export.ops.relax_params import layouts_of  # noqa: E402
from edge_mmllm_export.ops.tir.isa import Isa  # noqa: E402
from edge_mmllm_export.standalone.build import (  # noqa: E402
    KERNELS,
    LIBRARY,
    WEIGHTS,
    Standalone,
    write_standalone,
)
from edge_mmllm_runtime.mlc.parameters import packed  # noqa: E402
from edge_mmllm_runtime.mlc.weights import (  # noqa: E402
    QUANTIZATIONS,
    from_bfloat16,
    to_bfloat16,
)

ROOT = Path(__file__).parents[2]
TRAINED = {name: ROOT / "examples/models" / name for name in ("tiny-rwkv7", "tiny-mamba2")}
REFERENCES = ROOT / "tests/goldens/references"
#: Issue F, show-it 2: largest difference of a logit.
TOLERANCE = 2e-3
#: Issue F, show-it 5: beyond weights and state.
BEYOND_BYTES = 1 << 20
CAPACITY_TOKENS = 64
COUNT = 32
#: Statuses of edge_model.h.
OK, BAD_ARGUMENT, NO_FILE, NOT_WEIGHTS, TRUNCATED, OTHER_MODEL, DAMAGED = 0, -1, -2, -3, -4, -5, -6
BAD_TOKEN, BAD_STATE, CONTEXT_FULL = -9, -10, -11


@dataclass(frozen=True)
class Foreign:
    """Another CPU: its target, its compiler, and what runs its programs."""

    target: str
    gcc: str
    qemu: str
    cpu: str
    root: str

    @property
    def missing(self) -> str:
        absent = [tool for tool in (self.gcc, self.qemu) if shutil.which(tool) is None]
        return f"{', '.join(absent)} not installed" if absent else ""


_ARM64 = ("aarch64-linux-gnu-gcc", "qemu-aarch64")
FOREIGN = (
    Foreign("aarch64", *_ARM64, "cortex-a53", "/usr/aarch64-linux-gnu"),
    Foreign("aarch64-dotprod", *_ARM64, "cortex-a76", "/usr/aarch64-linux-gnu"),
    Foreign(
        "armv7", "arm-linux-gnueabihf-gcc", "qemu-arm", "cortex-a7", "/usr/arm-linux-gnueabihf"
    ),
)


def make(source: Path, folder: Path, target: str, quant: str = "q0f32") -> Standalone:
    """The library of a checkpoint."""
    checkpoint = open_checkpoint(source)
    model = build(checkpoint)
    sources = model.sources(checkpoint.layout)
    weights = bind(checkpoint, model.parameters(), sources, ignored=model.ignored())
    chosen, scheme = target_of(target), QUANTIZATIONS[quant]
    layouts = layouts_of(weights, dict.fromkeys(weights, "q4" if scheme.bits else "f32"))
    isa = Isa.of(chosen.tvm())
    library = build_library(model, weights, layouts, isa, functions=("decode",))

    def stored(name: str) -> NDArray[np.generic]:
        weight, _, part = name.rpartition(".")
        if part not in ("q_weight", "q_scale"):
            return weights[name].rows()
        words, scales = quantize(weights[weight].rows(), scheme)
        return words if part == "q_weight" else from_bfloat16(to_bfloat16(scales))

    grows = any(s.grows for s in model.states())
    return write_standalone(
        library.module,
        lambda name: packed(library.parameters[name].to_json(), stored),
        folder,
        chosen,
        name=model.name,
        capacity=CAPACITY_TOKENS if grows else 0,
    )


def compiled(folder: Path, gcc: str = "gcc", *, static: bool = False) -> Path:
    """The C example; `static`: with the library's sources in it, and libc."""
    out = folder / ("generate-static" if static else "generate")
    strict = [gcc, "-std=c11", "-O2", "-Wall", "-Wextra", "-Wpedantic", "-Werror"]
    parts = ["generate.c"]
    if static:
        parts += ["edge_model.c", KERNELS, "-static"]
    else:
        parts += ["-L.", "-ledge_model", "-Wl,-rpath,$ORIGIN"]
    subprocess.run([*strict, *parts, "-lm", "-o", out.name], cwd=folder, check=True)
    return out


def generated(command: Sequence[str | Path], folder: Path, ids: Sequence[int]) -> list[int]:
    words = [*map(str, command), str(folder / WEIGHTS), str(COUNT), *map(str, ids)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return [int(word) for word in done.stdout.split()]


def goldens(name: str) -> list[tuple[list[int], list[int]]]:
    """Prompts and the 32 tokens that an independent implementation gives greedily."""
    cases = json.loads((TRAINED[name] / "golden.json").read_text())["cases"]
    return [(case["input_ids"], case["greedy_32"]) for case in cases]


class Library:
    """libedge_model.so through ctypes."""

    def __init__(self, folder: Path) -> None:
        self.c = ctypes.CDLL(str(folder / LIBRARY))
        self.c.edge_model_state_size.restype = ctypes.c_size_t
        self.c.edge_model_state.restype = ctypes.c_void_p
        self.c.edge_model_position.restype = ctypes.c_int64
        self.c.edge_model_error.restype = ctypes.c_char_p
        self.vocabulary = int(self.c.edge_model_vocabulary())

    def open(self, path: Path) -> tuple[int, ctypes.c_void_p]:
        handle = ctypes.c_void_p()
        status = self.c.edge_model_open(os.fsencode(path), ctypes.byref(handle))
        assert bool(handle) == (status == OK)
        return status, handle

    def step(self, handle: ctypes.c_void_p, token: int) -> NDArray[np.float32]:
        logits = np.empty(self.vocabulary, np.float32)
        pointer = ctypes.c_void_p(logits.ctypes.data)
        assert self.c.edge_model_step(handle, token, pointer) == OK
        return logits

    def state(self, handle: ctypes.c_void_p) -> ctypes.Array[ctypes.c_char]:
        """The block itself."""
        size = self.c.edge_model_state_size()
        return (ctypes.c_char * size).from_address(self.c.edge_model_state(handle))


NAMES = ("tiny-rwkv7", "tiny-mamba2", "mamba", "llama")


@dataclass(frozen=True)
class Case:
    name: str
    source: Path
    made: Standalone
    library: Library

    @property
    def weights(self) -> Path:
        return self.made.folder / WEIGHTS

    def ids(self, count: int = 12) -> list[int]:
        return [(7 * i * i + 3) % self.library.vocabulary for i in range(count)]


@pytest.fixture(scope="module", params=NAMES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    if shutil.which("gcc") is None:
        pytest.skip("no gcc")
    name = request.param
    folder = tmp_path_factory.mktemp(name)
    source = TRAINED.get(name, REFERENCES / name)
    made = make(source, folder, "native")
    return Case(name, source, made, Library(folder))


@pytest.fixture
def handle(case: Case) -> Iterator[ctypes.c_void_p]:
    status, opened = case.library.open(case.weights)
    assert status == OK
    yield opened
    case.library.c.edge_model_close(opened)


def test_logits_are_the_oracles(case: Case, handle: ctypes.c_void_p) -> None:
    checkpoint = open_checkpoint(case.source)
    model = build(checkpoint)
    sources = model.sources(checkpoint.layout)
    weights = bind(checkpoint, model.parameters(), sources, ignored=model.ignored())
    expected = Oracle(model, weights, keep_weights=True).forward(np.array(case.ids()))
    logits = np.stack([case.library.step(handle, token) for token in case.ids()])
    assert np.abs(logits - expected).max() <= TOLERANCE
    assert case.library.c.edge_model_position(handle) == len(case.ids())


@pytest.mark.parametrize("static", [False, True])
def test_the_c_example_writes_what_the_reference_writes(case: Case, static: bool) -> None:
    if case.name not in TRAINED:
        pytest.skip("not trained: no golden tokens")
    program = compiled(case.made.folder, static=static)
    for ids, expected in goldens(case.name):
        assert generated([program], case.made.folder, ids) == expected


def test_memory_beyond_weights_and_state(case: Case) -> None:
    """Anonymous memory, in a program of its own: what the process cannot give back."""
    program = compiled(case.made.folder, static=True)
    ids = map(str, case.ids())
    words = [program, "-m", case.weights, "48", *ids]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    found = dict(line.split(":") for line in done.stderr.splitlines() if ":" in line)
    anonymous = int(found["RssAnon"].split()[0]) * 1024
    assert anonymous - case.made.state_bytes < BEYOND_BYTES
    mapped = int(found["RssFile"].split()[0]) * 1024
    assert mapped - case.weights.stat().st_size < BEYOND_BYTES


def test_a_state_is_copied_away_and_back(case: Case, handle: ctypes.c_void_p) -> None:
    library, ids = case.library, case.ids()
    for token in ids[:6]:
        library.step(handle, token)
    saved = library.state(handle).raw
    first = [library.step(handle, token) for token in ids[6:]]
    library.c.edge_model_reset(handle)
    fresh = library.step(handle, ids[0])
    library.state(handle).raw = saved
    again = [library.step(handle, token) for token in ids[6:]]
    assert np.array_equal(first, again)
    _, other = library.open(case.weights)
    library.state(other).raw = saved
    assert np.array_equal(library.step(other, ids[6]), first[0])
    library.c.edge_model_reset(other)
    assert np.array_equal(library.step(other, ids[0]), fresh)
    library.c.edge_model_close(other)


def test_threads_change_nothing(case: Case, handle: ctypes.c_void_p) -> None:
    one = [case.library.step(handle, token) for token in case.ids()]
    for threads in (2, 3, 1):
        case.library.c.edge_model_reset(handle)
        assert case.library.c.edge_model_set_threads(handle, threads) == OK
        assert np.array_equal([case.library.step(handle, token) for token in case.ids()], one)
    assert case.library.c.edge_model_set_threads(handle, 0) == BAD_ARGUMENT


def test_wrong_tokens_and_states_are_refused(case: Case, handle: ctypes.c_void_p) -> None:
    library = case.library
    before = library.state(handle).raw
    for token in (-1, library.vocabulary, 2**31 - 1):
        assert library.c.edge_model_step(handle, token, None) == BAD_TOKEN
    assert library.state(handle).raw == before
    library.state(handle).raw = bytes(len(before))
    assert library.c.edge_model_step(handle, 0, None) == BAD_STATE
    library.state(handle).raw = struct.pack("<q", -5) + before[8:]
    assert library.c.edge_model_step(handle, 0, None) == BAD_STATE
    last = struct.pack("<q", CAPACITY_TOKENS - 1) + before[8:]
    library.state(handle).raw = last
    statuses = [library.c.edge_model_step(handle, 0, None) for _ in range(2)]
    grows = library.c.edge_model_context() > 0
    assert statuses == [OK, CONTEXT_FULL if grows else OK]


def test_weight_files_that_are_not_whole_are_refused(case: Case, tmp_path: Path) -> None:
    library, whole = case.library, case.weights.read_bytes()
    bad = {
        "empty": (b"", TRUNCATED),
        "of a few bytes": (whole[:5], TRUNCATED),
        "of half a header": (whole[:40], TRUNCATED),
        "without data": (whole[:64], TRUNCATED),
        "cut": (whole[:-1], TRUNCATED),
        "longer": (whole + b"\0", TRUNCATED),
        "something else": (b"GGUF" + whole[4:], NOT_WEIGHTS),
        "short and something else": (b"GGUF", NOT_WEIGHTS),
        "of a later version": (whole[:8] + b"\2" + whole[9:], NOT_WEIGHTS),
        "of another model": (whole[:32] + bytes(32) + whole[64:], OTHER_MODEL),
        "that says so": (whole[:16] + struct.pack("<Q", 64) + whole[24:64], OTHER_MODEL),
    }
    path = tmp_path / "bad"
    for what, (content, expected) in bad.items():
        path.write_bytes(content)
        assert library.open(path)[0] == expected, what
    assert library.open(tmp_path / "absent")[0] == NO_FILE
    assert library.open(tmp_path)[0] == NO_FILE
    assert len({library.c.edge_model_error(status) for status in range(-12, 2)}) == 14


def test_verify_reads_every_byte(case: Case, handle: ctypes.c_void_p, tmp_path: Path) -> None:
    library = case.library
    assert library.c.edge_model_verify(handle) == OK
    damaged = bytearray(case.weights.read_bytes())
    damaged[-100] ^= 1
    path = tmp_path / "damaged"
    path.write_bytes(damaged)
    status, other = library.open(path)
    assert status == OK
    assert library.c.edge_model_verify(other) == DAMAGED
    library.c.edge_model_close(other)


def test_only_the_interface_is_visible(case: Case) -> None:
    command = ["nm", "-D", "--defined-only", str(case.made.folder / LIBRARY)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    names = [line.split()[-1] for line in lines]
    assert len(names) >= 15
    assert all(name.startswith("edge_model_") for name in names)


@dataclass(frozen=True)
class Exported:
    """A bundle with its standalone library."""

    name: str
    quant: str
    root: Path

    @property
    def folder(self) -> Path:
        return self.root / "standalone" / "native"


@pytest.fixture(scope="module", params=["tiny-rwkv7 f32", "tiny-rwkv7 int4", "tiny-mamba2 int4"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    if shutil.which("gcc") is None:
        pytest.skip("no gcc")
    name, quant = request.param.split()
    root = tmp_path_factory.mktemp(name) / quant
    plan = QuantPlan(name=quant)
    options = ExportOptions(plan=plan, format="mlc", standalone=True, gate=False)
    export(TRAINED[name], root, options)
    return Exported(name, quant, root)


def test_a_bundles_library_computes_what_its_session_computes(exported: Exported) -> None:
    """The same kernels: bit for bit, where both read one token at a time."""
    library = Library(exported.folder)
    status, handle = library.open(exported.folder / WEIGHTS)
    assert status == OK
    ids, _ = goldens(exported.name)[0]
    with load(exported.root) as session:
        session.engine.clear()
        tokens = list(ids)
        for position in range(len(ids) + COUNT - 1):
            expected = session.engine.step(tokens[position], position).reshape(-1)
            assert np.array_equal(library.step(handle, tokens[position]), expected)
            if position + 1 == len(tokens):
                tokens.append(int(expected.argmax()))
    library.c.edge_model_close(handle)
    assert generated([compiled(exported.folder)], exported.folder, ids) == tokens[len(ids) :]


def test_a_float_bundles_example_writes_what_its_session_writes(exported: Exported) -> None:
    if exported.quant != "f32":
        pytest.skip("8-bit activations: reading a prompt whole rounds otherwise than in steps")
    program = compiled(exported.folder)
    for ids, expected in goldens(exported.name):
        with load(exported.root) as session:
            tokens = list(session.generate_tokens(ids, COUNT, ignore_eos=True))
        assert tokens == generated([program], exported.folder, ids) == expected


def test_a_bundle_says_what_its_library_holds(exported: Exported) -> None:
    bundle = open_bundle(exported.root, verify="hashes")
    said = bundle.manifest.engine_format["standalone"]["native"]
    assert said["folder"] == "standalone/native"
    assert said["weight_bytes"] + 64 == (exported.folder / WEIGHTS).stat().st_size
    assert said["library_bytes"] == (exported.folder / LIBRARY).stat().st_size
    library = Library(exported.folder)
    assert said["state_bytes"] == library.c.edge_model_state_size()


@pytest.fixture(scope="module", params=[(n, q) for n in TRAINED for q in ("q0f32", "q4f32_1")])
def native(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, str, list[int]]:
    """What this machine writes: model, quantization, 32 tokens after the first prompt."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc")
    name, quant = request.param
    folder = tmp_path_factory.mktemp(f"{name}-{quant}")
    make(TRAINED[name], folder, "native", quant)
    return name, quant, generated([compiled(folder)], folder, goldens(name)[0][0])


@pytest.mark.parametrize("foreign", FOREIGN, ids=lambda f: f.target)
def test_other_cpus_write_the_same_tokens(
    native: tuple[str, str, list[int]], foreign: Foreign, tmp_path: Path
) -> None:
    """Quantized on armv7, whose float32 rounds otherwise (no fused sums): the first ones."""
    name, quant, expected = native
    if foreign.missing:
        pytest.skip(foreign.missing)
    make(TRAINED[name], tmp_path, foreign.target, quant)
    program = compiled(tmp_path, foreign.gcc)
    emulated = [foreign.qemu, "-cpu", foreign.cpu, "-L", foreign.root, program]
    found = generated(emulated, tmp_path, goldens(name)[0][0])
    same = 8 if quant == "q4f32_1" and foreign.target == "armv7" else COUNT
    assert found[:same] == expected[:same]
    if quant == "q0f32":
        assert found == goldens(name)[0][1]
