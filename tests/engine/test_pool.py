"""What the pool records of a worker, and the line about its workers."""

from __future__ import annotations

from reinforce.config import Workers
from reinforce.engine.outcome import WorkerInfo
from reinforce.engine.plan import PendingShard
from reinforce.engine.pool import Slot, describe_workers

INFO = WorkerInfo("node", 1, "cpu", {})
SHARD = PendingShard("a", "a.tar", ("samples",))


def test_a_worker_takes_two_leases_once_it_has_started_and_one_if_it_runs_a_suspect() -> None:
    slot = Slot(None)
    assert slot.free == 0
    slot.info = INFO
    assert slot.free == 2
    slot.leases[1] = SHARD
    assert slot.free == 1
    slot.leases[2] = SHARD
    assert slot.free == 0
    assert Slot(None, INFO, {1: SHARD}, alone=True).free == 0


def test_a_run_names_its_workers_and_the_cores_that_few_shards_leave_idle() -> None:
    nodes = [{"CPU": 16.0}]

    def line(shards: int, limit: int = 16, **given: float) -> str:
        return describe_workers(Workers.model_validate(given).fitted_to(nodes), shards, limit, nodes)

    assert line(100) == "16 workers x 1 CPU, batches of 256 images, device cpu"
    assert line(3) == (
        "3 workers x 1 CPU, batches of 256 images, device cpu; there are 16 places for workers and 3 shards: "
        "workers.cpus=5 uses more cores"
    )
    assert line(3, 3, cpus=5) == "3 workers x 5 CPUs, batches of 256 images, device cpu"
    assert line(15) == "15 workers x 1 CPU, batches of 256 images, device cpu"
    assert line(3, 1, max=1) == "1 worker x 1 CPU, batches of 256 images, device cpu"
    gpus = [{"CPU": 96.0, "GPU": 8.0}]
    assert describe_workers(Workers().fitted_to(gpus), 2, 8, gpus) == (
        "2 workers x 12 CPUs and 1 GPU, batches of 256 images, device cuda"
    )
