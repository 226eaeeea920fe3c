"""The session's contract, as `tests/runtimes` has it for onnxruntime, over compiled libraries.

The same test functions with another `toy`: a Mamba-2 and a llama of 256 tokens, exported as MLC in
float32, and the oracle as their reference. What looks inside the ONNX engine is not among them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

pytestmark = pytest.mark.full
pytest.importorskip("tvm", reason="apache-tvm is not installed: pip install 'edge-mmllm[mlc]'")

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[1] / "runtimes"), str(HERE.parents[2] / "benchmarks")]


def _borrow() -> None:
    """Imports the tests of the other engine, whose toys are graphs: there is no onnx here."""
    absent = [n for n in ("onnx", "edge_mmllm_runtime.onnx") if n not in sys.modules]
    for name in absent:
        stub = ModuleType(name)
        for member in ("TensorProto", "helper", "numpy_helper", "OnnxEngine"):
            setattr(stub, member, None)
        sys.modules[name] = stub
    import test_context
    import test_generation
    import test_prompt_cache
    import test_state_files

    for name in absent:
        del sys.modules[name]
    del test_context, test_generation, test_prompt_cache, test_state_files


_borrow()

import test_context  # noqa: E402
import test_generation  # noqa: E402
import test_prompt_cache  # noqa: E402
import test_state_files  # noqa: E402
import toys  # noqa: E402
from contract_models import MODELS  # noqa: E402
from test_context import (  # noqa: E402, F401
    test_a_callback_cannot_use_the_session,
    test_another_thread_cannot_use_the_session,
    test_branches_are_exact,
    test_cancelled_prefill_is_undone,
    test_closed_session,
    test_failing_engine_leaves_the_state,
    test_logits_of_chosen_positions,
    test_positions_must_be_the_next_ones,
    test_prefill_in_chunks_equals_the_reference,
    test_reset_forgets_everything,
    test_results_are_the_callers,
    test_snapshot_of_another_bundle_is_refused,
    test_steps_and_chunks_mix,
    test_token_by_token_equals_the_reference,
)
from test_generation import (  # noqa: E402, F401
    test_a_count_that_is_no_whole_number_is_refused_at_once,
    test_a_long_prompt_can_be_cancelled,
    test_every_end_of_sequence_token_ends,
    test_generate_many_equals_separate_calls,
    test_go_on_from_a_branch,
    test_greedy_equals_the_reference,
    test_no_new_tokens,
    test_one_text_is_not_many_prompts,
    test_prompts_of_a_wrong_type,
    test_sampling_is_reproducible,
    test_two_generations_at_once_are_refused,
)
from test_prompt_cache import (  # noqa: E402, F401
    test_a_prefill_that_fails_after_a_restore_is_undone,
    test_a_whole_cached_prompt_is_not_read_at_all,
    test_building_on_what_is_cached,
    test_each_of_many_equals_a_fresh_run,
    test_many_read_their_common_beginning_once,
    test_prefill_takes_it_into_an_empty_context_only,
    test_the_longest_cached_beginning_is_restored,
)
from test_state_files import (  # noqa: E402, F401
    saved,
    test_a_failed_write_leaves_the_old_file,
    test_a_file_is_replaced_not_written_over,
    test_a_state_of_another_bundle_is_refused,
    test_an_empty_state,
    test_every_flipped_bit_is_found,
    test_every_other_length_is_found,
)

from edge_mmllm.bundle import open_bundle  # noqa: E402
from edge_mmllm.spec import ModelSpec  # noqa: E402


@dataclass(frozen=True)
class MlcToy:
    """As `toys.Toy`, over an MLC bundle."""

    spec: ModelSpec
    folder: Path
    reference: Callable[[np.ndarray], np.ndarray]

    def session(self, context: int | None = None, *, chunk: int = 512, sha: str = "0" * 64):
        from edge_mmllm_runtime.engine import EngineOptions
        from edge_mmllm_runtime.mlc.engine import open_engine
        from edge_mmllm_runtime.session import Session

        room = context or self.spec.context_length
        engine = open_engine(open_bundle(self.folder), EngineOptions(threads=1, context=room))
        text = toys.make_text(self.spec)
        return Session(engine, self.spec, sha, text, context=room, chunk=chunk)


@pytest.fixture(scope="session", params=MODELS)
def made(request, tmp_path_factory) -> MlcToy:
    from edge_mmllm_export.checkpoints import open_checkpoint
    from edge_mmllm_export.exporter import export
    from edge_mmllm_export.models import build
    from edge_mmllm_export.oracle import Oracle
    from edge_mmllm_export.planning import ExportOptions
    from edge_mmllm_export.weights import bind

    folder = tmp_path_factory.mktemp("contract")
    source = folder / request.param
    MODELS[request.param](source)
    options = ExportOptions(format="mlc", mlc_quant="q0f32", tokenizer="none", gate=False)
    bundle = export(source, folder / "bundle", options)
    checkpoint = open_checkpoint(source)
    model = build(checkpoint)
    sources = model.sources(checkpoint.layout)
    weights = bind(checkpoint, model.parameters(), sources, ignored=model.ignored())
    from edge_mmllm_export.mlc import layout as mlc
    from edge_mmllm_runtime.mlc.weights import QUANTIZATIONS

    files = mlc.layout(model, weights, QUANTIZATIONS["q0f32"])
    oracle = Oracle(model, mlc.as_stored(files, weights), keep_weights=True)

    def reference(ids: np.ndarray) -> np.ndarray:
        oracle.reset()
        return oracle.forward(np.asarray(ids, np.int64))

    spec = replace(bundle.spec, text=replace(bundle.spec.text, tokenizer="bytes"))
    return MlcToy(spec, folder / "bundle", reference)


@pytest.fixture
def toy(made: MlcToy, monkeypatch) -> MlcToy:
    """Its float32 sums come in another order than the oracle's."""

    def close(found, expected):
        return np.abs(found - expected).max() <= 2e-4 * np.abs(expected).max()

    monkeypatch.setattr(test_context, "close_to", close)
    return made


def test_the_modules_are_those_of_the_other_engine() -> None:
    for module in (test_context, test_generation, test_prompt_cache, test_state_files):
        assert Path(module.__file__).parent.name == "runtimes"
