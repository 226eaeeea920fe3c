"""Makes `tests/export/goldens/tokenizers.json`: token ids by llama.cpp, for the GGUF tokenizers.

    .venv-bench/bin/python tests/goldens/make_tokenizers.py [SmolLM2-135M-Instruct.Q4_1.gguf]

needs llama-cpp-python and gguf (and this repository on PYTHONPATH). Two small vocabularies are
trained on the texts themselves, without any pre-tokenizer, so that their merges would run across
every boundary a pre-tokenizer must hold: a wrong regex shows in the ids. They are stored beside
the ids; the model's are not (a test that has the model compares them).
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "export"), str(ROOT / "tests" / "export")]

import llama_cpp  # noqa: E402
from checkpoint_files import write_vocabulary_gguf  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402

from edge_mmllm_export.checkpoints import pretokenizers  # noqa: E402

TARGET = ROOT / "tests" / "export" / "goldens" / "tokenizers.json"

TEXTS = [
    "",
    " ",
    "  ",
    "\n",
    "\t\n \r\n\r",
    "Hello, world!",
    " leading and trailing ",
    "What is the capital of France?",
    "In 1984, 3.14159 and 1,000,000 and 12345678901 were numbers.",
    "v1.2.3-rc4 x86_64 0xDEADBEEF 1e-5",
    "I'm you're he's we'll they'd I've can't DON'T IT'S We'Ll o'clock 'tis",
    "\u017f'\u017f a'\u017fb",  # long s: case folding must not take it for a contraction
    "camelCase HTTPServer iPhone XMLHttpRequest ABCdefGHI",
    "snake_case kebab-case path/to/file.txt C:\\dir\\x",
    "def f(x):\n    return [x ** 2 for x in range(10)]  # squares\n\n\nclass A: pass",
    "if (a != b && c <= d) { return a->b[0]; }\r\n\tgoto end;",
    '<p class="x">caf\u00e9</p> &amp; $5 + 3 = 8 ~ ^ | ` @ # % *',
    "...---***!!!???;;;:::\"\"\"'''(((",
    "...\n\n!!\n//\n--/\n",
    "a    b     c      d       e",
    "x" * 40 + " " * 33 + "y",
    "caf\u00e9 na\u00efve \u00dcn\u00efc\u00f6d\u00e9 \u00c5ngstr\u00f6m \u01c5 \u10d0\u10d1",
    "e\u0301 n\u0303 a\u0308\u0301",  # combining marks
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! "
    "\u041a\u0430\u043a \u0434\u0435\u043b\u0430?",
    "\u0393\u03b5\u03b9\u03ac \u03c3\u03bf\u03c5 \u039a\u03cc\u03c3\u03bc\u03b5",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u4eca\u5929\u662f2024\u5e743\u670815\u65e5\u3002",
    "\u3053\u3093\u306b\u3061\u306f\u3001\u30c6\u30b9\u30c8\u3067\u3059\u3002"
    "\uc548\ub155\ud558\uc138\uc694 \ud55c\uad6d\uc5b4",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645 \u0663\u0664\u0665",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e \u0967\u0968\u0969",
    "\U0001f600\U0001f469\u200d\U0001f469\u200d\U0001f467\U0001f1eb\U0001f1f7 ok \U0001d54f",
    "\u2460\u2461\u00bd\u00b2\u2167 \u2122\u00a9\u20ac\u00a3",
    "\u00a0nbsp\u2003em\u3000ideographic\u200bzero\ufeffbom",
    "\x00\x01\x1f\x7f\x85",
    "\u2581 already \u2581\u2581escaped",
    "<s> </s> <unk> <0x0A> <|x|>",
    "<|user|>Hi there<|end|>\n<|user|> again <|end|> <|end|><|end|>",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa bababababababab",
    "----------------------------------------",
    "The quick brown fox jumps over the lazy dog. 0123456789",
]

CONTROL, USER, UNKNOWN, BYTE, NORMAL = 3, 4, 2, 6, 1
WHOLE_WORDS = ("\u0120leading", "\u0120trailing", "\u0120capital", "\u0120jumps")
EXTRA = {"<|user|>": CONTROL, "<|end|>": CONTROL, "<|x|>": USER}


def byte_level() -> dict[str, Any]:
    """A byte-level BPE vocabulary whose merges know no boundary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=1400,
        min_frequency=1,
        max_token_length=9,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([text for text in TEXTS for _ in range(2)], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    tokens = [token for token in tokens if token not in EXTRA]
    # no merges lead to these: only a pre-tokenizer that ignores merges emits them
    tokens += [word for word in WHOLE_WORDS if word not in tokens]
    return {
        "tokens": [*tokens, *EXTRA],
        "token_types": [NORMAL] * len(tokens) + list(EXTRA.values()),
        "merges": [
            merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]
        ],
    }


def sentencepiece() -> dict[str, Any]:
    """A SentencePiece-like vocabulary: bytes, then pieces with scores by rank, then characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.decoder = decoders.Fuse()
    trainer = trainers.BpeTrainer(
        vocab_size=900, min_frequency=2, max_token_length=9, show_progress=False
    )
    texts = [text.replace(" ", "\u2581") for text in TEXTS if "\x00" not in text]
    tokenizer.train_from_iterator([text for text in texts for _ in range(2)], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    special = {"<unk>": UNKNOWN, "<s>": CONTROL, "</s>": CONTROL}
    tokens = [*special, *(f"<0x{i:02X}>" for i in range(256))]
    types = [*special.values(), *[BYTE] * 256]
    scores = [0.0] * len(tokens)
    merges = [
        merge if isinstance(merge, list) else merge.split(" ", 1) for merge in model["merges"]
    ]
    pieces = list(dict.fromkeys("".join(merge) for merge in merges))
    # leave rare characters out, so that byte fallback is used
    letters = sorted({c for text in texts for c in text if ord(c) < 0x3100 and c not in "\n\r\t"})
    for rank, piece in enumerate([*pieces, *(c for c in letters if c not in pieces)]):
        if set(piece) <= set(letters) and piece not in EXTRA and piece not in special:
            tokens.append(piece)
            types.append(NORMAL)
            scores.append(-float(rank))
    return {
        "tokens": [*tokens, *EXTRA],
        "token_types": [*types, *EXTRA.values()],
        "scores": [*scores, 0.0, 0.0, 0.0],
    }


class Vocabulary:
    """llama.cpp's tokenizer of one GGUF."""

    def __init__(self, path: Path) -> None:
        parameters = llama_cpp.llama_model_default_params()
        parameters.vocab_only = True
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)

    def ids(self, text: str) -> list[int]:
        raw = text.encode()
        size = len(raw) + 16
        out = (llama_cpp.llama_token * size)()
        count = llama_cpp.llama_tokenize(self.vocab, raw, len(raw), out, size, False, True)
        return list(out[:count])


@llama_cpp.llama_log_callback
def _quiet(level: int, text: bytes, data: object) -> None:
    """llama.cpp warns of every control token."""


def main() -> None:
    llama_cpp.llama_log_set(_quiet, ctypes.c_void_p(0))
    levels, pieces = byte_level(), sentencepiece()
    golden: dict[str, Any] = {
        "made_by": f"llama-cpp-python {llama_cpp.__version__}, {Path(__file__).name}",
        "texts": TEXTS,
        "byte_level": levels | {"ids": [], "pre": {}},  # pre-tokenizer -> its entry of ids
        "sentencepiece": pieces | {"ids": {}},
    }
    ids = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "v.gguf"
        for pre in pretokenizers.known():
            write_vocabulary_gguf(path, model="gpt2", pre=pre, more=ids, **levels)
            vocabulary = Vocabulary(path)
            found, distinct = [vocabulary.ids(text) for text in TEXTS], golden["byte_level"]["ids"]
            if found not in distinct:
                distinct.append(found)
            golden["byte_level"]["pre"][pre] = distinct.index(found)
        for prefix in (True, False):
            more = ids | {"tokenizer.ggml.add_space_prefix": prefix}
            write_vocabulary_gguf(path, model="llama", more=more, **pieces)
            vocabulary = Vocabulary(path)
            golden["sentencepiece"]["ids"][str(prefix)] = [vocabulary.ids(t) for t in TEXTS]
    if len(sys.argv) > 1:
        model = Path(sys.argv[1])
        vocabulary = Vocabulary(model)
        golden["smollm2"] = {
            "file": model.name,
            "sha256": hashlib.sha256(model.read_bytes()).hexdigest(),
            "ids": [vocabulary.ids(text) for text in TEXTS],
        }
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(json.dumps(golden, ensure_ascii=True, separators=(",", ":")) + "\n")
    print(f"{TARGET}: {TARGET.stat().st_size} bytes, {len(TEXTS)} texts")


if __name__ == "__main__":
    main()
