"""The llama.cpp engine: GGUF files on a CPU, through llama-cpp-python's low-level API.

llama.cpp owns the states. A snapshot takes them as one opaque run of bytes: 24 bytes of our own
(which library wrote them, tokens, size; little-endian), then what
`llama_state_seq_get_data` gives, which holds attention caches and recurrent states alike; then, of
models whose pictures have places of their own, `Places.save`; of an encoder-decoder the ids that
the encoder has read, int32, and how many they are: what it made of them, llama.cpp does not give.

The caches of attention are committed as soon as they are made, so they begin small and double
when they are full, up to the session's context.
"""

from __future__ import annotations

import ctypes
import hashlib
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edge_mmllm.bundle import Bundle
from edge_mmllm.errors import CorruptBundle, SessionError, StateMismatch
from edge_mmllm.spec import MEMORY, ModelSpec, StateSpec
from edge_mmllm_runtime.adapters import Adapter, check
from edge_mmllm_runtime.engine import Arrays, EngineOptions, Float32, Int64
from edge_mmllm_runtime.gguf.check import check_file
from edge_mmllm_runtime.gguf.exact import GatedGelus
from edge_mmllm_runtime.gguf.llama import Model, bytes_of, encode, floats_of, log
from edge_mmllm_runtime.gguf.places import STREAMS, TOKEN_BYTES, Places
from edge_mmllm_runtime.gguf.stages import Stages
from edge_mmllm_runtime.prompted import Prompted, parts

if TYPE_CHECKING:
    from edge_mmllm_runtime.perception import Perception

#: The state of every GGUF model, as the session sees it: uint8 `(bytes,)`.
STATE = StateSpec("llama.cpp", (MEMORY,), "uint8", "opaque")

#: Largest batch of one call, as of a session's chunk.
BATCH = 512
#: Tokens that a growing cache has room for at first.
FIRST_CONTEXT = 1024

#: sha256 of what wrote the bytes (first 8), tokens, bytes that follow.
_HEADER = struct.Struct("<8sQQ")


def open_engine(bundle: Bundle, options: EngineOptions) -> GgufEngine:
    """The engine of a bundle. See `GgufEngine` for what it raises."""
    stage = bundle.spec.stages.get("decoder")
    if stage is None:
        raise CorruptBundle("the bundle has no decoder", expected="a stage `decoder`")
    for file in bundle.manifest.files:  # their sizes are checked, not all their bytes
        if file.path.endswith(".gguf"):
            check_file(bundle.file(file.path), exact=True)
    path = bundle.file(stage.file)
    others = {n: s.file for n, s in bundle.spec.stages.items() if s.file != stage.file}
    return GgufEngine(
        bundle.spec,
        path,
        threads=options.threads,
        context=options.context,
        media={name: bundle.file(file) for name, file in others.items()},
        lora=options.lora,
        mmap=options.mmap,
    )


@dataclass(frozen=True)
class _Mark:
    """Where to go back to: the position, and the states where they cannot be cut."""

    position: int
    states: Arrays | None


class GgufEngine:
    """An `Engine` over llama.cpp. See `edge_mmllm_runtime.engine` for what each method does.

    Args:
        spec: the model.
        path: the GGUF file.
        threads: to compute with.
        context: tokens to make room for; None where no state grows.
        media: the file of each stage before the decoder.
        lora: adapters to apply.
        mmap: map the file into memory instead of reading it.

    Raises:
        CorruptBundle: llama.cpp refuses the file, or it is not as the spec says.
        SessionError: no memory for the states.
    """

    name = "gguf"
    takes_prompts = True

    def __init__(
        self,
        spec: ModelSpec,
        path: Path,
        *,
        threads: int,
        context: int | None,
        media: Mapping[str, Path] | None = None,
        lora: Sequence[Adapter] = (),
        mmap: bool = True,
    ) -> None:
        self.version: str = "llama-cpp-python " + version("llama-cpp-python")
        self.threads = threads
        self.model = Model(path, mmap=mmap)
        self._api = self.model.api
        self._context: Any = None
        self._adapters: list[tuple[Any, float]] = []
        try:
            if lora:
                check(path, lora)
                self._adapters = [(self.model.adapter(a.path), a.scale) for a in lora]
            found = (self.model.vocab_size, self.model.hidden_size)
            if found != (spec.vocab_size, spec.hidden_size):
                raise CorruptBundle(
                    "the model differs from the manifest",
                    where=str(path),
                    expected=f"{spec.vocab_size} tokens, width {spec.hidden_size}",
                    found=f"{found[0]} tokens, width {found[1]}",
                )
            self._vocab, self._hidden = found
            self._reads = bool(self._api.llama_model_has_encoder(self.model.pointer))
            self._widest = BATCH
            self._prompt: NDArray[np.int32] | None = None
            self._gelus: GatedGelus | None = None
            self._exact = spec.details.get("gguf", {}).get("file_type") == "ALL_F32"
            if self._exact and self._reads:
                self._gelus = GatedGelus(self._api.ggml_backend_sched_eval_callback)
            self._cuts = not (self.model.recurrent or self.model.hybrid)
            self.capacity = None if self.model.recurrent else context
            self.accepts_embeddings = True
            self._stages = Stages(spec, media or {}, self.model, threads)
            self._lost, self._filled = False, 0
            first = BATCH if self.capacity is None else min(self.capacity, FIRST_CONTEXT)
            self._open(first)
        except BaseException:
            self.close()
            raise
        self._writer = hashlib.sha256(self.version.encode()).digest()[:8]

    def _open(self, room: int) -> None:
        """Makes the context, with room for so many tokens where a state grows."""
        api = self._api
        params = api.llama_context_default_params()
        params.n_ctx, params.n_seq_max = room, 1
        params.n_batch = params.n_ubatch = self._widest
        params.n_threads = params.n_threads_batch = self.threads
        # With flash attention a token's logits depend on its chunk. Of quantized weights they do
        # without it, too, and as much; and it is faster (CHANGELOG.md has the figures).
        flash = api.LLAMA_FLASH_ATTN_TYPE_AUTO
        params.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_DISABLED if self._exact else flash
        if self._exact:  # of a model in float32 the caches are too: what ONNX computes
            params.type_k = params.type_v = api.GGML_TYPE_F32
        if self._gelus:
            params.cb_eval = self._gelus.callback
        params.no_perf, params.offload_kqv, params.op_offload = True, False, False
        log.restart()
        context = api.llama_init_from_model(self.model.pointer, params)
        if not context:
            raise SessionError(
                "llama.cpp cannot make a context",
                found=str(log),
                fix="load(..., context=N) with a smaller N",
            )
        if self._adapters:
            pointers, scales = zip(*self._adapters, strict=True)
            count = len(pointers)
            api.llama_set_adapters_lora(
                context,
                (api.llama_adapter_lora_p_ctypes * count)(*pointers),
                count,
                (ctypes.c_float * count)(*scales),
            )
        self._context, self._room = context, room
        self._memory = api.llama_get_memory(context)
        self.state_capacity_bytes = int(log.state_mib * 2**20)
        self._tokens = np.zeros(BATCH, np.int32)
        self._places = np.zeros(STREAMS * BATCH, np.int32)
        self._standing = Places(room) if self.model.streams else None
        self._wanted = np.zeros(BATCH, np.int8)
        self._counts = np.ones(BATCH, np.int32)
        self._sequence = np.zeros(1, np.int32)
        pointer = ctypes.POINTER(ctypes.c_int32)
        sequence = self._sequence.ctypes.data_as(pointer)
        self._sequences = (pointer * BATCH)(*[sequence] * BATCH)
        self._token_pointer = self._tokens.ctypes.data_as(pointer)
        self._batch = api.llama_batch(
            n_tokens=1,
            token=self._token_pointer,
            pos=self._places.ctypes.data_as(pointer),
            n_seq_id=self._counts.ctypes.data_as(pointer),
            seq_id=self._sequences,
            logits=self._wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )
        self._decode, self._get = api.llama_decode, api.llama_get_logits_ith
        self._seen: tuple[int, Float32] = (0, np.empty(0, np.float32))

    def _grow(self, tokens: int) -> None:
        """Makes room for so many tokens: a larger context with the same states."""
        assert self.capacity is not None  # noqa: S101 - for the type checker
        room = self._room
        while room < tokens:
            room = min(2 * room, self.capacity)
        position, state = self._filled, self.save(self._filled)[STATE.name].copy()
        self._api.llama_free(self._context)
        self._context, self._lost = None, True
        self._open(room)
        self._put(state, position)

    def forward(
        self,
        chunk: Int64 | Float32 | Prompted,
        position: int,
        rows: Int64,
        places: Int64 | None = None,
    ) -> Float32:
        """See `Engine.forward`; rows of a prompt go in as embeddings, its tokens as tokens."""
        logits = np.empty((len(rows), self._vocab), np.float32)
        end = position + len(chunk)
        self._ready(end)
        found = None
        if self._standing:
            found = self._standing.add(position, len(chunk), places)
        for start, part in parts(chunk, BATCH):
            count = len(part)
            if part.dtype == np.float32:
                self._batch.token, self._batch.embd = None, floats_of(part)
            else:
                self._tokens[:count] = part
                self._batch.token, self._batch.embd = self._token_pointer, None
            if found is None:
                self._places[:count] = np.arange(position + start, position + start + count)
            elif part.dtype != np.float32:
                self._places[:count] = found[0, start : start + count]
            else:
                self._places[: 3 * count] = found[:, start : start + count].reshape(-1)
                self._places[3 * count : 4 * count] = 0
            self._wanted[:count] = 0
            within = np.flatnonzero((rows >= start) & (rows < start + count))
            self._wanted[rows[within] - start] = 1
            self._batch.n_tokens = count
            self._run(position)
            for i in within:
                logits[i] = self._row(int(rows[i]) - start)
        self._filled = end
        return logits

    def step(self, token: int, position: int) -> Float32:
        """See `Engine.step`."""
        self._ready(position + 1)
        place = position
        if self._standing:
            place = int(self._standing.add(position, 1, None)[0, 0])
        self._tokens[0], self._places[0], self._wanted[0] = token, place, 1
        self._batch.n_tokens, self._batch.token, self._batch.embd = 1, self._token_pointer, None
        self._run(position)
        self._filled = position + 1
        return self._row(0)

    def _ready(self, end: int) -> None:
        """Raises: SessionError: the states were lost, or cannot grow."""
        if self._lost:
            raise SessionError(
                "the states were lost when llama.cpp failed before",
                fix="reset the session, or restore a snapshot",
            )
        if self.capacity is not None and end > self._room:
            self._grow(end)

    def _run(self, position: int) -> None:
        """Decodes the batch; where that fails, drops what it left from `position` on."""
        status = self._decode(self._context, self._batch)
        self._check_exact()
        if status == 0:
            return
        self._lost = not self._cut(position, position + 1)
        raise SessionError("llama.cpp failed to run the model", found=f"{status}: {log}")

    def _check_exact(self) -> None:
        """Raises: SessionError: what went wrong between two steps of the graph."""
        if self._gelus and self._gelus.failure:
            failure, self._gelus.failure = self._gelus.failure, None
            self._lost = True
            raise failure

    def _cut(self, position: int, end: int | None = None) -> bool:
        """Drops what stands from `position` on; False: nothing was done, it cannot be.

        Args:
            end: tokens in the states, where a failure left more than it should.
        """
        place: int | None = position
        if self._standing:
            place = self._standing.cut(position, max(self._filled, end or 0))
        return (
            self._cuts
            and place is not None
            and bool(self._api.llama_memory_seq_rm(self._memory, 0, place, -1))
        )

    def _row(self, index: int) -> Float32:
        """Logits of a token of the last batch, a view."""
        found = self._get(self._context, index)
        address = ctypes.addressof(found.contents)
        if address != self._seen[0]:
            view = np.ctypeslib.as_array(found, (self._vocab,))
            self._seen = (address, view)
        return self._seen[1]

    @property
    def memory_rows(self) -> int:
        """Bytes of the states, as `save` gives them: the size of the opaque state."""
        if self._reads and self._prompt is None:
            return 0
        own = _HEADER.size + int(self._api.llama_state_seq_get_size(self._context, 0))
        return own + len(self._beside())

    def clear(self) -> None:
        """See `Engine.clear`."""
        self._forget()
        self._prompt = None

    def _forget(self) -> None:
        """Drops all tokens; of an encoder-decoder not what the encoder has read."""
        self._api.llama_memory_clear(self._memory, True)
        self._lost, self._filled = False, 0

    def _beside(self) -> NDArray[np.uint8]:
        """What is saved behind llama.cpp's states."""
        if self._standing:
            return self._standing.save(self._filled)
        if self._prompt is None:
            return np.empty(0, np.uint8)
        return np.append(self._prompt, len(self._prompt)).astype("<i4").view(np.uint8)

    def rewind(self, position: int, to: int) -> bool:
        """See `Engine.rewind`."""
        if to == 0 and not self._lost:
            self._forget()
            return True
        if not self._cut(to):
            return False
        self._filled = to
        return True

    def mark(self, position: int) -> _Mark:
        """See `Engine.mark`."""
        cuts = self._cuts and not (self._standing and self._standing.splits(position))
        return _Mark(position, None if cuts or not position else self.save(position))

    def rollback(self, mark: object) -> None:
        """See `Engine.rollback`."""
        assert isinstance(mark, _Mark)  # noqa: S101 - for the type checker: `mark` made it
        if mark.states is not None:
            self._put(mark.states[STATE.name], mark.position)
        elif not mark.position:
            self._forget()
        else:
            self._cut(mark.position)
            self._filled = mark.position

    def save(self, position: int) -> Arrays:
        """See `Engine.save`."""
        size = self.memory_rows
        state = np.empty(size, np.uint8)
        if not size:  # of an encoder-decoder that has read nothing
            return {STATE.name: state}
        state[: _HEADER.size] = list(_HEADER.pack(self._writer, position, size - _HEADER.size))
        own = self._beside()
        body = size - _HEADER.size - own.size
        state[size - own.size :] = own
        written = self._api.llama_state_seq_get_data(
            self._context, bytes_of(state[_HEADER.size :]), body, 0
        )
        if written != body:
            raise SessionError("llama.cpp did not give its states", found=str(log))
        return {STATE.name: state}

    def load(self, states: Arrays, position: int) -> None:
        """See `Engine.load`."""
        state = states.get(STATE.name)
        found = "no such state"
        if state is not None and self._reads and not state.size and not position:
            self.clear()
            return
        if state is not None and state.dtype == np.uint8 and state.size >= _HEADER.size:
            writer, tokens, size = _HEADER.unpack(state[: _HEADER.size].tobytes())
            found = f"{tokens} tokens in {size} bytes"
            if writer != self._writer:
                found = "states of another release"
            elif (tokens, size) == (position, state.size - _HEADER.size):
                self._put(state, position)
                return
        raise StateMismatch(
            "the states do not fit this engine",
            expected=f"{position} tokens of {self.version}",
            found=found,
        )

    def _put(self, state: NDArray[np.uint8], position: int) -> None:
        """Puts bytes of `save` back."""
        if self.capacity is not None and position > self._room:
            self._filled = 0
            self.clear()
            self._grow(position)
        self.clear()
        body = np.ascontiguousarray(state[_HEADER.size :])
        if self._reads:
            self._lost = True
            count = int(body[-4:].view("<i4")[0])
            if not 0 < count <= (body.size - 4) // 4:
                raise SessionError("the states lack what the encoder has read")
            cut = body.size - 4 * (count + 1)
            self._read(body[cut:-4].view("<i4"))
            body = body[:cut]
        if position:
            self._lost = True
            if self._standing:
                if body.size < TOKEN_BYTES * position:
                    raise SessionError("the states lack the places of the tokens")
                cut = body.size - TOKEN_BYTES * position
                self._standing.load(body[cut:], position)
                body = body[:cut]
            log.restart()
            if not self._api.llama_state_seq_set_data(self._context, bytes_of(body), body.size, 0):
                raise SessionError("llama.cpp refuses the states", found=str(log))
        self._lost, self._filled = False, position

    def embed(self, ids: Int64) -> Float32:
        """See `Engine.embed`: llama.cpp does not give them."""
        raise SessionError("llama.cpp keeps its token embeddings to itself")

    def adopt(self, modality: str, perception: Perception) -> None:
        """Has a session read items of a modality as mtmd does; of files from elsewhere."""
        from edge_mmllm_runtime.gguf.native import NativeLayout, reader

        stage = partial(self._stages.projector, f"encode_{modality}")
        perception.adopt(modality, reader(modality, stage), NativeLayout())

    def load_stage(self, name: str) -> bool:
        """See `Engine.load_stage`: the decoder is loaded from the beginning."""
        return name != "decoder" and self._stages.load(name)

    def run_stage(self, name: str, inputs: Mapping[str, NDArray[Any]]) -> Float32:
        """See `Engine.run_stage`."""
        return self._stages.run(name, inputs)

    def remember(
        self, name: str, inputs: Mapping[str, NDArray[Any]], *, append: bool = False
    ) -> None:
        """See `Engine.remember`."""
        if name != "encode_text" or not self._reads or append:
            raise CorruptBundle(f"a GGUF bundle has no stage `{name}`", expected="decoder")
        self._read(np.asarray(inputs["input_ids"], np.int32))

    def _read(self, ids: NDArray[np.int32]) -> None:
        """Has the encoder read a prompt; all of it is one batch. Raises: SessionError."""
        self.clear()
        if len(ids) > self._widest:
            self._api.llama_free(self._context)
            self._context, self._lost, self._widest = None, True, len(ids)
            self._open(max(self._room, len(ids)))
            self._lost = False
        log.restart()
        status = encode(self._api, self._context, ids)
        self._check_exact()
        if status:
            raise SessionError("llama.cpp failed to read the prompt", found=f"{status}: {log}")
        self._prompt = ids.astype(np.int32)

    def release(self, name: str) -> bool:
        """See `Engine.release`."""
        return self._stages.release(name)

    def close(self) -> None:
        """See `Engine.close`."""
        context, self._context = self._context, None
        if context:
            self._api.llama_free(context)
        if hasattr(self, "_stages"):
            self._stages.close()
        self.model.close()
