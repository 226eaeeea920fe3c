"""Compiled model libraries on the TVM runtime, for every text architecture: against the oracle on
the stored weights, and the engine's contract.

Run by `make test-full` in an environment of its own with `edge-mmllm[mlc]` (no torch, no onnx).
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_mmllm.errors import CorruptBundle, SessionError, UnsupportedBundle
from edge_mmllm.spec import ModelSpec, Stage, TextSpec
from edge_mmllm_export.checkpoints import open_checkpoint
from edge_mmllm_export.models import build
from edge_mmllm_export.ops.base import Architecture
from edge_mmllm_export.oracle import Oracle
from edge_mmllm_export.weights import Weight, bind
from edge_mmllm_runtime.mlc.machine import machine_flags, runnable
from edge_mmllm_runtime.mlc.parameters import library_path
from edge_mmllm_runtime.mlc.weights import QUANTIZATIONS, WeightFiles

pytestmark = pytest.mark.full
pytest.importorskip("tvm", reason="apache-tvm is not installed: pip install 'edge-mmllm[mlc]'")

from edge_mmllm_export.mlc import layout as mlc  # noqa: E402
from edge_mmllm_export.mlc import write as mlc_write  # noqa: E402
from edge_mmllm_export.mlc.library import compile_library  # noqa: E402
from edge_mmllm_export.mlc.targets import target_of  # noqa: E402
from edge_mmllm_export.ops.relax_params import layouts_of  # noqa: E402
from edge_mmllm_runtime.mlc.engine import MlcEngine  # noqa: E402

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "export"))

from rwkv_models import blinkdl, write_pth  # noqa: E402

REFERENCES = ROOT / "tests/goldens/references"
#: Issue F, show-it 2: largest difference of a logit from the oracle on the stored weights.
TOLERANCE = 2e-3
#: Whole = chunked = stepwise, as a share of the largest logit.
CHUNK_TOLERANCE = 2e-5
CONTEXT = 64
TOKENS = 40

#: Architecture -> a reference, or a version of RWKV, and how it is stored. Activations stay in
#: float32 where weights are quantized, so that packing and kernels are what is compared.
CASES = {
    "llama": ("llama-tied-llama3", "q0f32"),
    "llama-int4": ("llama-bias", "q4f32_1"),
    "llama-int3": ("llama", "q3f16_1"),
    "mistral": ("mistral-window", "q0f32"),
    "qwen2": ("qwen2", "q0f16"),
    "qwen3": ("qwen3", "q0f32"),
    "olmo2": ("olmo2", "q0f32"),
    "opt": ("opt-350m", "q0f32"),
    "mamba": ("mamba", "q4f16_1"),
    "falcon_mamba": ("falcon-mamba", "q0f32"),
    "mamba2": ("mamba2-groups", "q4f32_1"),
    "rwkv4": ("rwkv", "q0f32"),
    "rwkv5": ("5.2", "q0f32"),
    "rwkv6": ("6", "q4f16_1"),
    "rwkv7": ("7", "q4f32_1"),
}


@dataclass
class Case:
    """A compiled model, its engine and the weights as stored."""

    model: Architecture
    stored: Mapping[str, Weight]
    engine: MlcEngine
    library: Path
    files: mlc.MlcFiles
    folder: Path

    @property
    def ids(self) -> NDArray[np.int64]:
        return np.random.default_rng(3).integers(0, self.model.vocab_size, TOKENS)

    def prefill(self, ids: NDArray[np.int64], position: int = 0) -> NDArray[np.float32]:
        return self.engine.forward(ids, position, np.arange(len(ids)))


def spec_of(model: Architecture) -> ModelSpec:
    return ModelSpec(
        architecture=model.name,
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        layers=model.layers,
        parameters=0,
        context_length=model.context_length,
        states=model.states(),
        stages={"decoder": Stage("lib/native.so", ("input_ids", "logit_rows"), ("logits",))},
        text=TextSpec("none"),
    )


@pytest.fixture(scope="module", params=sorted(CASES))
def compiled(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[Case]:
    name, word = CASES[request.param]
    source = REFERENCES / name
    if not source.exists():
        source = write_pth(tmp_path_factory.mktemp("rwkv") / "model.pth", blinkdl(name))
    checkpoint = open_checkpoint(source)
    model = build(checkpoint)
    sources = model.sources(checkpoint.layout)
    weights = bind(checkpoint, model.parameters(), sources, ignored=model.ignored())
    quant, folder = QUANTIZATIONS[word], tmp_path_factory.mktemp(request.param)
    files = mlc.layout(model, weights, quant)
    mlc_write.write(files, checkpoint, folder)
    library = folder / "lib" / "native.so"
    layouts = layouts_of(weights, files.kinds, half=quant.half)
    compile_library(model, weights, layouts, word, target_of("native"), library, exact=True)
    with WeightFiles(folder, views=files.views) as stored:
        engine = MlcEngine(spec_of(model), library, stored, threads=2, context=CONTEXT)
    yield Case(model, mlc.as_stored(files, weights), engine, library, files, folder)
    engine.close()


@pytest.fixture
def case(compiled: Case) -> Case:
    compiled.engine.clear()
    return compiled


def test_logits_are_the_oracles_on_the_stored_weights(case: Case) -> None:
    expected = Oracle(case.model, case.stored, keep_weights=True).forward(case.ids)
    logits = case.prefill(case.ids)
    assert np.abs(expected).max() > 1
    assert np.abs(logits - expected).max() <= TOLERANCE
    assert np.array_equal(logits.argmax(axis=-1), expected.argmax(axis=-1))


def test_whole_is_chunked_is_stepwise(case: Case) -> None:
    ids = case.ids
    whole = case.prefill(ids)
    states = {name: value.copy() for name, value in case.engine.save(TOKENS).items()}
    for chunk in (7, 1):
        case.engine.clear()
        pieces = [case.prefill(ids[i : i + chunk], i) for i in range(0, TOKENS, chunk)]
        assert np.abs(np.concatenate(pieces) - whole).max() <= limit(whole)
    case.engine.clear()
    steps = np.stack([case.engine.step(int(t), i).copy() for i, t in enumerate(ids)])
    assert np.abs(steps - whole).max() <= limit(whole)
    for name, value in case.engine.save(TOKENS).items():
        np.testing.assert_allclose(value, states[name], rtol=1e-3, atol=1e-4, err_msg=name)


def limit(logits: NDArray[np.float32]) -> float:
    return CHUNK_TOLERANCE * float(np.abs(logits).max())


def test_a_prefill_longer_than_the_library_takes_is_split(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = np.array([TOKENS - 1, 3, 16])
    whole = case.prefill(case.ids)[wanted]
    case.engine.clear()
    monkeypatch.setattr(case.engine, "_longest", 16)
    logits = case.engine.forward(case.ids, 0, wanted)
    assert logits.shape == whole.shape
    assert np.abs(logits - whole).max() <= limit(whole)
    assert case.engine.forward(case.ids[:2], TOKENS, wanted[:0]).shape == (0, whole.shape[1])


def test_snapshot_and_restore(case: Case) -> None:
    ids = case.ids
    case.prefill(ids[:20])
    saved = {name: value.copy() for name, value in case.engine.save(20).items()}
    mark = case.engine.mark(20)
    expected = case.prefill(ids[20:], 20)
    case.engine.rollback(mark)
    assert np.array_equal(case.prefill(ids[20:], 20), expected)
    case.engine.clear()
    case.prefill(ids[::-1])
    case.engine.load(saved, 20)
    assert np.array_equal(case.prefill(ids[20:], 20), expected)


def test_an_engine_of_another_capacity_takes_the_states(case: Case) -> None:
    case.prefill(case.ids[:20])
    saved = {name: value.copy() for name, value in case.engine.save(20).items()}
    expected = case.prefill(case.ids[20:], 20)
    with WeightFiles(case.folder, views=case.files.views) as files:
        other = MlcEngine(spec_of(case.model), case.library, files, threads=1, context=48)
    other.load(saved, 20)
    logits = other.forward(case.ids[20:], 20, np.arange(20))
    assert np.abs(logits - expected).max() <= limit(expected)
    assert (other.capacity == 48) == any(s.grows for s in case.model.states())
    assert other.accepts_embeddings is False
    embedded = other.embed(case.ids[:3])
    table = case.stored["embed"].rows()[case.ids[:3]]
    if "project_in" not in case.stored:
        np.testing.assert_allclose(embedded, table, rtol=1e-6, atol=1e-7)
    other.close()


def test_a_failed_run_loses_the_states_until_they_are_put_back(case: Case) -> None:
    if not any(s.grows for s in case.model.states()):
        return
    case.prefill(case.ids)
    mark = case.engine.mark(TOKENS)
    with pytest.raises(SessionError, match="kv state is full"):
        case.prefill(case.ids, TOKENS)
    for call in (lambda: case.prefill(case.ids[:1], 0), lambda: case.engine.step(1, 0)):
        with pytest.raises(SessionError, match="states were lost"):
            call()
    case.engine.rollback(mark)
    case.engine.step(1, TOKENS)


def test_a_library_of_another_model_is_refused(case: Case) -> None:
    other = spec_of(case.model)
    object.__setattr__(other, "vocab_size", other.vocab_size + 1)
    with WeightFiles(case.folder, views=case.files.views) as files:
        with pytest.raises(CorruptBundle, match="differs from the manifest"):
            MlcEngine(other, case.library, files, threads=1, context=CONTEXT)
        path = case.folder / "tensor-cache.json"
        with pytest.raises(CorruptBundle, match="cannot be loaded"):
            MlcEngine(other, path, files, threads=1, context=CONTEXT)


def test_the_best_library_that_runs_here_is_chosen() -> None:
    needs = {"plain": {"machines": ["m"], "flags": []}, "wide": {"machines": ["m"], "flags": ["w"]}}
    listed = {"libraries": {"plain": "lib/plain.so", "wide": "lib/wide.so"}, "needs": needs}
    assert library_path(listed, lambda _: True) == "lib/wide.so"
    assert library_path(listed, lambda n: not n["flags"]) == "lib/plain.so"
    with pytest.raises(UnsupportedBundle, match="no model library for this machine"):
        library_path(listed, lambda _: False)
    with pytest.raises(CorruptBundle, match="names no model libraries"):
        library_path({}, lambda _: True)


def test_native_runs_here_and_an_unknown_cpu_does_not() -> None:
    native = target_of("native").needs()
    assert runnable(native)
    assert not runnable({**native, "machines": ["vax"]})
    assert not runnable({**native, "flags": [*machine_flags(), "avx4096"]})


def test_the_runtime_needs_no_compiler(compiled: Case) -> None:
    script = (
        "import sys\nfrom pathlib import Path\nfrom edge_mmllm_runtime.mlc.vm import Library\n"
        f"library = Library(Path({str(compiled.library)!r}), 2)\nlibrary.ready()\n"
        "assert library.metadata['functions']['decode']['inputs'][0] == 'input_ids'\n"
        "assert 'tvm' not in sys.modules\n"
    )
    path = [str(ROOT), str(ROOT / "runtimes")]
    command = f"import sys; sys.path[:0] = {path}\n{script}"
    subprocess.run([sys.executable, "-W", "error", "-c", command], check=True, timeout=120)
