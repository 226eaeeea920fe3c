"""Qwen2-Audio: Whisper's encoder, pooled, one linear layer, qwen2.

Source: Qwen2-Audio (arXiv 2407.10759); `modeling_qwen2_audio.py` of transformers 5.23.
"""

from __future__ import annotations

from edge_mmllm.errors import CheckpointError
from edge_mmllm.modality import Modality
from edge_mmllm_export.checkpoints.base import Checkpoint
from edge_mmllm_export.families import hub
from edge_mmllm_export.families.composite import Composite, Part, Pathway
from edge_mmllm_export.families.llava import BACKBONES, PROJECTORS
from edge_mmllm_export.models.config import Fields
from edge_mmllm_export.models.mlp import Mlp, MlpConfig
from edge_mmllm_export.models.whisper import POOLED, STRIDE, Whisper


def qwen2_audio(checkpoint: Checkpoint, context: int | None) -> Composite:
    """The model of a Qwen2-Audio config. Raises: CheckpointError."""
    where = f"{checkpoint.source}, config.json"
    f = Fields(checkpoint.config, where)
    language, renames = hub.backbone(checkpoint, context, BACKBONES, "qwen2")
    audio = hub.part(checkpoint, "audio_config", {}, "qwen2_audio_encoder")
    tower = Whisper.from_config(Fields(audio, f"{where}, audio_config"))
    settings = hub.audio_settings(checkpoint)
    mel = settings["layout"]
    frames = mel["seconds"] * settings["rate"] // mel["hop"] if "hop" in mel else 0
    if tower.tokens or (mel.get("mels"), frames) != (tower.config.mels, tower.frames):
        raise CheckpointError(
            "the encoder does not take what its feature extractor makes",
            where=f"{where} and preprocessor_config.json",
            expected=f"a pooling encoder; {tower.config.mels} mels, {tower.frames} frames",
            found=f"{tower.name}; {mel.get('mels')} mels, {frames} frames",
        )
    token_id = f.size("audio_token_id", f.get("audio_token_index", 151646), least=0)
    sound = Modality(
        stages=(),
        placeholder=hub.placeholder(checkpoint, token_id, "audio_token"),
        token_id=token_id,
        tokens=0,
        layout={"kind": "sound", "stride": STRIDE, "pooled": POOLED},
        settings=settings,
    )
    linear = Mlp(MlpConfig(widths=(tower.width, language.hidden_size), names=("linear",)))
    towers = ("audio_tower.", "model.audio_tower.")
    path = Pathway(
        name="audio",
        encoder=Part(tower, hub.prefix(checkpoint, *towers)),
        projector=Part(linear, hub.prefix(checkpoint, *PROJECTORS)),
        modality=sound,
    )
    return Composite("qwen2_audio", language, renames, [path])
