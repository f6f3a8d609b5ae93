"""``precision: auto`` of the models of a run, resolved before fingerprints.

What dataset.json records for a model comes first, so that a dataset that was made in fp32 stays complete on any
machine. A model that it does not list is computed in bf16 where workers use GPUs, and in fp32 on CPUs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

from reinforce.config import Config
from reinforce.dataset.layers import mapping_at
from reinforce.dataset.manifest.class_code import entry_keys
from reinforce.processes.cores import Node, default_gpus
from teachers.spec import ModelSpec, Precision

_RECORDED, _GPUS, _CPUS = "as dataset.json records", "workers use GPUs", "workers use CPUs"


def resolve_precisions(
    config: Config, manifest: Callable[[], Mapping[str, Any] | None], nodes: Callable[[], Sequence[Node]]
) -> tuple[Config, list[str]]:
    """The config with the precision of each model that is loaded, and lines about those that were ``auto``.

    ``manifest`` returns dataset.json of the output; it is called if a model was ``auto``.
    ``nodes`` are those on which workers will run; it is called if `workers.gpus` is not set and they matter.
    """
    specs = config.models
    all_ = [(section, name, spec) for section, of in specs.items() for name, spec in of.items()]
    open_ = [(section, name) for section, name, spec in all_ if spec.uses_precision and spec.precision == "auto"]
    if not open_:
        return config, []
    found_manifest = manifest() or {}
    recorded = {model: _recorded(found_manifest, *model) for model in open_}
    default: tuple[Precision, str] = ("fp32", _CPUS)
    if None in recorded.values():
        gpus = default_gpus(nodes()) if config.workers.gpus is None else config.workers.gpus
        default = ("bf16", _GPUS) if gpus else default
    found = {model: (precision, _RECORDED) if precision else default for model, precision in recorded.items()}
    changed: dict[str, dict[str, ModelSpec]] = {section: {**specs[section]} for section, _ in found}
    for (section, name), (precision, _) in found.items():
        changed[section][name] = changed[section][name].model_copy(update={"precision": precision})
    return config.model_copy(update=changed), _lines(found)


def _recorded(manifest: Mapping[str, Any], section: str, name: str) -> Precision | None:
    """The precision of a model's layers in dataset.json, None if it lists none."""
    precision = mapping_at(manifest, *entry_keys(section, name), "model").get("precision")
    return precision if precision in get_args(Precision) else None


def _lines(found: Mapping[tuple[str, str], tuple[Precision, str]]) -> list[str]:
    """One line for each precision and reason, with the models."""
    rows = sorted((precision, reason, name) for (_, name), (precision, reason) in found.items())
    return [
        f"precision: {precision} for {', '.join(name for _, _, name in group)} (auto: {reason})"
        for (precision, reason), group in itertools.groupby(rows, key=lambda row: row[:2])
    ]
