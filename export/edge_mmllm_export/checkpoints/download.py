"""Hub ids: a snapshot through huggingface_hub, where that is installed and can reach the hub."""

from __future__ import annotations

import re
from pathlib import Path

from edge_mmllm.errors import CheckpointError, MissingDependency

#: Everything beside the weights: settings, tokenizer, templates.
_TEXT = ["*.json", "*.jinja", "tokenizer.model"]

#: Weights by preference; each attempt downloads only what it names, from the top folder.
_WEIGHTS = (
    ["model.safetensors", "model-*.safetensors"],
    ["pytorch_model.bin", "pytorch_model-*.bin"],
)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_id(text: str) -> bool:
    """Whether `text` has the form `org/name`."""
    return _HUB_ID.fullmatch(text) is not None


def snapshot(repo_id: str) -> Path:
    """The local folder of a hub repository, downloaded where it is not cached.

    Safetensors are preferred, then PyTorch shards, then a lone `.pth` or `.gguf`.

    Raises: MissingDependency, CheckpointError (no network, no such repository, no weights).
    """
    try:
        import huggingface_hub as hub
    except ImportError as error:
        raise MissingDependency("huggingface_hub", "export") from error

    try:
        for weights in _WEIGHTS:
            folder = Path(hub.snapshot_download(repo_id, allow_patterns=_TEXT + weights))
            if any(path for pattern in weights for path in folder.glob(pattern)):
                return folder
        names = hub.HfApi().list_repo_files(repo_id)
        single = [n for n in names if n.endswith((".pth", ".gguf"))]
        if len(single) == 1:
            return Path(hub.snapshot_download(repo_id, allow_patterns=_TEXT + single))
    except Exception as error:  # its own errors, its HTTP client's, OSError: one family to a user
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise CheckpointError(
            f"cannot get {repo_id} from the hub",
            expected="a local path, or a hub id that can be downloaded",
            found=f"{type(error).__name__}: {reason}",
            fix="check the id and the network (HF_TOKEN for a gated model), "
            "or download it elsewhere and pass its folder",
        ) from error
    raise CheckpointError(
        f"{repo_id} holds no checkpoint that can be chosen for you",
        expected="safetensors, pytorch_model.bin, or exactly one .pth or .gguf",
        found=", ".join(single[:20]) or "none of them",
        fix="download one file and pass its path",
    )
