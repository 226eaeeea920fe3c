"""Pictures on a small machine: memory of the stages, a second question, time to encode.

A random LLaVA of published dimensions (CLIP ViT-L/14 at 336 pixels, two-layer MLP, a Llama as wide
and deep as SmolLM2-135M), written tensor by tensor for the occasion and deleted after it.

- Memory: peak of whole processes that only encode a picture, that only decode as many tokens of
  text, and that answer a question about the picture with all stages kept, and with the picture's
  released before the decoder is loaded (as `edge-mmllm run` does).
- Time to the first token of a question, of another on the same picture, and of one more in the
  same conversation, split.
- Time to encode by scheme of the encoder.

    python benchmarks/picture.py [--only memory questions encode] [--scratch FOLDER] [--publish]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import artefacts
import harness
import numpy as np
from export_cost import write_checkpoint

from edge_mmllm.profiling.stats import median

PARTS = ("memory", "questions", "encode")
VISION, LAYERS, INNER, PATCHES = 1024, 24, 4096, 576
TEXT, TEXT_LAYERS, TEXT_INNER, KEYS, VOCAB = 576, 30, 1536, 192, 49216
IMAGE_TOKEN, CONTEXT, QUESTION_TOKENS, NEW_TOKENS = 49152, 1024, 30, 8
#: Dimensions of openai/clip-vit-large-patch14-336 and HuggingFaceTB/SmolLM2-135M.
CONFIG = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "image_token_index": IMAGE_TOKEN,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": VISION,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": 768,
    },
    "text_config": {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": TEXT,
        "intermediate_size": TEXT_INNER,
        "num_hidden_layers": TEXT_LAYERS,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
    },
    "tie_word_embeddings": True,
}
PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 336},
    "crop_size": {"height": 336, "width": 336},
    "resample": 3,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
#: Of one picture: products of the 23 layers that are used, and of attention.
ENCODE_FLOP = 2 * 577 * 23 * (4 * VISION**2 + 2 * VISION * INNER) + 4 * 577**2 * VISION * 23
#: Label -> options of `edge-mmllm export`. The first is the one whose memory is measured.
BUNDLES = {
    "int8, blocks of 32": ("--quant", "int4"),
    "int8, blocks of 128": ("--quant", "int4", "--block-size", "128"),
    "f32": ("--quant", "int4", "--encoder-quant", "f32"),
}
#: What a child does -> what the table calls it.
CASES = {
    "import": "runtime imported",
    "encode": "picture encoded and projected, no decoder",
    "decode": "decoder only, as many tokens of text",
    "keep": "question about the picture, all stages kept",
    "release": "the same, picture's stages released",
}
SPLIT = ("preprocess", "encode", "project", "prefill")


def shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the checkpoint's tensors, as the hub has them."""
    h, tower = VISION, "vision_tower.vision_model"
    yield f"{tower}.embeddings.class_embedding", (h,)
    yield f"{tower}.embeddings.patch_embedding.weight", (h, 3, 14, 14)
    yield f"{tower}.embeddings.position_embedding.weight", (PATCHES + 1, h)
    norms = [f"{tower}.pre_layrnorm", f"{tower}.post_layernorm"]
    linears: dict[str, tuple[int, int]] = {}
    for i in range(LAYERS):
        p = f"{tower}.encoder.layers.{i}"
        norms += [f"{p}.layer_norm1", f"{p}.layer_norm2"]
        linears |= {f"{p}.self_attn.{n}_proj": (h, h) for n in ("q", "k", "v", "out")}
        linears |= {f"{p}.mlp.fc1": (INNER, h), f"{p}.mlp.fc2": (h, INNER)}
    linears |= {f"multi_modal_projector.linear_{n}": (TEXT, w) for n, w in ((1, h), (2, TEXT))}
    for name in norms:
        linears[name] = (h, 0)
    for name, (out, into) in linears.items():
        yield f"{name}.weight", (out, into) if into else (out,)
        yield f"{name}.bias", (out,)
    text = "language_model.model"
    yield f"{text}.embed_tokens.weight", (VOCAB, TEXT)
    yield f"{text}.norm.weight", (TEXT,)
    for i in range(TEXT_LAYERS):
        p = f"{text}.layers.{i}"
        yield f"{p}.input_layernorm.weight", (TEXT,)
        yield f"{p}.post_attention_layernorm.weight", (TEXT,)
        for name, width in {"q": TEXT, "k": KEYS, "v": KEYS, "o": TEXT}.items():
            yield f"{p}.self_attn.{name}_proj.weight", (width, TEXT)
        yield f"{p}.mlp.gate_proj.weight", (TEXT_INNER, TEXT)
        yield f"{p}.mlp.up_proj.weight", (TEXT_INNER, TEXT)
        yield f"{p}.mlp.down_proj.weight", (TEXT, TEXT_INNER)


def worker(what: str, bundle: str, rounds: int, threads: int) -> None:
    """The child: does one thing of `CASES`, `questions` or `encode`; prints JSON."""
    import PIL.Image

    import edge_mmllm
    import edge_mmllm_runtime.onnx

    assert edge_mmllm_runtime.onnx
    assert PIL.Image
    if what == "import":
        print("{}")
        return
    y, x = np.mgrid[:480, :640]
    picture = np.stack([x % 256, y % 256, (x + y) % 256], -1).astype(np.uint8)
    random = np.random.default_rng(0)

    def words(count: int) -> list[int]:
        return [int(i) for i in random.integers(0, IMAGE_TOKEN, count)]

    with edge_mmllm.load(bundle, context=CONTEXT, threads=threads) as session:

        def ask(ids: list[int], *, reuse: bool = False) -> dict[str, Any]:
            """Times in ms, and the answer."""
            shown = {"image": [picture]} if IMAGE_TOKEN in ids else None
            started = time.perf_counter()
            stream = session.generate_tokens(
                ids, NEW_TOKENS, ignore_eos=True, reuse=reuse, media=shown
            )
            answer = [next(stream)]
            first = time.perf_counter()
            answer += stream
            told = session.perception.timings.to_json()
            return {"ttft_ms": 1e3 * (first - started), **told, "answer": answer}

        found: Any = {}
        if what == "encode":
            session.perception.item("image", picture).rows()
        elif what == "decode":
            ask(words(PATCHES + QUESTION_TOKENS))
        elif what in ("keep", "release"):
            session.perception.keep_stages = what == "keep"
            found = ask([IMAGE_TOKEN, *words(QUESTION_TOKENS)])
        elif what == "questions":
            found = []
            for _ in range(rounds + 1):
                session.perception.forget()
                first, second = ([IMAGE_TOKEN, *words(QUESTION_TOKENS)] for _ in range(2))
                one, two = ask(first), ask(second)
                turn = ask([*second, *two["answer"], *words(QUESTION_TOKENS)], reuse=True)
                found.append([one, two, turn])
        else:  # time to encode
            pixels = random.standard_normal((3, 336, 336), np.float32)
            found = []
            for _ in range(rounds + 1):
                started = time.perf_counter()
                session.engine.run_stage("encode_image", {"pixels": pixels})
                found.append(1e3 * (time.perf_counter() - started))
    print(json.dumps(found))


def child(what: str, bundle: Path, arguments: argparse.Namespace) -> tuple[int, Any]:
    """Peak bytes of such a process, and what it printed."""
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", what, str(bundle)]
    command += [str(arguments.rounds), str(arguments.threads)]
    _, peak, output = harness.measured_run(command)
    return peak, json.loads(output["stdout"])


def memory(bundle: Path, arguments: argparse.Namespace, report: harness.Reporter) -> None:
    """Peaks of whole processes."""
    peaks: dict[str, float] = {}
    for case in CASES:
        runs = [child(case, bundle, arguments)[0] for _ in range(arguments.runs)]
        peaks[case] = median(runs)
        report.record(model="llava-clip-l-336-135m-random", case=case, peak_rss_bytes=runs,
                      context=CONTEXT, threads=arguments.threads)  # fmt: skip
    base = peaks["import"]
    total = peaks["encode"] + peaks["decode"] - base
    rows = [[CASES[case], *_megabytes(peaks[case], base, total)] for case in CASES]
    rows.insert(3, ["sum of the stages", *_megabytes(total, base, total)])
    report.table(
        f"Peak RSS of whole processes, MB: encoder int8, projector f16, backbone int4; context "
        f"{CONTEXT}, {NEW_TOKENS} new tokens (median of {arguments.runs} runs)",
        ["process", "peak", "above the runtime", "of the sum"],
        rows,
    )


def _megabytes(peak: float, base: float, total: float) -> tuple[str, str, str]:
    above = peak - base
    return f"{peak / 1e6:.0f}", f"{above / 1e6:.0f}", f"{100 * above / (total - base):.0f} %"


def questions(bundle: Path, arguments: argparse.Namespace, report: harness.Reporter) -> None:
    """Where the time to the first token goes."""
    _, rounds = child("questions", bundle, arguments)
    rows = []
    titles = ("first question", "another, same picture", "next turn of the same conversation")
    for title, *asked in zip(titles, *rounds[1:], strict=True):
        parts = {name: median(a[f"{name}_ms"] for a in asked) for name in SPLIT}
        ttft = harness.summary([a["ttft_ms"] for a in asked])
        report.record(model="llava-clip-l-336-135m-random", question=title, ttft_ms=ttft, **parts,
                      encoded=[a["encoded"] for a in asked], threads=arguments.threads)  # fmt: skip
        encoded = ", ".join(sorted({str(a["encoded"]) for a in asked}))
        rows.append([title, f"{ttft['median']:.0f}", harness.percent(ttft["spread"]),
                     *(f"{value:.1f}" for value in parts.values()), encoded])  # fmt: skip
    report.table(
        f"Time to the first token of a question of {QUESTION_TOKENS} tokens about a picture of "
        f"640 x 480 ({PATCHES} rows), ms, {arguments.threads} threads (median of "
        f"{arguments.rounds} rounds; load average {os.getloadavg()[0]:.1f})",
        ["", "first token", "spread", *SPLIT, "pictures encoded"],
        rows,
    )


def encode(
    bundles: dict[str, Path], arguments: argparse.Namespace, report: harness.Reporter
) -> None:
    """Time to encode one picture."""
    rows = []
    for label, bundle in bundles.items():
        peak, times = child("time", bundle, arguments)
        size = sum(p.stat().st_size for p in bundle.glob("encode_image*"))
        told = harness.summary(times[1:])
        report.record(model="clip-vit-l-14-336-random", scheme=label, encode_ms=told,
                      stage_bytes=size, peak_rss_bytes=peak, threads=arguments.threads)  # fmt: skip
        rows.append([label, f"{size / 1e6:.0f}", f"{told['median']:.0f}", f"{told['min']:.0f}",
                     harness.percent(told["spread"]), f"{ENCODE_FLOP / told['median'] / 1e6:.0f}",
                     f"{peak / 1e6:.0f}"])  # fmt: skip
    report.table(
        f"CLIP ViT-L/14 at 336 pixels, one picture ({ENCODE_FLOP / 1e9:.0f} GFLOP), "
        f"{arguments.threads} threads (median of {arguments.rounds} runs; load average "
        f"{os.getloadavg()[0]:.1f})",
        ["encoder", "stage MB", "ms", "best", "spread", "GFLOP/s", "peak RSS MB"],
        rows,
    )


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        what, bundle, rounds, threads = sys.argv[2:6]
        worker(what, bundle, int(rounds), int(threads))
        return
    parser = harness.parser(__doc__)
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--scratch", type=Path, help="where 4 GB fit for a while")
    parser.add_argument("--runs", type=int, default=3, help="processes for each peak")
    parser.add_argument("--rounds", type=int, default=5, help="of what is timed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--wait", type=float, default=60, help="seconds to wait for quiet")
    arguments = parser.parse_args()
    report = harness.Reporter("picture", "Pictures", arguments)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        source, bundles = Path(scratch) / "checkpoint", dict[str, Path]()
        source.mkdir()
        parameters = write_checkpoint(source, CONFIG, shapes())
        (source / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
        wanted = list(BUNDLES) if "encode" in arguments.only else list(BUNDLES)[:1]
        for i, label in enumerate(wanted):
            bundles[label] = Path(scratch) / f"bundle{i}"
            options = (*BUNDLES[label], "--gate", "off", "--tokenizer", "none")
            artefacts.run(artefacts.export_command(source, bundles[label], *options))
        first = bundles[wanted[0]]
        report.text(
            f"Random LLaVA of {parameters / 1e6:.0f} million parameters; bundle "
            f"{harness.size_bytes(first) / 1e6:.0f} MB."
        )
        if "memory" in arguments.only:
            memory(first, arguments, report)
        harness.wait_quiet(1, arguments.wait)
        if "questions" in arguments.only:
            questions(first, arguments, report)
        if "encode" in arguments.only:
            encode(bundles, arguments, report)
    report.close()


if __name__ == "__main__":
    main()
