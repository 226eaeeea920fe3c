"""MLC: weights as mlc-llm stores them, and model libraries compiled from our definitions."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_mmllm.bundle import BundleWriter, QuantGroup
from edge_mmllm.bundle.manifest import Engine
from edge_mmllm.errors import UnsupportedArchitecture, UsageError
from edge_mmllm.spec import Stage, StateSpec
from edge_mmllm_export.families.composite import Composite
from edge_mmllm_export.formats.base import Advance, Job, Written
from edge_mmllm_export.mlc import compile as mlc_compile
from edge_mmllm_export.mlc import layout as mlc
from edge_mmllm_export.mlc.config import CONFIG, WORLD, chat_config, world_file
from edge_mmllm_export.mlc.write import write
from edge_mmllm_export.ops.base import Architecture, EncoderDecoder
from edge_mmllm_export.quantize.schemes import QuantPlan
from edge_mmllm_export.weights import Weight
from edge_mmllm_runtime import ENGINES
from edge_mmllm_runtime.mlc.weights import INDEX

if TYPE_CHECKING:
    from edge_mmllm_export.planning import ExportOptions

#: Index, configuration and manifest, and a library for each target.
_BESIDE_BYTES = 8 << 20
_LIBRARY_BYTES = 8 << 20
#: `--target` where none is given, and what says that no library is wanted.
NATIVE, NONE = "native", "none"


@dataclass(frozen=True)
class MlcArtefact:
    """Weight files, configuration, libraries (see `mlc.layout`)."""

    job: Job
    files: mlc.MlcFiles
    options: ExportOptions

    @property
    def targets(self) -> tuple[str, ...]:
        return targets(self.options)

    @cached_property
    def groups(self) -> tuple[QuantGroup, ...]:
        return self.files.groups()

    @property
    def size_bytes(self) -> int:
        each = _LIBRARY_BYTES + (self.files.size_bytes if self.options.standalone else 0)
        return self.files.size_bytes + _BESIDE_BYTES + each * len(self.targets)

    @property
    def child_ram_bytes(self) -> int:
        return mlc_compile.CHILD_RAM_BYTES if self.targets else 0

    @property
    def context_length(self) -> int | None:
        return self.job.model.context_length

    @property
    def states(self) -> tuple[StateSpec, ...]:
        return self.job.model.states()

    @property
    def details(self) -> dict[str, Any]:
        found = self.files.map
        return {
            "mlc": {
                "model_type": found.model_type,
                "stock": found.stock,
                "context_length": found.context_length,
                "remarks": list(found.remarks),
            }
        }

    def write(self, writer: BundleWriter, progress: Advance) -> Written:
        job, files = self.job, self.files
        write(files, job.checkpoint, writer.root, workers=job.workers, progress=progress)
        config = chat_config(files.map, files.quant, job.text, job.checkpoint)
        writer.path(CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        if job.text.tokenizer_json is not None and job.text.spec.tokenizer == "rwkv-world":
            writer.path(WORLD).write_bytes(world_file(job.text.tokenizer_json))
        needs: dict[str, Any] = {}
        if self.targets:
            needs = mlc_compile.compile_libraries(
                mlc_compile.Request(
                    source=str(job.checkpoint.source),
                    lora=self.options.lora,
                    context=self.options.context,
                    quantization=files.quant.name,
                    targets=self.targets,
                    folder=str(writer.root),
                    standalone=self.options.standalone,
                )
            )
        standalone = {
            n: need.pop("standalone") for n, need in needs.items() if "standalone" in need
        }
        libraries = {name: mlc_compile.library_file(name) for name in needs}
        engine_format = {
            "quantization": files.quant.name,
            "libraries": libraries,
            "needs": needs,
            "views": {name: asdict(view) for name, view in files.views.items()},
            **({"standalone": standalone} if standalone else {}),
        }
        return Written(self._stages(next(iter(libraries.values()), INDEX)), engine_format)

    def _stages(self, file: str) -> dict[str, Stage]:
        """All in one file: a library holds a function for each stage."""
        model, out = self.job.model, dict[str, Stage]()
        tokens = "input_ids"
        if isinstance(model, Composite):
            tokens = "inputs_embeds"
            for stage in model.stage_definitions():
                ports = tuple(port.name for port in stage.ports)
                out[stage.name] = Stage(file, ports, (stage.output,))
            out["embed"] = Stage(file, ("input_ids",), (tokens,))
        memory = tuple(s.name for s in self.states if s.kind == "cross_kv")
        if memory:
            out["encode_text"] = Stage(file, (tokens,), (), fills=memory)
        grows = any(s.kind == "kv" for s in self.states)
        inputs = (tokens, *(["position"] if grows else []), "logit_rows")
        in_place = tuple(s.name for s in self.states if s.kind != "cross_kv")
        return out | {"decoder": Stage(file, inputs, ("logits",), in_place)}


def targets(options: ExportOptions) -> tuple[str, ...]:
    """What to compile for; empty where `none` was asked for. Raises: UsageError."""
    names = options.targets or (NATIVE,)
    if NONE in names and len(names) > 1:
        raise UsageError("--target none goes with no other target", found=" ".join(names))
    return () if NONE in names else tuple(dict.fromkeys(names))


class MlcFormat:
    """`--format mlc`."""

    engine: Engine = "mlc"
    packages = ("apache-tvm", "apache-tvm-ffi")

    def variant(self, options: ExportOptions) -> str | None:
        return options.mlc_quant

    def resolved(self, options: ExportOptions) -> ExportOptions:
        quant = mlc.quantization(options.plan, options.mlc_quant)
        return replace(options, mlc_quant=quant.name, plan=mlc.plan_for(quant))

    def layout(self, job: Job, options: ExportOptions) -> MlcArtefact:
        if options.inputs != "ids":
            raise UsageError("--inputs embeds is for --format onnx", expected="--inputs ids")
        reads = isinstance(getattr(job.model, "backbone", job.model), EncoderDecoder)
        odd = {s.kind for s in job.model.states()} & {"place", *(() if reads else ("cross_kv",))}
        if odd:
            raise UnsupportedArchitecture(
                f"{job.model.name} cannot be written as MLC yet",
                expected="a model without pictures beside its text, or places of its own",
                found=f"states of kind {', '.join(sorted(odd))}",
                fix="export with --format onnx",
            )
        targets(options)
        quant = mlc.quantization(QuantPlan(), options.mlc_quant)
        return MlcArtefact(job, mlc.layout(job.model, job.weights, quant), options)

    def as_stored(
        self,
        model: Architecture,
        weights: Mapping[str, Weight],
        plan: QuantPlan,
        word: str | None,
        folder: Path,
    ) -> dict[str, Weight]:
        return mlc.as_stored(mlc.layout(model, weights, mlc.quantization(plan, word)), weights)

    def judged_as(self, options: ExportOptions) -> str:
        quant = mlc.quantization(QuantPlan(), options.mlc_quant)
        return f"int{quant.bits}" if quant.bits else "f16"

    def unjudged(self, options: ExportOptions) -> str | None:
        if not targets(options):
            return "there is no library to run (--target none)"
        package = "tvm"
        if "mlc" not in ENGINES or importlib.util.find_spec(package) is None:
            return "TVM is not installed: pip install 'edge-mmllm[mlc]', then edge-mmllm check"
        return None


MLC = MlcFormat()
