"""What `run --state` reads after a state, and the files it goes on from and leaves behind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edge_mmllm.errors import OutputExists, UsageError
from edge_mmllm_runtime.placing import Media, place_text, placeholders, question
from edge_mmllm_runtime.prompted import Prompted
from edge_mmllm_runtime.reading import Progress
from edge_mmllm_runtime.sampling import Sampling
from edge_mmllm_runtime.session import Session
from edge_mmllm_runtime.statefile import is_state_file
from edge_mmllm_runtime.storage import Storage, check_storage

if TYPE_CHECKING:
    from edge_mmllm_runtime.constrained import Guide

#: An answer that no template changes and no other part of a conversation contains.
_ANSWER = "edge-mmllm-answer"


@dataclass(frozen=True)
class StateFiles:
    """The state files of one run.

    Attributes:
        load: to go on from; None starts from an empty context.
        save: to leave behind, replacing another state file; None leaves none.
        storage: how `save` holds the states.
    """

    load: str | os.PathLike[str] | None = None
    save: str | os.PathLike[str] | None = None
    storage: Storage = "f32"

    def check(self) -> None:
        """Finds what would fail at the end, before anything is loaded.

        Raises:
            UsageError: an unknown storage; `save` lies in no folder.
            OutputExists: `save` is there and is no state file.
        """
        check_storage(self.storage)
        if self.save is None:
            return
        path = Path(self.save)
        if not path.absolute().parent.is_dir():
            raise UsageError("there is no such folder to save the state in", where=str(path))
        if os.path.lexists(path) and not is_state_file(path):
            raise OutputExists(
                "what is there is no state file, and is not replaced",
                where=str(path),
                fix="give another path, or remove it first",
            )


def following(session: Session, prompt: str, media: Media, *, raw: bool) -> Prompted:
    """What brings `prompt` to a model which just said something.

    With a chat template that is what the template writes after an answer (its end, the user's
    turn, the beginning of the next answer); else, or with `raw`, the text as it is. No BOS.

    Raises:
        UsageError: no tokenizer, no text, or a template that does not repeat earlier answers.
        TemplateError: the template failed.
    """
    if not raw and session.text.has_chat_template:
        asked = question(session, prompt, media)
        last = {"role": "user", "content": asked} if isinstance(asked, str) else asked[0]
        turns = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": _ANSWER},
            last,
        ]
        whole = session.text.apply_chat_template(turns)
        _, found, prompt = whole.partition(_ANSWER)
        if not found:
            raise UsageError(
                "this bundle's chat template does not repeat earlier answers",
                expected="one that a next turn can be cut out of",
                fix="use --raw (raw=True), and write the turns as the model expects them",
            )
    elif media:
        prompt = placeholders(session, media) + prompt
    return place_text(session, prompt, media, add_bos=False)


def appended(
    session: Session,
    ids: Prompted,
    max_new_tokens: int,
    sampling: Sampling,
    progress: Progress,
    guide: Guide | None = None,
) -> Iterator[int]:
    """Reads `ids` after the present state, then generates. See `Session.generate_tokens`."""
    if session.spec.decoder_start_id is not None:
        raise UsageError(
            "an encoder-decoder cannot read more of a prompt after its state",
            fix="ask again from an empty context, with the whole prompt",
        )
    session.prefill(ids, progress=progress)
    yield from session.generate_tokens(None, max_new_tokens, sampling, constraint=guide)


def settle(session: Session, last: int | None) -> None:
    """Reads the last token of an answer, so that the state holds all of it.

    Args:
        last: the token that was generated last. Nothing is read where the state has it already,
            or where the context is full.
    """
    full = session.context is not None and session.position >= session.context
    if last is not None and session.logits is None and not full:
        session.decode(last)
