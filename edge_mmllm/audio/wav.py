"""Reads WAV files that nobody vouches for: RIFF/WAVE, PCM of 8, 16, 24, 32 bits, float of 32, 64.

Layout (little-endian): "RIFF", u32 size, "WAVE", then chunks: four-letter name, u32 size, that
many bytes, one more where the size is odd. "fmt " holds u16 format (1 PCM, 3 float, 0xFFFE: the
format is the first u16 of the GUID at byte 24), u16 channels, u32 rate, u32 bytes a second,
u16 bytes a sample of all channels, u16 bits. "data" holds the samples, channels interleaved.
No size in the file is trusted: nothing is allocated for bytes that are not there.
"""

from __future__ import annotations

import io
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from edge_mmllm.errors import CorruptMedia, MediaTooLarge, UnsupportedMedia, UsageError

Samples = npt.NDArray[np.float32]

_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
_CODECS = {2: "ADPCM", 6: "A-law", 7: "mu-law", 0x11: "IMA ADPCM", 0x55: "MP3", 0xFF: "AAC"}
_MOST_CHUNKS = 4096
_MOST_CHANNELS = 64
_RATES = (1000, 768_000)  # Hz
#: Sizes that programs write into a stream whose length they do not know yet.
_UNKNOWN = (0xFFFFFFFF, 0x7FFFFFFF, 0xFFFFFF00, 0x7FFFF000)

#: What else people hand in: (offset, first bytes, what it is)
_OTHER = (
    (0, b"ID3", "an MP3 file"),
    (0, b"\xff\xfb", "an MP3 file"),
    (0, b"\xff\xf3", "an MP3 file"),
    (0, b"fLaC", "a FLAC file"),
    (0, b"OggS", "an Ogg file (Vorbis or Opus)"),
    (4, b"ftyp", "an MP4, M4A or MOV file"),
    (0, b"\x1a\x45\xdf\xa3", "a Matroska or WebM file"),
    (0, b"FORM", "an AIFF file"),
    (0, b"RF64", "an RF64 file (WAV past 4 GB)"),
    (0, b"RIFX", "a big-endian WAV file"),
    (0, b".snd", "an AU file"),
    (0, b"#!AMR", "an AMR file"),
)


@dataclass(frozen=True)
class Wav:
    """What a file holds.

    Attributes:
        samples: float32 `(samples, channels)`, within -1..1 for PCM.
        rate: Hz.
        seconds: length of the file's sound, of which `samples` may be the beginning.
    """

    samples: Samples
    rate: int
    seconds: float


@dataclass(frozen=True)
class _Format:
    kind: int
    channels: int
    rate: int
    bits: int

    @property
    def block_bytes(self) -> int:
        return self.channels * self.bits // 8


def read_wav(
    source: str | os.PathLike[str] | bytes | BinaryIO,
    *,
    most_seconds: float = 600.0,
    first_seconds: float | None = None,
) -> Wav:
    """Reads a WAV file, or only its first `first_seconds`.

    Raises:
        UsageError: there is no such file, or `source` is of another type.
        UnsupportedMedia: not WAV, or a codec that is not read.
        MediaTooLarge: longer than `most_seconds`; the samples were not read.
        CorruptMedia: damaged, cut short or empty.
    """
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if not path.is_file():
            raise UsageError("there is no such sound file", where=str(path))
        try:
            with path.open("rb") as file:
                return _read(file, str(path), most_seconds, first_seconds)
        except OSError as error:
            raise UsageError(
                "the sound file cannot be read", where=str(path), found=str(error)
            ) from error
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _read(io.BytesIO(bytes(source)), "bytes", most_seconds, first_seconds)
    if hasattr(source, "read"):
        seekable = hasattr(source, "seekable") and source.seekable()
        stream = source if seekable else io.BytesIO(source.read())
        return _read(stream, "file", most_seconds, first_seconds)
    raise UsageError(
        "this is not a sound",
        expected="a path, bytes, a binary file, or a numpy array with its rate",
        found=type(source).__name__,
    )


def _read(file: BinaryIO, where: str, most_seconds: float, first_seconds: float | None) -> Wav:
    start = file.tell()
    end = file.seek(0, os.SEEK_END)
    file.seek(start)
    head = file.read(12)
    if head[:4] != b"RIFF" or head[8:12] != b"WAVE":
        raise _not_wav(head, where)
    form: _Format | None = None
    for _ in range(_MOST_CHUNKS):
        header = file.read(8)
        if len(header) < 8:
            break
        name, size = header[:4], int.from_bytes(header[4:], "little")
        left = end - file.tell()
        if name == b"data":
            if form is None:
                raise CorruptMedia("the sound's samples come before its format", where=where)
            if size in _UNKNOWN:
                size = left
            if size > left:
                raise CorruptMedia(
                    "the sound file is cut short",
                    where=where,
                    expected=f"{size} bytes of samples",
                    found=f"{left}",
                )
            return _samples(file, size, form, where, most_seconds, first_seconds)
        if size > left:
            break
        if name == b"fmt ":
            form = _format(file.read(min(size, 64)), where)
            file.seek(size - min(size, 64), os.SEEK_CUR)
        else:
            file.seek(size, os.SEEK_CUR)
        file.seek(size & 1, os.SEEK_CUR)
    raise CorruptMedia(
        "the sound file has no samples",
        where=where,
        expected='a "fmt " and a "data" chunk',
        found="the end of the file",
    )


def _format(data: bytes, where: str) -> _Format:
    if len(data) < 16:
        raise CorruptMedia(
            'the "fmt " chunk is too short', where=where, expected="16 bytes", found=str(len(data))
        )
    kind, channels, rate, _, block, bits = struct.unpack_from("<HHIIHH", data)
    if kind == _EXTENSIBLE:
        if len(data) < 40:
            raise CorruptMedia("the extensible format is cut short", where=where)
        kind = int.from_bytes(data[24:26], "little")
    if (kind, bits) not in {(_PCM, b) for b in (8, 16, 24, 32)} | {(_FLOAT, 32), (_FLOAT, 64)}:
        codec = {_PCM: "PCM", _FLOAT: "float"}.get(kind, _CODECS.get(kind, f"codec {kind:#x}"))
        raise UnsupportedMedia(
            "the sound's coding is not read",
            where=where,
            expected="PCM of 8, 16, 24 or 32 bits, or float of 32 or 64",
            found=f"{codec} of {bits} bits",
            fix="convert it to 16-bit PCM WAV: ffmpeg -i IN -c:a pcm_s16le OUT.wav",
        )
    form = _Format(kind, channels, rate, bits)
    if not 1 <= channels <= _MOST_CHANNELS or block != form.block_bytes:
        raise CorruptMedia(
            "the sound's channels make no sense",
            where=where,
            expected=f"1 to {_MOST_CHANNELS} channels, channels * bits / 8 bytes a block",
            found=f"{channels} channels of {bits} bits, {block} bytes a block",
        )
    if not _RATES[0] <= rate <= _RATES[1]:
        raise CorruptMedia(
            "the sound's rate makes no sense",
            where=where,
            expected=f"{_RATES[0]} to {_RATES[1]} Hz",
            found=f"{rate} Hz",
        )
    return form


def _samples(
    file: BinaryIO,
    size: int,
    form: _Format,
    where: str,
    most_seconds: float,
    first_seconds: float | None,
) -> Wav:
    count = size // form.block_bytes
    seconds = count / form.rate
    if count == 0:
        raise CorruptMedia("the sound has no samples", where=where)
    if seconds > most_seconds:
        raise MediaTooLarge(
            "the sound is too long",
            where=where,
            expected=f"at most {most_seconds:g} s",
            found=f"{seconds:.1f} s",
            fix="cut it, or raise most_seconds",
        )
    if first_seconds is not None:
        count = min(count, math.ceil(first_seconds * form.rate))
    data = file.read(count * form.block_bytes)
    if len(data) < count * form.block_bytes:
        raise CorruptMedia("the sound file is cut short", where=where)
    samples = _decode(data, form, where).reshape(count, form.channels)
    return Wav(samples, form.rate, seconds)


def _decode(data: bytes, form: _Format, where: str) -> Samples:
    if form.kind == _FLOAT:
        values = np.frombuffer(data, "<f4" if form.bits == 32 else "<f8").astype(np.float32)
        if not np.isfinite(values).all():
            raise CorruptMedia("the sound holds NaN or infinity", where=where)
        return values
    if form.bits == 8:  # unsigned, silence is 128
        return (np.frombuffer(data, np.uint8).astype(np.float32) - 128) / np.float32(128)
    if form.bits == 16:
        return np.frombuffer(data, "<i2").astype(np.float32) / np.float32(32768)
    if form.bits == 32:
        return (np.frombuffer(data, "<i4") / 2147483648).astype(np.float32)
    raw: npt.NDArray[Any] = np.frombuffer(data, np.uint8).reshape(-1, 3)
    wide = np.zeros((len(raw), 4), np.uint8)
    wide[:, 1:] = raw  # the 24 bits on top, so that the sign is right
    return (wide.reshape(-1).view("<i4") / 2147483648).astype(np.float32)


def _not_wav(head: bytes, where: str) -> CorruptMedia | UnsupportedMedia:
    if not head:
        return CorruptMedia("the sound file is empty", where=where)
    kinds = [what for at, magic, what in _OTHER if head[at : at + len(magic)] == magic]
    return UnsupportedMedia(
        "this is not a sound that can be read",
        where=where,
        expected="WAV (RIFF/WAVE)",
        found=kinds[0] if kinds else f"a file that begins {head[:8].hex(' ')}",
        fix="convert it to 16-bit PCM WAV: ffmpeg -i IN -ac 1 -ar 16000 -c:a pcm_s16le OUT.wav",
    )
