"""Puts pictures, videos and recordings in their places in a prompt.

As the processors of transformers do it: the chat template writes a placeholder for each, every
placeholder becomes as many tokens as there are rows (and the text that the layout puts around
them), and only then the text is tokenized.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_mmllm.errors import UsageError
from edge_mmllm.modality import MODALITIES
from edge_mmllm_runtime.prompted import Look, Prompted, Span, identities

if TYPE_CHECKING:
    from edge_mmllm_runtime.engine import Float32, Int64
    from edge_mmllm_runtime.perception import Item
    from edge_mmllm_runtime.session import Session

#: Modality -> what was given for it, in the order of the prompt.
Media = Mapping[str, Sequence[Any]]

Messages = Sequence[Mapping[str, Any]]


def place_text(
    session: Session, text: str, media: Media, *, add_bos: bool | None = None
) -> Prompted:
    """A text with one placeholder for each item.

    Args:
        add_bos: see `Text.encode`.

    Raises:
        UsageError: another number of placeholders than items.
    """
    spec = session.spec.modalities
    items = _items(session, media, text)
    front: list[Item] = []
    inside: dict[str, Iterator[Item]] = {}
    for name, found in items.items():
        count = text.count(spec[name].placeholder)
        if not count and spec[name].placement == "front":
            front += found
        elif count != len(found):
            raise _mismatch(name, spec[name].placeholder, count, len(found))
        else:
            inside[spec[name].placeholder] = iter(found)
    if inside:
        pattern = re.compile("|".join(re.escape(t) for t in sorted(inside, key=len)[::-1]))
        text = pattern.sub(lambda match: next(inside[match[0]]).text, text)
        for name in items:
            text = session.perception.tidy(name, text)
    whole = session.spec.decoder_start_id is not None
    if add_bos is None and _has_bos(session, text):
        add_bos = False
    ids = session.check_ids(session.text.encode(text, add_bos=add_bos, whole=whole))
    lead = [spec[i.modality].token_id for i in front for _ in range(i.places)]
    return _filled(session, np.concatenate([np.array(lead, np.int64), ids]), items)


def place_ids(session: Session, ids: Int64, media: Media) -> Prompted:
    """Token ids in which each item has as many placeholder ids as it has rows, or just one.

    Raises:
        UsageError: another number of placeholders.
    """
    spec = session.spec.modalities
    items = _items(session, media, ids)
    for name, found in items.items():
        at = np.flatnonzero(ids == spec[name].token_id)
        if len(at) == len(found) != sum(i.places for i in found):
            counts = np.ones(len(ids), np.int64)
            counts[at] = [i.places for i in found]
            ids = np.repeat(ids, counts)
    return _filled(session, ids, items)


def place_messages(session: Session, messages: Messages, media: Media) -> Prompted:
    """Chat messages: parts `{"type": "image"}` take the pictures given, in order; a part
    `{"type": "image", "image": picture}` brings its own.

    Raises:
        UsageError: parts without a picture, or pictures without a part.
    """
    left = {name: list(_several(name, given)) for name, given in media.items()}
    found: dict[str, list[Any]] = {name: [] for name in session.spec.modalities}
    plain = [
        _without_media(session, message, left, found, f"messages[{i}]")
        for i, message in enumerate(messages)
    ]
    unused = {name: len(given) for name, given in left.items() if given}
    if unused:
        raise UsageError(
            "the messages have no place for what was given",
            expected="a part {'type': 'image'} for each",
            found=", ".join(f"{count} {name} too many" for name, count in unused.items()),
        )
    text = session.text.apply_chat_template(plain)
    return place_text(session, text, {n: s for n, s in found.items() if s})


def question(session: Session, text: str, media: Media) -> Messages | str:
    """A question about pictures as the model was trained to be asked: where `text` has no
    placeholder of its own, a user's message with the pictures first (or, without a chat
    template, the placeholders in front of the text)."""
    spec = session.spec.modalities
    bare = {
        name: len(given)
        for name, given in media.items()
        if name in spec and given and spec[name].placeholder not in text
    }
    if not bare:
        return text
    if session.text.has_chat_template:
        parts = [{"type": name} for name, count in bare.items() for _ in range(count)]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
    return placeholders(session, {name: media[name] for name in bare}) + text


def placeholders(session: Session, media: Media) -> str:
    """What stands in front of a text that has no placeholders of its own."""
    spec = session.spec.modalities
    marks = [
        spec[name].placeholder * len(given)
        for name, given in media.items()
        if name in spec and spec[name].placement == "text"
    ]
    return "".join(marks) + ("\n" if any(marks) else "")


def _has_bos(session: Session, text: str) -> bool:
    """Whether a text has BOS behind placeholders that it begins with."""
    spec, rest = session.spec, text
    marks = tuple(m.placeholder for m in spec.modalities.values())
    while mark := next((m for m in marks if rest.startswith(m)), ""):
        rest = rest.removeprefix(mark).lstrip()
    return rest != text and bool(spec.text.bos_token) and rest.startswith(spec.text.bos_token or "")


def _items(session: Session, media: Media, prompt: str | Int64) -> dict[str, list[Item]]:
    """Each given source, identified and prepared; with the prompt's text, where stages read it."""
    for name, given in media.items():
        _several(name, given)
    perception, text = session.perception, ""
    if any(perception.reads_text(name) for name, given in media.items() if given):
        text = _plain(session, prompt)
    return {
        name: [perception.item(name, source, text) for source in given]
        for name, given in media.items()
        if given
    }


def _several(name: str, given: Any) -> Sequence[Any]:
    """What was given for a modality, a list. Raises: UsageError."""
    if isinstance(given, Sequence) and not isinstance(given, (str, bytes, bytearray, memoryview)):
        return given
    raise UsageError(
        f"what is given for {name} is not a list",
        expected=f"[{name}, ...], for one {name} too",
        found=type(given).__name__,
    )


def _plain(session: Session, prompt: str | Int64) -> str:
    """A prompt's text without placeholders."""
    spec = session.spec.modalities.values()
    if not isinstance(prompt, str):
        return session.text.decode(prompt[~np.isin(prompt, [m.token_id for m in spec])].tolist())
    for modality in spec:
        prompt = prompt.replace(modality.placeholder, "")
    return prompt


def _filled(session: Session, ids: Int64, items: Mapping[str, Sequence[Item]]) -> Prompted:
    """The ids with the identities of rows in the place of placeholder ids."""
    known, ids = ids, ids.copy()
    spans: list[Span] = []
    looks: list[Look] = []
    standing: list[tuple[Int64, Item]] = []
    for name, modality in session.spec.modalities.items():
        own = items.get(name, ())
        at = np.flatnonzero(known == modality.token_id)
        wanted = sum(item.places for item in own)
        if len(at) != wanted:
            raise _mismatch(name, f"id {modality.token_id}", len(at), wanted)
        begin = 0
        for item in own:
            places = at[begin : begin + item.places]
            begin += item.places
            ids[places] = identities(item.key, item.places)
            standing.append((places, item))
            if modality.target == "embeddings":
                spans += _runs(places, item)
        if modality.target == "states":
            seen = session.perception.seen_by(name, at.tolist(), known.tolist())
            stage = f"remember_{name}"
            blind = any(start > 0 for start, _ in seen[:1])
            for span, item in zip(seen, own, strict=True):
                looks += _looks(stage, span, item, blind)
    if not (spans or looks):
        return Prompted(known)
    found = [(at, item.steps) for at, item in standing if item.steps is not None and len(at)]
    return Prompted(ids, tuple(spans), known, tuple(looks), places=_stepped(len(ids), found))


def _stepped(count: int, items: Sequence[tuple[Int64, Int64]]) -> Int64 | None:
    """Where the tokens of a prompt stand in three streams, `(3, count)`: text goes on behind the
    largest position of an item. None where no item takes positions of its own.

    Args:
        items: which tokens are an item's rows, and `Item.steps`.
    """
    if not items:
        return None
    out, reached, begin = np.empty((3, count), np.int64), 0, 0
    for at, steps in sorted(items, key=lambda pair: int(pair[0][0])):
        start = int(at[0])
        if at[-1] - start + 1 != len(at):
            raise UsageError(
                "the rows of one item stand apart",
                where=f"prompt, position {start}",
                expected=f"{len(at)} placeholder ids in a row",
            )
        out[:, begin:start] = np.arange(reached, reached + start - begin)
        out[:, at] = reached + start - begin + steps
        reached, begin = int(out[:, at].max()) + 1, start + len(at)
    out[:, begin:] = np.arange(reached, reached + count - begin)
    return out


def _looks(stage: str, span: tuple[int, int], item: Item, blind: bool) -> Iterator[Look]:
    """An item's rows beside the tokens; those that no token sees go in where tokens are blind."""
    if item.used is None:
        yield Look(stage, *span, item.rows)
        return
    yield Look(stage, *span, partial(_part, item, 0, item.used))
    if blind:
        yield Look(stage, -1, -1, partial(_part, item, item.used, None))


def _part(item: Item, start: int, stop: int | None) -> Float32:
    return item.rows()[start:stop]


def _runs(places: Int64, item: Item) -> Iterator[Span]:
    """Spans of positions in a row; an item's rows may be apart."""
    first = 0
    for run in np.split(places, np.flatnonzero(np.diff(places) != 1) + 1):
        yield Span(int(run[0]), len(run), first, item.rows)
        first += len(run)


def _without_media(
    session: Session,
    message: Mapping[str, Any],
    left: Mapping[str, list[Any]],
    found: Mapping[str, list[Any]],
    where: str,
) -> Mapping[str, Any]:
    """The message as a template takes it; what its parts bring, or take, goes to `found`."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, (list, tuple)):
        return message
    spec, parts = session.spec.modalities, list[Any]()
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in MODALITIES:
            parts.append(part)
            continue
        own = next((part[key] for key in (kind, "path") if part.get(key) is not None), None)
        if own is None and not left.get(kind):
            raise UsageError(
                f"a part of a message has no {kind}",
                where=f"{where}.content[{i}]",
                expected=f"{{'type': {kind!r}, {kind!r}: ...}}, or one more of what is given",
                found=repr(part)[:200],
            )
        if kind not in spec:
            session.perception.item(kind, own)  # says what the bundle understands
        found[kind].append(left[kind].pop(0) if own is None else own)
        if session.text.takes_parts:
            parts.append({"type": kind, kind: ""})  # templates look for either
        else:
            parts.append({"type": "text", "text": spec[kind].placeholder})
    return {**message, "content": parts}


def _mismatch(name: str, placeholder: str, count: int, items: int) -> UsageError:
    return UsageError(
        f"the prompt has another number of places for {name} than there are",
        expected=f"{items} ({placeholder})",
        found=str(count),
        fix="give each its placeholder, or a text without any",
    )
