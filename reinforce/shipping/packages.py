"""The runtimes that models are exported for, and the optional packages that each needs."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reinforce.processes.imports import require

if TYPE_CHECKING:
    from reinforce.shipping.targets.base import Target


@dataclass(frozen=True)
class TargetEntry:
    """A runtime: the extra that installs its ``packages``. ``targets/NAME.py`` implements it."""

    title: str
    extra: str
    packages: tuple[str, ...]


#: By the name that `reinforce export` has for it. OpenVINO runs the files of ONNX, and is only measured.
TARGETS = {
    "onnx": TargetEntry("ONNX", "export", ("onnx", "onnxscript", "onnxruntime")),
    "litert": TargetEntry("LiteRT", "litert", ("litert_torch", "ai_edge_litert", "ai_edge_quantizer")),
    "executorch": TargetEntry("ExecuTorch", "executorch", ("executorch", "torchao")),
    "openvino": TargetEntry("OpenVINO", "openvino", ("onnx", "onnxscript", "openvino")),
    "coreml": TargetEntry("Core ML", "coreml", ("coremltools",)),
}


def require_packages(target: str) -> None:
    """Raise UserError if a package of a target's extra is missing."""
    entry = TARGETS[target]
    require(entry.extra, entry.title, *entry.packages)


def load_target(target: str) -> Target:
    """Import a target. Raises UserError if a package of its extra is missing."""
    require_packages(target)
    found: Target = importlib.import_module(f"reinforce.shipping.targets.{target}").TARGET
    return found
