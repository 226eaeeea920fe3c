"""GGUF files from elsewhere: a session without a bundle.

Nobody vouches for such a file, and llama.cpp is C++ that trusts much of what it reads. So a
child process loads it first, reads a token and describes it; where the child crashes, the file
is refused. What it describes is built from the file's metadata: sizes, special tokens and chat
template; the tokenizer is llama.cpp's own.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_mmllm._children import python_command
from edge_mmllm.errors import CorruptBundle, UnsupportedBundle, UsageError
from edge_mmllm.spec import ModelSpec, Stage, TextSpec
from edge_mmllm.text import StreamDecoder, Text
from edge_mmllm.text.vocabulary import Vocabulary
from edge_mmllm_runtime.llama import Model

if TYPE_CHECKING:
    from edge_mmllm_runtime.engine import EngineOptions
    from edge_mmllm_runtime.session import Session

MAGIC = b"GGUF"

#: Seconds a child may take: a disk that reads 30 MB/s loads 18 GB in them.
_PATIENCE_S = 600
#: The identity of a file: its first bytes (metadata and tensor table, mostly), and samples.
_HEAD_BYTES, _SAMPLES, _SAMPLE_BYTES = 8 << 20, 256, 4096
_REPLACEMENT = "\ufffd".encode()


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether a regular file at `path` begins as a GGUF file does."""
    try:
        place = Path(path)
        if not place.is_file():
            return False
        with place.open("rb") as file:
            return file.read(4) == MAGIC
    except (OSError, ValueError):
        return False


@dataclass(frozen=True)
class GgufFile:
    """A file that a child process could load.

    Attributes:
        path: where it lies.
        spec: what its metadata says.
        sha256: its identity, which states are bound to: of its size, its first 8 MiB and 256
            samples spread over the rest, so that a large file need not be read whole.
    """

    path: Path
    spec: ModelSpec
    sha256: str

    def session(self, spec: ModelSpec, options: EngineOptions) -> Session:
        """A session over the file. Raises: as `GgufEngine`."""
        from edge_mmllm_runtime.gguf import GgufEngine
        from edge_mmllm_runtime.session import Session

        engine = GgufEngine(
            spec, self.path, threads=options.threads, context=options.context, lora=options.lora
        )
        model = engine.model
        return Session(
            engine, spec, self.sha256, lambda: VocabText(spec.text, model), context=options.context
        )


def open_file(path: str | os.PathLike[str]) -> GgufFile:
    """Has a child process load the file, and takes its description.

    Raises:
        CorruptBundle: llama.cpp refuses the file or crashes on it.
        UnsupportedBundle: no model that reads and writes text token by token.
    """
    place = Path(path).resolve()
    told = _child(place)
    if "unsupported" in told:
        raise UnsupportedBundle(
            "this GGUF file cannot be run", where=str(path), found=told["unsupported"]
        )
    return GgufFile(place, ModelSpec.from_json(told["model"], str(path)), _identity(place))


def _child(path: Path) -> dict[str, Any]:
    """What `describe` prints in a process of its own. Raises: CorruptBundle."""
    code = f"from edge_mmllm_runtime.gguf_file import main; main({str(path)!r})"
    try:
        child = subprocess.run(
            python_command(code), capture_output=True, timeout=_PATIENCE_S, check=False
        )
        found = f"exit status {child.returncode}"
        if child.returncode < 0:
            found = f"llama.cpp crashed on it (signal {-child.returncode})"
        told = json.loads(child.stdout) if child.returncode == 0 else {"error": found}
    except subprocess.TimeoutExpired:
        told = {"error": f"it was not loaded within {_PATIENCE_S} s"}
    except ValueError as error:
        told = {"error": f"no description: {error}"}
    if "error" in told:
        raise CorruptBundle(
            "llama.cpp cannot use this GGUF file", where=str(path), found=told["error"]
        )
    assert isinstance(told, dict)  # noqa: S101 - for the type checker: `main` printed it
    return told


def main(path: str) -> None:
    """The child: prints a description of the file as JSON."""
    try:
        told = describe(Path(path))
    except CorruptBundle as error:
        told = {"error": error.found or str(error)}
    sys.stdout.write(json.dumps(told))


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
    _read_a_token(spec, path)
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


def _read_a_token(spec: ModelSpec, path: Path) -> None:
    """Runs the model once: what crashes shall crash here."""
    from edge_mmllm_runtime.gguf import GgufEngine

    engine = GgufEngine(spec, path, threads=1, context=64)
    engine.step(0, 0)
    if spec.text.tokenizer == "gguf":
        engine.model.detokenize(engine.model.tokenize(b"a b"))
    engine.close()


def _identity(path: Path) -> str:
    """See `GgufFile.sha256`."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(size.to_bytes(8, "little"))
        digest.update(file.read(_HEAD_BYTES))
        for i in range(_SAMPLES if size > _HEAD_BYTES else 0):
            file.seek(_HEAD_BYTES + (size - _HEAD_BYTES) * i // _SAMPLES)
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


class VocabText(Text):
    """Text through llama.cpp's own tokenizer. See `edge_mmllm.text.Text`.

    Args:
        spec: the model's text settings.
        model: the vocabulary; it may be closed, then `SessionClosed` is raised.
    """

    def __init__(self, spec: TextSpec, model: Model) -> None:
        super().__init__(spec)
        self._model = model

    def encode(self, text: str, *, add_bos: bool | None = None, whole: bool = False) -> list[int]:
        """See `Text.encode`."""
        try:
            ids = self._model.tokenize(text.encode("utf-8"))
        except UnicodeEncodeError as error:
            raise UsageError("the text is not valid Unicode", found=str(error)) from error
        bos = self.spec.bos_id
        if add_bos and bos is None:
            raise UsageError("this model has no BOS token", found="add_bos=True")
        wanted = self.spec.add_bos if add_bos is None else add_bos
        if wanted and bos is not None and ids[:1] != [bos]:
            return [bos, *ids]
        return ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """See `Text.decode`."""
        size = self._model.vocab_size
        known = [i for i in ids if 0 <= i < size]
        return self._model.detokenize(known, special=not skip_special_tokens).decode(
            "utf-8", "replace"
        )

    def vocabulary(self, size: int) -> Vocabulary:
        """See `Text.vocabulary`."""
        tokens, special = [], set()
        for i in range(size):
            data, is_text = self._model.piece(i)
            tokens.append(data)
            if not is_text:
                special.add(i)
        return Vocabulary(tuple(tokens), frozenset(special))

    def stream(self) -> StreamDecoder:
        """See `Text.stream`."""
        model = self._model

        def skip(token_id: int) -> bool:
            known = 0 <= token_id < model.vocab_size
            return not known or bool(model.api.llama_vocab_is_control(model.vocab, token_id))

        def complete(ids: Sequence[int]) -> bool:
            return model.detokenize(ids[-3:]).endswith(_REPLACEMENT)

        return StreamDecoder(self.decode, skip, complete)
