"""GGUF files from elsewhere: a session without a bundle.

Nobody vouches for such a file, and llama.cpp is C++ that trusts much of what it reads. So the file
is checked (`gguf/check.py`), then a child process loads it, reads some tokens and describes it
(`gguf/trial.py`), and only then is it loaded here. What is described is built from the file's
metadata: sizes, special tokens and chat template; the tokenizer is llama.cpp's own.

What this leaves open: a file that is changed in the moment between the last look at it and
llama.cpp's, one that is cut short while it is in use (it is mapped: SIGBUS), and a flaw in
llama.cpp that shows only with other input than the child's.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from edge_mmllm.errors import UnsupportedBundle, UsageError
from edge_mmllm.spec import ModelSpec
from edge_mmllm.text import StreamDecoder, Text
from edge_mmllm.text.vocabulary import Vocabulary
from edge_mmllm_runtime.gguf.check import Checked, check_file
from edge_mmllm_runtime.gguf.llama import Model
from edge_mmllm_runtime.gguf.trial import try_file

if TYPE_CHECKING:
    from edge_mmllm_runtime.engine import EngineOptions
    from edge_mmllm_runtime.session import Session

MAGIC = b"GGUF"

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
        checked: that it is still the file that was checked and tried.
        projector: the `mmproj` file beside it, if there is one.
    """

    path: Path
    spec: ModelSpec
    sha256: str
    checked: Checked
    projector: Path | None = None

    def with_projector(self, path: str | os.PathLike[str]) -> GgufFile:
        """The model with an `mmproj` file beside it, which a child process could use.

        Raises:
            CorruptBundle: damaged; llama.cpp refuses it, or it is of another model.
            UsageError: no GGUF file.
        """
        from edge_mmllm_runtime.gguf import native as gguf_native

        if not is_gguf(path):
            raise UsageError("the projector is no GGUF file", where=str(path))
        place = Path(path).resolve()
        check_file(place)
        size = place.stat().st_size + self.path.stat().st_size
        told = try_file(place, size, gguf_native.trial(self.path, place))
        digest = hashlib.sha256(f"{self.sha256} {_identity((place,))}".encode())
        spec = gguf_native.with_projector(self.spec, told)
        return replace(self, spec=spec, sha256=digest.hexdigest(), projector=place)

    def session(self, spec: ModelSpec, options: EngineOptions) -> Session:
        """A session over the file. Raises: CorruptBundle: it was changed; and as `GgufEngine`."""
        from edge_mmllm_runtime.gguf.engine import GgufEngine
        from edge_mmllm_runtime.session import Session

        self.checked.require_same()
        media = {f"encode_{name}": self.projector for name in spec.modalities if self.projector}
        engine = GgufEngine(
            spec,
            self.path,
            threads=options.threads,
            context=options.context,
            media=media,
            lora=options.lora,
            mmap=options.mmap,
        )
        model = engine.model
        try:
            self.checked.require_same()
        except BaseException:
            engine.close()
            raise
        session = Session(
            engine, spec, self.sha256, lambda: VocabText(spec, model), context=options.context
        )
        for name in spec.modalities:
            engine.adopt(name, session.perception)
        return session


def open_file(path: str | os.PathLike[str]) -> GgufFile:
    """Checks the file, has a child process load it, and takes its description.

    Raises:
        CorruptBundle: damaged; llama.cpp refuses it or crashes on it.
        UnsupportedBundle: no model that reads and writes text token by token.
    """
    place = Path(path).resolve()
    checked = check_file(place)
    told = try_file(place, sum(p.stat().st_size for p in checked.paths))
    if "unsupported" in told:
        raise UnsupportedBundle(
            "this GGUF file cannot be run", where=str(path), found=told["unsupported"]
        )
    spec = ModelSpec.from_json(told["model"], str(path))
    found = GgufFile(place, spec, _identity(checked.paths), checked)
    checked.require_same()
    return found


def _identity(paths: tuple[Path, ...]) -> str:
    """See `GgufFile.sha256`."""
    digest = hashlib.sha256()
    for path in paths:
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
        spec: the model, of which the text settings, and what stands for pictures.
        model: the vocabulary; it may be closed, then `SessionClosed` is raised.
    """

    def __init__(self, spec: ModelSpec, model: Model) -> None:
        super().__init__(spec.text)
        self._model = model
        marks = {m.placeholder: m.token_id for m in spec.modalities.values()}
        self._mark = next(iter(marks.items()), None)
        if self._mark:
            self.takes_parts = False  # the template's own placeholders are not ours

    def encode(self, text: str, *, add_bos: bool | None = None, whole: bool = False) -> list[int]:
        """See `Text.encode`."""
        try:
            ids = self._ids(text)
        except UnicodeEncodeError as error:
            raise UsageError("the text is not valid Unicode", found=str(error)) from error
        bos = self.spec.bos_id
        if add_bos and bos is None:
            raise UsageError("this model has no BOS token", found="add_bos=True")
        wanted = self.spec.add_bos if add_bos is None else add_bos
        if wanted and bos is not None and ids[:1] != [bos]:
            return [bos, *ids]
        return ids

    def _ids(self, text: str) -> list[int]:
        if self._mark is None:
            return self._model.tokenize(text.encode("utf-8"))
        mark, row = self._mark
        ids: list[int] = []
        for i, part in enumerate(text.split(mark)):
            ids += [row] * bool(i)
            ids += self._model.tokenize(part.encode("utf-8")) if part else []
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
