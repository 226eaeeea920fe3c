"""What an export costs: whole-process wall time and peak resident memory.

SmolLM2 from float32 safetensors, ours (gate off) beside the peers, one after the other in the same
run: to int4 onnxruntime-genai's builder, to GGUF llama.cpp's converter and quantizer; and, with
`--large`, a checkpoint of three billion bfloat16 parameters in shards, written for the occasion and
deleted after it.

    python benchmarks/export_cost.py [--rounds 3] [--large] [--publish]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import artefacts
import harness
import numpy as np
import peer_convert

from edge_mmllm.profiling.stats import median

PACKAGES = (
    "edge-mmllm", "onnx", "onnxruntime", "onnxruntime-genai", "torch", "transformers", "gguf",
    "llama-cpp-python",
)  # fmt: skip
#: Bytes written at a time while the large checkpoint is made.
PIECE = 64 << 20
SHARD_BYTES = 1 << 30
#: Dimensions of Llama-3.2-3B.
LARGE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}


def large_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the large checkpoint's tensors, as the hub has them."""
    h, inner, head = LARGE["hidden_size"], LARGE["intermediate_size"], LARGE["head_dim"]
    kv = LARGE["num_key_value_heads"] * head  # type: ignore[operator]
    yield "model.embed_tokens.weight", (LARGE["vocab_size"], h)  # type: ignore[misc]
    for i in range(LARGE["num_hidden_layers"]):  # type: ignore[call-overload]
        p = f"model.layers.{i}"
        for name, shape in {
            "input_layernorm": (h,),
            "post_attention_layernorm": (h,),
            "self_attn.q_proj": (h, h),
            "self_attn.k_proj": (kv, h),
            "self_attn.v_proj": (kv, h),
            "self_attn.o_proj": (h, h),
            "mlp.gate_proj": (inner, h),
            "mlp.up_proj": (inner, h),
            "mlp.down_proj": (h, inner),
        }.items():
            yield f"{p}.{name}.weight", shape  # type: ignore[misc]
    yield "model.norm.weight", (h,)  # type: ignore[misc]


def write_checkpoint(
    folder: Path, config: Mapping[str, Any], shapes: Iterable[tuple[str, tuple[int, ...]]]
) -> int:
    """Write a checkpoint tensor by tensor, in shards; returns its number of parameters.

    Values are random bfloat16 of magnitude 2^-10 to 2^-6 and either sign; norms are ones.
    """
    (folder / "config.json").write_text(json.dumps(config))
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    room = SHARD_BYTES
    for name, shape in shapes:
        size = 2 * int(np.prod(shape))
        if size > room and shards[-1]:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = shape
        room -= size
    where, parameters = {}, 0
    random = np.random.default_rng(0)
    for number, tensors in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        where |= dict.fromkeys(tensors, file)
        parameters += _write_shard(folder / file, tensors, random)
    index = {"metadata": {"total_size": 2 * parameters}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return parameters


def _write_shard(
    path: Path, tensors: Mapping[str, tuple[int, ...]], random: np.random.Generator
) -> int:
    header: dict[str, Any] = {}
    end = 0
    for name, shape in tensors.items():
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for shape in tensors.values():
            left = int(np.prod(shape))
            while left:
                count = min(left, PIECE // 2)
                if len(shape) == 1:
                    values = np.full(count, 0x3F80, np.uint16)
                else:
                    # Sign and seven bits of mantissa at random; exponent 117 to 120.
                    values = random.integers(0, 1 << 16, count, np.uint16) & 0x81FF
                    values += 0x3A80
                file.write(values.tobytes())
                left -= count
    return end // 2


def compare(arguments: argparse.Namespace, report: harness.Reporter) -> None:
    """SmolLM2 to ONNX, ours beside the builder, in turn."""
    source = artefacts.MODELS["smollm2"].hub(arguments.cache)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        commands = {
            "ours": artefacts.export_command(source, out, "--quant", "int4", "--gate", "off")
        }
        if arguments.peers.exists():
            commands["onnxruntime-genai builder"] = artefacts.builder_command(
                arguments.peers, source, out, Path(scratch)
            )
        title = "SmolLM2-135M-Instruct, float32 safetensors to int4 ONNX"
        _in_turn(title, commands, out, arguments, report)


def compare_gguf(arguments: argparse.Namespace, report: harness.Reporter) -> None:
    """SmolLM2 to GGUF, ours beside llama.cpp's converter, in the interpreter that has both."""
    if not arguments.peers.exists():
        return
    source = artefacts.MODELS["smollm2"].hub(arguments.cache)
    script, python = peer_convert.converter(arguments.cache), arguments.peers
    with tempfile.TemporaryDirectory() as scratch:
        out, draft = Path(scratch) / "out", Path(scratch) / "draft.gguf"
        for kind in ("F16", "Q4_K_M"):
            options = ("--format", "gguf", "--gguf-type", kind, "--gate", "off")
            commands = {"ours": [str(python), *artefacts.export_command(source, out, *options)[1:]]}
            if kind == "F16":
                name = "llama.cpp convert_hf_to_gguf"
                commands[name] = peer_convert.command(python, script, source, out, "f16")
            else:
                name = "llama.cpp convert_hf_to_gguf, llama_model_quantize"
                commands[name] = peer_convert.mixed_command(
                    python, script, source, out, draft, kind
                )
            title = f"SmolLM2-135M-Instruct, float32 safetensors to GGUF {kind}"
            _in_turn(title, commands, out, arguments, report)


def _in_turn(
    title: str, commands: Mapping[str, list[str]], out: Path, arguments: argparse.Namespace,
    report: harness.Reporter,
) -> None:  # fmt: skip
    """A table of whole processes, each in every round."""
    found: dict[str, list[tuple[float, int]]] = {}
    harness.wait_quiet(1, arguments.wait)
    for number in range(arguments.rounds + 1):
        for name, command in commands.items():
            wall, peak, _ = harness.measured_run(command)
            if number:  # the first round fills the page cache
                found.setdefault(name, []).append((wall, peak))
            size = harness.size_bytes(out)
            shutil.rmtree(out) if out.is_dir() else out.unlink()
            if number == arguments.rounds:
                _record(report, f"{title}: {name}", found[name], size, arguments)
    rows, base = [], found["ours"]
    for name, runs in found.items():
        wall, peak = median(w for w, _ in runs), median(p for _, p in runs)
        ratio = (
            f"{median(w for w, _ in base) / wall:.2f}",
            f"{median(p for _, p in base) / peak:.2f}",
        )
        rows.append([name, f"{wall:.1f}", f"{min(w for w, _ in runs):.1f}", ratio[0],
                     f"{peak / 1e6:.0f}", ratio[1]])  # fmt: skip
    report.table(
        f"{title}, whole process, {arguments.rounds} runs each"
        f" (load average {os.getloadavg()[0]:.1f})",
        ["exporter", "wall s", "best", "ours / it", "peak RSS MB", "ours / it"],
        rows,
    )


def _record(
    report: harness.Reporter, name: str, runs: list[tuple[float, int]], size: int,
    arguments: argparse.Namespace,
) -> None:  # fmt: skip
    python = sys.executable if name.endswith("ONNX: ours") else arguments.peers
    report.record(
        model="smollm2", exporter=name, wall_s=harness.summary([w for w, _ in runs]),
        peak_rss_bytes=harness.summary([float(p) for _, p in runs]), output_bytes=size,
        threads=os.cpu_count(), versions=harness.versions(python, PACKAGES),
    )  # fmt: skip


def large(arguments: argparse.Namespace, report: harness.Reporter) -> None:
    """Three billion parameters in bounded memory."""
    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        source, out = Path(scratch) / "checkpoint", Path(scratch) / "out"
        source.mkdir()
        parameters = write_checkpoint(source, LARGE, large_shapes())
        for label, options in {
            "default": (),
            "--max-ram 1GiB": ("--max-ram", "1GiB"),
            "--max-ram 64MiB": ("--max-ram", "64MiB"),
            "--format gguf --gguf-type Q4_0": ("--format", "gguf", "--gguf-type", "Q4_0"),
        }.items():
            command = artefacts.export_command(source, out, "--gate", "off", "--tokenizer", "none")
            try:
                wall, peak, _ = harness.measured_run([*command, *options])
            except RuntimeError as error:
                message = " ".join(str(error).partition(": ")[2].split())
                rows.append([label, "refused", "-", "-", message[:160]])
                report.record(model="llama-3b-random", options=label, refused=message)
                continue
            size = harness.size_bytes(out)
            shutil.rmtree(out)
            rows.append([label, f"{wall:.1f}", f"{peak / 1e6:.0f}", f"{size / 1e6:.0f}", ""])
            report.record(
                model="llama-3b-random", options=label, wall_s=wall, peak_rss_bytes=peak,
                output_bytes=size, parameters=parameters, threads=os.cpu_count(),
                versions=harness.versions(sys.executable, PACKAGES),
            )  # fmt: skip
    report.table(
        f"Random Llama of {parameters / 1e9:.2f} billion bfloat16 parameters "
        f"({2 * parameters / 1e9:.1f} GB in shards) to int4, gate off, one run each",
        ["options", "wall s", "peak RSS MB", "output MB", "message"],
        rows,
    )


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", choices=("onnx", "gguf"), default=["onnx", "gguf"])
    parser.add_argument("--large", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--scratch", type=Path, help="where 9 GB fit for a while")
    parser.add_argument("--wait", type=float, default=60)
    arguments = parser.parse_args()
    if arguments.only:
        report = harness.Reporter("export_cost", "Export cost", arguments)
        if "onnx" in arguments.only:
            compare(arguments, report)
        if "gguf" in arguments.only:
            compare_gguf(arguments, report)
        report.close()
    if arguments.large:
        report = harness.Reporter("export_cost_large", "Export cost of a large model", arguments)
        large(arguments, report)
        report.close()


if __name__ == "__main__":
    main()
