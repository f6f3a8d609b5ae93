"""What the loss of a host means for a training on several."""

from __future__ import annotations

from reinforce.training.mailbox import Mailbox, RankHost
from reinforce.training.ray_train import Cluster, LostHosts, find_lost

A, B = RankHost("node-a", "a", "10.0.0.1"), RankHost("node-b", "b", "10.0.0.2")
AGAIN = "run the same command again, which resumes from the last checkpoint."


def hosts(ranks: int = 2) -> LostHosts:
    return LostHosts(ranks, 4, 1)


def test_a_training_goes_on_while_no_host_is_lost() -> None:
    watched = hosts()
    assert watched.update(Cluster({}, places=0), 0.0) is None, "its ranks may wait for nodes"
    assert watched.error(10_000.0) is None
    assert watched.error(10_000.0, failed=True) is None, "Ray Train failed for another reason"


def test_a_lost_host_whose_ranks_fit_on_no_other_ends_the_training_with_its_name_and_what_to_do() -> None:
    watched = hosts()
    line = watched.update(Cluster({B: (1,)}, places=1), 100.0)
    assert line == "host b (10.0.0.2, rank 1) was lost; the ranks restart once the other hosts can hold them"
    assert watched.update(Cluster({B: (1,)}, places=1), 120.0) is None, "one line"
    assert watched.error(129.9) is None, "it may come back"
    assert watched.error(130.0) == (
        "host b (10.0.0.2, rank 1) was lost, and the other hosts can hold 1 of 2 ranks with 4 CPUs and 1 GPU each. "
        f"Bring back what is lost, or set train.compute.ranks to fit; then {AGAIN}"
    )


def test_ranks_that_fit_on_other_hosts_go_on_there_until_the_restarts_are_used_up() -> None:
    watched = hosts()
    watched.update(Cluster({B: (1,)}, places=2), 100.0)
    assert watched.error(10_000.0) is None, "Ray Train restarts them"
    assert watched.error(10_000.0, failed=True) == (
        f"host b (10.0.0.2, rank 1) was lost, after train.retries restarts. Check the hosts; then {AGAIN}"
    )
    watched.update(Cluster({}, places=2), 200.0)
    assert watched.error(10_000.0, failed=True) is None, "they have started elsewhere"


def test_where_an_autoscaler_may_add_nodes_the_ranks_wait_for_them() -> None:
    watched = hosts()
    watched.update(Cluster({B: (1,)}, places=1, grows=True), 100.0)
    assert watched.error(10_000.0) is None
    assert watched.error(10_000.0, failed=True) is not None


def test_a_second_host_that_is_lost_begins_the_time_again_and_both_are_named() -> None:
    watched = hosts(3)
    watched.update(Cluster({B: (1, 2)}, places=1), 100.0)
    line = watched.update(Cluster({A: (0,), B: (1, 2)}, places=0), 130.0)
    assert line is not None
    assert line.startswith("host a (10.0.0.1, rank 0) was lost")
    assert watched.error(150.0) is None
    error = watched.error(160.0)
    assert error is not None
    assert error.startswith(
        "hosts a (10.0.0.1, rank 0) and b (10.0.0.2, rank 1, rank 2) were lost, and the other hosts"
    )


def test_a_host_that_is_lost_before_its_rank_has_started_ends_the_training_where_the_ranks_have_no_other_place() -> (
    None
):
    assert find_lost([A, B], {}, {"node-a"}, fit=False) == {B: ()}
    assert find_lost([A, B], {0: A}, {"node-a"}, fit=False) == {B: ()}
    assert find_lost([A, B], {}, {"node-a"}, fit=True) == {}, "they start on a"
    assert find_lost([A, B], {0: A, 1: B}, {"node-a"}, fit=True) == {B: (1,)}, "they restart on a"
    assert find_lost([A, B], {0: B, 1: B}, set(), fit=False) == {B: (0, 1), A: ()}
    watched = hosts()
    line = watched.update(Cluster({B: ()}, places=1), 0.0)
    assert line == "host b (10.0.0.2) was lost; the ranks restart once the other hosts can hold them"
    error = watched.error(30.0)
    assert error is not None
    assert error.startswith("host b (10.0.0.2) was lost, and the other hosts can hold 1 of 2 ranks with 4 CPUs")


def test_the_process_of_the_mailbox_imports_no_more_than_its_module_for_a_host() -> None:
    """A host is unpickled there; from a module that imports torch it would cost seconds in every training on Ray."""
    assert RankHost.__module__ == Mailbox.__module__
