"""Speed of the models of a run, by layer: inputs per second, and model FLOP utilisation (MFU).

MFU is the model's FLOP/s over its layer's time, as a share of the peak FLOP/s of the card in the model's precision.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from reinforce.dataset.kinds.registry import find_kind
from reinforce.terminal import format_bytes

#: Sums over batches, shards and workers, by layer: ``inputs``, ``seconds``, and, if known, ``flops``, ``peak_flops``
#: (what the card could have done in these seconds) and ``tokens`` of captions.
Stages: TypeAlias = "dict[str, Counter[str]]"
_RATES = ("per_second", "tokens_per_second", "mfu")


@dataclass(frozen=True)
class Cost:
    """FLOPs of one input of a layer, and the peak FLOP/s of the card in the precision of its model."""

    flops: float
    peak: float


def add_stages(sums: Stages, stages: Mapping[str, Mapping[str, float]]) -> None:
    """Add the sums of a ``StageMeter``, or of a summary."""
    for layer, stage in stages.items():
        entry: Any = sums.setdefault(layer, Counter())
        entry.update({key: value for key, value in stage.items() if key not in _RATES})


def with_rates(stages: Stages) -> dict[str, dict[str, float]]:
    """Sums with ``per_second`` and, if known, ``tokens_per_second`` and ``mfu``."""
    found: dict[str, dict[str, float]] = {}
    for layer, stage in stages.items():
        entry = found[layer] = {key: round(value, 3) for key, value in stage.items()}
        if stage["seconds"]:
            entry["per_second"] = round(stage["inputs"] / stage["seconds"], 2)
            if stage["tokens"]:
                entry["tokens_per_second"] = round(stage["tokens"] / stage["seconds"], 2)
        if stage["peak_flops"]:
            entry["mfu"] = round(stage["flops"] / stage["peak_flops"], 4)
    return found


def fuller(one: Mapping[str, Any], other: Mapping[str, Any]) -> Mapping[str, Any]:
    """The report of the device that has used the larger share of its memory; a report may be empty."""
    return max(one, other, key=lambda device: device["memory_peak"] / device["memory_total"] if device else -1.0)


def unit_of(layer: str) -> str:
    """The unit of a layer's rates; ``inputs`` for a layer of an unknown kind."""
    kind = find_kind(layer)
    return "inputs" if kind is None else kind.unit


def rate_lines(summary: Mapping[str, Any], by_layer: bool = True) -> list[str]:
    """Lines about the speed of a run, from its summary; none where it has no rates."""
    stages, device = summary.get("stages") or {}, summary.get("device") or {}
    lines = []
    if stages:
        memory = ""
        if device:
            peak, total = (format_bytes(device.get(key, 0)) for key in ("memory_peak", "memory_total"))
            memory = f", {device.get('name')}: tensors took at most {peak} of {total}"
        more = "" if by_layer else "; -v shows the speed of each layer"
        lines.append(f"models busy {summary.get('busy_share', 0):.0%}{memory}{more}")
    for layer, stage in stages.items() if by_layer else ():
        unit = unit_of(layer)
        mfu = f", MFU {stage['mfu']:.0%}" if "mfu" in stage else ""
        tokens = f", {stage['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in stage else ""
        speed = f"{stage.get('per_second', 0):,.0f} {unit}/s{tokens}{mfu}"
        lines.append(f"  {layer}: {stage['inputs']:,.0f} {unit}, {speed}")
    return lines
