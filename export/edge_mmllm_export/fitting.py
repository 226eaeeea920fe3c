"""What `fit` needs to know of a checkpoint: every quantization, planned from its headers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from edge_mmllm.errors import UnsupportedArchitecture
from edge_mmllm.profiling.facts import Facts, sort_weights
from edge_mmllm_export.exporter import plan_export
from edge_mmllm_export.inspection import inspect_checkpoint
from edge_mmllm_export.planning import ExportOptions
from edge_mmllm_export.quantize.schemes import QuantPlan

#: Scheme and block size of the forms compared.
_FORMS = (("f16", 32), ("int8", 32), ("int4", 32), ("int4", 128))


def checkpoint_facts(source: str) -> list[Facts]:
    """The facts of each form that an export could take; no weight is read.

    Raises:
        CheckpointError: it cannot be exported; the message says why.
    """
    report = inspect_checkpoint(source)
    if report.sizes is None or report.problem is not None:
        raise UnsupportedArchitecture(report.problem or "not a model that can be exported")
    sizes = {name: value or 0 for name, value in report.sizes.items()}
    found = []
    for scheme, block in _FORMS:
        options = replace(ExportOptions(), plan=QuantPlan(name=scheme, block_size=block))
        plan = plan_export(source, options)
        found.append(
            Facts(
                name=Path(source).name,
                scheme=f"{scheme}, block {block}" if scheme.startswith("int") else scheme,
                architecture=plan.architecture,
                parameters=plan.parameters,
                hidden=sizes["hidden"],
                layers=sizes["layers"],
                vocab=sizes["vocab"],
                weights=sort_weights(plan.groups),
                disk_bytes=plan.disk_bytes,
                state_constant_bytes=2 * plan.state_bytes_constant,
                state_bytes_per_token=plan.state_bytes_per_token,
                context_length=plan.context_length,
                native=None,
                gate="not judged",
                quality={},
            )
        )
    return found
