"""llama.cpp's C API as this runtime uses it: a model and its vocabulary, and what it logs.

Nothing is imported from llama-cpp-python before a `Model` is opened. Pointers never leave this
module and `engine.py`: whoever asks a closed model gets `SessionClosed`, not a crash.
"""

from __future__ import annotations

import ctypes
import re
from collections import deque
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_mmllm.errors import CorruptBundle, SessionClosed

_ERROR, _CONTINUED = 3, 5
#: Kinds of tokens that are no text: LLAMA_TOKEN_ATTR_UNKNOWN, UNUSED and CONTROL.
_NO_TEXT = 1 | 2 | 8
_SIZE = re.compile(r"(?:kv_cache\w*|memory_recurrent|_rs_cache): +size = +([0-9.]+) MiB")


class Log:
    """What llama.cpp says, kept instead of printed.

    Attributes:
        errors: the last lines at error level.
        state_mib: sizes of the caches that were made since `restart`.
    """

    def __init__(self) -> None:
        self.errors: deque[str] = deque(maxlen=4)
        self.state_mib = 0.0
        self._level = 0

    def restart(self) -> None:
        """Forgets everything."""
        self.errors.clear()
        self.state_mib = 0.0

    def __call__(self, level: int, text: bytes, _: object) -> None:
        """The callback."""
        self._level = self._level if level == _CONTINUED else level
        line = text.decode("utf-8", "replace").strip()
        if self._level == _ERROR and line:
            self.errors.append(line[:300])
        elif found := _SIZE.search(line):
            self.state_mib += float(found[1])

    def __str__(self) -> str:
        return "; ".join(self.errors) or "it did not say why"


log = Log()


@cache
def library() -> Any:
    """llama_cpp's low-level module, initialized, its log going to `log`."""
    import llama_cpp.llama_cpp as api

    callback = api.llama_log_callback(log)
    api.llama_log_set(callback, None)
    api.edge_mmllm_log = callback  # lives as long as the library
    api.llama_backend_init()
    return api


def floats_of(array: NDArray[Any]) -> Any:
    """The C pointer to a float32 array, which must live as long as it is used."""
    return array.ctypes.data_as(ctypes.POINTER(ctypes.c_float))


def bytes_of(array: NDArray[np.uint8]) -> Any:
    """The same of bytes."""
    return array.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


def encode(api: Any, context: Any, ids: NDArray[np.int32]) -> int:
    """Has the encoder of a model read ids; llama.cpp's status, 0 where it went well."""
    batch = api.llama_batch_init(len(ids), 0, 1)
    try:
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids.tolist()):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, i, 1
            batch.seq_id[i][0], batch.logits[i] = 0, 1
        return int(api.llama_encode(context, batch))
    finally:
        api.llama_batch_free(batch)


class Model:
    """A loaded model: weights and vocabulary.

    Args:
        path: the GGUF file.
        mmap: map the file instead of reading it.
        vocab_only: no weights.

    Raises:
        CorruptBundle: llama.cpp refuses the file; the message has its words.
    """

    def __init__(self, path: Path, *, mmap: bool = True, vocab_only: bool = False) -> None:
        self.api = library()
        params = self.api.llama_model_default_params()
        params.load_mode = 1 if mmap else 0
        params.vocab_only = vocab_only
        params.n_gpu_layers = 0
        log.restart()
        self._pointer = self.api.llama_model_load_from_file(str(path).encode(), params)
        if not self._pointer:
            raise CorruptBundle("llama.cpp cannot load the model", where=str(path), found=str(log))

    @property
    def pointer(self) -> Any:
        """The model. Raises: SessionClosed."""
        if not self._pointer:
            raise SessionClosed("the session is closed", fix="load the model again")
        return self._pointer

    @property
    def vocab(self) -> Any:
        """The vocabulary. Raises: SessionClosed."""
        return self.api.llama_model_get_vocab(self.pointer)

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return int(self.api.llama_vocab_n_tokens(self.vocab))

    @property
    def hidden_size(self) -> int:
        """Width of input embeddings."""
        return int(self.api.llama_model_n_embd_inp(self.pointer))

    @property
    def recurrent(self) -> bool:
        """Whether no state grows with the context."""
        return bool(self.api.llama_model_is_recurrent(self.pointer))

    @property
    def hybrid(self) -> bool:
        """Whether some layers are recurrent."""
        return bool(self.api.llama_model_is_hybrid(self.pointer))

    @property
    def streams(self) -> bool:
        """Whether pictures take rotary positions in several streams (M-RoPE)."""
        kind = int(self.api.llama_model_rope_type(self.pointer))
        return kind in (self.api.LLAMA_ROPE_TYPE_MROPE, self.api.LLAMA_ROPE_TYPE_IMROPE)

    def metadata(self, key: str) -> str | None:
        """A value of the file's metadata as text; None where it is absent."""
        size = 4096
        while True:
            buffer = ctypes.create_string_buffer(size)
            length = self.api.llama_model_meta_val_str(self.pointer, key.encode(), buffer, size)
            if length < 0:
                return None
            if length < size:
                return buffer.value.decode("utf-8", "replace")
            size = length + 1

    def tokenize(self, text: bytes) -> list[int]:
        """Token ids of UTF-8 text, special tokens understood, none added."""
        room = len(text) + 8
        while True:
            ids = (ctypes.c_int32 * room)()
            count = self.api.llama_tokenize(self.vocab, text, len(text), ids, room, False, True)
            if count >= 0:
                return list(ids[:count])
            room = -count

    def detokenize(self, ids: Sequence[int], *, special: bool = False) -> bytes:
        """Text of valid ids.

        Args:
            special: with the text of special tokens.
        """
        given = (ctypes.c_int32 * len(ids))(*ids)
        room = 16 * len(ids) + 64
        while True:
            text = ctypes.create_string_buffer(room)
            count = self.api.llama_detokenize(
                self.vocab, given, len(ids), text, room, False, special
            )
            if count >= 0:
                return text.raw[:count]
            room = -count

    def adapter(self, path: Path) -> Any:
        """A LoRA adapter for this model, which ends with it. Raises: CorruptBundle."""
        log.restart()
        found = self.api.llama_adapter_lora_init(self.pointer, str(path).encode())
        if not found:
            raise CorruptBundle(
                "llama.cpp cannot load the adapter", where=str(path), found=str(log)
            )
        return found

    def piece(self, token: int) -> tuple[bytes, bool]:
        """What a valid id adds to a text (of a special one its name), and whether that is text."""
        room = 256
        while True:
            buffer = ctypes.create_string_buffer(room)
            count = self.api.llama_token_to_piece(self.vocab, token, buffer, room, 0, True)
            if count >= 0:
                break
            room = -count
        kind = self.api.llama_vocab_get_attr(self.vocab, token)
        return buffer.raw[:count], not kind & _NO_TEXT

    def close(self) -> None:
        """Frees the model. Closing twice is fine."""
        pointer, self._pointer = self._pointer, None
        if pointer:
            self.api.llama_model_free(pointer)
