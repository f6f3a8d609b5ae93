"""The runtimes that `reinforce latency` measures, by their names on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from reinforce.errors import UserError
from reinforce.shipping.packages import require_packages

TORCH, ALL = "torch", "all"


@dataclass(frozen=True)
class Runtime:
    """The target that converts and loads, and how weights are stored."""

    target: str
    weights: str = "fp32"


RUNTIMES = {
    "onnxruntime": Runtime("onnx"),
    "openvino": Runtime("openvino"),
    "litert": Runtime("litert"),
    "litert-int8": Runtime("litert", "int8"),
    "litert-dynamic-int8": Runtime("litert", "dynamic-int8"),
    "executorch": Runtime("executorch"),
    "executorch-dynamic-int8": Runtime("executorch", "dynamic-int8"),
}


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
