"""Whether a picture is seen alike through llama.cpp: answers, features, logits and pixels.

tiny-llava is asked "What is in this image?" about the first 200 test pictures of Fashion-MNIST, as
an ONNX bundle in float32 and as GGUF bundles (`model.gguf` and `mmproj.gguf`). Beside them
llama.cpp on its own: mtmd resizes the picture and computes in its own arithmetic, from the same
files, first with the class token put where positions count on it, then as llama-cpp-python 0.3.36
is.

    python benchmarks/accuracy_gguf.py [--shared DIR] [--pictures 200] [--publish]

No figure depends on the machine's load. Needs edge-mmllm[export,gguf,runtime-onnx].
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import artefacts
import harness
import numpy as np
from accuracy import MODELS, NAMES, QUESTION, idx
from numpy.typing import NDArray

import edge_mmllm
from edge_mmllm_runtime.gguf import media as gguf_media
from edge_mmllm_runtime.gguf.stages import Stages
from edge_mmllm_runtime.session import Session

MODEL = "tiny-llava"
#: Row of the table -> format, --quant, how mtmd is used.
ROWS = {
    "ONNX f32": ("onnx", "f32", "ours"),
    "GGUF F32": ("gguf", "f32", "ours"),
    "GGUF F16": ("gguf", "f16", "ours"),
    "GGUF Q8_0": ("gguf", "int8", "ours"),
    "GGUF Q4_0": ("gguf", "int4", "ours"),
    "GGUF F32, mtmd's resize, arithmetic": ("gguf", "f32", "class"),
    "GGUF F32, mtmd as it is": ("gguf", "f32", "own"),
}
HEAD = (
    "bundle", "right", "same answer as ONNX", "features: largest delta", "of their largest",
    "logits of the first answer: largest delta", "levels of pixels that differ", "by at most",
)  # fmt: skip
Seen = tuple[list[str], list[NDArray[np.float32]], list[NDArray[np.float32]], list[Any]]


class _Plain(gguf_media.Projector):
    """mtmd as it comes, given pictures as they are. `turned`: but for the class token's place."""

    picture: NDArray[np.uint8]
    turned = False

    def encode(self, inputs: Any) -> NDArray[np.float32]:
        return self._rows([inputs["pixels"]])

    def _level(self, pixels: NDArray[np.float32]) -> NDArray[np.uint8]:
        return self.picture

    def _products(self, given: Any) -> list[NDArray[np.float32]]:
        return []

    def _between(self, tensor: int, ask: bool) -> bool:
        step = gguf_media.description(tensor)
        if ask:
            return step == b"IM2COL" or (self.turned and step == b"CONCAT")
        if step == b"CONCAT":
            return super()._between(tensor, ask)
        self.seen = gguf_media.tensor_values(tensor).view(np.float16).astype(np.float32)
        return True


@contextmanager
def _as(kind: str) -> Iterator[None]:
    """How mtmd is used within."""
    own = gguf_media.Projector
    if kind != "ours":
        _Plain.turned = kind == "class"
        gguf_media.Projector = _Plain  # type: ignore[misc]
    try:
        yield
    finally:
        gguf_media.Projector = own  # type: ignore[misc]


def ask(bundle: Path, pictures: NDArray[np.uint8], threads: int) -> Seen:
    """Answers, features, logits of the first token of each answer, and levels that mtmd saw."""
    answers, features, logits, levels = [], [], [], []
    with edge_mmllm.load(bundle, threads=threads) as session:
        for picture in pictures:
            rgb = np.ascontiguousarray(np.repeat(picture[..., None], 3, 2))
            _Plain.picture = rgb
            text = "".join(session.generate(QUESTION, [rgb], max_new_tokens=16)).strip()
            answers.append(text)
            rows = next(iter(session.perception._features.values()))
            features.append(rows)
            session.reset()
            logits.append(session.prefill(_question(session, rgb)))
            levels.append(_levels(session, rgb))
            session.perception.forget()
    return answers, features, logits, levels


def _question(session: Session, rgb: NDArray[np.uint8]) -> Any:
    parts = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    return session.encode([{"role": "user", "content": parts}], {"image": [rgb]})


def _levels(session: Session, rgb: NDArray[np.uint8]) -> tuple[int, int, int]:
    """Of mtmd's own resize: levels that differ from ours, all of them, the largest difference."""
    loaded = getattr(session.engine, "_stages", None)
    found = list(loaded._loaded.values()) if isinstance(loaded, Stages) else []
    if not found or not isinstance(found[0], _Plain):
        return 0, 0, 0
    plain = found[0]
    from edge_mmllm.image import ImageSettings, prepare_image

    settings = ImageSettings.from_json(session.spec.modalities["image"].settings, "")
    pixels = prepare_image(rgb, settings).pixels[0]
    ours = gguf_media.patches_of(pixels, plain._patch).reshape(-1, 3, plain._patch**2)
    mean, scale = plain._mean.reshape(3, 1), plain._scale.reshape(3, 1)
    theirs = plain.seen.reshape(ours.shape)
    delta = np.abs(np.rint((theirs - mean) * scale) - np.rint((ours - mean) * scale))
    return int((delta > 0).sum()), delta.size, int(delta.max())


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--shared", type=Path, default=harness.ROOT.parent / "shared/data")
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    report = harness.Reporter("accuracy_gguf", "Pictures through llama.cpp", arguments)
    data = arguments.shared / "fashion_mnist"
    pictures = idx(data / "t10k-images-idx3-ubyte.gz")[: arguments.pictures]
    classes = idx(data / "t10k-labels-idx1-ubyte.gz")[: arguments.pictures]
    expected = [f"This is {NAMES[c]}." for c in classes]
    packages = ("edge-mmllm", "onnxruntime", "llama-cpp-python", "numpy", "pillow")
    versions = harness.versions(sys.executable, packages)
    base: Seen | None = None
    rows = []
    for name, (form, quant, kind) in ROWS.items():
        bundle = arguments.cache / "benchmarks" / f"accuracy-{MODEL}-{form}-{quant}"
        bundle.parent.mkdir(parents=True, exist_ok=True)
        if not (bundle / "manifest.json").is_file():
            source = arguments.shared / MODELS[MODEL].below
            artefacts.run(
                artefacts.export_command(source, bundle, "--quant", quant, "--format", form)
            )
        with _as(kind):
            seen = ask(bundle, pictures, arguments.threads)
        base = base or seen
        rows.append((name, *_row(seen, base, expected, report, name, versions)))
        print(rows[-1], file=sys.stderr, flush=True)
    report.table(
        f"{MODEL}, the first {len(pictures)} test pictures of Fashion-MNIST, against ONNX f32",
        HEAD,
        rows,
    )
    report.close()


def _row(
    seen: Seen, base: Seen, expected: list[str], report: harness.Reporter, name: str, versions: Any
) -> tuple[str | int, ...]:
    answers, features, logits, levels = seen
    right = sum(a == b for a, b in zip(answers, expected, strict=True))
    same = sum(a == b for a, b in zip(answers, base[0], strict=True))
    largest: Callable[[Any, Any], float] = lambda a, b: max(  # noqa: E731
        float(np.abs(x - y).max()) for x, y in zip(a, b, strict=True)
    )
    delta, apart = largest(features, base[1]), largest(logits, base[2])
    scale = max(float(np.abs(x).max()) for x in base[1])
    count, of, most = (sum(x) for x in zip(*levels, strict=True))
    most = max(x[2] for x in levels)
    report.record(
        bundle=name, pictures=len(answers), right=right, same_as_onnx=same, feature_delta=delta,
        feature_largest=scale, logit_delta=apart, levels_that_differ=count, levels=of,
        level_delta=most, versions=versions,
    )  # fmt: skip
    pixels = f"{100 * count / of:.1f} %" if of else "none"
    return right, same, f"{delta:.2g}", f"{delta / scale:.1e}", f"{apart:.2g}", pixels, most


if __name__ == "__main__":
    main()
