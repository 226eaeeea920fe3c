"""`edge-mmllm export`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_mmllm.cli._errors import clean_termination
from edge_mmllm.cli._options import (
    SIZE,
    context_option,
    json_option,
    recorded_command,
    threads_option,
)
from edge_mmllm.cli._output import emit, grid, progress_bars, size_text, table
from edge_mmllm.errors import UsageError
from edge_mmllm.modality import MODALITIES

if TYPE_CHECKING:
    from edge_mmllm.bundle import Bundle, QuantGroup
    from edge_mmllm_export.planning import ExportOptions, ExportPlan  # noqa: TID251

#: The same words as the exporter's QUANT_NAMES, which is not imported for `--help`.
QUANT_NAMES = ("f32", "f16", "int8", "int4")
#: The same words as the exporter's gguf_types.WORDS and KINDS.
GGUF_TYPES = (
    "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q6_K", "Q5_K_M", "Q5_K_S",
    "Q4_K_M", "Q4_K_S", "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K", "Q2_K_S", "IQ4_NL", "IQ4_XS",
    "IQ3_M", "IQ3_S", "IQ3_XS", "IQ3_XXS", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S",
)  # fmt: skip
GGUF_KINDS = (
    "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q6_K", "Q5_K", "Q4_K", "Q3_K",
    "Q2_K", "IQ4_NL", "IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S",
)  # fmt: skip
#: The same words as the runtime's mlc_weights.QUANTIZATIONS.
MLC_QUANTS = ("q0f16", "q0f32", "q3f16_1", "q4f16_0", "q4f16_1", "q4f16_2", "q4f32_1")
FORMATS = ("onnx", "gguf", "mlc")


@click.command("export")
@click.argument("source", metavar="SRC")
@click.option("--out", metavar="DIR", help="The bundle's folder.")
@click.option(
    "--format", "format_", default="onnx", show_default=True, metavar="FORMAT",
    help="The bundle's format: onnx, gguf for llama.cpp, or mlc: compiled by TVM.",
)  # fmt: skip
@click.option("--quant", type=click.Choice(QUANT_NAMES), default="int4", show_default=True)
@click.option(
    "--gguf-type", type=click.Choice(GGUF_TYPES, case_sensitive=False),
    metavar="TYPE", help="With --format gguf: what matrices are stored as, instead of --quant, "
    "e.g. Q4_K_M, Q6_K, IQ4_XS (K and I types through llama.cpp).",
)  # fmt: skip
@click.option(
    "--mlc-quant", type=click.Choice(MLC_QUANTS), metavar="NAME",
    help="With --format mlc: mlc-llm's name of a quantization, instead of --quant, e.g. q4f16_1; "
    "int4 means q4f32_1, f16 q0f16, f32 q0f32.",
)  # fmt: skip
@click.option(
    "--target", "targets", multiple=True, metavar="NAME",
    help="With --format mlc: what to compile for: native (the default), x86-64-v3, aarch64, "
    "aarch64-dotprod, armv7, aarch64-android; none: weights alone. May be given again.",
)  # fmt: skip
@click.option(
    "--standalone", is_flag=True,
    help="With --format mlc: also a C library for each target that needs no runtime.",
)  # fmt: skip
@click.option(
    "--imatrix", metavar="FILE",
    help="Importance matrix for K and I types, of `edge-mmllm imatrix` or of llama.cpp.",
)  # fmt: skip
@click.option("--imatrix-text", metavar="FILE", help="Compute one from this text.")
@click.option("--imatrix-chunks", type=click.IntRange(1), default=20, show_default=True,
              help="Pieces of 512 tokens of that text.")  # fmt: skip
@click.option(
    "--block-size", type=click.Choice(("32", "64", "128")), default="32", show_default=True,
    help="Weights that share a scale.",
)  # fmt: skip
@click.option(
    "--zero", type=click.Choice(("none", "int", "float")), default="none", show_default=True,
    help="Zero point of a 4-bit block: none (symmetric), a 4-bit one, or a float minimum.",
)  # fmt: skip
@click.option(
    "--embedding-quant", type=click.Choice(QUANT_NAMES),
    help="Embedding and head; default: int8 with --quant int4, else as --quant.",
)  # fmt: skip
@click.option(
    "--encoder-quant", type=click.Choice(QUANT_NAMES),
    help="Encoders of pictures and sounds; default: int8 with --quant int4, else as --quant.",
)  # fmt: skip
@click.option(
    "--projector-quant", type=click.Choice(QUANT_NAMES),
    help="Their projectors; default: f16 with --quant int8 or int4, else as --quant.",
)  # fmt: skip
@click.option(
    "--override", "overrides", multiple=True, metavar="PATTERN=SCHEME",
    help="Another scheme for some tensors, e.g. 'layers.0.*=int8', or with --format gguf "
    "'*.mlp.down=Q6_K'. May be given again.",
)  # fmt: skip
@click.option(
    "--inputs", type=click.Choice(("ids", "embeds")), default="ids", show_default=True,
    help="What the decoder takes; embeds adds a stage of its own for the embedding.",
)  # fmt: skip
@context_option
@click.option(
    "--tokenizer",
    metavar="PATH|bytes|none",
    help="Instead of the checkpoint's own tokenizer (tokenizer.json, rwkv_vocab*.txt).",
)
@click.option("--lora", metavar="DIR", help="Merge a LoRA adapter in (PEFT layout).")
@click.option("--gate", type=click.Choice(("on", "off")), default="on", show_default=True,
              help="Judge the result against the checkpoint in float32.")  # fmt: skip
@click.option("--gate-text", metavar="FILE", help="Text to judge by; default: a built-in one.")
@click.option("--accept-quality-loss", is_flag=True, help="Keep a bundle that fails the gate.")
@click.option("--max-ram", type=SIZE, metavar="SIZE",
              help="Refuse up front what would take more memory, e.g. 2GiB.")  # fmt: skip
@threads_option
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@click.option("--dry-run", is_flag=True, help="Show what it would write and need; write nothing.")
@json_option
@click.pass_context
def command(ctx: click.Context, /, **given: Any) -> None:
    """Export a checkpoint to a quantized, judged bundle.

    SRC is a folder in hub layout, a .safetensors, .pth or .gguf file, or a hub id (org/name).
    """
    _check_format(given["format_"])
    if given["out"] is None and not given["dry_run"]:
        raise click.UsageError("Missing option '--out'.", ctx)
    from edge_mmllm_export import exporter  # noqa: TID251

    options = _options(
        given,
        recorded_command(
            ctx, ("source", "out", "tokenizer", "gate_text", "lora", "imatrix", "imatrix_text")
        ),
    )
    source, as_json = given["source"], given["as_json"]
    if given["dry_run"]:
        plan = exporter.plan_export(source, options)
        if as_json:
            emit({"dry_run": True, **asdict(plan), "bits_per_weight": plan.bits_per_weight})
        else:
            _show_plan(plan)
        return
    with clean_termination(), progress_bars(shown=not as_json) as progress:
        bundle = exporter.export(source, given["out"], options, progress=progress)
    if as_json:
        emit(_document(bundle))
    else:
        _show(bundle)


def _check_format(name: str) -> None:
    """Raises: UsageError for a format that there is not."""
    if name not in FORMATS:
        raise UsageError("unknown --format", expected=" | ".join(FORMATS), found=name)


def _options(given: dict[str, Any], record: str) -> ExportOptions:
    from edge_mmllm_export.planning import ExportOptions  # noqa: TID251
    from edge_mmllm_export.quantize.schemes import QuantPlan, parse_override  # noqa: TID251

    text = given["gate_text"]
    if text is not None and not Path(text).is_file():
        raise UsageError("--gate-text is no file", where=text, expected="a text in UTF-8")
    own = [text for text in given["overrides"] if _gguf_kind(text) is None]
    plan = QuantPlan(
        name=given["quant"],
        block_size=int(given["block_size"]),
        zero=given["zero"],
        embedding=given["embedding_quant"],
        overrides=tuple(parse_override(text) for text in own),
        encoder=given["encoder_quant"],
        projector=given["projector_quant"],
    )
    return ExportOptions(
        plan=plan,
        inputs=given["inputs"],
        context=given["context"],
        tokenizer=given["tokenizer"],
        lora=given["lora"],
        gate=given["gate"] == "on",
        gate_text=given["gate_text"],
        accept_quality_loss=given["accept_quality_loss"],
        max_ram=given["max_ram"],
        workers=given["threads"],
        force=given["force"],
        command=record,
        format=given["format_"],
        gguf_type=given["gguf_type"],
        gguf_overrides=tuple(
            (text.rpartition("=")[0], kind)
            for text in given["overrides"]
            if (kind := _gguf_kind(text)) is not None
        ),
        imatrix=given["imatrix"],
        imatrix_text=given["imatrix_text"],
        imatrix_chunks=given["imatrix_chunks"],
        mlc_quant=given["mlc_quant"],
        targets=given["targets"],
        standalone=given["standalone"],
    )


def _gguf_kind(override: str) -> Any:
    """The type of an override in GGUF's words; None of one in ours."""
    pattern, _, name = override.rpartition("=")
    return (
        name.upper() if pattern and name.upper() in GGUF_KINDS and name not in QUANT_NAMES else None
    )


def _document(bundle: Bundle) -> dict[str, Any]:
    """What `--json` says of a new bundle."""
    manifest = bundle.manifest
    return {
        "bundle": str(bundle.root),
        "bundle_sha256": bundle.sha256,
        "size_bytes": bundle.size_bytes,
        "architecture": manifest.model.architecture,
        "parameters": manifest.model.parameters,
        "quantization": asdict(manifest.quantization),
        "gate": asdict(manifest.gate),
        "export": asdict(manifest.export),
    }


def _show_groups(groups: tuple[QuantGroup, ...]) -> None:
    rows = [(g.group, g.scheme, g.tensors, size_text(g.size_bytes)) for g in groups]
    grid(("weights", "scheme", "tensors", "size"), rows)


def _show_plan(plan: ExportPlan) -> None:
    _show_groups(plan.groups)
    rows: list[tuple[str, object]] = [
        ("architecture", plan.architecture),
        ("parameters", f"{plan.parameters:,} in {plan.tensors} tensors"),
        ("bits per weight", f"{plan.bits_per_weight:.2f}"),
        ("disk", size_text(plan.disk_bytes)),
        ("peak RAM", f"about {size_text(plan.peak_ram_bytes)}"),
        ("of the gate", f"about {size_text(plan.gate_ram_bytes)}, in a process of its own"),
        ("context", plan.context_length or "unbounded"),
        ("state, constant", size_text(plan.state_bytes_constant)),
        ("state per token", size_text(plan.state_bytes_per_token)),
    ]
    table(rows, "dry run: nothing was written")


def _show(bundle: Bundle) -> None:
    manifest = bundle.manifest
    _show_groups(manifest.quantization.groups)
    rows: list[tuple[str, object]] = [
        ("architecture", manifest.model.architecture),
        ("parameters", f"{manifest.model.parameters:,}"),
        ("quantization", f"{manifest.quantization.scheme}, "
         f"{manifest.quantization.bits_per_weight:.2f} bits per weight"),
        ("size", size_text(bundle.size_bytes)),
        *gate_rows(manifest.gate.verdict, manifest.gate.figures),
        ("export", f"{manifest.export.wall_s:.1f} s, "
         f"peak RSS {size_text(manifest.export.peak_rss_bytes)}"),
        ("next", f"edge-mmllm run {bundle.root.name} --prompt 'Hello'"),
    ]  # fmt: skip
    table(rows, f"wrote {bundle.root}")


#: Figure of the gate -> its form for people.
_FIGURES = {
    "top1_agreement": "{:.1%}",
    "top1_agreement_clear": "{:.1%}",
    "kl_mean": "{:.4g}",
    "kl_p99": "{:.4g}",
    "perplexity_change": "{:+.2%}",
}


def gate_rows(verdict: str, figures: dict[str, Any]) -> list[tuple[str, object]]:
    """The gate's verdict and main figures, for `table`."""
    rows: list[tuple[str, object]] = [("quality gate", verdict)]
    for of in ("", *MODALITIES):
        found = figures.get(of) if of else figures
        if not isinstance(found, dict):
            continue
        for name, form in _FIGURES.items():
            value = found.get(name)
            if isinstance(value, (int, float)):
                rows.append((f"  {of} {name}" if of else f"  {name}", form.format(value)))
    if isinstance(figures.get("reason"), str):
        rows.append(("  because", figures["reason"]))
    broken = figures.get("breaches")
    if isinstance(broken, list) and broken:
        rows.append(("  breaches", "; ".join(map(str, broken))))
    return rows
