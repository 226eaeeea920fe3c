"""`chat`: a conversation, line by line, over one session."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from edge_mmllm.errors import ContextFull, EdgeError
from edge_mmllm.modality import MODALITIES
from edge_mmllm_runtime.answer import Answer, AnswerSettings, Write, answer
from edge_mmllm_runtime.generation import Prompt
from edge_mmllm_runtime.placing import placeholders
from edge_mmllm_runtime.session import Session

#: A context in which Ctrl-C does not raise; what it gives says whether it was pressed.
Interruptible = Callable[[], AbstractContextManager[Callable[[], bool]]]

HELP = "/reset forgets the conversation, /exit or Ctrl-D ends, Ctrl-C stops an answer"


class Conversation:
    """What was said so far, and the session that answers.

    Args:
        session: keeps its state from turn to turn, so that only what is new is read.
        settings: how to answer.
        system: a system message to begin with.
        raw: no chat template: the conversation is one text that the model continues.

    Raises:
        UsageError: the bundle has no tokenizer, or no chat template and not `raw`.
    """

    def __init__(
        self,
        session: Session,
        settings: AnswerSettings,
        *,
        system: str | None = None,
        raw: bool = False,
    ) -> None:
        self._session, self._settings = session, settings
        self._system, self._raw = system, raw
        self.reset()
        if not raw:
            session.text.apply_chat_template([{"role": "user", "content": "?"}])
        _ = session.text

    @property
    def help(self) -> str:
        """What can be typed."""
        media = "".join(f", /{name} PATH adds one" for name in self._session.spec.modalities)
        return HELP + media

    def attach(self, modality: str, source: str) -> None:
        """Puts a picture (video, recording) before the next thing said.

        Raises:
            EdgeError: it cannot be used, or the model does not understand it.
        """
        self._session.perception.item(modality, source)
        self._attached.append({"type": modality, modality: source})

    def reset(self) -> None:
        """Forgets everything but the system message."""
        self._attached: list[dict[str, str]] = []
        self.messages: list[dict[str, Any]] = []
        if self._system is not None:
            self.messages.append({"role": "system", "content": self._system})

    def say(self, text: str, write: Write, cancelled: Callable[[], bool] = lambda: False) -> Answer:
        """One turn. A turn that fails leaves the conversation as it was.

        Raises:
            EdgeError: as `Session.generate`.
        """
        content: Any = text
        if self._attached:
            content = [*self._attached, {"type": "text", "text": text}]
        turn = [*self.messages, {"role": "user", "content": content}]
        prompt: Prompt | Callable[[], Prompt] = turn
        if self._raw:
            prompt = lambda: _as_text(self._session, turn)  # noqa: E731
        given = answer(
            self._session, prompt, self._settings, write=write, cancelled=cancelled, reuse=True
        )
        self.messages = [*turn, {"role": "assistant", "content": given.text}]
        self._attached = []
        return given


def _as_text(session: Session, messages: Sequence[Mapping[str, Any]]) -> Prompt:
    """A conversation as one text, with its pictures in their places."""
    pieces: list[str] = []
    media: dict[str, list[Any]] = {}
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for part in parts:
            if part["type"] == "text":
                pieces.append(part["text"])
            else:
                media.setdefault(part["type"], []).append(part[part["type"]])
                pieces.append(placeholders(session, {part["type"]: ["one"]}))
    text = "".join(pieces)
    return session.encode(text, media) if media else text


def chat(
    conversation: Conversation,
    lines: Iterator[str],
    write: Write,
    note: Callable[[str], object],
    interruptible: Interruptible,
) -> int:
    """Answers lines until they end or one says `/exit`.

    Args:
        lines: what the user types, without the newline.
        write: gets the answers, and a newline after each.
        note: gets remarks and errors, which do not end the conversation.

    Returns:
        How many turns were answered.
    """
    turns = 0
    for line in lines:
        word = line.strip()
        if word in ("/exit", "/quit"):
            break
        if word == "/reset":
            conversation.reset()
            note("the conversation was forgotten")
        elif word.startswith("/"):
            _command(conversation, word, note)
        elif word:
            try:
                with interruptible() as cancelled:
                    given = conversation.say(line, write, cancelled)
            except ContextFull as error:
                note(f"error: {error.what}: /reset forgets the conversation, --context makes room")
                continue
            except EdgeError as error:
                note(f"error: {error}")
                continue
            write("\n")
            turns += 1
            if given.finish_reason in ("cancelled", "length", "context"):
                note(f"(the answer was cut: {given.finish_reason})")
    return turns


def _command(conversation: Conversation, word: str, note: Callable[[str], object]) -> None:
    """`/image PATH` and its like; anything else shows the help."""
    name, _, path = word[1:].partition(" ")
    if name not in MODALITIES or not path.strip():
        note(conversation.help)
        return
    try:
        conversation.attach(name, path.strip())
    except EdgeError as error:
        note(f"error: {error}")
        return
    note(f"the {name} goes with what you say next")
