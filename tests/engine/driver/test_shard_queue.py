"""Which worker gets which shard."""

from __future__ import annotations

from reinforce.engine.driver.pool import Slot
from reinforce.engine.driver.shard_queue import ShardQueue
from reinforce.engine.messages.results import WorkerId
from reinforce.engine.messages.task import PendingShard
from tests.helpers.driver import shard, started

SHARDS = [shard(name) for name in "abcdefgh"]
TRIED = frozenset({WorkerId("x", 1)})


def lease(slot: Slot, leased: PendingShard, alone: bool = False) -> None:
    slot.alone, slot.draining = alone, False
    slot.leases[object()] = leased


def hand_out(queue: ShardQueue, *slots: Slot, now: float = 0.0) -> list[str]:
    """Hand out shards -> the names of the shards that each worker has."""
    queue.hand_out(slots, lease, now)
    return ["".join(leased.name for leased in slot.leases.values()) for slot in slots]


def end(slot: Slot, name: str) -> None:
    slot.alone = False
    slot.leases = {ref: leased for ref, leased in slot.leases.items() if leased.name != name}


def test_each_worker_gets_two_shards_in_turns() -> None:
    queue = ShardQueue(SHARDS)
    assert hand_out(queue, started(), started()) == ["ac", "bd"]
    assert len(queue) == 4


def test_a_delayed_shard_is_leased_at_its_time() -> None:
    queue, slot = ShardQueue([]), started()
    queue.add_delayed(SHARDS[0], at=10.0)
    queue.add_delayed(SHARDS[1], at=5.0)
    found = [(*hand_out(queue, slot, now=now), len(queue)) for now in (4.9, 5.0, 10.0)]
    assert found == [("", 2), ("b", 1), ("ba", 0)]


def test_a_shard_added_first_is_leased_first() -> None:
    queue = ShardQueue(SHARDS[:3])
    queue.add(SHARDS[5], first=True)
    queue.add(SHARDS[6])
    assert hand_out(queue, started()) == ["fa"]


def test_a_suspect_runs_alone_in_an_idle_worker() -> None:
    queue, slots = ShardQueue(SHARDS[:4]), [started(), started()]
    queue.add_suspect(SHARDS[7])
    for _ in range(2):
        assert hand_out(queue, *slots) == ["h", "ab"]
        assert [slot.alone for slot in slots] == [True, False]


def test_a_busy_worker_is_drained_for_each_suspect_and_runs_it_alone() -> None:
    queue, slots = ShardQueue(SHARDS), [started(), started()]
    hand_out(queue, *slots)
    queue.add_suspect(shard("s"))
    end(slots[0], "a")
    end(slots[1], "b")
    assert hand_out(queue, *slots) == ["c", "de"], "the first is drained, the second continues"
    end(slots[0], "c")
    assert hand_out(queue, *slots) == ["s", "de"]
    assert [slot.alone for slot in slots] == [True, False]
    end(slots[0], "s")
    assert hand_out(queue, *slots) == ["fg", "de"]


def test_a_worker_stops_draining_when_another_one_takes_the_suspect() -> None:
    queue, slots = ShardQueue(SHARDS), [started()]
    hand_out(queue, *slots)
    queue.add_suspect(shard("s"))
    hand_out(queue, *slots)
    assert slots[0].draining
    slots.append(started())
    assert hand_out(queue, *slots)[1] == "s"
    assert not slots[0].draining


def test_a_retry_goes_to_another_node_and_waits_for_it_while_others_go_on() -> None:
    queue, slots = ShardQueue(SHARDS[:1]), [started("x", 1), started("x", 2), started("y", 3)]
    slots[2].leases = {1: SHARDS[5], 2: SHARDS[6]}
    queue.add_delayed(SHARDS[7], 0.0, TRIED)
    assert hand_out(queue, *slots, now=1.0) == ["a", "", "fg"]
    assert len(queue) == 1
    end(slots[2], "f")
    assert hand_out(queue, *slots, now=1.0) == ["a", "", "gh"]


def test_a_retry_goes_to_another_worker_of_the_only_node_and_to_the_same_if_there_is_no_other() -> None:
    queue, slots = ShardQueue([]), [started("x", 1), started("x", 2)]
    queue.add_delayed(SHARDS[0], 0.0, TRIED)
    assert hand_out(queue, *slots, now=1.0) == ["", "a"]
    queue.add_delayed(SHARDS[0], 0.0, TRIED)
    assert hand_out(queue, slots[0], now=1.0) == ["a"]


def test_a_retry_goes_to_no_worker_at_which_the_last_lease_failed_while_there_are_others() -> None:
    queue, slots = ShardQueue([]), [started("y", 2), started("z", 3)]
    queue.add_delayed(SHARDS[0], 0.0, TRIED)
    queue.hand_out(slots, lease, 1.0, failing={slots[0].id})
    assert [len(slot.leases) for slot in slots] == [0, 1]
    queue.add_delayed(SHARDS[1], 0.0, TRIED)
    queue.hand_out(slots, lease, 1.0, failing={slot.id for slot in slots})
    assert [len(slot.leases) for slot in slots] == [1, 1]


def test_a_suspect_prefers_another_node_and_does_not_wait_for_it() -> None:
    queue = ShardQueue([])
    for number in range(2):
        queue.add_suspect(SHARDS[number], TRIED)
    assert hand_out(queue, started("y", 3), started("x", 1), now=1.0) == ["a", "b"]


def test_a_worker_gets_no_lease_during_a_pause_or_once_it_must_be_restarted() -> None:
    queue, slot = ShardQueue(SHARDS[:2]), started()
    queue.pause(slot.id, 5.0)
    assert hand_out(queue, slot, now=4.9) == [""]
    slot.exhausted = True
    assert hand_out(queue, slot, now=5.0) == [""]
    slot.exhausted = False
    assert hand_out(queue, slot, now=5.0) == ["ab"]


def test_a_worker_on_a_drained_node_is_no_place_for_retries_or_suspects() -> None:
    leaving, here, queue = started("y", leaving=True), started("x"), ShardQueue([])
    queue.add_delayed(SHARDS[0], 0.0, frozenset({WorkerId("x", 2)}))
    queue.add_suspect(SHARDS[1], TRIED)
    assert hand_out(queue, leaving, here, now=1.0) == ["", "b"]
    end(here, "b")
    assert hand_out(queue, leaving, here, now=1.0) == ["", "a"]
