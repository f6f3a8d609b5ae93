"""What the pool records of a worker."""

from __future__ import annotations

from reinforce.engine.outcome import WorkerInfo
from reinforce.engine.plan import PendingShard
from reinforce.engine.pool import Slot
from reinforce.engine.watch import Pulse

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


def test_any_count_that_changes_is_progress_and_the_key_in_work_is_not() -> None:
    slot = Slot(None, INFO, last_progress=0.0)
    slot.record_pulse(Pulse(key="k"), now=1.0)
    assert (slot.pulse.key, slot.last_progress) == ("k", 0.0)
    for now, pulse in enumerate(
        (Pulse(samples=1), Pulse(samples=1, busy=0.1), Pulse(samples=1, busy=0.1, prepared=1)), 2
    ):
        slot.record_pulse(pulse, float(now))
        assert slot.last_progress == now
