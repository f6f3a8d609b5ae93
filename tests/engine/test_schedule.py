"""Which worker gets which shard."""

from __future__ import annotations

from collections.abc import Callable

from reinforce.engine.driver.pool import Slot
from reinforce.engine.driver.shard_queue import ShardQueue
from reinforce.engine.messages.results import WorkerId, WorkerInfo
from reinforce.engine.messages.task import PendingShard

SHARDS = [PendingShard(name, f"{name}.tar", ("samples",)) for name in "abcdefgh"]


def started() -> Slot:
    return Slot(None, WorkerInfo("node", 1, "cpu", {}))


def leases_of(slot: Slot) -> str:
    return "".join(shard.name for shard in slot.leases.values())


def leaser() -> Callable[..., None]:
    def lease(slot: Slot, shard: PendingShard, alone: bool = False) -> None:
        slot.alone, slot.draining = alone, False
        slot.leases[object()] = shard

    return lease


def end(slot: Slot, name: str) -> None:
    slot.alone = False
    slot.leases = {ref: shard for ref, shard in slot.leases.items() if shard.name != name}


def test_each_worker_gets_two_shards_in_turns_and_none_before_it_has_started() -> None:
    queue, slots = ShardQueue(SHARDS), [started(), Slot(None), started()]
    queue.hand_out(slots, leaser(), now=0.0)
    assert [leases_of(slot) for slot in slots] == ["ac", "", "bd"]
    assert len(queue) == 4


def test_a_delayed_shard_is_leased_at_its_time() -> None:
    queue, slot = ShardQueue([]), started()
    queue.add_delayed(SHARDS[0], at=10.0)
    queue.add_delayed(SHARDS[1], at=5.0)
    queue.hand_out([slot], leaser(), now=4.9)
    assert leases_of(slot) == ""
    queue.hand_out([slot], leaser(), now=5.0)
    assert (leases_of(slot), len(queue)) == ("b", 1)
    queue.hand_out([slot], leaser(), now=10.0)
    assert (leases_of(slot), len(queue)) == ("ba", 0)


def test_a_suspect_runs_alone_in_an_idle_worker() -> None:
    queue, slots = ShardQueue(SHARDS[:4]), [started(), started()]
    queue.add_suspect(SHARDS[7])
    queue.hand_out(slots, leaser(), now=0.0)
    assert sorted(leases_of(slot) for slot in slots) == ["ab", "h"]
    [alone] = [slot for slot in slots if slot.alone]
    assert leases_of(alone) == "h"
    queue.hand_out(slots, leaser(), now=0.0)
    assert leases_of(alone) == "h"


def test_a_busy_worker_is_drained_for_each_suspect_and_runs_it_alone() -> None:
    queue, slots = ShardQueue(SHARDS), [started(), started()]
    lease = leaser()
    queue.hand_out(slots, lease, now=0.0)
    queue.add_suspect(PendingShard("s", "s.tar", ("samples",)))
    end(slots[0], "a")
    end(slots[1], "b")
    queue.hand_out(slots, lease, now=0.0)
    assert [leases_of(slot) for slot in slots] == ["c", "de"], "the first is drained, the second continues"
    end(slots[0], "c")
    queue.hand_out(slots, lease, now=0.0)
    assert [(leases_of(slot), slot.alone) for slot in slots] == [("s", True), ("de", False)]
    end(slots[0], "s")
    queue.hand_out(slots, lease, now=0.0)
    assert leases_of(slots[0]) == "fg"


def test_a_worker_stops_draining_when_another_one_takes_the_suspect() -> None:
    queue, slots = ShardQueue(SHARDS), [started()]
    lease = leaser()
    queue.hand_out(slots, lease, now=0.0)
    queue.add_suspect(PendingShard("s", "s.tar", ("samples",)))
    queue.hand_out(slots, lease, now=0.0)
    assert slots[0].draining
    slots.append(started())
    queue.hand_out(slots, lease, now=0.0)
    assert (leases_of(slots[1]), slots[0].draining) == ("s", False)


def test_a_shard_added_first_is_leased_first() -> None:
    queue, slot = ShardQueue(SHARDS[:3]), started()
    queue.add(SHARDS[5], first=True)
    queue.add(SHARDS[6])
    queue.hand_out([slot], leaser(), now=0.0)
    assert leases_of(slot) == "fa"


def at(node: str, pid: int) -> Slot:
    return Slot(None, WorkerInfo(node, pid, "cpu", {}))


def test_a_retry_goes_to_another_node_and_waits_for_it_while_others_go_on() -> None:
    queue, slots, lease = ShardQueue(SHARDS[:1]), [at("x", 1), at("x", 2), at("y", 3)], leaser()
    slots[2].leases = {1: SHARDS[5], 2: SHARDS[6]}
    queue.add_delayed(SHARDS[7], 0.0, frozenset({WorkerId("x", 1)}))
    queue.hand_out(slots, lease, now=1.0)
    assert [leases_of(slot) for slot in slots] == ["a", "", "fg"]
    assert len(queue) == 1
    end(slots[2], "f")
    queue.hand_out(slots, lease, now=1.0)
    assert [leases_of(slot) for slot in slots] == ["a", "", "gh"]


def test_a_retry_goes_to_another_worker_of_the_only_node_and_to_the_same_if_there_is_no_other() -> None:
    tried = frozenset({WorkerId("x", 1)})
    queue, slots = ShardQueue([]), [at("x", 1), at("x", 2)]
    queue.add_delayed(SHARDS[0], 0.0, tried)
    queue.hand_out(slots, leaser(), now=1.0)
    assert [leases_of(slot) for slot in slots] == ["", "a"]
    queue.add_delayed(SHARDS[0], 0.0, tried)
    queue.hand_out(slots[:1], leaser(), now=1.0)
    assert leases_of(slots[0]) == "a"


def test_a_suspect_prefers_another_node_and_does_not_wait_for_it() -> None:
    queue, slots = ShardQueue([]), [at("y", 3), at("x", 1)]
    for number in range(2):
        queue.add_suspect(SHARDS[number], frozenset({WorkerId("x", 1)}))
    queue.hand_out(slots, leaser(), now=1.0)
    assert [leases_of(slot) for slot in slots] == ["a", "b"]


def test_a_worker_gets_no_lease_during_a_pause_or_once_it_is_to_be_restarted() -> None:
    queue, slot = ShardQueue(SHARDS[:2]), at("x", 1)
    queue.pause(slot.id, 5.0)
    queue.hand_out([slot], leaser(), now=4.9)
    assert leases_of(slot) == ""
    slot.exhausted = True
    queue.hand_out([slot], leaser(), now=5.0)
    assert leases_of(slot) == ""
    slot.exhausted = False
    queue.hand_out([slot], leaser(), now=5.0)
    assert leases_of(slot) == "ab"


def test_a_worker_on_a_drained_node_is_no_place_for_retries_or_suspects() -> None:
    here, leaving = Slot(None, WorkerInfo("x", 1, "cpu", {})), Slot(None, WorkerInfo("y", 1, "cpu", {}), leaving=True)
    queue = ShardQueue([])
    queue.add_delayed(SHARDS[0], 0.0, frozenset({WorkerId("x", 2)}))
    queue.add_suspect(SHARDS[1], frozenset({WorkerId("x", 1)}))
    queue.hand_out([leaving, here], leaser(), now=1.0)
    assert (leases_of(leaving), leases_of(here)) == ("", "b")
    end(here, "b")
    queue.hand_out([leaving, here], leaser(), now=1.0)
    assert (leases_of(leaving), leases_of(here)) == ("", "a")
