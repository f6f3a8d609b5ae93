"""Checkpoints: one safetensors file each, with what is not a tensor as JSON in its header. No pickle.

A file appears whole or not at all, so a checkpoint that is there is good. Nothing of random generators is kept: what
is random in a step is seeded from the training's seed, the step and the rank.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from reinforce.errors import UserError
from reinforce.storage import Storage

FOLDER = "checkpoints"
_BEST = "best.json"
_VERSION = 1
_NAME = re.compile(r"step-(\d{9})\.safetensors")


@dataclass(frozen=True)
class Record:
    """What a checkpoint knows beside its tensors.

    ``step`` steps are done, ``skipped`` of them without an update; ``seconds`` were spent in steps. ``course`` is the
    part of the config that determines the training, by dotted keys.
    """

    step: int
    course: Mapping[str, Any]
    seconds: float = 0.0
    skipped: int = 0


@dataclass(frozen=True)
class Best:
    """The step whose ``metric`` was the highest so far."""

    step: int
    metric: str
    value: float


class Checkpoints:
    """The checkpoints of one output."""

    def __init__(self, store: Storage, keep: int) -> None:
        self._store = store
        self._keep = keep

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are there, in order; by one listing."""
        try:
            entries = self._store.fs.ls(self._store.path(FOLDER), detail=False, refresh=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
        found = (_NAME.fullmatch(str(entry).rpartition("/")[2]) for entry in entries)
        return sorted(int(match[1]) for match in found if match)

    def save(self, record: Record, tensors: Mapping[str, torch.Tensor]) -> None:
        """Publish a checkpoint, then remove those that are neither among the latest ``keep`` nor the best."""
        header = {"reinforce.checkpoint": json.dumps({"version": _VERSION, **asdict(record)})}
        with self._store.new_file(FOLDER, _name(record.step)) as path:
            save_file(_separate(tensors), path, metadata=header)
        best = self.best()
        for step in self.steps()[: -self._keep]:
            if best is None or step != best.step:
                self._store.fs.rm_file(self._store.path(FOLDER, _name(step)))

    def best(self) -> Best | None:
        """The best step of those that were evaluated."""
        found = self._store.read_json(FOLDER, _BEST)
        return Best(**found) if found else None

    def rate(self, step: int, metric: str, value: float) -> Best:
        """Note how good a step is; returns the best so far, which is the earliest among equals."""
        best = self.best()
        if best is None or best.metric != metric or value > best.value:
            best = Best(step, metric, value)
            self._store.write_json(asdict(best), FOLDER, _BEST)
        return best

    def load(self, step: int) -> tuple[Record, dict[str, torch.Tensor]]:
        """A checkpoint's record and its tensors on the CPU. Raises UserError if the file is not a checkpoint."""
        path = self._store.path(FOLDER, _name(step))
        if self._store.local:
            return _read(path, path)
        with tempfile.TemporaryDirectory() as folder:
            local = str(Path(folder, _name(step)))
            self._store.fs.get_file(path, local)
            return _read(local, path)


def _name(step: int) -> str:
    return f"step-{step:09d}.safetensors"


def _read(local: str, shown: str) -> tuple[Record, dict[str, torch.Tensor]]:
    try:
        with safe_open(local, framework="pt") as file:
            header = json.loads((file.metadata() or {})["reinforce.checkpoint"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError) as error:
        raise UserError(
            f"{shown} is not a checkpoint of a training ({type(error).__name__}: {error}). "
            "Delete it to go on from the one before."
        ) from error
    if header.pop("version") > _VERSION:
        raise UserError(f"{shown} was written by a newer version of this program. Upgrade to go on from it.")
    return Record(**header), tensors


def _separate(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies on the CPU, contiguous; tied weights, which share their memory, twice."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        flat = tensor.detach().cpu().contiguous()
        separate[name] = flat.clone() if flat.data_ptr() in seen else flat
        seen.add(flat.data_ptr())
    return separate
