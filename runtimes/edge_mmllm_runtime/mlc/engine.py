"""The MLC engine: model libraries that TVM compiled, on a CPU, without TVM's compiler.

A bundle holds weights as mlc-llm stores them and a library for each target. The weights are
repacked once, when a bundle is loaded; after that a step binds nothing anew: token, position,
states and parameters are tensors over fixed memory, and the library writes the states in place.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_mmllm.bundle import Bundle
from edge_mmllm.errors import CorruptBundle, SessionError, UsageError
from edge_mmllm.spec import ModelSpec
from edge_mmllm_runtime.engine import Arrays, EngineOptions, Float32, Int64
from edge_mmllm_runtime.memory import Memory
from edge_mmllm_runtime.mlc.machine import runnable
from edge_mmllm_runtime.mlc.parameters import library_path, load_parameters
from edge_mmllm_runtime.mlc.vm import Library, runtime_version, tensor
from edge_mmllm_runtime.mlc.weights import WeightFiles, read_views
from edge_mmllm_runtime.state import StateBuffers, allocate

_FORMAT = 1


def open_engine(bundle: Bundle, options: EngineOptions) -> MlcEngine:
    """The engine of a bundle. See `MlcEngine` for what it raises."""
    engine_format = bundle.manifest.engine_format
    path = bundle.file(library_path(engine_format, runnable))
    views = read_views(engine_format)
    with WeightFiles(bundle.file, views=views) as files:
        return MlcEngine(bundle.spec, path, files, threads=options.threads, context=options.context)


class MlcEngine:
    """An `Engine` over a compiled library. See `edge_mmllm_runtime.engine` for its methods.

    Args:
        spec: the model.
        path: the library.
        files: the weights, read while the engine is made.
        threads: to compute with.
        context: tokens to make room for; ignored where no state grows.

    Raises:
        CorruptBundle: library, weights and manifest do not fit together.
        SessionError: no memory for the states.
    """

    name = "mlc"

    def __init__(
        self,
        spec: ModelSpec,
        path: Path,
        files: WeightFiles,
        *,
        threads: int,
        context: int | None,
    ) -> None:
        self._spec, self.threads = spec, threads
        self.version: str = runtime_version()
        self._library = Library(path, threads)
        metadata = self._library.metadata
        _check(metadata, spec, path)
        self._functions: dict[str, Any] = metadata["functions"]
        self._longest = int(metadata["longest"])
        self.accepts_embeddings = "prefill_embeds" in self._functions and bool(spec.modalities)
        grows = any(s.grows for s in spec.states)
        if grows and context is None:
            raise UsageError("a model whose state grows needs a context", expected="tokens")
        self.capacity = context if grows else None
        self._memory = Memory(spec.states)
        own = tuple(s for s in spec.states if s.kind != "cross_kv")
        self._states = StateBuffers(own, self.capacity, {s.name for s in own})
        self.state_capacity_bytes = self._states.size_bytes
        self._parameters = load_parameters(metadata["parameters"], files)
        self._tensors = {name: tensor(array) for name, array in self._parameters.items()}
        self._lost = False
        self._prepare()

    def _prepare(self) -> None:
        """Makes the tensors that every call shares, and binds those of a step."""
        token, position = allocate([8, 8])
        self._token: Int64 = token.view(np.int64)
        self._position: Int64 = position.view(np.int64)
        self._at = tensor(self._position)
        self._own = {name: tensor(pair[0]) for name, pair in self._states.pairs.items()}
        self._bind()

    def _bind(self) -> None:
        """Has every function read the memory as it is now."""
        memory = {name: tensor(_aligned(a)) for name, a in self._memory.arrays.items()}
        states = self._own | memory
        self._rest = {
            name: [
                *(states[s] for s in function["states"]),
                *(self._tensors[p] for p in function["parameters"]),
            ]
            for name, function in self._functions.items()
        }
        given = {"input_ids": tensor(self._token), "position": self._at}
        inputs = [given[name] for name in self._functions["decode"]["inputs"]]
        self._library.bind("decode", [*inputs, *self._rest["decode"]])

    def forward(
        self, chunk: Int64 | Float32, position: int, rows: Int64, places: Int64 | None = None
    ) -> Float32:
        """See `Engine.forward`."""
        self._check_states()
        logits = np.empty((len(rows), self._spec.vocab_size), np.float32)
        for start in range(0, len(chunk), self._longest):
            part = chunk[start : start + self._longest]
            inside = np.flatnonzero((rows >= start) & (rows < start + len(part)))
            logits[inside] = self._prefill(part, position + start, rows[inside] - start)
        return logits

    def _prefill(self, chunk: Int64 | Float32, position: int, rows: Int64) -> Float32:
        name = "prefill" if chunk.dtype == np.int64 else "prefill_embeds"
        self._position[0] = position
        # A library computes at least one row.
        wanted = rows if len(rows) else np.zeros(1, np.int64)
        given = {
            "input_ids": chunk,
            "inputs_embeds": chunk,
            "position": self._position,
            "logit_rows": wanted,
        }
        inputs = [_aligned(given[i]) for i in self._functions[name]["inputs"]]
        result = self._run(name, [tensor(array) for array in inputs])
        return result[: len(rows)]

    def step(self, token: int, position: int) -> Float32:
        """See `Engine.step`."""
        if self._lost:
            self._check_states()
        self._token[0], self._position[0] = token, position
        try:
            logits: Float32 = self._library.run("decode")[0]
        except Exception as error:  # tvm_ffi raises any of Python's own
            raise self._failed("decode", error) from error
        return logits

    def _run(self, name: str, inputs: list[Any]) -> Float32:
        try:
            self._library.ready()
            result = self._library.function(name)(*inputs, *self._rest[name])
            return np.asarray(np.from_dlpack(result), np.float32)
        except Exception as error:  # see `step`
            raise self._failed(name, error) from error

    def _failed(self, name: str, error: Exception) -> SessionError:
        self._lost = name != "embed"
        return SessionError(f"the model library failed to run {name}", found=str(error)[-300:])

    def _check_states(self) -> None:
        if self._lost:
            raise SessionError(
                "the states were lost when the model library failed before",
                fix="reset the session, or restore a snapshot",
            )

    @property
    def memory_rows(self) -> int:
        """See `Engine.memory_rows`."""
        return self._memory.rows

    def clear(self) -> None:
        """See `Engine.clear`."""
        self._states.clear()
        self._lost = False
        if self._memory.rows:
            self._memory.clear()
            self._bind()

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
            self._bind()

    def embed(self, ids: Int64) -> Float32:
        """See `Engine.embed`."""
        return self._run("embed", [tensor(_aligned(ids))])

    def load_stage(self, name: str) -> bool:
        """See `Engine.load_stage`: one library holds all functions, and it is loaded."""
        if name not in self._spec.stages:
            raise CorruptBundle(
                f"the bundle has no stage `{name}`", expected=", ".join(self._spec.stages)
            )
        return False

    def run_stage(self, name: str, inputs: Mapping[str, NDArray[Any]]) -> Float32:
        """See `Engine.run_stage`."""
        self.load_stage(name)
        function = self._functions.get(name)
        if function is None:
            raise CorruptBundle(f"the model library has no function `{name}`")
        return self._run(name, [tensor(_aligned(inputs[i])) for i in function["inputs"]])

    def remember(
        self, name: str, inputs: Mapping[str, NDArray[Any]], *, append: bool = False
    ) -> None:
        """See `Engine.remember`."""
        self.load_stage(name)
        stage, function = self._spec.stages[name], self._functions.get(name)
        if function is None:
            raise CorruptBundle(f"the model library has no function `{name}`")
        given = [tensor(_aligned(inputs[i])) for i in function["inputs"]]
        try:
            self._library.ready()
            results = self._library.function(name)(*given, *self._rest[name])
            values = [np.array(np.from_dlpack(result)) for result in results]
        except Exception as error:  # see `step`
            raise SessionError(
                f"the model library failed to run {name}", found=str(error)[-300:]
            ) from error
        self._memory.fill(dict(zip(stage.fills, values, strict=True)), append=append)
        self._bind()

    def release(self, name: str) -> bool:
        """See `Engine.release`."""
        return False

    def close(self) -> None:
        """See `Engine.close`."""
        del self._rest, self._tensors, self._at, self._own, self._memory
        del self._library, self._parameters, self._states


def _aligned(array: NDArray[Any]) -> NDArray[Any]:
    """The array itself, or a copy as compiled code wants it: contiguous, writable, at a multiple
    of 64 bytes."""
    if array.flags.c_contiguous and array.flags.writeable and not array.ctypes.data % 64:
        return array
    (raw,) = allocate([array.nbytes])
    copy = raw.view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def _check(metadata: Mapping[str, Any], spec: ModelSpec, path: Path) -> None:
    """Raises: CorruptBundle: the library is of another format or model."""
    states = [(s.name, list(s.shape), s.dtype) for s in spec.states]
    found = [(s["name"], s["shape"], s["dtype"]) for s in metadata.get("states", [])]
    wanted = (_FORMAT, spec.vocab_size, spec.hidden_size, states)
    seen = (
        metadata.get("format"),
        metadata.get("vocab_size"),
        metadata.get("hidden_size"),
        found,
    )
    if wanted != seen:
        raise CorruptBundle(
            "the model library differs from the manifest",
            where=str(path),
            expected=str(wanted)[:200],
            found=str(seen)[:200],
            fix="export the model again",
        )
