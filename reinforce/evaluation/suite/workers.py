"""Sets of a suite, in this process or side by side by workers on Ray, each with all models on one accelerator."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from reinforce.errors import UserError
from reinforce.evaluation.kinds.files import SetFiles
from reinforce.evaluation.registry import SuiteSet
from reinforce.evaluation.report import Outcome
from reinforce.model_names import resolve_models
from reinforce.parallel.map_workers import Actors, MapWorkers
from reinforce.processes.cores import available_cores, cores_per_process
from reinforce.processes.fast_paths import use_accelerator
from teachers.redact import redact

if TYPE_CHECKING:
    from reinforce.evaluation.models import Models
    from teachers.runtime.accelerator import Precision


@dataclass(frozen=True)
class Job:
    """A set, its files, and the names of the models that lack a result on it.

    ``kept`` has the content of kept results by model, whose files had another state: a result is kept if the files
    still have this content.
    """

    one: SuiteSet
    files: SetFiles
    names: tuple[str, ...]
    kept: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Options:
    """How the models of a command are loaded: their ``names`` there, and the arguments of ``evaluate_suite``."""

    names: tuple[str, ...]
    pretrained: str | None
    device: str
    precision: Precision
    batch: int
    teachers: bool
    accelerator: Literal["fast", "plain"]


def run_job(job: Job, models: Callable[[], Models], progress: Callable[[int], None], threads: int) -> Outcome | str:
    """The outcome of the models without a result of this content, or why the set cannot be used.

    ``models`` loads all models, where one is needed.
    """
    from reinforce.evaluation.content import ContentDigest
    from reinforce.evaluation.evaluator import evaluate_published, read_content

    try:
        content = read_content(job.one, job.files, threads) if job.kept else ""
    except UserError as error:
        return str(error)
    names = (*job.names, *(name for name, known in job.kept.items() if known != content))
    if not names:
        return Outcome({}, 0, [], content=content)
    loaded = models()
    needed = replace(loaded, encoders={name: loaded.encoders[name] for name in names})
    try:
        return evaluate_published(job.one, job.files, needed, ContentDigest(), progress)
    except UserError as error:
        return str(error)


def count_workers(workers: int | None, address: str | None, device: str) -> int | None:
    """Number of workers on Ray, or None where the sets are evaluated in this process. Connects to nothing.

    Raises UserError for a device that several workers cannot share.
    """
    if workers is not None and workers > 1 and ":" in device:
        raise UserError(f"--workers {workers}: each needs an accelerator of its own; --device {device} is one.")
    if address or os.environ.get("RAY_ADDRESS"):
        return workers or 0  # as many as the cluster has accelerators
    if workers is None and device in ("auto", "cuda"):
        import torch

        workers = torch.cuda.device_count()
    return workers if workers is not None and workers > 1 else None


@contextlib.contextmanager
def ray_workers(options: Options, address: str | None, workers: int) -> Iterator[tuple[MapWorkers, EvaluateSet]]:
    """Yield workers on Ray, ``workers`` or one for each accelerator, and what they do with a set.

    Raises UserError if there are fewer accelerators than workers.
    """
    from reinforce.cluster import live_resources, ray_cluster

    with ray_cluster(address, log_to_driver=False):
        nodes = live_resources()
        gpus = 0 if options.device == "cpu" else int(sum(node.get("GPU", 0) for node in nodes))
        count = workers or max(1, gpus)
        if gpus and count > gpus:
            raise UserError(f"--workers {count}: there are {gpus} accelerators. Lower it, or use --device cpu.")
        threads = cores_per_process(nodes, count, 1.0 if gpus else 0.0)
        with Actors(count, 1 if gpus else 0) as actors:
            yield actors, EvaluateSet(options, os.getcwd(), threads)


class EvaluateSet:
    """Evaluates sets in a worker, which loads the models once; in ``folder`` if the machine has it."""

    def __init__(self, options: Options, folder: str, threads: int) -> None:
        self._options, self._folder, self._threads = options, folder, threads
        self._models: Models | None = None
        self._copies = contextlib.ExitStack()  # of remote models

    def __call__(self, job: Job) -> Outcome | str:
        """The outcome, or why the set cannot be used. Raises UserError for a model that cannot be loaded."""
        if os.path.isdir(self._folder):
            os.chdir(self._folder)
        threads = min(self._threads, available_cores())
        return run_job(job, lambda: self._load(threads), lambda _: None, threads)

    def _load(self, threads: int) -> Models:
        if self._models is None:
            from reinforce.evaluation.models import load_models

            options = self._options
            use_accelerator(options.accelerator)
            specs = self._copies.enter_context(
                resolve_models(options.names, options.pretrained, teachers=options.teachers)
            )
            named = {redact(name): spec for name, spec in specs.items()}
            self._models = load_models(named, options.device, options.precision, options.batch, threads)
        return self._models
