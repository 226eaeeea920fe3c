"""A multimodal checkpoint of BLIP-2's size on a small machine: export to int4, then one picture.

Random bfloat16 weights of ViT-g, Q-Former and OPT-2.7B dimensions, in shards, written for the
occasion and deleted after it. Peak memory and wall time of whole processes: the export (gate off),
and a run that answers a question about one picture, with all stages kept and with the picture's
stages released before the decoder is loaded.

    python benchmarks/blip2.py [--scratch FOLDER] [--publish]
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import artefacts
import harness
from export_cost import PACKAGES, write_checkpoint

VISION, QFORMER, TEXT = 1408, 768, 2560
#: Dimensions of Salesforce/blip2-opt-2.7b.
CONFIG = {
    "architectures": ["Blip2ForConditionalGeneration"],
    "model_type": "blip-2",
    "image_token_index": 50265,
    "num_query_tokens": 32,
    "vision_config": {
        "model_type": "blip_2_vision_model",
        "hidden_size": VISION,
        "intermediate_size": 6144,
        "num_hidden_layers": 39,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
    },
    "qformer_config": {"model_type": "blip_2_qformer"},
    "text_config": {
        "model_type": "opt",
        "vocab_size": 50304,
        "hidden_size": TEXT,
        "ffn_dim": 10240,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "word_embed_proj_dim": TEXT,
    },
}
PROCESSOR = {
    "image_processor_type": "BlipImageProcessor",
    "size": {"height": 224, "width": 224},
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
Shapes = Iterator[tuple[str, tuple[int, ...]]]


def _linear(name: str, out: int, into: int) -> Shapes:
    yield f"{name}.weight", (out, into)
    yield f"{name}.bias", (out,)


def _norm(name: str, width: int) -> Shapes:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def shapes() -> Shapes:
    """Names and shapes of the checkpoint's tensors, as the hub has them."""
    h = VISION
    yield "vision_model.embeddings.class_embedding", (1, 1, h)
    yield "vision_model.embeddings.position_embedding", (1, 257, h)
    yield "vision_model.embeddings.patch_embedding.weight", (h, 3, 14, 14)
    yield "vision_model.embeddings.patch_embedding.bias", (h,)
    for i in range(39):
        p = f"vision_model.encoder.layers.{i}"
        yield from _norm(f"{p}.layer_norm1", h)
        yield from _norm(f"{p}.layer_norm2", h)
        yield from _linear(f"{p}.self_attn.qkv", 3 * h, h)
        yield from _linear(f"{p}.self_attn.projection", h, h)
        yield from _linear(f"{p}.mlp.fc1", 6144, h)
        yield from _linear(f"{p}.mlp.fc2", h, 6144)
    yield from _norm("vision_model.post_layernorm", h)
    q = QFORMER
    yield "query_tokens", (1, 32, q)
    yield from _norm("qformer.layernorm", q)
    for i in range(12):
        p = f"qformer.encoder.layer.{i}"
        for part, width in (("attention", q), ("crossattention", h)):
            if part == "crossattention" and i % 2:
                continue
            yield from _linear(f"{p}.{part}.attention.query", q, q)
            yield from _linear(f"{p}.{part}.attention.key", q, width)
            yield from _linear(f"{p}.{part}.attention.value", q, width)
            yield from _linear(f"{p}.{part}.output.dense", q, q)
            yield from _norm(f"{p}.{part}.output.LayerNorm", q)
        yield from _linear(f"{p}.intermediate_query.dense", 3072, q)
        yield from _linear(f"{p}.output_query.dense", q, 3072)
        yield from _norm(f"{p}.output_query.LayerNorm", q)
    yield from _linear("language_projection", TEXT, q)
    d = "language_model.model.decoder"
    yield f"{d}.embed_tokens.weight", (50304, TEXT)
    yield f"{d}.embed_positions.weight", (2050, TEXT)
    yield from _norm(f"{d}.final_layer_norm", TEXT)
    for i in range(32):
        p = f"{d}.layers.{i}"
        for name in "qkv":
            yield from _linear(f"{p}.self_attn.{name}_proj", TEXT, TEXT)
        yield from _linear(f"{p}.self_attn.out_proj", TEXT, TEXT)
        yield from _norm(f"{p}.self_attn_layer_norm", TEXT)
        yield from _linear(f"{p}.fc1", 10240, TEXT)
        yield from _linear(f"{p}.fc2", TEXT, 10240)
        yield from _norm(f"{p}.final_layer_norm", TEXT)


#: What a child does with a bundle: a question about a picture, eight tokens of an answer.
ANSWER = """
import json, sys
import numpy as np
import edge_mmllm
y, x = np.mgrid[:480, :640]
picture = np.stack([x % 256, y % 256, (x + y) % 256], -1).astype(np.uint8)
with edge_mmllm.load(sys.argv[1], context=128, prepacked_cache=None) as session:
    session.perception.keep_stages = sys.argv[2] == "keep"
    ids = [50265, 2, 45641, 35, 99, 16, 42, 116]
    media = {"image": [picture]}
    answer = list(session.generate_tokens(ids, 8, ignore_eos=True, media=media))
    print(json.dumps({"tokens": answer, **session.perception.timings.to_json()}))
"""


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--scratch", type=Path, help="where 11 GB fit for a while")
    arguments = parser.parse_args()
    report = harness.Reporter("blip2", "BLIP-2's size", arguments)
    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        source, out = Path(scratch) / "checkpoint", Path(scratch) / "out"
        source.mkdir()
        parameters = write_checkpoint(source, CONFIG, shapes())
        (source / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
        options = ("--quant", "int4", "--gate", "off", "--tokenizer", "none")
        wall, peak, _ = harness.measured_run(artefacts.export_command(source, out, *options))
        size = harness.size_bytes(out)
        rows.append(["export to int4, gate off", f"{wall:.1f}", f"{peak / 1e6:.0f}", ""])
        report.record(
            model="blip2-opt-2.7b-random", step="export", wall_s=wall, peak_rss_bytes=peak,
            output_bytes=size, parameters=parameters, threads=os.cpu_count(),
            versions=harness.versions(sys.executable, PACKAGES),
        )  # fmt: skip
        for kind, words in {"keep": "all stages kept", "release": "stages released"}.items():
            command = [sys.executable, "-c", ANSWER, str(out), kind]
            wall, peak, output = harness.measured_run(command)
            found = json.loads(output["stdout"])
            split = ", ".join(
                f"{name} {found[f'{name}_ms'] / 1e3:.2f}"
                for name in ("load", "preprocess", "encode", "project", "prefill")
            )
            rows.append(
                [f"one picture, 8 tokens, {words}", f"{wall:.1f}", f"{peak / 1e6:.0f}", split]
            )
            report.record(
                model="blip2-opt-2.7b-random", step=f"picture, {kind}", wall_s=wall,
                peak_rss_bytes=peak, **found, threads=os.cpu_count(),
            )  # fmt: skip
    report.table(
        f"Random BLIP-2 (ViT-g, Q-Former, OPT-2.7B) of {parameters / 1e9:.2f} billion bfloat16 "
        f"parameters ({2 * parameters / 1e9:.1f} GB in shards; bundle {size / 1e9:.2f} GB), whole "
        f"processes, one run each (load average {os.getloadavg()[0]:.1f})",
        ["step", "wall s", "peak RSS MB", "split, s"],
        rows,
    )
    report.close()


if __name__ == "__main__":
    main()
