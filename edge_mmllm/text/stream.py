"""Text that can be shown at once: whole characters, and no part of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence

from edge_mmllm.errors import UsageError

#: What a decoder prints for bytes that are not, or not yet, UTF-8.
REPLACEMENT = "\ufffd"

#: A character has at most 4 bytes and a token at least one, so more pending tokens than this
#: are invalid for good.
_MAX_PENDING = 16


class StreamDecoder:
    """Ids to text, one at a time: `"".join(push(i) for i in ids) + flush() == decode(ids)`.

    (But for a character that the end cuts off: `decode` shows U+FFFD for it, a stream nothing.)

    A token's text depends on its neighbours: it may be part of a character, and some decoders
    drop the space in front of the first one. So a window of ids is decoded, made of those that
    gave the last text shown and those since; what is new is the difference. The window is
    bounded, so that a token costs the same at any position.

    Args:
        decode: ids to text, special tokens left out.
        skip: whether an id adds nothing to the text (special, or unknown to the tokenizer).
        complete: whether ids end in a real U+FFFD, rather than in an incomplete character.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        skip: Callable[[int], bool],
        complete: Callable[[Sequence[int]], bool],
    ) -> None:
        self._decode, self._skip, self._complete = decode, skip, complete
        self._window: list[int] = []
        self._context = 0  # ids at the window's start whose text was shown
        self._shown = 0  # characters of the window's text that were shown

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; empty while a character is incomplete."""
        if self._skip(token_id):
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        if text.endswith(REPLACEMENT) and not self._complete(self._window):
            if len(self._window) - self._context < _MAX_PENDING:
                return ""
            return self._give_up(text)
        new = text[self._shown :]
        if new:
            self._window = self._window[self._context :]
            self._context = len(self._window)
            self._shown = len(self._decode(self._window))
        elif len(self._window) - self._context >= _MAX_PENDING:
            del self._window[self._context :]  # tokens without text
        return new

    def _give_up(self, text: str) -> str:
        """Shows invalid bytes, all but the last one, which may begin a character."""
        new = text[self._shown : -1]
        self._window = self._window[-4:]
        self._context = 0
        self._shown = max(len(self._decode(self._window)) - 1, 0)
        return new

    def flush(self) -> str:
        """Ends the stream: what is still held back, without an incomplete character at its end."""
        text = self._decode(self._window) if self._window else ""
        new = text[self._shown :].rstrip(REPLACEMENT)
        self._window, self._context, self._shown = [], 0, 0
        return new


def _one_byte(token_id: int) -> bytes:
    return bytes([token_id]) if 0 <= token_id < 256 else b""


class ByteStreamDecoder(StreamDecoder):
    """The stream of a model whose tokens are bytes, whole characters or not.

    Args:
        token: the bytes of an id, none where it adds nothing; by default ids are byte values.
    """

    def __init__(self, token: Callable[[int], bytes] = _one_byte) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._token = token

    def push(self, token_id: int) -> str:
        """See `StreamDecoder.push`."""
        return self._utf8.decode(self._token(token_id))

    def flush(self) -> str:
        """See `StreamDecoder.flush`."""
        self._utf8.reset()
        return ""


class StopMatcher:
    """Cuts a stream of text at the first stop string, of which no part is ever let through.

    Text that may yet turn out to be the start of a stop string is held back. How the text is cut
    into pieces makes no difference. Of several stop strings, the one that is complete first
    counts, and of those that are complete at the same character the longest.

    Raises:
        UsageError: an empty stop string.
    """

    def __init__(self, stops: Sequence[str] | str | None) -> None:
        stops = [stops] if isinstance(stops, str) else list(stops or ())
        if not all(isinstance(stop, str) and stop for stop in stops):
            raise UsageError(
                "a stop string must be a string of at least one character", found=repr(stops)[:200]
            )
        self._stops = stops
        self._longest = max((len(stop) for stop in stops), default=0)
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> tuple[str, bool]:
        """Adds `piece`. Returns the text that may be shown now, and whether a stop was found.

        After a stop nothing more is let through.
        """
        if self.stopped:
            return "", True
        text = self._held + piece
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]], True
        keep = self._suspect(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def _suspect(self, text: str) -> int:
        """Length of the longest end of `text` that starts a stop string."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0

    def flush(self) -> str:
        """Ends the stream: the text held back, which is part of no stop string after all."""
        held, self._held = self._held, ""
        return held
