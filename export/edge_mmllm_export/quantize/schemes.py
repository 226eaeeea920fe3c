"""Storage schemes and the plan that gives each weight one.

`f32 | f16 | int8 | int4` mean the same in every output format. Schemes that need calibration
data (GPTQ, AWQ, importance matrices) belong in a sibling module and return the same `Quantized`
blocks as `blocks.quantize`, so that no backend has to know how the numbers were chosen.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from edge_mmllm.errors import UsageError
from edge_mmllm.modality import MODALITIES

if TYPE_CHECKING:
    from edge_mmllm_export.weights import Parameter

Zero = Literal["none", "int", "float"]
QUANT_NAMES = ("f32", "f16", "int8", "int4")
BLOCK_SIZES = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Scheme:
    """How a weight is stored: `w = (q - zero) * scale` in blocks along K.

    Attributes:
        bits: 32 and 16 are floats, 8 and 4 are quantized.
        block_size: weights that share a scale.
        zero: `none` (symmetric: zero is 2^(bits-1)), `int` (a `bits`-wide zero for each block),
            `float` (a float32 zero: `w = q * scale + minimum`, as GGUF's Q4_1).
    """

    bits: int = 32
    block_size: int = 32
    zero: Zero = "none"

    @property
    def quantized(self) -> bool:
        return self.bits < 16

    @property
    def scale_bits(self) -> int:
        """A scale is a float16; beside a float minimum it is a float32, so that data that came
        from Q4_1 stays as it was."""
        return 32 if self.zero == "float" else 16

    @property
    def name(self) -> str:
        if not self.quantized:
            return f"f{self.bits}"
        suffix = {"none": "", "int": "-asym", "float": "-min"}[self.zero]
        return f"int{self.bits}-b{self.block_size}{suffix}"

    def bits_per_weight(self) -> float:
        """Stored bits, scale and zero included."""
        if not self.quantized:
            return float(self.bits)
        zero = {"none": 0, "int": self.bits, "float": 32}[self.zero]
        return self.bits + (self.scale_bits + zero) / self.block_size


F32 = Scheme(32)
F16 = Scheme(16)


@dataclass(frozen=True)
class QuantPlan:
    """What `--quant`, `--block-size`, `--zero` and the overrides ask for.

    Attributes:
        name: one of `QUANT_NAMES`: the scheme of matrices.
        embedding: the scheme of embedding and head; None means 8 bits where `name` is int4,
            else the same as matrices.
        overrides: `(pattern, scheme)` pairs over our names; the last match wins.
        encoder: the scheme of a modality encoder's matrices; None means 8 bits where `name` is
            int4, else the same as the backbone's.
        projector: of a projector's; None means f16 where `name` is int8 or int4.
    """

    name: str = "int4"
    block_size: int = 32
    zero: Zero = "none"
    embedding: str | None = None
    overrides: tuple[tuple[str, Scheme], ...] = ()
    encoder: str | None = None
    projector: str | None = None

    def __post_init__(self) -> None:
        for name in (self.name, self.embedding, self.encoder, self.projector):
            if name is not None and name not in QUANT_NAMES:
                raise UsageError(f"unknown quantization {name!r}", expected=" | ".join(QUANT_NAMES))
        if self.block_size not in BLOCK_SIZES:
            raise UsageError(
                f"unsupported block size {self.block_size}",
                expected=" | ".join(map(str, BLOCK_SIZES)),
            )

    def _scheme(self, name: str) -> Scheme:
        bits = {"f32": 32, "f16": 16, "int8": 8, "int4": 4}[name]
        # Eight bits need no zero point: the range is lost by at most one bit in 255.
        return Scheme(bits, self.block_size, self.zero if bits == 4 else "none")

    def of(self, p: Parameter) -> Scheme:
        """The scheme of one parameter. Vectors are always float32, tables float16 at the least."""
        if p.role == "vector":
            return F32
        if p.role == "table":
            return F32 if self.name == "f32" else F16
        for pattern, scheme in reversed(self.overrides):
            if fnmatch.fnmatchcase(p.name, pattern):
                if p.role == "embedding" and scheme.quantized and scheme.zero == "float":
                    raise UsageError(
                        "an embedding cannot be stored with a float minimum",
                        where=p.name,
                        expected=f"{scheme.name.removesuffix('-min')}, or with -asym",
                        found=f"{pattern}={scheme.name}",
                    )
                return _fit(scheme, p)
        if p.role in ("embedding", "head"):
            part = component(p.name)
            own = "int8" if self.name == "int4" else self.name
            name = self.of_component(part) if part else self.embedding or own
            scheme = self._scheme(name)
            if scheme.bits == 8 and self.name == "int4":
                # At 8 bits a block of 128 costs no quality and 0.75 bits less than one of 32.
                scheme = replace(scheme, block_size=max(128, self.block_size))
            if p.role == "embedding" and scheme.zero == "float":
                # Rows are picked by GatherBlockQuantized, whose zero points are integers.
                scheme = replace(scheme, zero="int")
            return _fit(scheme, p)
        return _fit(self._scheme(self.of_component(component(p.name))), p)

    def of_component(self, part: str | None) -> str:
        """The scheme's name for matrices of `encoder`, `projector` or (None) the backbone."""
        if part == "encoder":
            return self.encoder or ("int8" if self.name == "int4" else self.name)
        if part == "projector":
            return self.projector or ("f16" if self.name in ("int8", "int4") else self.name)
        return self.name


def component(name: str) -> str | None:
    """`encoder` or `projector` of a name such as `image.encoder.layers.0.attn.q`; None for the
    backbone's."""
    parts = name.split(".", 2)
    if len(parts) > 2 and parts[0] in MODALITIES and parts[1] in ("encoder", "projector"):
        return parts[1]
    return "projector" if name.startswith("output.") else None


def _fit(scheme: Scheme, p: Parameter) -> Scheme:
    """Embeddings (read by row) need blocks that divide the row; others may end in a short block,
    but none is twice as long as the row."""
    if not scheme.quantized:
        return scheme
    size = scheme.block_size
    if p.role in ("embedding", "head"):
        while p.shape[1] % size and size > 16:
            size //= 2
        if p.shape[1] % size:
            return F16
    while size // 2 >= max(p.shape[1], 16):
        size //= 2
    return replace(scheme, block_size=size)


def parse_override(text: str) -> tuple[str, Scheme]:
    """`PATTERN=SCHEME`, e.g. `layers.0.*=int8` or `*.mlp.down=int4-b64-asym`.

    Raises:
        UsageError: malformed, or an unknown scheme.
    """
    pattern, _, name = text.partition("=")
    parts = name.split("-")
    simple: dict[str, Callable[[], Scheme]] = {
        "f32": lambda: F32,
        "f16": lambda: F16,
        "int8": lambda: Scheme(8),
        "int4": lambda: Scheme(4),
    }
    if pattern and parts[0] in simple:
        scheme = simple[parts[0]]()
        for part in parts[1:]:
            if part.startswith("b") and part[1:].isdigit() and int(part[1:]) in BLOCK_SIZES:
                scheme = replace(scheme, block_size=int(part[1:]))
            elif part == "asym":
                scheme = replace(scheme, zero="int")
            elif part == "min" and scheme.bits == 4:  # no kernel takes 8 bits with a minimum
                scheme = replace(scheme, zero="float")
            else:
                break
        else:
            return pattern, scheme
    raise UsageError(
        f"cannot read the override {text!r}",
        expected="PATTERN=f32|f16|int8[-bSIZE][-asym]|int4[-bSIZE][-asym|-min]",
        fix="for example --override 'layers.0.*=int8-b64'",
    )
