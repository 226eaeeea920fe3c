"""Whisper's encoder, and Qwen2-Audio's, which pools pairs of rows before the last norm.

Whisper hears 30 seconds always, silence included. Qwen2-Audio looks away from what lies behind the
end of a recording; since rows see each other in attention alone, those are dropped before the
first layer, and a short recording costs less.

Source: Whisper (arXiv 2212.04356), Qwen2-Audio (2407.10759); `WhisperEncoder` and
`Qwen2AudioEncoder` of transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from edge_mmllm_export.checkpoints.base import Layout
from edge_mmllm_export.families.composite import Port
from edge_mmllm_export.models.config import MAX_LAYERS, Fields
from edge_mmllm_export.models.vit import Block, activation_of, check_heads
from edge_mmllm_export.ops.base import Ops
from edge_mmllm_export.weights import Parameter, Source, Weight

T = TypeVar("T")

#: Width of both convolutions; the second takes every other row.
_KERNEL, STRIDE = 3, 2
#: Rows that become one in Qwen2-Audio.
POOLED = 2


@dataclass(frozen=True)
class WhisperConfig:
    """Sizes of the encoder.

    Attributes:
        mels: bands of the log-mel spectrum.
        positions: rows after the convolutions, half the frames it takes in.
        pooled: Qwen2-Audio's variant.
    """

    mels: int
    positions: int
    layers: int
    block: Block
    pooled: bool = False


class Whisper:
    """Two convolutions, learned (or sinusoidal, stored) positions, pre-norm layers."""

    def __init__(self, config: WhisperConfig) -> None:
        c = self.config = config
        self.name = "qwen2_audio_encoder" if c.pooled else "whisper"
        self.tokens = 0 if c.pooled else c.positions
        self.width = c.block.hidden_size
        self.frames = c.positions * STRIDE

    @classmethod
    def from_config(cls, f: Fields) -> Whisper:
        """Read a published config of Whisper or of Qwen2-Audio's encoder.

        Raises: CheckpointError, UnsupportedArchitecture.
        """
        kind = f.one_of("model_type", ("whisper", "qwen2_audio_encoder"))
        large = kind != "whisper"  # defaults of the two classes
        hidden = f.size("d_model", 1280 if large else 384)
        heads = f.size("encoder_attention_heads", 20 if large else 6)
        check_heads(f, hidden, heads)
        block = Block(
            hidden,
            f.size("encoder_ffn_dim", 5120 if large else 1536),
            heads,
            1e-5,
            activation_of(f, "activation_function", "gelu"),
            biases="qv",
        )
        return cls(
            WhisperConfig(
                mels=f.size("num_mel_bins", 128 if large else 80),
                positions=f.size("max_source_positions", 1500),
                layers=f.size("encoder_layers", 32 if large else 4, limit=MAX_LAYERS),
                block=block,
                pooled=large,
            )
        )

    def ports(self) -> tuple[Port, ...]:
        """`mel` log-mel spectrum; `frames`, in Qwen2-Audio, how many of them hold sound."""
        mel = Port("mel", "float32", (self.config.mels, self.frames))
        return (mel, Port("frames", "int64", (1,))) if self.config.pooled else (mel,)

    def tokens_of(self, frames: int) -> int:
        """Rows that a recording of so many frames becomes."""
        return -(-frames // STRIDE) // POOLED if self.config.pooled else self.config.positions

    def parameters(self) -> list[Parameter]:
        c, h = self.config, self.config.block.hidden_size
        out = [
            Parameter("conv1", (h, c.mels * _KERNEL)),
            Parameter("conv1_bias", (h,), "vector"),
            Parameter("conv2", (h, h * _KERNEL)),
            Parameter("conv2_bias", (h,), "vector"),
            Parameter("position", (c.positions, h), "vector"),
        ]
        for i in range(c.layers):
            out += c.block.parameters(f"layers.{i}.")
        return out + [Parameter(n, (h,), "vector") for n in ("norm", "norm_bias")]

    def sources(self, layout: Layout, prefix: str) -> dict[str, Source]:
        """Our names to the hub's, which begin with `prefix`, e.g. `model.encoder.`."""
        c, h = self.config, self.config.block.hidden_size
        out = {
            "conv1": Source(f"{prefix}conv1.weight", stored=(h, c.mels, _KERNEL)),
            "conv1_bias": Source(f"{prefix}conv1.bias"),
            "conv2": Source(f"{prefix}conv2.weight", stored=(h, h, _KERNEL)),
            "conv2_bias": Source(f"{prefix}conv2.bias"),
            "position": Source(f"{prefix}embed_positions.weight"),
            "norm": Source(f"{prefix}layer_norm.weight"),
            "norm_bias": Source(f"{prefix}layer_norm.bias"),
        }
        for i in range(c.layers):
            out |= c.block.sources(f"layers.{i}.", f"{prefix}layers.{i}.", _HUB_NAMES)
        return out

    def ignored(self, prefix: str) -> tuple[str, ...]:
        """Every tensor of the encoder is used."""
        return ()

    def encode(self, op: Ops[T], w: Mapping[str, Weight], mel: T, frames: T | None = None) -> T:
        """Log-mel `(mels, frames)` -> `(tokens, width)`.

        Args:
            frames: int64 `(1,)`, how many frames hold sound; for Qwen2-Audio.
        """
        c = self.config
        x = op.input_rows(mel, c.mels, transposed=True)
        x = op.windows(x, _KERNEL, padding=1)
        x = op.activation(op.linear(x, w["conv1"], bias=(w["conv1_bias"],))[0], "gelu")
        x = op.windows(x, _KERNEL, stride=STRIDE, padding=1)
        x = op.activation(op.linear(x, w["conv2"], bias=(w["conv2_bias"],))[0], "gelu")
        x = op.add(x, op.table(w["position"]))
        if frames is not None:
            x = op.first_rows(x, frames, STRIDE)
        for i in range(c.layers):
            x = c.block.forward(op, w, f"layers.{i}.", x)
        if c.pooled:
            x = op.average_rows(x, POOLED)
        return op.norm(x, w["norm"], eps=c.block.norm_eps, bias=w["norm_bias"])


_HUB_NAMES = {
    "norm_attn": "self_attn_layer_norm",
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.out_proj",
    "norm_mlp": "final_layer_norm",
    "mlp.up": "fc1",
    "mlp.down": "fc2",
}
