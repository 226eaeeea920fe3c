"""Damages GGUF files on purpose: a sound file is taken apart, and put together wrong.

Every mutation is a function of a seed, so that a failure is found again by its number.
"""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass, field

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9

#: What loops, products and conversions go wrong at.
_EDGES = (0, 1, 2, 3, 5, 7, 63, 64, 65, 127, 128, 255, 256, 1000, 0x7FFF, 0xFFFF, 1 << 20,
          (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 61, (1 << 63) - 1, 1 << 63,
          (1 << 64) - 32, (1 << 64) - 1)  # fmt: skip


@dataclass
class Spot:
    """A field of the file: where it lies and what it is."""

    begin: int
    size: int
    what: str


@dataclass
class Sound:
    """A sound file: its fields, its pairs and tensors as pieces, its data."""

    raw: bytes
    spots: list[Spot] = field(default_factory=list)
    pairs: list[bytes] = field(default_factory=list)
    tensors: list[bytes] = field(default_factory=list)
    data: bytes = b""


def take_apart(raw: bytes) -> Sound:
    """Fields and pieces of a file that is sound.

    Raises: ValueError, KeyError: it is not.
    """
    made, at = Sound(raw), 0

    def spot(size: int, what: str) -> int:
        nonlocal at
        made.spots.append(Spot(at, size, what))
        at += size
        if at > len(raw):
            raise ValueError("not sound: it ends early")
        return int.from_bytes(raw[at - size : at], "little")

    def string(what: str) -> None:
        spot(spot(8, f"{what} length"), f"{what} text")

    def value(kind: int) -> None:
        if kind == _STRING:
            string("value")
        elif kind == _ARRAY:
            inner, count = spot(4, "item type"), spot(8, "item count")
            if inner == _STRING:
                for _ in range(count):
                    string("item")
            else:
                spot(count * _SIZES[inner], "items")
        else:
            spot(_SIZES[kind], "number")

    spot(4, "magic")
    spot(4, "version")
    tensors, pairs = spot(8, "tensor count"), spot(8, "pair count")
    for _ in range(pairs):
        begin = at
        string("key")
        value(spot(4, "type"))
        made.pairs.append(raw[begin:at])
    for _ in range(tensors):
        begin = at
        string("name")
        for _ in range(spot(4, "dimensions")):
            spot(8, "dimension")
        spot(4, "tensor type")
        spot(8, "offset")
        made.tensors.append(raw[begin:at])
    made.data = raw[-(-at // 32) * 32 :]
    return made


def put_together(pairs: list[bytes], tensors: list[bytes], data: bytes) -> bytes:
    """A file of pieces: its counts fit, the offsets of its tensors are as they were."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs))
    body = head + b"".join(pairs) + b"".join(tensors)
    return body + bytes(-len(body) % 32) + data


def _number(rng: random.Random, old: int, size: int) -> int:
    new = rng.choice((
        old + 1, old - 1, 2 * old, old // 2, old ^ (1 << rng.randrange(8 * size)),
        rng.choice(_EDGES), -rng.choice(_EDGES), rng.getrandbits(8 * size),
    ))  # fmt: skip
    return new % (1 << 8 * size)


def _change_field(rng: random.Random, sound: Sound) -> tuple[bytes, str]:
    """One field gets another value. Kinds of fields are equally likely, not fields."""
    kinds = sorted({s.what for s in sound.spots if s.size})
    kind = rng.choice(kinds)
    spot = rng.choice([s for s in sound.spots if s.what == kind and s.size])
    raw = bytearray(sound.raw)
    if spot.what.endswith("text") or spot.what == "items" or spot.size > 8:
        for _ in range(rng.choice((1, 1, 4, spot.size))):
            raw[spot.begin + rng.randrange(spot.size)] = rng.choice(
                (0, 32, 255, rng.randrange(256))
            )
        return bytes(raw), f"{spot.what} at {spot.begin} overwritten"
    if spot.what in ("number", "dimension") and rng.random() < 0.3:
        step = rng.choice((4, 8))
        rng_value = rng.choice((0.0, -1.0, float("nan"), float("inf"), 1e-300, 1e38))
        if spot.size == step:
            new = struct.pack("<f" if step == 4 else "<d", rng_value if step == 8 else
                              struct.unpack("<f", struct.pack("<f", rng_value))[0])  # fmt: skip
            raw[spot.begin : spot.begin + step] = new
            return bytes(raw), f"{spot.what} at {spot.begin} set to {rng_value}"
    old = int.from_bytes(raw[spot.begin : spot.begin + spot.size], "little")
    new_value = _number(rng, old, spot.size)
    raw[spot.begin : spot.begin + spot.size] = new_value.to_bytes(spot.size, "little")
    return bytes(raw), f"{spot.what} at {spot.begin}: {old} -> {new_value}"


def _move_pieces(rng: random.Random, sound: Sound) -> tuple[bytes, str]:
    """A pair or tensor is left out, put in twice, or swapped; the counts still fit."""
    pairs, tensors = list(sound.pairs), list(sound.tensors)
    pieces, name = rng.choice(((pairs, "pair"), (tensors, "tensor")))
    index = rng.randrange(len(pieces))
    act = rng.choice(("left out", "twice", "swapped", "renamed"))
    if act == "left out":
        del pieces[index]
    elif act == "twice":
        pieces.insert(rng.randrange(len(pieces)), pieces[index])
    elif act == "swapped":
        other = rng.randrange(len(pieces))
        pieces[index], pieces[other] = pieces[other], pieces[index]
    else:
        other = pieces[rng.randrange(len(pieces))]
        (size,), (theirs,) = (
            struct.unpack_from("<Q", pieces[index]),
            struct.unpack_from("<Q", other),
        )
        pieces[index] = other[: 8 + theirs] + pieces[index][8 + size :]
    return put_together(pairs, tensors, sound.data), f"{name} {index} {act}"


def _retype(rng: random.Random, sound: Sound) -> tuple[bytes, str]:
    """A value becomes one of another type, well formed: a number an array, a text a number."""
    pairs = list(sound.pairs)
    index = rng.randrange(len(pairs))
    (size,) = struct.unpack_from("<Q", pairs[index])
    key = pairs[index][: 8 + size]
    kind = rng.choice((*_SIZES, _STRING, _ARRAY))
    if kind == _STRING:
        text = rng.choice((b"", b"llama", b"x" * 300, b"\xff\xfe", b"\0", b"gpt2", b"yarn"))
        value = struct.pack("<Q", len(text)) + text
    elif kind == _ARRAY:
        inner, count = rng.choice((*_SIZES, _STRING)), rng.choice((0, 1, 2, 64, 600))
        item = struct.pack("<Q", 1) + b"a" if inner == _STRING else None
        value = struct.pack("<IQ", inner, count)
        value += item * count if item else rng.randbytes(count * _SIZES[inner])
    else:
        value = rng.choice(_EDGES).to_bytes(8, "little")[: _SIZES[kind]]
    pairs[index] = key + struct.pack("<I", kind) + value
    return put_together(pairs, sound.tensors, sound.data), f"pair {index} is of type {kind}"


def _shorten_an_array(rng: random.Random, sound: Sound) -> tuple[bytes, str]:
    """An array loses items, its count says so."""
    pairs = list(sound.pairs)
    arrays = []
    for i, pair in enumerate(pairs):
        (size,) = struct.unpack_from("<Q", pair)
        if struct.unpack_from("<I", pair, 8 + size)[0] == _ARRAY:
            arrays.append((i, 12 + size))
    if not arrays:
        return _move_pieces(rng, sound)
    index, at = rng.choice(arrays)
    pair = pairs[index]
    inner, count = struct.unpack_from("<IQ", pair, at)
    kept = rng.choice((0, 1, count // 2, max(0, count - 1)))
    end = at + 12
    for _ in range(min(kept, count)):
        end += 8 + struct.unpack_from("<Q", pair, end)[0] if inner == _STRING else _SIZES[inner]
    pairs[index] = pair[:at] + struct.pack("<IQ", inner, kept) + pair[at + 12 : end]
    return put_together(pairs, sound.tensors, sound.data), f"array of pair {index}: {kept} items"


def _bytes(rng: random.Random, sound: Sound) -> tuple[bytes, str]:
    """Some bytes anywhere, most in the header."""
    raw = bytearray(sound.raw)
    header = len(raw) - len(sound.data)
    places = []
    for _ in range(rng.choice((1, 2, 8))):
        place = rng.randrange(header if rng.random() < 0.9 else len(raw))
        raw[place] = rng.randrange(256)
        places.append(place)
    return bytes(raw), f"bytes at {places}"


def _cut(rng: random.Random, sound: Sound) -> tuple[bytes, str]:
    header = len(sound.raw) - len(sound.data)
    size = rng.randrange(header if rng.random() < 0.8 else len(sound.raw))
    return sound.raw[:size], f"cut at {size}"


def _insert(rng: random.Random, sound: Sound) -> tuple[bytes, str]:
    place, size = rng.randrange(len(sound.raw) - len(sound.data)), rng.choice((1, 4, 8, 32))
    return sound.raw[:place] + rng.randbytes(size) + sound.raw[place:], f"{size} bytes at {place}"


_MUTATIONS = (
    *[_change_field] * 9,
    *[_move_pieces] * 3,
    *[_retype] * 4,
    *[_shorten_an_array] * 2,
    _bytes, _bytes, _cut, _insert,
)  # fmt: skip


def mutate(sound: Sound, seed: int) -> tuple[bytes, str]:
    """A damaged file, and what was done to it."""
    rng = random.Random(seed)
    raw, what = rng.choice(_MUTATIONS)(rng, sound)
    if rng.random() < 0.1:
        try:
            raw, more = rng.choice(_MUTATIONS)(rng, take_apart(raw))
            what += f"; {more}"
        except (ValueError, KeyError, IndexError, struct.error, OverflowError, MemoryError):
            pass
    return raw, what
