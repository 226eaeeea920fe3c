"""The onnxruntime engine: bundles in ONNX format on a CPU.

Graph contract: `input_ids` int64 `(seq,)` or `inputs_embeds` float32 `(seq, hidden)`, `position`
int64 `(1,)` where the graph has it, `logit_rows` int64 `(rows,)`, and `state.X` -> `next.X` for
each state; output `logits` float32 `(rows, vocab)`. An `embed` stage turns ids into embeddings
where the decoder takes those; it and the stages of pictures and sounds are loaded when first
used.

Nothing is copied per token: inputs, outputs and states are `OrtValue`s over fixed numpy memory,
bound once. A step writes the token and the position and runs one of two prepared bindings
(states that do not grow are read from one buffer and written to the other, in turn).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edge_mmllm.bundle import Bundle
from edge_mmllm.errors import CorruptBundle, KernelError, SessionError, UsageError
from edge_mmllm.profiling.limits import says_no_memory
from edge_mmllm.spec import NATIVE_DECODER, ModelSpec, Stage, StateSpec
from edge_mmllm_runtime.engine import Arrays, EngineOptions, Float32, Int64
from edge_mmllm_runtime.hugepages import give_back, huge_pages
from edge_mmllm_runtime.memory import Memory
from edge_mmllm_runtime.native import wanted
from edge_mmllm_runtime.prepacked import cached_graph
from edge_mmllm_runtime.state import StateBuffers, allocate

_ORT_TYPES = {
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "int8": "tensor(int8)",
    "int64": "tensor(int64)",
}


def session_options(threads: int) -> ort.SessionOptions:
    """Options for one model used by one thread at a time."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    # Patterns are kept for each input shape; without them a step is 3 to 5 % faster.
    options.enable_mem_pattern = False
    options.log_severity_level = 4  # errors are raised, not printed
    return options


def open_engine(bundle: Bundle, options: EngineOptions) -> OnnxEngine:
    """The engine of a bundle. See `OnnxEngine` for what it raises."""
    places: dict[str, Path] = {}
    stage = bundle.spec.stages.get("decoder")
    kernels = wanted(options.kernels)
    if NATIVE_DECODER not in bundle.spec.stages:
        if options.kernels == "native":
            raise KernelError(
                "the bundle has no program for the native kernels",
                expected=f"a stage {NATIVE_DECODER}",
                fix="export it anew; an architecture that they do not know stays without",
            )
        kernels = None
    if kernels is None and options.prepacked_cache is not None and stage is not None:
        places[stage.file] = cached_graph(
            bundle.file(stage.file), bundle.sha256, options.prepacked_cache
        )
    return OnnxEngine(
        bundle.spec,
        lambda path: places.get(path) or bundle.file(path),
        threads=options.threads,
        context=options.context,
        kernels=kernels,
        trace=None if options.trace is None else Path(options.trace),
    )


class OnnxEngine:
    """An `Engine` over onnxruntime. See `edge_mmllm_runtime.engine` for what each method does.

    Args:
        spec: the model.
        file: a bundle's path of a stage's file, e.g. `bundle.file`.
        threads: threads for one operator.
        context: tokens to make room for; ignored where no state grows.
        kernels: the library that runs the stage `decoder_native`; None runs `decoder`.
        trace: see `EngineOptions`.

    Raises:
        CorruptBundle: a graph is unreadable or does not keep the contract.
        SessionError: no memory for the states.
    """

    name = "onnx"
    version: str = ort.__version__

    def __init__(
        self,
        spec: ModelSpec,
        file: Callable[[str], Path],
        *,
        threads: int,
        context: int | None,
        kernels: Path | None = None,
        trace: Path | None = None,
    ) -> None:
        self._spec, self._file, self.threads, self._trace = spec, file, threads, trace
        if kernels is not None:
            self.version = f"{ort.__version__}, native kernels"
        stage = spec.stages.get("decoder" if kernels is None else NATIVE_DECODER)
        if stage is None:
            raise CorruptBundle("the bundle has no decoder", expected="a stage `decoder`")
        self._inputs = frozenset(stage.inputs)
        self.accepts_embeddings = "inputs_embeds" in self._inputs
        self._session: ort.InferenceSession | None = None
        self._decoder, self._kernels = stage, kernels
        self._memory = Memory(spec.states)
        own = tuple(s for s in spec.states if s.kind != "cross_kv")
        grows = any(s.grows for s in spec.states)
        if grows and context is None:
            raise UsageError("a model whose state grows needs a context", expected="tokens")
        self.capacity = context if grows else None
        self._states = StateBuffers(own, self.capacity, stage.in_place)
        self._in_place, self._lost = bool(stage.in_place), False
        self.state_capacity_bytes = self._states.size_bytes
        self._stages: dict[str, ort.InferenceSession] = {}
        self._step_bindings: list[tuple[Any, Any]] = []
        if not spec.modalities:  # else on first use: pictures are encoded without it in memory
            self._wake()

    def _wake(self) -> None:
        """Loads the decoder."""
        path = self._file(self._decoder.file)
        session = _open(path, self.threads, self._kernels, self._trace)
        _check(session, self._spec, self._decoder, self._spec.states, self._states.specs)
        self._session = session
        self._prepare(session)

    def _prepare(self, session: ort.InferenceSession) -> None:
        """Binds the states both ways round, and the fixed inputs and output of a step."""
        spec = self._spec
        width = spec.hidden_size if self.accepts_embeddings else 2
        sizes = [8, 8, 8, 24, 4 * width, 4 * spec.vocab_size]
        ids, position, rows, place, embeds, logits = allocate(sizes)
        self._place: Int64 = place.view(np.int64).reshape(3, 1)  # a step's token: always 0
        self._token: Int64 = ids.view(np.int64)
        self._position: Int64 = position.view(np.int64)
        self._first_row: Int64 = rows.view(np.int64)
        self._embeds: Float32 = embeds.view(np.float32).reshape(1, width)
        self._logits: Float32 = logits.view(np.float32).reshape(1, spec.vocab_size)
        self._logits_row: Float32 = self._logits[0]
        self._logits_value = _value(self._logits)
        self._run = session._sess.run_with_iobinding
        values = {
            name: (_value(even), _value(odd)) for name, (even, odd) in self._states.pairs.items()
        }
        bindings = [
            (self._bind(session, values, p), self._bind(session, values, p)) for p in (0, 1)
        ]
        self._prefills = tuple(prefill for prefill, _ in bindings)
        self._steps = tuple(step._iobinding for _, step in bindings)
        for _, step in bindings:
            if self.accepts_embeddings:
                step.bind_ortvalue_input("inputs_embeds", _value(self._embeds))
            else:
                step.bind_ortvalue_input("input_ids", _value(self._token))
            if "logit_rows" in self._inputs:
                step.bind_ortvalue_input("logit_rows", _value(self._first_row))
            if "places" in self._inputs:
                step.bind_ortvalue_input("places", _value(self._place))
            step.bind_ortvalue_output("logits", self._logits_value)
        self._step_bindings = bindings  # keeps the OrtValues of `_steps` alive
        self._bind_memory()

    def _bind_memory(self) -> None:
        """Has every binding read the memory as it is now."""
        for name, array in self._memory.arrays.items():
            value = _value(array)
            for pair in self._step_bindings:
                for binding in pair:
                    binding.bind_ortvalue_input(f"state.{name}", value)

    def _bind(
        self, session: ort.InferenceSession, values: dict[str, tuple[Any, Any]], parity: int
    ) -> Any:
        """A binding that reads states from buffers `parity` and writes them to the others."""
        binding = session.io_binding()
        for name, pair in values.items():
            binding.bind_ortvalue_input(f"state.{name}", pair[parity])
            binding.bind_ortvalue_output(f"next.{name}", pair[1 - parity])
        if "position" in self._inputs:
            binding.bind_ortvalue_input("position", _value(self._position))
        return binding

    def forward(
        self, chunk: Int64 | Float32, position: int, rows: Int64, places: Int64 | None = None
    ) -> Float32:
        """See `Engine.forward`."""
        if self._session is None:
            self._wake()
        binding = self._prefills[self._states.parity]
        if chunk.dtype == np.int64 and self.accepts_embeddings:
            chunk = self.embed(np.asarray(chunk, np.int64))
        source = _value(np.ascontiguousarray(chunk))
        binding.bind_ortvalue_input(
            "inputs_embeds" if self.accepts_embeddings else "input_ids", source
        )
        pruned = "logit_rows" in self._inputs
        if "places" in self._inputs:
            if places is None:
                places = np.tile(np.arange(len(chunk), dtype=np.int64), (3, 1))
            binding.bind_ortvalue_input("places", _value(np.ascontiguousarray(places)))
        logits = np.empty((len(rows) if pruned else len(chunk), self._spec.vocab_size), np.float32)
        if pruned:
            binding.bind_ortvalue_input("logit_rows", _value(np.ascontiguousarray(rows, np.int64)))
        binding.bind_ortvalue_output("logits", _value(logits))
        self._position[0] = position
        self._execute(binding._iobinding)
        result: Float32 = logits if pruned else logits[rows]
        return result

    def step(self, token: int, position: int) -> Float32:
        """See `Engine.step`."""
        if self._session is None:
            self._wake()
        self._token[0] = token
        self._position[0] = position
        if self.accepts_embeddings:
            self._embeds[:] = self.embed(self._token)
        self._execute(self._steps[self._states.parity])
        return self._logits_row

    def _execute(self, binding: Any) -> None:
        if self._lost:
            raise SessionError(
                "the states were lost when onnxruntime failed before",
                fix="reset the session, or restore a snapshot",
            )
        try:
            self._run(binding, None)
        except Exception as error:  # onnxruntime's errors share no base class but this
            self._lost = self._in_place
            raise SessionError("onnxruntime failed to run the decoder", found=str(error)) from error
        self._states.parity ^= 1

    def embed(self, ids: Int64) -> Float32:
        """See `Engine.embed`."""
        return self.run_stage("embed", {"input_ids": ids})

    def load_stage(self, name: str) -> bool:
        """See `Engine.load_stage`."""
        if name == "decoder" and self._session is None:
            self._wake()
            return True
        if name in self._stages or name == "decoder":
            return False
        stage = self._spec.stages.get(name)
        if stage is None:
            raise CorruptBundle(
                f"the bundle has no stage `{name}`", expected=", ".join(self._spec.stages)
            )
        session = _open(self._file(stage.file), self.threads, trace=self._trace, rests=True)
        filled = tuple(s for s in self._spec.states if s.name in stage.fills)
        _check(session, self._spec, stage, (), filled)
        self._stages[name] = session
        return True

    def run_stage(self, name: str, inputs: Mapping[str, NDArray[Any]]) -> Float32:
        """See `Engine.run_stage`."""
        if name not in self._stages:
            self.load_stage(name)
        try:
            result: Float32 = self._stages[name].run(None, dict(inputs))[0]
        except Exception as error:  # see `_execute`
            raise SessionError(f"onnxruntime failed to run {name}", found=str(error)) from error
        return result

    @property
    def memory_rows(self) -> int:
        """See `Engine.memory_rows`."""
        return self._memory.rows

    def remember(
        self, name: str, inputs: Mapping[str, NDArray[Any]], *, append: bool = False
    ) -> None:
        """See `Engine.remember`."""
        self.load_stage(name)
        stage = self._spec.stages[name]
        try:
            outputs = self._stages[name].run([f"next.{n}" for n in stage.fills], dict(inputs))
        except Exception as error:  # see `_execute`
            raise SessionError(f"onnxruntime failed to run {name}", found=str(error)) from error
        self._memory.fill(dict(zip(stage.fills, outputs, strict=True)), append=append)
        self._bind_memory()

    def release(self, name: str) -> bool:
        """See `Engine.release`."""
        if self._stages.pop(name, None) is None:
            return False
        give_back()
        return True

    def clear(self) -> None:
        """See `Engine.clear`."""
        self._states.clear()
        self._lost = False
        if self._memory.rows:
            self._memory.clear()
            self._bind_memory()

    def rewind(self, position: int, to: int) -> bool:
        """See `Engine.rewind`."""
        return self._states.rewind(position, to)

    def mark(self, position: int) -> Arrays:
        """See `Engine.mark`."""
        return self._states.mark()

    def rollback(self, mark: object) -> None:
        """See `Engine.rollback`."""
        assert isinstance(mark, dict)  # noqa: S101 - for the type checker: `mark` made it
        self._states.rollback(mark)
        self._lost = False

    def save(self, position: int) -> Arrays:
        """See `Engine.save`."""
        return self._states.save(position) | self._memory.arrays

    def load(self, states: Arrays, position: int) -> None:
        """See `Engine.load`."""
        memory = {s.name: states[s.name] for s in self._memory.specs if s.name in states}
        self._memory.check(memory)
        self._states.load({n: a for n, a in states.items() if n not in memory}, position)
        self._lost = False
        if memory:
            self._memory.fill(memory)
            self._bind_memory()

    def close(self) -> None:
        """See `Engine.close`."""
        self._stages.clear()
        if self._session is not None:
            del self._run, self._steps, self._prefills, self._logits_value
        del self._states, self._memory, self._step_bindings, self._session


def _value(array: NDArray[Any]) -> ort.OrtValue:
    """An OrtValue over the array's own memory (no copy on CPU)."""
    return ort.OrtValue.ortvalue_from_numpy(array)


def _open(
    path: Path,
    threads: int,
    kernels: Path | None = None,
    trace: Path | None = None,
    *,
    rests: bool = False,
) -> ort.InferenceSession:
    """`rests`: its threads stop between runs. A decoder's spin, since the next step comes at once;
    an encoder's would take the decoder's CPUs (a prefill behind a picture took thrice as long).
    """
    try:
        options = session_options(threads)
        if rests:
            options.add_session_config_entry("session.force_spinning_stop", "1")
        if trace is not None:  # written when the session goes: `<trace>/<stage>_<time>.json`
            options.enable_profiling, options.profile_file_prefix = True, str(trace / path.stem)
        if kernels is not None:
            _register(options, kernels)
        with huge_pages():
            return ort.InferenceSession(
                path, sess_options=options, providers=["CPUExecutionProvider"]
            )
    except KernelError:
        raise
    except Exception as error:  # onnxruntime's errors share no base class but this
        if says_no_memory(str(error)):
            raise SessionError(
                "no memory to load a graph of the bundle",
                where=str(path),
                found=str(error)[-300:],
                fix="a smaller quantization or context; `edge-mmllm fit` says what it takes",
            ) from error
        raise CorruptBundle(
            "onnxruntime cannot load a graph of the bundle", where=str(path), found=str(error)
        ) from error


def _register(options: ort.SessionOptions, kernels: Path) -> None:
    try:
        options.register_custom_ops_library(str(kernels))
    except Exception as error:  # see `_open`
        raise KernelError(
            "onnxruntime cannot load the native kernels",
            where=str(kernels),
            found=str(error)[:300],
            fix="edge-mmllm kernels --build makes them anew; EDGE_MMLLM_KERNELS=stock goes without",
        ) from error


def _check(
    session: ort.InferenceSession,
    spec: ModelSpec,
    stage: Stage,
    reads: tuple[StateSpec, ...],
    writes: tuple[StateSpec, ...],
) -> None:
    """Compares a graph's inputs and outputs with the manifest: names, types, fixed sizes.

    Args:
        reads, writes: states that come in as `state.X`, and that go out as `next.X`.

    Raises:
        CorruptBundle: all differences at once.
    """
    plain = {
        "input_ids": ("tensor(int64)", (None,)),
        "inputs_embeds": ("tensor(float)", (None, spec.hidden_size)),
        "position": ("tensor(int64)", (1,)),
        "places": ("tensor(int64)", (3, None)),
        "logit_rows": ("tensor(int64)", (None,)),
        "logits": ("tensor(float)", (None, spec.vocab_size)),
        "features": ("tensor(float)", (None, None)),
    }
    wrong = []
    for side, nodes, names, prefix, states in (
        ("input", session.get_inputs(), stage.inputs, "state.", reads),
        ("output", session.get_outputs(), stage.outputs, "next.", writes),
    ):
        carried = {
            prefix + s.name: (_ORT_TYPES[s.dtype], tuple(None if d < 0 else d for d in s.shape))
            for s in states
        }
        want = {n: plain.get(n) for n in names} | carried
        have = {n.name: (n.type, tuple(n.shape)) for n in nodes}
        for name in sorted(want.keys() | have.keys()):
            wanted, found = want.get(name), have.get(name)
            if name in names and name not in plain and found is not None:
                continue  # what preprocessing makes: any type and shape
            if wanted is None or found is None or not _agree(wanted, found):
                wrong.append(f"{side} {name}: expected {wanted}, found {found}")
    if wrong:
        raise CorruptBundle(
            f"{len(wrong)} inputs or outputs of {stage.file} differ from the manifest",
            where="; ".join(wrong[:8]),
        )


def _agree(wanted: tuple[str, tuple[int | None, ...]], found: tuple[str, tuple[Any, ...]]) -> bool:
    """Whether types are the same and every size that both sides fix is."""
    return (
        wanted[0] == found[0]
        and len(wanted[1]) == len(found[1])
        and all(
            w == f or w is None or not isinstance(f, int)
            for w, f in zip(wanted[1], found[1], strict=True)
        )
    )
