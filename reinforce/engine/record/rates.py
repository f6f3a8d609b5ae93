"""Speed of the models of a run, by layer: inputs a second, and model FLOP utilisation (MFU).

MFU is the model's operations in a second of its layer's time, as a share of what the card could do in its precision.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from reinforce.dataset.kinds.registry import find_kind
from reinforce.terminal import format_bytes

#: What is summed over batches, shards and workers, by layer: ``inputs``, ``seconds``, and, where they are known,
#: ``flops`` and ``peak_flops``, those that the card could have done in these seconds, and ``tokens`` of captions.
Stages: TypeAlias = "dict[str, Counter[str]]"


_RATES = ("per_second", "tokens_per_second", "mfu")


@dataclass(frozen=True)
class Cost:
    """FLOPs of one input of a layer, and the FLOP/s that the card can do at most in the precision of its model."""

    flops: float
    peak: float


def add_stages(sums: Stages, stages: Mapping[str, Mapping[str, float]]) -> None:
    """Add what ``StageMeter`` has measured, or an earlier sum."""
    for layer, stage in stages.items():
        entry: Any = sums.setdefault(layer, Counter())
        entry.update({key: value for key, value in stage.items() if key not in _RATES})


def add_numbers(sums: Any, numbers: Mapping[str, float]) -> None:
    """Add numbers by name to a Counter, whose type is that of whole numbers."""
    sums.update(numbers)


def with_rates(stages: Stages) -> dict[str, dict[str, float]]:
    """Sums with ``per_second`` and, where it is known, ``mfu``."""
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
    """The report of the device that has used more of its memory; an empty report is of no device."""
    return max(one, other, key=lambda device: device["memory_peak"] / device["memory_total"] if device else -1.0)


def unit_of(layer: str) -> str:
    """What the rates of a layer count; ``inputs`` for a layer of an unknown kind."""
    kind = find_kind(layer)
    return "inputs" if kind is None else kind.unit


def rate_lines(summary: Mapping[str, Any]) -> list[str]:
    """Lines about the speed of a run, from its summary; none for one of a version that had not measured it."""
    stages, device = summary.get("stages") or {}, summary.get("device") or {}
    lines = []
    if stages:
        memory = ""
        if device:
            peak, total = (format_bytes(device.get(key, 0)) for key in ("memory_peak", "memory_total"))
            memory = f", {device.get('name')}: tensors took at most {peak} of {total}"
        lines.append(f"accelerator busy {summary.get('busy_share', 0):.0%}{memory}")
    for layer, stage in stages.items():
        unit = unit_of(layer)
        mfu = f", MFU {stage['mfu']:.0%}" if "mfu" in stage else ""
        tokens = f", {stage['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in stage else ""
        speed = f"{stage.get('per_second', 0):,.0f} {unit}/s{tokens}{mfu}"
        lines.append(f"  {layer}: {stage['inputs']:,.0f} {unit}, {speed}")
    return lines
