"""What a checkpoint wants done to a sound: frozen, and stored in the bundle's manifest.

`from_json` reads a manifest that nobody vouches for: every member is bounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edge_mmllm._fields import Fields
from edge_mmllm.errors import UnsupportedArchitecture

_RATES = (4000, 96_000)  # Hz
_MOST_FEATURES = 1 << 23  # of one sound; Whisper's are 3000 * 128


@dataclass(frozen=True)
class LogMel:
    """Whisper's features.

    Attributes:
        mels: filters.
        n_fft, hop: samples of a frame, and from one frame to the next.
        seconds: every sound is cut or padded to this length.
    """

    mels: int
    n_fft: int = 400
    hop: int = 160
    seconds: int = 30


@dataclass(frozen=True)
class Waveform:
    """The samples themselves (Wav2Vec2, HuBERT).

    Attributes:
        normalise: scale to zero mean and unit variance.
    """

    normalise: bool = True


@dataclass(frozen=True)
class AudioSettings:
    """Everything `prepare_audio` needs to know of a checkpoint.

    Attributes:
        layout: what the encoder takes.
        rate: samples a second it was trained on; a sound of another rate is resampled.
        most_seconds: a longer sound is refused unread.
    """

    layout: LogMel | Waveform
    rate: int = 16000
    most_seconds: int = 600

    def to_json(self) -> dict[str, Any]:
        """The JSON object that `from_json` reads."""
        layout: dict[str, Any]
        match self.layout:
            case LogMel():
                layout = {
                    "kind": "log_mel",
                    "mels": self.layout.mels,
                    "n_fft": self.layout.n_fft,
                    "hop": self.layout.hop,
                    "seconds": self.layout.seconds,
                }
            case Waveform():
                layout = {"kind": "waveform", "normalise": self.layout.normalise}
        return {"layout": layout, "rate": self.rate, "most_seconds": self.most_seconds}

    @staticmethod
    def from_json(value: object, where: str = "audio") -> AudioSettings:
        """Reads settings that nobody vouches for.

        Raises:
            CorruptBundle: a member is missing, of a wrong type or out of bounds.
        """
        fields = Fields(value, where)
        one = fields.child("layout")
        layout: LogMel | Waveform
        if one.one_of("kind", ("log_mel", "waveform")) == "log_mel":
            n_fft = _within(one, "n_fft", 16, 4096)
            if n_fft % 2:
                raise one.fail("n_fft", "an even integer")
            layout = LogMel(
                mels=_within(one, "mels", 1, 512),
                n_fft=n_fft,
                hop=_within(one, "hop", 8, n_fft),
                seconds=_within(one, "seconds", 1, 120),
            )
        else:
            layout = Waveform(one.flag("normalise"))
        rate = _within(fields, "rate", *_RATES)
        if isinstance(layout, LogMel):
            features = layout.seconds * rate // layout.hop * layout.mels
            if features > _MOST_FEATURES:
                raise one.fail("mels", f"at most {_MOST_FEATURES} features in all")
        return AudioSettings(layout, rate, _within(fields, "most_seconds", 1, 3600))


def read_audio_settings(
    config: Mapping[str, Any], where: str = "preprocessor_config.json"
) -> AudioSettings:
    """The settings of a published feature extractor (for the exporter).

    Args:
        config: the parsed `preprocessor_config.json`; of a `processor_config.json` its
            `feature_extractor` is read.
        where: its name, for errors.

    Raises:
        UnsupportedArchitecture: a feature extractor that is not defined here.
        CorruptBundle: a member of a wrong type or out of bounds.
    """
    fields = Fields(config, where)
    if isinstance(config.get("feature_extractor"), Mapping):
        fields = fields.child("feature_extractor")
    name = fields.text("feature_extractor_type")
    rate = fields.maybe_integer("sampling_rate", least=1) or 16000
    layout: LogMel | Waveform
    if name == "WhisperFeatureExtractor":
        if fields.value.get("dither"):
            raise _unsupported(fields, "dither", "0")
        if fields.value.get("padding_value"):
            raise _unsupported(fields, "padding_value", "0")
        layout = LogMel(
            fields.maybe_integer("feature_size", least=1) or 80,
            fields.maybe_integer("n_fft", least=1) or 400,
            fields.maybe_integer("hop_length", least=1) or 160,
            fields.maybe_integer("chunk_length", least=1) or 30,
        )
    elif name == "Wav2Vec2FeatureExtractor":
        if (fields.maybe_integer("feature_size") or 1) != 1:
            raise _unsupported(fields, "feature_size", "1")
        layout = Waveform(fields.flag("do_normalize", default=True))
    else:
        raise UnsupportedArchitecture(
            f"no preprocessing is defined for the feature extractor {name!r}",
            where=fields.where,
            expected="WhisperFeatureExtractor or Wav2Vec2FeatureExtractor",
            found=name,
            fix="an issue, with the checkpoint's name",
        )
    return AudioSettings.from_json(AudioSettings(layout, rate).to_json(), where)


def _within(fields: Fields, name: str, least: int, most: int) -> int:
    value = fields.integer(name, least=least)
    if value > most:
        raise fields.fail(name, f"an integer from {least} to {most}")
    return value


def _unsupported(fields: Fields, name: str, expected: str) -> UnsupportedArchitecture:
    return UnsupportedArchitecture(
        "this use of the feature extractor is not defined",
        where=fields.path(name),
        expected=expected,
        found=repr(fields.value.get(name)),
    )
