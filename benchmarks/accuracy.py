"""What each scheme costs a multimodal model in right answers.

The zoo's trained LLaVAs, one with a Llama and one with a Mamba-2 behind the same tower, are asked
"What is in this image?" about the first 2,000 test pictures of Fashion-MNIST, as they are: 28 x 28,
gray, made RGB. An answer is right when its whole text is ("This is an ankle boot."). Everything
from the picture on is our runtime's: resizing, encoder, projector, backbone, greedy tokens.
Accuracy does not depend on the machine's load.

    python benchmarks/accuracy.py [--shared DIR] [--pictures 2000] [--publish]
"""

from __future__ import annotations

import argparse
import gzip
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

import artefacts
import harness
import numpy as np
from numpy.typing import NDArray

import edge_mmllm
from edge_mmllm.bundle import open_bundle

QUESTION = "What is in this image?"
#: Of the classes 0 to 9, as the models name them.
NAMES = (
    "a T-shirt", "a pair of trousers", "a pullover", "a dress", "a coat", "a sandal", "a shirt",
    "a sneaker", "a bag", "an ankle boot",
)  # fmt: skip
#: How many of the first 500 transformers 5 (for Mamba-2: its parts) answers right in float32.
REFERENCE_PICTURES = 500


@dataclass(frozen=True)
class Model:
    """A model of the table.

    Attributes:
        below: its checkpoint, below the shared data.
        schemes: --quant.
        reference: right answers among the first 500, by the checkpoint's `golden.json`.
    """

    below: str
    schemes: tuple[str, ...]
    reference: int


MODELS = {
    "tiny-llava": Model("zoo/tiny-llava", ("f32", "f16", "int8", "int4"), 464),
    "tiny-llava-mamba": Model("zoo/tiny-llava-mamba", ("f32", "int8", "int4"), 466),
}
#: Scheme -> percentage points that it may lose.
ALLOWED = {"f16": 0.3, "int8": 0.3, "int4": 2.0}
HEAD = (
    "model", "scheme", "bundle MB", "bits/weight", "right of the first 500", "right", "accuracy",
    "against f32, points", "allowed", "same answer as f32",
)  # fmt: skip


def idx(path: Path) -> NDArray[np.uint8]:
    """An IDX file of bytes: 0, 0, 8, number of axes, their lengths (big-endian), the values."""
    content = gzip.decompress(path.read_bytes())
    if content[:3] != b"\0\0\x08":
        raise ValueError(f"{path.name} is no IDX file of bytes")
    shape = struct.unpack_from(f">{content[3]}I", content, 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(shape)


def answers(bundle: Path, pictures: NDArray[np.uint8], threads: int) -> list[str]:
    """The model's answer about each picture."""
    found = []
    with edge_mmllm.load(bundle, threads=threads) as session:
        for picture in pictures:
            rgb = np.repeat(picture[..., None], 3, 2)
            found.append("".join(session.generate(QUESTION, [rgb], max_new_tokens=16)).strip())
            session.perception.forget()
    return found


def run(
    name: str, arguments: argparse.Namespace, report: harness.Reporter
) -> list[tuple[str | int, ...]]:
    """One model's rows of the table."""
    model, data = MODELS[name], arguments.shared / "fashion_mnist"
    pictures = idx(data / "t10k-images-idx3-ubyte.gz")[: arguments.pictures]
    classes = idx(data / "t10k-labels-idx1-ubyte.gz")[: arguments.pictures]
    expected = [f"This is {NAMES[c]}." for c in classes]
    versions = harness.versions(sys.executable, ("edge-mmllm", "onnxruntime", "numpy", "pillow"))
    rows, base = list[tuple[str | int, ...]](), list[str]()
    for scheme in model.schemes:
        bundle = arguments.cache / "benchmarks" / f"accuracy-{name}-{scheme}"
        bundle.parent.mkdir(parents=True, exist_ok=True)
        source = arguments.shared / model.below
        artefacts.run(artefacts.export_command(source, bundle, "--quant", scheme))
        opened = open_bundle(bundle)
        given = answers(bundle, pictures, arguments.threads)
        right = [a == b for a, b in zip(given, expected, strict=True)]
        base = base or given
        points = 100 * (sum(right) - _right(base, expected)) / len(given)
        same, size = _right(given, base), harness.size_bytes(bundle)
        first = sum(right[:REFERENCE_PICTURES])
        bits = opened.manifest.quantization.bits_per_weight
        allowed = ALLOWED.get(scheme)
        report.record(
            model=name, scheme=scheme, pictures=len(given), right=sum(right),
            right_of_first_500=first, reference_of_first_500=model.reference, points=points,
            points_allowed=allowed, same_as_f32=same, bundle_bytes=size, bits_per_weight=bits,
            gate=dict(opened.manifest.gate.figures or {}), threads=arguments.threads,
            bundle_sha256=opened.sha256, versions=versions,
        )  # fmt: skip
        limit = "" if allowed is None else f"-{allowed:.1f}" + _verdict(points, allowed)
        rows.append(
            (
                "" if rows else name, scheme, f"{size / 1e6:.1f}", f"{bits:.2f}", first,
                sum(right), f"{100 * sum(right) / len(given):.2f} %", f"{points:+.2f}", limit, same,
            )
        )  # fmt: skip
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def _right(given: list[str], expected: list[str]) -> int:
    return sum(a == b for a, b in zip(given, expected, strict=True))


def _verdict(points: float, allowed: float) -> str:
    return "" if points >= -allowed else " (missed)"


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--shared", type=Path, default=harness.ROOT.parent / "shared/data")
    parser.add_argument("--only", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    report = harness.Reporter("accuracy", "Right answers about pictures", arguments)
    rows = [row for name in arguments.only for row in run(name, arguments, report)]
    told = ", ".join(f"{MODELS[name].reference} ({name})" for name in arguments.only)
    report.table(
        f"Fashion-MNIST, the first {arguments.pictures} test pictures; transformers 5 in float32 "
        f"answers {told} of the first {REFERENCE_PICTURES} right",
        HEAD,
        rows,
    )
    report.close()


if __name__ == "__main__":
    main()
