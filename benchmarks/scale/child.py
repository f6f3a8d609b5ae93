"""What is measured in a process of its own: ``python -m benchmarks.scale.child NAME ARGUMENTS`` prints JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks.processes import own_peak


def plan(config: str, *overrides: str) -> dict[str, Any]:
    """Plan a run."""
    from reinforce.config import load_config
    from reinforce.engine.plan.plan import make_plan

    found = make_plan(load_config(config, list(overrides)))
    return {"shards": found.shards, "pending": len(found.pending), "quarantined": found.quarantined}


def start(url: str, images_from: str) -> dict[str, Any]:
    """Open the dataset of a training."""
    from reinforce.student.config import Data
    from reinforce.student.data.datasets import open_datasets

    data = Data.model_validate({"datasets": url, "images_from": [images_from]})
    [dataset] = open_datasets(data, 0, None)
    return {"shards": len(dataset.shards), "rows": dataset.rows}


def status(url: str) -> dict[str, Any]:
    """The status of a dataset."""
    from reinforce.dataset.status import read_status

    return {"shards": read_status(url)["samples"]}


def validate(url: str, sample: str = "") -> dict[str, Any]:
    """Validate a dataset by its keys, in this process."""
    from reinforce.dataset.validate import validate as validate_dataset

    found = validate_dataset(url, quick=True, sample=int(sample) if sample else None, processes=1)
    kinds = sorted({finding.kind for finding in found.findings})
    return {"shards": found.shards, "read": found.read, "valid": found.valid, "kinds": kinds}


def job(url: str) -> dict[str, Any]:
    """The state of a running job."""
    from reinforce.dataset.runs import list_runs, running
    from reinforce.storage import Storage

    store = Storage(url)
    found = running(store, list_runs(store))
    assert found is not None
    return {"workers": len(found.workers)}


def main(name: str, *arguments: str) -> None:
    every = (plan, start, status, validate, job)
    parts: dict[str, Callable[..., dict[str, Any]]] = {part.__name__: part for part in every}
    if name == "start":  # imports are no part of what is measured
        import reinforce.student.data.datasets
    if name in ("status", "job", "validate"):
        import reinforce.dataset.status
        import reinforce.dataset.validate  # noqa: F401
    began, cpu = time.perf_counter(), time.process_time()
    found = parts[name](*arguments)
    figures = {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu, "MB": own_peak() / 1e6}
    print(json.dumps({**found, **figures}))


if __name__ == "__main__":
    main(*sys.argv[1:])
