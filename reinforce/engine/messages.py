"""What the driver and its workers send each other: a shard to compute, its result, and the errors that a worker raises,
with the place in the user's code at which they were raised."""

from __future__ import annotations

import contextlib
import linecache
import os
import sysconfig
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import teachers
from reinforce.dataset.index import FileEntry
from reinforce.dataset.runs import ShardRecord
from reinforce.errors import UserError
from reinforce.source.config import DEFAULT
from reinforce.source.formats.base import Part, Shard, find_format
from schemas import Reason
from teachers.fast_paths.usage import Usage
from teachers.protocols import ServerUnavailable

_MAX_FRAMES = 5
_MAX_SOURCE = 160  # characters; a longer line is left out and not cut, since half a secret is not redacted
#: Folders of ``reinforce`` and ``teachers``.
_OURS = tuple(str(path) + os.sep for path in (Path(__file__).parents[1], *teachers.__path__))
_STANDARD = sysconfig.get_path("stdlib") + os.sep
_INSTALLED = ("site-packages", "dist-packages")
#: Installed packages that load and run named models.
_LIBRARIES = frozenset(
    (
        *("PIL", "filelock", "fsspec", "huggingface_hub", "numpy", "open_clip", "openai"),
        *("safetensors", "timm", "torch", "torchvision", "transformers"),
    )
)


def error_with_frames(error: BaseException) -> str:
    """Type and message of an error and its frames in the user's code."""
    return f"{type(error).__name__}: {error}{user_frames(error)}"


def user_frames(error: BaseException) -> str:
    """The innermost frames of an error in the user's code, as `` (FILE:LINE in FUNCTION: `SOURCE` -> ...)``.

    The frames of its cause if the error itself has none. Empty if no code of the user is involved.
    """
    cause: BaseException | None = error
    while cause is not None:
        others = []  # frames that are neither of this project nor of the standard library nor of no file
        for frame, line in traceback.walk_tb(cause.__traceback__):
            file = frame.f_code.co_filename
            standard = file.startswith(_STANDARD) and not any(folder in Path(file).parts for folder in _INSTALLED)
            if not standard and not file.startswith(("<", *_OURS)):
                others.append((frame, line))
        package, frames = _package(others[0][0]) if others else "", []
        for frame, line in others:
            file = frame.f_code.co_filename
            installed = any(folder in Path(file).parts for folder in _INSTALLED)
            if not installed or (_package(frame) == package and package not in _LIBRARIES):
                source = linecache.getline(file, line, frame.f_globals).strip()
                shown = f": `{source}`" if 0 < len(source) <= _MAX_SOURCE else ""
                frames.append(f"{file.removeprefix(os.getcwd() + os.sep)}:{line} in {frame.f_code.co_name}{shown}")
        if frames:
            named = frames if len(frames) <= _MAX_FRAMES else [frames[0], "...", *frames[1 - _MAX_FRAMES :]]
            return f" ({' -> '.join(named)})"
        cause = cause.__cause__
    return ""


def shorten(text: str, characters: int) -> str:
    """Cut a text in its middle, since its end names the place of the error. Redact it before: half a secret stays."""
    half = (characters - 5) // 2
    return text if len(text) <= characters else f"{text[:half]} ... {text[-half:]}"


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


@dataclass(frozen=True, slots=True)
class PendingShard:
    """A source shard and its missing layers, each after the layers it needs.

    ``stored`` are layers that exist although samples are missing, also of other configs. ``quarantined`` are layers
    that may have a quarantine file of an earlier attempt. ``replaced`` are layers whose files are set aside before
    others are committed, each before those that it was computed from.
    """

    name: str
    url: str
    layers: tuple[str, ...]
    reinforcements: str | None = None  # URL of its published reinforcements, if a missing layer reads them
    stored: tuple[str, ...] = ()
    format: str = DEFAULT
    listing: str = ""  # URL of the list of its files
    part: Part | None = None  # of a table that is divided
    quarantined: tuple[str, ...] = field(default=(), compare=False)
    replaced: tuple[str, ...] = ()

    @property
    def source(self) -> Shard:
        return Shard(self.url, self.name, self.format, self.listing, self.part)

    @property
    def is_file(self) -> bool:
        """Whether its URL is that of a file, which it has all samples of."""
        return self.part is None and not find_format(self.format).is_listed


class WorkerId(NamedTuple):
    """The process of a worker. ``host`` names its node for people."""

    node: str
    pid: int
    host: str = ""

    @property
    def place(self) -> str:
        return self.host or self.node[:12]

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.place}"


@dataclass(frozen=True)
class WorkerInfo:
    """A worker whose models are loaded.

    ``models`` has by section and name what only a loaded model reports (dimension, logit scale), ``memory`` is the
    bytes of the process, ``batch`` the number of images in a batch, and ``notes`` are messages for the user.
    """

    id: WorkerId
    accelerator: str
    models: Mapping[tuple[str, str], Mapping[str, Any]]
    memory: int = 0

    batch: int = 0
    notes: tuple[str, ...] = ()
    device: Mapping[str, Any] = field(default_factory=dict)  # name and memory of a CUDA device
    log: str = ""  # path of its output on its node, if that is a file
    fast_paths: tuple[Usage, ...] = ()  # without the calls of tests before the first shard
    reads_heic: bool | None = None


@dataclass(frozen=True, kw_only=True)
class ShardResult:
    """Result of one lease. Its fields are the keys of the ``shard`` event in events.jsonl, except ``record`` and
    ``files``, which are not in it, and ``quarantine_reason``, which is ``given_up`` there."""

    shard: str
    layers: tuple[str, ...] = ()  # committed by this lease
    samples: int = 0
    refused: Mapping[str, int] = field(default_factory=dict)  # rows that this lease quarantined, by reason
    refused_samples: int = 0  # whose rows these are
    quarantine_reason: str | None = None  # of the shard as a whole; None if it is not quarantined
    seconds: float
    busy: float = 0.0  # seconds of the accelerator
    bytes: int = 0  # of the files
    cleaned: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # `postprocess.COUNTS` by captioner
    examples: Mapping[str, str] = field(default_factory=dict)  # by reason: key and detail of the first refusal
    source_note: str | None = None  # how the source file has changed since the samples were written, if it has
    record: ShardRecord | None = None  # None if the shard is quarantined
    files: Mapping[str, FileEntry] = field(default_factory=dict)  # committed by this lease, by layer
    memory: int = 0  # bytes of the worker's process afterwards
    set_aside: Mapping[str, str] = field(default_factory=dict)  # files that must be computed again: reason by layer
    notes: tuple[str, ...] = ()  # about the worker, such as a batch that did not fit in the memory of its device
    stages: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # sums of `rates.Stages`, by layer
    device: Mapping[str, Any] = field(default_factory=dict)  # name and memory of a CUDA device
    read_bytes: int = 0  # encoded images and texts, of the source or of stored samples
    times: Mapping[str, float] = field(default_factory=dict)  # seconds by stage of the lease; their sum is `seconds`
    source_counts: Mapping[str, int] = field(default_factory=dict)  # of samples at reading, as `source_lines` describes
    fast_paths: tuple[Usage, ...] = ()  # calls in the worker since its last lease ended

    def event(self) -> dict[str, Any]:
        names = {one.name: one.name for one in fields(self) if one.name not in ("record", "files")}
        names["quarantine_reason"] = "given_up"
        stages = {layer: _rounded(stage) for layer, stage in self.stages.items()}
        values = {key: getattr(self, name) for name, key in names.items()}
        paths = {f"{one.model}/{one.path}": one.counts for one in self.fast_paths}
        return {**values, "stages": stages, "times": _rounded(self.times), "fast_paths": paths}


def _rounded(stage: Mapping[str, float]) -> dict[str, float]:
    """Sums with five digits, since the events of 190,000 shards should be small."""
    return {key: value if isinstance(value, int) else float(f"{value:.5g}") for key, value in stage.items()}


class LayerFailure(RuntimeError):
    """A model raised; ``args`` are the layer's name and the error's text."""

    @property
    def layer(self) -> str:
        return str(self.args[0])

    def __str__(self) -> str:
        return f"{self.args[0]}: {self.args[1]}"


@contextlib.contextmanager
def raising_layer_failure(layer: str) -> Iterator[None]:
    """Turn an error of a layer's model into a LayerFailure with the frames of the user's code.

    Only the layers of this model are quarantined for it, also where it raised KeyboardInterrupt or SystemExit: models
    run in threads of a worker, which no signal reaches. Raises UserError if a server did not answer, since no shard is
    the cause.
    """
    try:
        yield
    except ServerUnavailable as error:
        raise UserError(f"{layer}: {error}") from error
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        raise LayerFailure(layer, error_with_frames(error)) from error


class LoadFailure(RuntimeError):
    """A worker could not load its models. ``args`` are the worker, the text, and whether the user must fix it."""

    @property
    def worker(self) -> WorkerId:
        return WorkerId(*self.args[0])

    @property
    def error(self) -> UserError:
        return UserError(str(self) if self.args[2] else f"a worker could not load its models: {self}")

    def __str__(self) -> str:
        return str(self.args[1])


class ShardFailure(RuntimeError):
    """A shard raised. Carries the text of the error, since errors of many storages cannot be pickled.

    ``args`` are the text and whether the worker may be at fault, for example because its accelerator is broken.
    """

    @property
    def worker_at_fault(self) -> bool:
        return bool(self.args[1])

    def __str__(self) -> str:
        return str(self.args[0])


class StorageFailure(ShardFailure):
    """The storage of a shard or of the dataset failed after all retries.

    ``args`` are the text, False, the reason for which the shard is quarantined if it is found to be the cause, or None,
    and whether a file does not exist.
    """

    @property
    def reason(self) -> Reason | None:
        return None if self.args[2] is None else Reason(self.args[2])

    @property
    def missing(self) -> bool:
        return bool(self.args[3])
