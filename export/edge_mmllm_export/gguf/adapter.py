"""A LoRA adapter (PEFT layout) as a GGUF file, which llama.cpp applies while the model runs.

For a tensor `NAME` of the model's file there are `NAME.lora_a`, `(r, K)`, and `NAME.lora_b`,
`(N, r)`, in float32; llama.cpp adds `alpha / r * B A`. Rows of B are where the model's file has
them: its own order of rotary rows, a part of a fused projection. What the checkpoint's adapter
scales otherwise (rsLoRA, patterns) goes into B. Source: llama.cpp src/llama-adapter.cpp.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np

from edge_mmllm.errors import MissingDependency, OutputExists, UnsupportedArchitecture
from edge_mmllm_export.checkpoints import open_checkpoint
from edge_mmllm_export.checkpoints.lora import Factors, LoraCheckpoint
from edge_mmllm_export.families.composite import Composite
from edge_mmllm_export.gguf.layout import StoredTensor, Wanted, layout
from edge_mmllm_export.models import build
from edge_mmllm_export.quantize.schemes import QuantPlan
from edge_mmllm_export.weights import Source, bind

try:
    from gguf import GGUFWriter
except ImportError as error:
    raise MissingDependency("gguf", "export") from error

#: Tensors to which llama.cpp's graphs were seen to apply an adapter. Others it may pass over in
#: silence, which would be a wrong answer: they are refused.
_APPLIED = re.compile(
    r"blk\.\d+\.(attn_[qkv]|attn_output|ffn_(gate|up|down)|ssm_(in|out))\.weight|output\.weight"
)


def write_adapter(
    source: str | os.PathLike[str],
    lora: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    force: bool = False,
) -> tuple[str, ...]:
    """Writes the adapter in `lora` for the GGUF export of `source`.

    Returns:
        Names of the model's tensors that it changes.

    Raises:
        CheckpointError: no adapter, not of this checkpoint, or one that llama.cpp cannot apply.
        OutputExists: `out` is there, and not `force`.
    """
    path = Path(out)
    if path.exists() and not force:
        raise OutputExists("the output exists", where=str(path), fix="--force replaces it")
    base = open_checkpoint(source if isinstance(source, str) else Path(source), Path(lora))
    assert isinstance(base, LoraCheckpoint)  # noqa: S101 - for the type checker
    try:
        model = build(base)
        if isinstance(model, Composite):
            raise _unsupported("a multimodal model's adapter", str(lora))
        weights = bind(
            base, model.parameters(), model.sources(base.layout), ignored=model.ignored()
        )
        file = layout(model, weights, Wanted(QuantPlan("f32")))
        found, wrong = {}, set(base.targets)
        for tensor in file.tensors:
            named = {name for piece in tensor.pieces for name in _names(piece.weight.source)}
            if not named & set(base.targets):
                continue
            wrong -= named
            pair = _pair(tensor, base)
            if pair is None:
                wrong.add(tensor.tensor.name)
            else:
                found[tensor.tensor.name] = pair
        if wrong or not found:
            raise _unsupported(f"adapters of {', '.join(sorted(wrong))[:300]}", str(lora))
        _write(path, file.map.architecture, base.alpha, found)
    finally:
        base.close()
    return tuple(found)


def _names(source: Source) -> tuple[str, ...]:
    return (source.name, *source.more)


def _unsupported(what: str, where: str) -> UnsupportedArchitecture:
    return UnsupportedArchitecture(
        f"llama.cpp does not apply {what} while it runs",
        where=where,
        expected="attention's and the MLP's matrices, and the in and out projections of a Mamba",
        fix="edge-mmllm export SRC --lora DIR merges it",
    )


def _pair(tensor: StoredTensor, base: LoraCheckpoint) -> tuple[np.ndarray, np.ndarray] | None:
    """A and B of a tensor of the file; None: its shape is not that of one matrix."""
    if len(tensor.pieces) == 1:
        source = tensor.pieces[0].weight.source
        factors = base.factors(source.name)
        plain = source.apply is None and source.whole is None and not source.more
        if plain and not factors.embedding and _APPLIED.fullmatch(tensor.tensor.name):
            return _rows(factors, source, tensor.tensor.scale, base.alpha)
    # Several of our weights from one of theirs, as a fused projection that stays fused.
    sources = [piece.weight.source for piece in tensor.pieces]
    same = {s.name for s in sources}
    fused = len(same) == 1 and all(s.rows and not s.apply and s.whole is None for s in sources)
    if fused and _APPLIED.fullmatch(tensor.tensor.name):
        factors = base.factors(same.pop())
        pairs = [_rows(factors, s, tensor.tensor.scale, base.alpha) for s in sources]
        return pairs[0][0], np.concatenate([b for _, b in pairs])
    return None


def _rows(
    factors: Factors, source: Source, scale: float, alpha: float
) -> tuple[np.ndarray, np.ndarray]:
    """A, and the rows of B in the file's order, scaled so that `alpha / r` makes up the rest."""
    b = factors.b if source.rows is None else factors.b[slice(*source.rows)]
    if source.order is not None:
        b = b[source.order]
    factor = scale * factors.scale * len(factors.a) / alpha
    return factors.a, b if factor == 1.0 else b * np.float32(factor)


def _write(
    path: Path, architecture: str, alpha: float, found: dict[str, tuple[np.ndarray, np.ndarray]]
) -> None:
    part = path.with_name(path.name + ".part")
    out = GGUFWriter(part, architecture)
    out.add_string("general.type", "adapter")
    out.add_string("adapter.type", "lora")
    out.add_float32("adapter.lora.alpha", alpha)
    for name, pair in found.items():
        for side, values in zip("ab", pair, strict=True):
            data = np.ascontiguousarray(values, np.float32)
            out.add_tensor(f"{name}.lora_{side}", data)
    try:
        out.write_header_to_file()
        out.write_kv_data_to_file()
        out.write_tensors_to_file()
    finally:
        out.close()
    part.replace(path)
