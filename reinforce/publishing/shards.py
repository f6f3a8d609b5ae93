"""Call a function for each shard of a dataset: in Ray tasks, a bounded number at a time, or in this process."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from reinforce.errors import StorageError, UserError
from reinforce.storage import Storage
from reinforce.terminal import Screen, format_duration, plural

R = TypeVar("R")
_ATTEMPTS = 3  # at a shard whose storage fails
_IN_FLIGHT = 2  # tasks per core, so that no core waits for the driver
_TICK_SECONDS = 0.5


def for_each_shard(
    function: Callable[[str], R], shards: Sequence[str], *, use_ray: bool = True, address: str | None = None
) -> Iterator[tuple[str, R]]:
    """Yield (shard, ``function(shard)``) as they finish, and show progress.

    ``function`` must be picklable: a ``functools.partial`` of a function of a module. A StorageError costs the shard an
    attempt. Raises UserError; what has finished by then stays.
    """
    calls = _in_tasks(function, shards, address) if use_ray and shards else _here(function, shards)
    start = time.monotonic()
    with Screen() as screen:
        for done, result in enumerate(calls, start=1):
            rate = done / max(time.monotonic() - start, 1e-9)
            left = format_duration((len(shards) - done) / rate)
            screen.draw(
                f"{done:,} of {plural(len(shards), 'shard')}  {rate:.1f} shards/s  ETA {left}", done, len(shards)
            )
            yield result


def as_seen_by_workers(url: str) -> str:
    """A URL, or the absolute path of a local folder, because workers have other working folders."""
    storage = Storage(url)
    return storage.root if storage.local else url


def check_output(dataset: Storage, output: Storage) -> None:
    """Raise UserError if an export would write into the dataset, or cannot write."""
    if f"{output.root}/".startswith(f"{dataset.root}/") and type(output.fs) is type(dataset.fs):
        raise UserError(f"{output.url} is in the dataset. Give another folder.")
    output.check_writable()


def record_export(output: Storage, config: Mapping[str, Any], name: str, options: str | None = None) -> None:
    """Write what is exported to the file ``name``. Raises UserError if the folder has another export.

    The error names the keys that differ, of ``config`` or of its section ``options``.
    """
    before = output.read_json(name)
    if before is None:
        output.write_json(config, name)
    elif before != config:
        own, other = (config, before) if options is None else (config[options], before.get(options))
        other = other if isinstance(other, dict) else {}
        different = [key for key in {**own, **other} if other.get(key) != own.get(key)]
        raise UserError(
            f"{output.url} has an export with other {', '.join(different) or 'content'}. Repeat the options of that "
            "one, or give another folder."
        )


def existing_files(output: Storage, *folder: str) -> set[str]:
    """Names of the files in a folder of the output."""
    try:
        with output.storage_errors("listed", *folder):
            found = output.fs.ls(output.path(*folder), detail=False, refresh=True)
    except (FileNotFoundError, NotADirectoryError):
        return set()
    return {str(path).rstrip("/").rpartition("/")[2] for path in found}


def _here(function: Callable[[str], R], shards: Iterable[str]) -> Iterator[tuple[str, R]]:
    for shard in shards:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                result = function(shard)
            except StorageError as error:
                _count_failure(shard, attempt, error)
                continue
            break
        yield shard, result


def _count_failure(shard: str, attempt: int, error: StorageError) -> None:
    """Log a failed attempt. Raises UserError after the last one."""
    if attempt >= _ATTEMPTS:
        raise UserError(f"{error} Run the same command again to resume.") from error
    logging.getLogger(__name__).warning("%s: attempt %d failed: %s", shard, attempt, error)


def _in_tasks(function: Callable[[str], R], shards: Sequence[str], address: str | None) -> Iterator[tuple[str, R]]:
    """Run in tasks of one core each; results come in the order in which tasks end."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    from reinforce.cluster import cause_of, ray_cluster

    with ray_cluster(address):
        task = ray.remote(num_cpus=1, max_retries=_ATTEMPTS)(_call)
        shared = ray.put(function)
        waiting = deque((shard, 1) for shard in shards)
        running: dict[Any, tuple[str, int]] = {}
        try:
            while waiting or running:
                limit = max(1, round(_IN_FLIGHT * ray.cluster_resources().get("CPU", 1)))
                while waiting and len(running) < limit:
                    shard, attempt = waiting.popleft()
                    running[task.remote(shared, shard)] = (shard, attempt)
                ray.wait([*running], timeout=_TICK_SECONDS)
                for ref in ray.wait([*running], num_returns=len(running), timeout=0)[0]:  # all that have ended
                    shard, attempt = running.pop(ref)
                    try:
                        result = ray.get(ref)
                    except RayTaskError as error:
                        cause = cause_of(error)
                        if not isinstance(cause, StorageError):
                            raise cause if isinstance(cause, UserError) else error from None
                        _count_failure(shard, attempt, cause)
                        waiting.append((shard, attempt + 1))
                        continue
                    except RayError as error:
                        raise UserError(f"{shard}: {error} Run the same command again to resume.") from error
                    yield shard, result
        finally:
            for ref in running:
                ray.cancel(ref, force=True)


def _call(function: Callable[[str], R], shard: str) -> R:
    return function(shard)
