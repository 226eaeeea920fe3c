"""Tries a GGUF file in a child process: what crashes, hangs or takes all memory does so there.

The child is no sandbox: it runs as the same user. It guards against files that end or stall the
process that loads them, not against one that takes it over.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import IO, Any

import numpy as np

from edge_mmllm._children import die_with_parent, python_command
from edge_mmllm.errors import CorruptBundle, EdgeError
from edge_mmllm.spec import ModelSpec, Stage, TextSpec
from edge_mmllm_runtime.gguf.llama import Model

#: A child may take so many seconds, and one for each so many bytes: a slow disk reads 10 MB/s.
_PATIENCE_S, _BYTES_PER_S = 60, 10 << 20
#: Private memory of the child beside two copies of the file (llama.cpp packs weights anew).
_ROOM_BYTES = 3 << 30
#: What the child may write, on stderr and as its answer: a vocabulary's end tokens, a template.
_SAID_BYTES = 64 << 20

#: Tokens that are read at once, and a context that a session begins with.
_BATCH, _CONTEXT = 40, 1024
#: Every byte, and what tokenizers treat in their own ways.
_WORDS = (
    bytes(range(256)),
    bytes(range(255, -1, -1)),
    "".join(map(chr, range(0x250))).encode(),
    "naïve  日本\r\n\t 🎉 12345 it's </s><s><|im_end|>".encode(),
)


def try_file(path: Path, size_bytes: int, code: str | None = None) -> dict[str, Any]:
    """What `describe` says of a file, in a process of its own.

    Args:
        code: what the child runs instead, and is answered by.

    Raises:
        CorruptBundle: llama.cpp refuses the file, crashes on it, or takes too long or too much.
    """
    patience = _PATIENCE_S + size_bytes // _BYTES_PER_S
    code = (
        code or f"from edge_mmllm_runtime.gguf.trial import main; main({str(path)!r}, {size_bytes})"
    )
    # GGML_NO_BACKTRACE: llama.cpp would start a debugger to print where it ended.
    surroundings = {**os.environ, "GGML_NO_BACKTRACE": "1"}
    with tempfile.TemporaryFile() as answer, tempfile.TemporaryFile() as errors:
        try:
            status: int | None = subprocess.run(
                python_command(code),
                stdin=subprocess.DEVNULL,
                stdout=answer,
                stderr=errors,
                env=surroundings,
                timeout=patience,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            status = None
        told = _told(status, answer)
        if told is None:
            how = f"it was not loaded within {patience} s"
            if status is not None:
                how = f"exit status {status}" if status >= 0 else f"signal {-status}"
                how = f"llama.cpp crashed on it ({how}): {_last_words(errors)}"
            told = {"error": how}
    if "error" in told:
        raise CorruptBundle(
            "llama.cpp cannot use this GGUF file", where=str(path), found=str(told["error"])[:500]
        )
    return told


def _told(status: int | None, answer: IO[bytes]) -> dict[str, Any] | None:
    """The child's answer; None where it gave none."""
    if status != 0:
        return None
    answer.seek(0)
    try:
        told = json.loads(answer.read(_SAID_BYTES))
    except (ValueError, RecursionError):
        return None
    return told if isinstance(told, dict) else None


def _last_words(errors: IO[bytes]) -> str:
    size = errors.seek(0, os.SEEK_END)
    errors.seek(max(0, size - 4096))
    lines = errors.read(4096).decode("utf-8", "replace").split("\n")
    lines = [line.strip() for line in lines if line.strip()]
    said = next((line for line in lines if "ASSERT" in line or "what()" in line), "")
    return (said or (lines[-1] if lines else "it did not say why"))[-300:]


def main(path: str, size_bytes: int) -> None:
    """The child: writes a description of the file as JSON, under limits of its own."""
    die_with_parent()
    _confine(size_bytes)
    answer = os.dup(1)
    os.dup2(2, 1)  # llama.cpp may print
    try:
        told = describe(Path(path))
    except (EdgeError, MemoryError) as error:
        told = {"error": (error.found if isinstance(error, EdgeError) else None) or repr(error)}
    with os.fdopen(answer, "w") as file:
        json.dump(told, file)


def _confine(size_bytes: int) -> None:
    """Bounds memory, output and core dumps; asks to be the first to go where memory runs out."""
    try:
        import resource
    except ImportError:  # no such thing on Windows
        return
    bounds = {
        resource.RLIMIT_DATA: 2 * size_bytes + _ROOM_BYTES,
        resource.RLIMIT_FSIZE: _SAID_BYTES,
        resource.RLIMIT_CORE: 0,
    }
    for what, most in bounds.items():
        soft, hard = resource.getrlimit(what)
        infinite = resource.RLIM_INFINITY
        allowed = [most, *(limit for limit in (soft, hard) if limit != infinite)]
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(what, (min(allowed), hard))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")


def describe(path: Path) -> dict[str, Any]:
    """A spec as JSON under `model`; or why there is none, under `unsupported`.

    Raises:
        CorruptBundle: llama.cpp refuses the file.
    """
    model = Model(path)
    api, pointer = model.api, model.pointer
    architecture = model.metadata("general.architecture") or "unknown"
    if not api.llama_model_has_decoder(pointer) or api.llama_model_has_encoder(pointer):
        return {"unsupported": f"{architecture}, which is no decoder alone"}
    trained = int(api.llama_model_n_ctx_train(pointer))
    spec = ModelSpec(
        architecture=architecture,
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        layers=int(api.llama_model_n_layer(pointer)),
        parameters=int(api.llama_model_n_params(pointer)),
        context_length=None if model.recurrent or trained < 1 else trained,
        states=(),
        stages={"decoder": Stage(path.name, ("input_ids", "logit_rows"), ("logits",))},
        text=_text_spec(model),
        details={"gguf": {"description": _description(model)}},
    )
    model.close()
    _use(spec, path)
    return {"model": spec.to_json()}


def _text_spec(model: Model) -> TextSpec:
    api, vocab = model.api, model.vocab
    if not api.llama_vocab_type(vocab):
        return TextSpec("none")
    size = model.vocab_size
    bos, eos, pad = (
        i if 0 <= i < size else None
        for i in (f(vocab) for f in (api.llama_vocab_bos, api.llama_vocab_eos, api.llama_vocab_pad))
    )
    ends = tuple(i for i in range(size) if api.llama_vocab_is_eog(vocab, i))
    texts = (
        None if i is None else api.llama_vocab_get_text(vocab, i).decode("utf-8", "replace")
        for i in (bos, eos)
    )
    return TextSpec(
        "gguf",
        bos_id=bos,
        eos_ids=ends,
        add_bos=bos is not None and bool(api.llama_vocab_get_add_bos(vocab)),
        chat_template=model.metadata("tokenizer.chat_template"),
        bos_token=next(texts),
        eos_token=next(texts),
        pad_id=pad,
    )


def _description(model: Model) -> str:
    import ctypes

    buffer = ctypes.create_string_buffer(256)
    model.api.llama_model_desc(model.pointer, buffer, 256)
    return buffer.value.decode("utf-8", "replace")


def _use(spec: ModelSpec, path: Path) -> None:
    """Reads some tokens and some text: what crashes shall crash here."""
    from edge_mmllm_runtime.gguf.engine import GgufEngine

    context = min(spec.context_length or _CONTEXT, _CONTEXT)
    engine = GgufEngine(spec, path, threads=1, context=context)
    count = min(_BATCH, context - 1)
    ids = np.arange(count, dtype=np.int64) % spec.vocab_size
    if count:
        engine.forward(ids, 0, np.array([count - 1]))
    engine.step(spec.vocab_size - 1, count)
    engine.save(count + 1)
    if spec.text.tokenizer == "gguf":
        model = engine.model
        for words in _WORDS:
            model.detokenize(model.tokenize(words))
        model.detokenize(range(spec.vocab_size), special=True)
    engine.close()
