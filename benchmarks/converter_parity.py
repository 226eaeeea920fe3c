"""Our GGUF files beside llama.cpp's own converter's of the same checkpoints: tensors byte for byte,
metadata key by key.

The checkpoints are the tests' references (tiny, random, published layouts), which have no
tokenizer, random RWKV in hub layout, the zoo's, and SmolLM2 with its tokenizer. What the converter
rejects is said. Nothing is timed.

    python benchmarks/converter_parity.py [--shared DIR] [--publish]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import artefacts
import harness
import numpy as np
import peer_convert
from gguf import GGUFReader
from smollm2 import smollm2_hub

REFERENCES = harness.ROOT / "tests/goldens/references"
TINY = (
    "llama", "llama-linear", "llama-tied-llama3", "mistral-window", "qwen2", "qwen2-window",
    "qwen3", "olmo2", "mamba", "mamba2", "mamba2-groups", "falcon-mamba",
)  # fmt: skip
#: The converter, with models that have no tokenizer.
_DRIVER = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import convert_hf_to_gguf as c
find = c.get_model_class
def without_vocabulary(*args, **options):
    found = find(*args, **options)
    found.set_vocab = lambda self: self.gguf_writer.add_tokenizer_model("no_vocab")
    return found
c.get_model_class = without_vocabulary
c.main()
"""


def sources(arguments: argparse.Namespace, scratch: Path) -> Iterator[tuple[str, Path, bool]]:
    """Name, folder, and whether it has a tokenizer that the converter reads."""
    for name in TINY:
        yield name, REFERENCES / name, False
    yield from ((f"rwkv{v} of the hub", _rwkv(v, scratch), False) for v in "67")
    for name in ("tiny-mamba", "tiny-mamba2"):
        if (arguments.shared / "zoo" / name).is_dir():
            yield f"zoo/{name}", arguments.shared / "zoo" / name, False
    yield "SmolLM2-135M-Instruct", smollm2_hub(arguments.cache), True


def _rwkv(version: str, scratch: Path) -> Path:
    sys.path.insert(0, str(harness.ROOT / "tests/export"))
    import rwkv_models

    for name, value in (("HIDDEN", 128), ("HEADS", 2), ("SIZE", 64)):
        setattr(rwkv_models, name, value)
    rwkv_models._Random.norm.__defaults__ = (128,)
    made = rwkv_models.blinkdl(version)
    if version == "6":
        hub, more = rwkv_models.fla6(made), {"architectures": ["RWKV6ForCausalLM"]}
    else:
        hub = rwkv_models.fla7(made, fused=False)
        ranks = {"decay": 16, "a": 24, "gate": 32, "v": _rank(hub)}
        more = {
            "architectures": ["RWKV7ForCausalLM"], "num_hidden_layers": rwkv_models.LAYERS,
            "hidden_size": 128, "intermediate_size": rwkv_models.FFN, "head_dim": 64,
            "norm_eps": 1e-5, "vocab_size": rwkv_models.VOCAB,
            **{f"{name}_low_rank_dim": rank for name, rank in ranks.items()},
        }  # fmt: skip
    folder = scratch / f"rwkv{version}"
    folder.mkdir()
    rwkv_models.write_hub(folder, hub, model_type=f"rwkv{version}", group_norm_eps=64e-5, **more)
    return folder


def _rank(tensors: dict[str, Any]) -> int:
    """Of the second layer's value adapter."""
    return int(tensors["model.layers.1.attn.v_lora.lora.0.weight"].shape[0])


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors as (type, shape, bytes), metadata as values."""
    reader = GGUFReader(path)
    tensors = {
        t.name: (t.tensor_type.name, t.shape.tolist(), np.asarray(t.data).tobytes())
        for t in reader.tensors
    }
    fields = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    return tensors, fields


def difference(ours: tuple[str, Any, bytes], theirs: tuple[str, Any, bytes]) -> str | float:
    """How a tensor differs: in a few words, or the largest difference over the largest value."""
    if ours[:2] != theirs[:2]:
        return f"{ours[0]} {ours[1]}, not {theirs[0]} {theirs[1]}"
    kinds = {"F32": np.float32, "F16": np.float16}
    if ours[0] not in kinds:
        return "other bytes"
    a, b = (np.frombuffer(x[2], kinds[ours[0]]).astype(np.float64) for x in (ours, theirs))
    largest = np.abs(b).max() or 1.0
    return float(np.abs(a - b).max() / largest)


def compare(
    name: str, source: Path, kind: str, vocabulary: bool, arguments: argparse.Namespace,
    scratch: Path,
) -> list[str]:  # fmt: skip
    """A row of the table."""
    script = peer_convert.converter(arguments.cache)
    out, theirs = scratch / "out", scratch / "theirs.gguf"
    options = ("--format", "gguf", "--gguf-type", kind, "--gate", "off")
    options += () if vocabulary else ("--tokenizer", "none")
    try:
        artefacts.run(artefacts.export_command(source, out, *options))
    except RuntimeError as error:
        why = str(error).partition("error: ")[2].splitlines()[0]
        return [name, kind, "-", "-", f"ours refuses it: {why}"]
    command = peer_convert.command(arguments.peers, script, source, theirs, kind.lower())
    if not vocabulary:
        command = [command[0], "-c", _DRIVER, str(script.parent), *command[2:]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return [name, kind, "-", "-", f"rejects it: {done.stderr.strip().splitlines()[-1][:150]}"]
    (mine, said), (peer, their_words) = read(out / "model.gguf"), read(theirs)
    same = [n for n in mine if mine[n] == peer.get(n)]
    notes = [f"`{n}` only in theirs" for n in sorted(peer.keys() - mine.keys())]
    notes += [f"`{n}` only in ours" for n in sorted(mine.keys() - peer.keys())]
    differing = {n: difference(mine[n], peer[n]) for n in mine.keys() & peer.keys() - set(same)}
    grouped: dict[str, list[str | float]] = {}
    for n, how in differing.items():
        key = ".".join("N" if p.isdigit() else p for p in n.split("."))
        grouped.setdefault(key, []).append(how)
    for n, hows in grouped.items():
        numbers = [how for how in hows if isinstance(how, float)]
        words = sorted({how for how in hows if isinstance(how, str)})
        words += [f"up to {max(numbers):.1e} of the largest"] if numbers else []
        notes.append(f"`{n}` {', '.join(words)} ({len(hows)}x)")
    keys = [
        k for k in sorted(said.keys() | their_words.keys())
        if not k.startswith("general.") and not _equal(said.get(k), their_words.get(k))
    ]  # fmt: skip
    words = [f"`{k}` {_short(said.get(k))} / {_short(their_words.get(k))}" for k in keys]
    print(name, kind, notes, words, file=sys.stderr, flush=True)
    return [name, kind, f"{len(same)} of {len(peer)}", "; ".join(notes) or "none",
            "; ".join(words) or "none"]  # fmt: skip


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return bool(np.isclose(a, b, rtol=1e-6))
    return bool(a == b)


def _short(value: Any) -> str:
    if value is None:
        return "-"
    text = f"{len(value)} items" if isinstance(value, list) else str(value)
    return text if len(text) < 30 else text[:27] + "..."


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--shared", type=Path, default=harness.ROOT.parent / "shared/data")
    parser.add_argument("--only", nargs="*", help="names")
    arguments = parser.parse_args()
    report = harness.Reporter("converter_parity", "GGUF beside llama.cpp's converter", arguments)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for name, source, vocabulary in sources(arguments, scratch):
            if arguments.only and name not in arguments.only:
                continue
            for kind in ("F32", "F16") if not vocabulary else ("F16",):
                rows.append(compare(name, source, kind, vocabulary, arguments, scratch))
    report.table(
        f"Tensors and metadata, llama-cpp-python {peer_convert.VERSION}",
        ["checkpoint", "type", "tensors with the same bytes", "other tensors",
         "other metadata (ours / theirs)"],
        rows,
    )  # fmt: skip
    report.close()


if __name__ == "__main__":
    main()
