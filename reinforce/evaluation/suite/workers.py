"""Sets of a suite side by side: each worker holds all models on one accelerator, of this machine or of a Ray cluster.

The largest sets begin first. A set whose worker dies is done once more, by a new worker.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from reinforce.errors import UserError
from reinforce.evaluation.kinds.files import SetFiles
from reinforce.evaluation.registry import SuiteSet
from reinforce.evaluation.report import Outcome
from reinforce.model_names import resolve_models
from reinforce.processes.cores import available_cores, cores_per_process
from teachers.redact import redact

if TYPE_CHECKING:
    from reinforce.evaluation.models import Models
    from teachers.device.accelerator import Precision

_ATTEMPTS = 2


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


#: Evaluates a set; gives its outcome, or the reason why the set cannot be used.
Evaluate = Callable[[Job], Outcome | str]
#: A worker: starts to evaluate a set.
Worker = Callable[[Job], "Future[Outcome | str]"]


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


class WorkerLost(Exception):
    """A worker died while it evaluated a set; ``with_node`` if its node was lost, which has no place for another."""

    def __init__(self, text: str, with_node: bool = False) -> None:
        super().__init__(text)
        self.with_node = with_node


def schedule(jobs: Sequence[Job], start: Callable[[], Worker], workers: int) -> Iterator[tuple[Job, Outcome | str]]:
    """Yield each job with its outcome, or with the reason why there is none, as soon as it ends.

    At most ``workers`` of those that ``start`` starts are busy at once. Errors of a job other than ``WorkerLost`` are
    raised.
    """
    waiting = deque(sorted(jobs, key=lambda job: -job.one.size))
    idle = [start() for _ in range(min(workers, len(waiting)))]
    running: dict[Future[Outcome | str], tuple[Worker, Job]] = {}
    lost: Counter[str] = Counter()
    while waiting or running:
        while idle and waiting:
            worker, job = idle.pop(), waiting.popleft()
            running[worker(job)] = worker, job
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            worker, job = running.pop(future)
            try:
                outcome = future.result()
            except WorkerLost as error:
                if not error.with_node or not (idle or running):
                    idle.append(start())
                lost[job.one.key] += 1
                if lost[job.one.key] < _ATTEMPTS:
                    waiting.append(job)
                else:
                    yield job, f"{job.one.name}: its worker died {_ATTEMPTS} times: {error}"
                continue
            idle.append(worker)
            yield job, outcome


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
def ray_workers(options: Options, address: str | None, workers: int) -> Iterator[tuple[Callable[[], Worker], int]]:
    """Yield what starts a worker on Ray, and the number of workers: ``workers``, or one for each accelerator.

    Raises UserError if there are fewer accelerators than workers.
    """
    import ray

    from reinforce.cluster import live_resources, ray_cluster

    with ray_cluster(address, log_to_driver=False):
        nodes = live_resources()
        gpus = 0 if options.device == "cpu" else int(sum(node.get("GPU", 0) for node in nodes))
        count = workers or max(1, gpus)
        if gpus and count > gpus:
            raise UserError(f"--workers {count}: there are {gpus} accelerators. Lower it, or use --device cpu.")
        actor = ray.remote(num_cpus=1, num_gpus=1 if gpus else 0, max_restarts=0)(_SetWorker)
        threads = cores_per_process(nodes, count, 1.0 if gpus else 0.0)

        def start() -> Worker:
            handle: Any = actor.remote(options, os.getcwd(), threads)
            return lambda job: _translated(handle.evaluate.remote(job).future())

        yield start, count


class _SetWorker:
    """Evaluates sets in a process of Ray, in the working folder of the command if the machine has it."""

    def __init__(self, options: Options, folder: str, threads: int) -> None:
        self._options, self._threads = options, threads
        self._models: Models | None = None
        self._copies = contextlib.ExitStack()  # of remote models
        if os.path.isdir(folder):
            os.chdir(folder)

    def evaluate(self, job: Job) -> Outcome | str:
        """The outcome, or why the set cannot be used. Raises UserError for a model that cannot be loaded."""
        threads = min(self._threads, available_cores())
        return run_job(job, lambda: self._load(threads), lambda _: None, threads)

    def _load(self, threads: int) -> Models:
        if self._models is None:
            from reinforce.evaluation.models import load_models

            options = self._options
            specs = self._copies.enter_context(resolve_models(options.names, options.pretrained))
            named = {redact(name): spec for name, spec in specs.items()}
            self._models = load_models(named, options.device, options.precision, options.batch, threads)
        return self._models


def _translated(future: Future[Any]) -> Future[Any]:
    """Ray's future, with WorkerLost where the process died, and the error of a task without Ray's wrapper."""
    from ray.exceptions import ActorUnavailableError, RayError, RayTaskError

    from reinforce.cluster import cause_of, is_node_lost

    result: Future[Any] = Future()

    def pass_on(done: Future[Any]) -> None:
        error = done.exception()
        if error is None:
            result.set_result(done.result())
        elif isinstance(error, RayTaskError):
            result.set_exception(cause_of(error))
        elif isinstance(error, RayError):
            with_node = is_node_lost(error) or isinstance(error, ActorUnavailableError)
            result.set_exception(WorkerLost(str(error).splitlines()[0], with_node))
        else:
            result.set_exception(error)

    future.add_done_callback(pass_on)
    return result
