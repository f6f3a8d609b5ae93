"""The runtimes that models are exported for and measured in, and the optional packages that each needs."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reinforce.errors import UserError
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
    "transformers": TargetEntry("transformers", "export", ("transformers", "timm")),
}


@dataclass(frozen=True)
class Runtime:
    """The target that converts and loads, and how weights are stored."""

    target: str
    weights: str = "fp32"


#: By the names that `reinforce export latency` has for them, beside TORCH.
RUNTIMES = {
    "onnxruntime": Runtime("onnx"),
    "openvino": Runtime("openvino"),
    "litert": Runtime("litert"),
    "litert-int8": Runtime("litert", "int8"),
    "litert-dynamic-int8": Runtime("litert", "dynamic-int8"),
    "executorch": Runtime("executorch"),
    "executorch-dynamic-int8": Runtime("executorch", "dynamic-int8"),
}
TORCH, ALL = "torch", "all"


def require_packages(target: str) -> None:
    """Raise UserError if a package of a target's extra is missing."""
    entry = TARGETS[target]
    require(entry.extra, entry.title, *entry.packages)


def load_target(target: str) -> Target:
    """Import a target. Raises UserError if a package of its extra is missing."""
    require_packages(target)
    found: Target = importlib.import_module(f"reinforce.shipping.targets.{target}").TARGET
    return found


def choose_runtimes(names: Sequence[str]) -> tuple[dict[str, Runtime], list[str]]:
    """Return runtimes beside torch, and a line for each package that is missing.

    A name may be ``torch``, or ``all`` for those that are installed. Raises UserError for an unknown name, and for one
    that was named but is not installed.
    """
    for name in names:
        if name not in (TORCH, ALL, *RUNTIMES):
            raise UserError(f"--runtime: {name!r} is unknown; choose of {', '.join((TORCH, *RUNTIMES, ALL))}.")
    chosen, missing = {}, dict[str, None]()
    for name, runtime in RUNTIMES.items():
        if name not in names and ALL not in names:
            continue
        try:
            require_packages(runtime.target)
            chosen[name] = runtime
        except UserError as error:
            if name in names:
                raise
            missing[f"left out: {error}"] = None
    return chosen, list(missing)
