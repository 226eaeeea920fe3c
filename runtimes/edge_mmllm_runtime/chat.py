"""`chat`: a conversation, line by line, over one session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from edge_mmllm.errors import ContextFull, EdgeError
from edge_mmllm_runtime.answer import Answer, AnswerSettings, Write, answer
from edge_mmllm_runtime.generation import Prompt
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

    def reset(self) -> None:
        """Forgets everything but the system message."""
        self.messages: list[dict[str, str]] = []
        if self._system is not None:
            self.messages.append({"role": "system", "content": self._system})

    def say(self, text: str, write: Write, cancelled: Callable[[], bool] = lambda: False) -> Answer:
        """One turn. A turn that fails leaves the conversation as it was.

        Raises:
            EdgeError: as `Session.generate`.
        """
        turn = [*self.messages, {"role": "user", "content": text}]
        prompt: Prompt = "".join(m["content"] for m in turn) if self._raw else turn
        given = answer(
            self._session, prompt, self._settings, write=write, cancelled=cancelled, reuse=True
        )
        self.messages = [*turn, {"role": "assistant", "content": given.text}]
        return given


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
            note(HELP)
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
