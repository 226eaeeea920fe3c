"""The quality gate on pictures (and what other modalities add): the whole pipeline, judged.

The same preprocessing and the same prompt go through the artefact's stages and through the
oracle's; what the decoder says after the picture is compared as for text.
"""

from __future__ import annotations

import io
import wave
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edge_mmllm_export.families.composite import Composite, scoped
from edge_mmllm_export.oracle import Oracle
from edge_mmllm_export.weights import Weight

if TYPE_CHECKING:
    from edge_mmllm_runtime.prompted import Prompted
    from edge_mmllm_runtime.session import Session

Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]

#: Tokens of text judged after the picture's question.
TEXT_TOKENS = 64
_QUESTION = "Describe what you are given."


def picture() -> bytes:
    """A PNG of 96 x 80 pixels with what pictures have: slopes, edges, texture, colours."""
    y, x = np.mgrid[:80, :96]
    image = np.stack([x * 2, y * 3, 255 - x - y], axis=-1).astype(np.int64)
    for i, (cy, cx, r) in enumerate(((24, 30, 16), (50, 64, 20), (60, 20, 9))):
        image[(y - cy) ** 2 + (x - cx) ** 2 < r * r] = np.roll((230, 60, 20), i)
    image[10:16, 50:90] = 255
    image += np.random.default_rng(0).integers(-12, 13, image.shape)
    rows = np.clip(image, 0, 255).astype(np.uint8).reshape(80, -1)
    data = b"".join(b"\0" + row.tobytes() for row in rows)

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return len(content).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    # 8 bits, RGB. Source: PNG specification, 11.2.
    head = (96).to_bytes(4, "big") + (80).to_bytes(4, "big") + bytes((8, 2, 0, 0, 0))
    parts = (chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(data, 9)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def animation() -> bytes:
    """A GIF of eight frames of 48 x 40 pixels, in which a disc moves."""
    from PIL import Image

    y, x = np.mgrid[:40, :48]
    frames = []
    for i in range(8):
        image = np.stack([x * 5, y * 6, 128 + 0 * x], axis=-1)
        image[(y - 20) ** 2 + (x - 6 - 5 * i) ** 2 < 60] = (240, 40, 30)
        frames.append(Image.fromarray(image.astype(np.uint8)))
    out = io.BytesIO()
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:], duration=250, loop=0)
    return out.getvalue()


def sound() -> bytes:
    """Two seconds of a rising tone with noise, as 16-bit WAV of 16 kHz."""
    t = np.arange(32000) / 16000
    wave_ = 0.5 * np.sin(2 * np.pi * (220 * t + 180 * t * t)) * np.exp(-t)
    wave_ += 0.02 * np.random.default_rng(0).standard_normal(len(t))
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes((np.clip(wave_, -1, 1) * 32767).astype("<i2").tobytes())
    return out.getvalue()


#: Modality -> (suffix of its sample's file, what makes it). One without a sample is not judged.
SAMPLES: dict[str, tuple[str, Callable[[], bytes]]] = {
    "image": (".png", picture),
    "video": (".gif", animation),
    "audio": (".wav", sound),
}


class OracleStages:
    """The stages of a definition in float32, for `Perception` to drive as it drives an engine.

    Args:
        joined: an item's stages are one, as in a GGUF bundle.
    """

    def __init__(
        self, model: Composite, weights: Mapping[str, Weight], *, joined: bool = False
    ) -> None:
        self._joined = joined
        self._definitions = {d.name: d for d in model.stage_definitions()}
        self._oracle, self._weights = Oracle(model, weights), weights

    def load_stage(self, name: str) -> bool:
        """Nothing to load."""
        return False

    def run_stage(self, name: str, inputs: Mapping[str, NDArray[Any]]) -> Float32:
        """See `Engine.run_stage`."""
        definition = self._definitions[name]
        given = [inputs[port.name] for port in definition.ports]
        own = scoped(self._weights, definition.scope)
        result: Float32 = definition.run(self._oracle.ops(), own, given)
        following = name.replace("encode_", "project_")
        if self._joined and following != name and following in self._definitions:
            return self.run_stage(following, {**inputs, definition.output: result})
        return result


def media_ids(session: Session, name: str, source: Path, text: Int64, limit: int) -> Int64:
    """The ids to judge by: a question about the sample, its rows as placeholder ids, and text.

    Args:
        text: ids that follow, at most `TEXT_TOKENS` of them.
        limit: ids in all.
    """
    token = session.spec.modalities[name].token_id
    others = [m.token_id for m in session.spec.modalities.values()]
    text = text[~np.isin(text, others)][:TEXT_TOKENS]
    if session.spec.text.tokenizer == "none":
        asked = session.encode(np.array([token]), {name: [source]})
    else:
        asked = session.encode(_QUESTION, {name: [source]})
    return np.concatenate([asked.tokens, text])[:limit]


def answers_from(prompt: Prompted) -> int:
    """The first position that is judged: the last one that takes a row."""
    ends = [span.start + span.count for span in prompt.spans]
    return max([*ends, *(look.start + 1 for look in prompt.looks)], default=1) - 1


def oracle_logits(
    model: Composite,
    weights: Mapping[str, Weight],
    session_prompt: Prompted,
    answer: Int64 | None = None,
) -> Float32:
    """The oracle's logits for all positions of a prompt whose rows are the oracle's too, or of an
    answer to it, by an encoder-decoder."""
    oracle = Oracle(model, weights)
    x = session_prompt.embeddings(oracle.embed)
    oracle.start(x)
    for look in session_prompt.looks:
        oracle.look(look.rows(), (look.start, look.end))
    if answer is not None:
        return oracle.forward(answer)
    logits: Float32 = oracle.forward_embeddings(x, places=session_prompt.own_places())
    return logits
