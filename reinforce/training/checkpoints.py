"""The state of a training run: its optimizer with the learning rate of every step, and its checkpoints.

A checkpoint is one safetensors file, with a JSON header for everything that is not a tensor. No pickle. A file appears
whole or not at all, so every checkpoint that exists is complete, and a checksum finds later damage: the training then
goes on from the checkpoint before, which is kept for that. The state of random generators is not stored: the random
numbers of a step are seeded from the training run's seed, the step and the rank.

They are written while the training run continues: a step waits for a copy of the state in the host's memory; a thread
makes the file of it and publishes that. One checkpoint is in work at a time, so host memory holds the state once more,
in buffers that are used again.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import re
import tempfile
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from reinforce.errors import UserError
from reinforce.processes.signals import Stopped
from reinforce.storage import Storage
from reinforce.training.config import HIGHEST_LOGIT_SCALE, Optimizer, cooldown_start, describe_changes

if TYPE_CHECKING:
    from timm.utils import ModelEmaV3

_LOG = logging.getLogger(__name__)
FOLDER = "checkpoints"
_BEST = "best.json"
_HEADER, _CHECKSUM = "reinforce.checkpoint", "reinforce.checksum"
_VERSION = 1
_HEADER_BYTES = 100 * 2**20  # the limit of safetensors
_NAME = re.compile(r"step-(\d{9})\.safetensors")
#: The latest checkpoints that are kept at least: the last one, and the one before in case that it is damaged.
_LEAST_KEPT = 2
#: Steps without an update that end a training run: in a row, in a row at its end, and as a share of its steps so far,
#: which counts at the end or from ``_MAX_SKIPPED`` steps without an update.
_MAX_SKIPPED, _MAX_SKIPPED_LAST, _MAX_SKIPPED_SHARE = 20, 3, 0.25
_MODEL, _OPTIMIZER, _AVERAGE = "model/", "optimizer/", "average/"


def learning_rate(step: int, steps: int, config: Optimizer, tower: str | None = None) -> float:
    """Learning rate of step ``step`` (from 0) of ``steps``: a linear warm-up, ``lr``, then a decay to ``final_lr``.

    With w = ``warmup_of(steps)``, n = ``steps``, and h = w + ``hold``, or with ``cooldown`` the step before the last
    ``cooldown`` * n:

        lr * (step + 1) / w                                      for step < w
        lr                                                       for step < h
        final_lr + (lr - final_lr) * f((step - h) / (n - 1 - h)) otherwise

    where f(x) is (1 + cos(pi x)) / 2, or 1 - x for ``decay: linear``. The last step has ``final_lr``, unless it is
    held. ``lr`` is that of the ``tower``, if it has one of its own.
    """
    peak = config.lr if tower is None or config.towers is None else config.towers.get(tower, config.lr)
    warmup = config.warmup_of(steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    start = warmup + (config.hold or 0) if config.cooldown is None else cooldown_start(steps, config.cooldown)
    done = min(1.0, max(0, step - start) / max(1, steps - 1 - start))
    left = 1 - done if config.decay == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return config.final_lr + (peak - config.final_lr) * left


def undecayed_parameters(model: torch.nn.Module) -> set[str]:
    """Names of the parameters without weight decay.

    These are gains, biases and logit scales (at most one dimension is longer than 1), and what modules of open_clip
    and timm list in ``no_weight_decay()``, such as positional embeddings.
    """
    names = {name for name, p in model.named_parameters() if p.numel() == max(p.shape, default=1)}
    for prefix, module in model.named_modules():
        if callable(listed := getattr(module, "no_weight_decay", None)):
            names |= {f"{prefix}.{name}" if prefix else name for name in listed()}
    return names


def make_adamw(model: torch.nn.Module, config: Optimizer) -> torch.optim.AdamW:
    """AdamW over all parameters that require gradients; fused into one kernel on CUDA.

    Groups have the ``tower`` for ``learning_rate``, and the ``scale`` of its result. Raises UserError for towers that
    the model does not have.
    """
    learnt = {name: p for name, p in model.named_parameters() if p.requires_grad}
    undecayed = undecayed_parameters(model)
    towers = _towers(model, "towers", config.towers, learnt)
    decays, scales = config.layer_decay, dict[str, float]()
    decayed = _towers(model, "layer_decay", decays, learnt)
    if decays:  # d^n for a parameter with n blocks between it and the head
        depths = cast(Any, model).depths()
        for tower in decays:
            if not any(depths[name] for name in decayed if decayed[name] == tower):
                raise UserError(
                    f"train.optimizer.layer_decay: the blocks of this {tower} tower are not known; remove it."
                )
        scales = {name: decays[tower] ** depths[name] for name, tower in decayed.items()}
    groups = []
    for group in (None, *(config.towers or ())):
        own = {name: p for name, p in learnt.items() if towers.get(name) == group}
        for scale in sorted({1.0, *(scales.get(name, 1.0) for name in own)}, reverse=True):
            for free, decay in ((False, config.weight_decay), (True, 0.0)):
                parameters = [
                    p for name, p in own.items() if (name in undecayed) == free and scales.get(name, 1.0) == scale
                ]
                groups.append({"params": parameters, "weight_decay": decay, "tower": group, "scale": scale})
    return torch.optim.AdamW(
        groups,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=all(p.is_cuda for p in learnt.values()) or None,
    )


def _towers(model: Any, key: str, stated: Mapping[str, float] | None, learnt: Iterable[str]) -> dict[str, str]:
    """The tower of each parameter whose tower is ``stated`` under a key."""
    if not stated:
        return {}
    tower_of = getattr(model, "tower_of", None)
    if tower_of is None:
        raise UserError(f"train.optimizer.{key} is for students: remove it, and set train.optimizer.lr.")
    towers = {name: tower for name in learnt if (tower := tower_of(name)) in stated}
    if missing := sorted({*stated} - {*towers.values()}):
        raise UserError(
            f"train.optimizer.{key}: no weights of {', '.join(missing)} are learnt; name image or text, if it is not "
            "under student.freeze."
        )
    return towers


class DamagedCheckpoint(UserError):
    """A file that is no checkpoint, or no longer the one that was written."""


@dataclass(frozen=True)
class Progress:
    """The header of a checkpoint: how far the training run is, and which training it is.

    ``step`` is the number of finished steps, ``steps`` that of the whole training, ``skipped`` how many made no update,
    ``seconds`` the time spent in steps. ``fixed_config`` is the part of the config that determines the training run, by
    dotted keys. ``streams`` is the number of streams that the feed reads, if the order of samples depends on one, and
    ``samples`` those of an epoch; ``model_config`` is that of the job, ``data`` that of the feed, ``files`` the hash of
    its files, and ``division`` the parts of a batch. ``skipped_last`` is the number of steps without an update since
    the last update, and ``part`` the samples of a part that ``accumulate: auto`` has found. ``compiled`` is true where
    steps ran compiled code.
    """

    step: int
    fixed_config: Mapping[str, Any]
    seconds: float = 0.0
    skipped: int = 0
    streams: int | None = None
    samples: int | None = None
    model_config: Mapping[str, Any] | None = None
    data: Mapping[str, Any] | None = None
    division: str | None = None
    files: str | None = None
    part: int | None = None
    steps: int | None = None
    compiled: bool | None = None
    skipped_last: int = 0


@dataclass(frozen=True)
class BestCheckpoint:
    """The step with the highest value of ``metric`` so far; the content of best.json."""

    step: int
    metric: str
    value: float


class CheckpointFolder:
    """The checkpoints in one output folder; the latest ``keep``, at least two, and the best one are kept.

    Damaged ones that were found by ``load`` do not count.
    """

    def __init__(self, storage: Storage, keep: int) -> None:
        self._storage = storage
        self._keep = max(keep, _LEAST_KEPT)
        self._damaged: set[int] = set()

    def steps(self) -> list[int]:
        """Steps of the existing checkpoints, ascending. Costs one listing."""
        found = map(_NAME.fullmatch, self._storage.names(FOLDER))
        return sorted(int(match[1]) for match in found if match)

    def save(self, progress: Progress, tensors: Mapping[str, torch.Tensor]) -> None:
        """Publish a checkpoint, then delete those that are neither among the latest ``keep`` nor the best.

        The tensors are contiguous, on the CPU, and share no memory.
        """
        header = json.dumps({"version": _VERSION, **asdict(progress)})
        metadata = {_HEADER: header, _CHECKSUM: _checksum(header, tensors)}
        with self._storage.new_file(FOLDER, _file_name(progress.step)) as path:
            save_file(dict(tensors), path, metadata=metadata)
        self._damaged.discard(progress.step)
        best, steps = self.best(), self.steps()
        kept = [step for step in steps if step not in self._damaged][-self._keep :]
        for step in {*steps} - {*kept, best.step if best else None}:
            self._storage.fs.rm_file(self._storage.path(FOLDER, _file_name(step)))

    def best(self) -> BestCheckpoint | None:
        """The best of the evaluated steps, or None if no step was evaluated."""
        found = self._storage.read_json(FOLDER, _BEST)
        return BestCheckpoint(**found) if found else None

    def update_best(self, step: int, metric: str, value: float) -> None:
        """Compare a step with the best so far and keep the better one; among equals, the earlier one."""
        best = self.best()
        if best is None or best.metric != metric or value > best.value:
            self._storage.write_json(asdict(BestCheckpoint(step, metric, value)), FOLDER, _BEST)

    def load(self, step: int) -> tuple[Progress, dict[str, torch.Tensor]]:
        """Return a checkpoint's header and its tensors on the CPU.

        Raises DamagedCheckpoint, and UserError if it is of a newer version.
        """
        path = self._storage.path(FOLDER, _file_name(step))
        try:
            if self._storage.local:
                return _read(path, path)
            with tempfile.TemporaryDirectory() as folder:
                local = str(Path(folder, _file_name(step)))
                self._storage.fs.get_file(path, local)
                return _read(local, path)
        except DamagedCheckpoint:
            self._damaged.add(step)
            raise


class CheckpointWriter:
    """Saves checkpoints in a thread. Leaving the block waits for the last one, and raises its error."""

    def __init__(self, checkpoints: CheckpointFolder) -> None:
        self.checkpoints = checkpoints
        self._copies: dict[str, torch.Tensor] = {}
        self._pins = True
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    def save(self, progress: Progress, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy the tensors and begin to write them, after the checkpoint before. Raises the error of that one."""
        self.wait()
        # contiguous copies on the CPU; tied weights, which share memory, are stored twice
        copies = {}
        for name, tensor in tensors.items():
            copy = self._copies.get(name)
            if copy is None or (copy.shape, copy.dtype) != (tensor.shape, tensor.dtype):
                copy = self._buffer(tensor)
            copies[name] = copy.copy_(tensor.detach(), non_blocking=tensor.is_cuda)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()
        self._copies = copies
        self._writing = self._thread.submit(self.checkpoints.save, progress, self._copies)

    @property
    def failed(self) -> bool:
        """Whether the last checkpoint could not be written; does not wait."""
        writing = self._writing
        return writing is not None and writing.done() and writing.exception() is not None

    def wait(self) -> None:
        """Wait until the last checkpoint is written. Raises its error, once."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _buffer(self, tensor: torch.Tensor) -> torch.Tensor:
        """Host memory for a copy of a tensor: for one on CUDA pinned, unless the machine has refused that before."""
        if tensor.is_cuda and self._pins:
            try:
                return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            except RuntimeError as error:
                self._pins = False
                first = str(error).partition("\n")[0]
                _LOG.warning("checkpoints are copied to memory that is not pinned, which is slower: %s", first)
        return torch.empty(tensor.shape, dtype=tensor.dtype)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        writing = self._writing
        self._thread.shutdown()
        if writing is not None and (kind is None or issubclass(kind, Stopped)):
            writing.result()


def read_config(storage: Storage) -> dict[str, Any] | None:
    """``Progress.fixed_config`` of the latest checkpoint in an output folder, or None if there is none.

    Only its header is read. Raises DamagedCheckpoint.
    """
    steps = CheckpointFolder(storage, _LEAST_KEPT).steps()
    if not steps:
        return None
    path = storage.path(FOLDER, _file_name(steps[-1]))
    try:
        with storage.fs.open(path, "rb") as file:
            header = json.loads(file.read(min(int.from_bytes(file.read(8), "little"), _HEADER_BYTES)))
        found: dict[str, Any] = json.loads(header["__metadata__"][_HEADER])["fixed_config"]
    except (KeyError, ValueError, TypeError) as error:
        raise DamagedCheckpoint(f"{path} is not a whole checkpoint ({type(error).__name__}: {error})") from error
    return found


def check_resumable(before: Progress, now: Progress, steps: int, output: str) -> None:
    """Compare a checkpoint's header with that of a training run of ``steps`` steps that is about to resume from it.

    ``data`` replaces the keys of the config that are resolved by the data. Raises UserError with one line per
    difference, and for a checkpoint beyond the last step.
    """
    config = (before.fixed_config, now.fixed_config)
    data = (before.data or {}, now.data or {})
    model = (before.model_config or {}, now.model_config or {})
    changed = describe_changes(*({**c, **d, **m} for c, d, m in zip(config, data, model, strict=True)))
    if changed:
        kind = (
            "on other data"
            if {*changed} - {*describe_changes(*config), *describe_changes(*model)}
            else "of another config"
        )
        raise UserError(
            f"{output} has a training {kind}:\n  " + "\n  ".join(changed) + "\n"
            "Write to another `output`, restore these values (remove keys that were not set), or delete the folder to "
            "start over."
        )
    if before.step > steps:
        raise UserError(
            f"{output} is already at step {before.step:,}, beyond the {steps:,} steps of this config. "
            "Raise train.steps (or epochs), or write to another `output`."
        )


def describe_length(before: Progress, steps: int, optimizer: Optimizer) -> list[str]:
    """A line if the last step of a checkpoint has another learning rate in a training run of ``steps`` steps."""
    if before.steps in (None, steps) or not before.step:
        return []
    last, same = (learning_rate(before.step - 1, length, optimizer) for length in (before.steps, steps))
    if last == same:
        return []
    following = learning_rate(before.step, steps, optimizer)
    return [
        f"the training has {steps:,} steps now and had {before.steps:,} at the last checkpoint, so its learning rate "
        f"decays otherwise: it was {last:.3g} in step {before.step:,} and is {following:.3g} in the next one. What "
        "else depends on the length, such as the part of student.quantize, follows the new one, too"
    ]


def describe_differences(before: Progress, now: Progress) -> list[str]:
    """Lines about changes with which a training run may resume, but not bit for bit."""
    notes = []
    if before.samples not in (None, now.samples):
        notes.append(
            f"an epoch has {now.samples:,} samples now and had {before.samples:,} at the last checkpoint: the data "
            "have changed, and the order of samples is another one from here on"
        )
    elif before.files not in (None, now.files):
        notes.append(
            "the files with the samples have changed since the last checkpoint, though not their number of samples: if "
            "they are other samples, write to another `output`"
        )
    if before.division not in (None, now.division):
        notes.append(
            f"a batch is divided into {now.division} now and was divided into {before.division} at the last "
            "checkpoint: batch normalisation and dropout, where the model has them, differ from here on"
        )
    if before.compiled and not now.compiled:
        notes.append(
            "steps ran compiled code up to the last checkpoint and run plain code now: results differ in rounding from "
            "here on"
        )
    return notes


def _file_name(step: int) -> str:
    return f"step-{step:09d}.safetensors"


def _read(local: str, shown: str) -> tuple[Progress, dict[str, torch.Tensor]]:
    """Read the file at ``local``; errors name it ``shown``."""
    try:
        with safe_open(local, framework="pt") as file:
            metadata = file.metadata() or {}
            header = json.loads(metadata[_HEADER])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata[_CHECKSUM] != _checksum(metadata[_HEADER], tensors):
            raise ValueError("its checksum is wrong, so it was damaged after it was written")
        version = header.pop("version")
    except (SafetensorError, KeyError, ValueError) as error:
        raise DamagedCheckpoint(f"{shown} is not a whole checkpoint ({type(error).__name__}: {error})") from error
    if version > _VERSION or not header.keys() <= Progress.__dataclass_fields__.keys():
        raise UserError(f"{shown} was written by a newer version of this program. Upgrade to resume from it.")
    return Progress(**header), tensors


def _checksum(header: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """CRC-32 of the header and of the tensors on the CPU, by name: dtype, shape and bytes."""
    checksum = zlib.crc32(header.encode())
    for name, tensor in sorted(tensors.items()):
        checksum = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), checksum)
        checksum = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, checksum)
    return f"crc32:{checksum:08x}"


@dataclass(frozen=True)
class State:
    """State that a checkpoint stores. ``average`` exists only on rank 0, which evaluates and exports it."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    average: ModelEmaV3 | None = None

    @property
    def final_model(self) -> torch.nn.Module:
        """The model that is evaluated and exported: the average if there is one."""
        return self.model if self.average is None else self.average.module

    @functools.cached_property
    def _logit_scales(self) -> list[torch.Tensor]:
        return [p for name, p in self.model.named_parameters() if name.rpartition(".")[2] == "logit_scale"]

    def update(self, clip: float | None, step: int) -> float:
        """Clip the gradient and update the weights as step ``step``, or skip if it is not finite.

        Returns the norm before clipping, which is the same on all ranks, so that all skip the same steps.
        """
        # Reading the norm waits for the device.
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, math.inf if clip is None else clip))
        if math.isfinite(norm):
            self.optimizer.step()
            with torch.no_grad():
                for scale in self._logit_scales:
                    scale.clamp_(0, math.log(HIGHEST_LOGIT_SCALE))
            if self.average is not None:
                self.average.update(self.model, step)
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by name, without copies: ``model/WEIGHT``, ``average/WEIGHT``, ``optimizer/WEIGHT/MOMENT``."""
        found = {_MODEL + name: value for name, value in self.model.state_dict().items()}
        if self.average is not None:
            found |= {_AVERAGE + name: value for name, value in self.average.module.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                found[f"{_OPTIMIZER}{name}/{key}"] = value
        return found

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restore the tensors of a checkpoint. Raises KeyError or RuntimeError if they are of another model."""
        parts: dict[str, dict[str, torch.Tensor]] = {_MODEL: {}, _AVERAGE: {}, _OPTIMIZER: {}}
        for path, value in tensors.items():
            part, slash, name = path.partition("/")
            parts[part + slash][name] = value
        self.model.load_state_dict(parts[_MODEL])
        if self.average is not None:
            self.average.module.load_state_dict(parts[_AVERAGE])
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        moments: dict[str, dict[str, torch.Tensor]] = {}
        for path, value in parts[_OPTIMIZER].items():
            name, _, key = path.rpartition("/")
            moments.setdefault(name, {})[key] = value
        learnt = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        # moments in the memory layout of their parameters, which the optimizer's fused kernels require
        states = {
            index: {
                key: (value if key == "step" else torch.empty_like(parameter, requires_grad=False).copy_(value))
                for key, value in moments[names[parameter]].items()
            }
            for index, parameter in enumerate(learnt)
            if names[parameter] in moments
        }
        self.optimizer.load_state_dict({"state": states, "param_groups": self.optimizer.state_dict()["param_groups"]})


def check_skipped(progress: Progress, steps: int) -> None:
    """Raise UserError if so many of the steps so far made no update that the training run of ``steps`` steps has
    failed."""
    ended, step = progress.step == steps, progress.step
    last = progress.skipped_last >= (_MAX_SKIPPED_LAST if ended else _MAX_SKIPPED)
    share = (ended or progress.skipped >= _MAX_SKIPPED) and progress.skipped > _MAX_SKIPPED_SHARE * step
    if last or share:
        count = f"{progress.skipped_last} steps in a row" if last else f"{progress.skipped:,} of {step:,} steps"
        raise UserError(
            f"the gradient was not finite in {count} up to step {step:,}{', the last one' * ended}, so they made no "
            "update. Lower train.optimizer.lr, raise its warmup, or set train.compute.precision to fp32, in another "
            "`output`; earlier progress is in the last checkpoint."
        )
