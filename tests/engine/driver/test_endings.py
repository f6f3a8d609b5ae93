"""Every run ends, whatever fails: simulated histories of failures, and what each cause may cost."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reinforce.dataset.layers import Layer
from reinforce.engine.messages import LayerFailure, PendingShard, ShardFailure, WorkerId
from tests.helpers.simulated_run import Outcome, SimulatedRun

GOOD, BAD, TEXTS = "embeddings/good/images", "embeddings/bad/images", "embeddings/good/c"
LAYERS = {
    "samples": Layer("samples", "samples", "0"),
    "captions/c": Layer("captions/c", "captions", "1", needs=("samples",)),
    GOOD: Layer(GOOD, "images", "2", needs=("samples",)),
    BAD: Layer(BAD, "images", "3", needs=("samples",)),
    TEXTS: Layer(TEXTS, "texts", "4", needs=("samples", "captions/c")),
}
WORKERS = [(1, 1), (2, 1), (1, 4), (4, 2)]  # nodes, and workers of each


@pytest.mark.parametrize(("nodes", "per_node"), WORKERS)
@pytest.mark.parametrize("shards", [1, 4, 30])
def test_a_model_that_fails_at_every_worker_costs_its_own_layers_and_the_other_layers_are_computed(
    nodes: int, per_node: int, shards: int
) -> None:
    def outcome(shard: PendingShard, worker: WorkerId) -> Outcome:
        return LayerFailure(BAD, "ValueError: odd") if BAD in shard.layers else None

    run = SimulatedRun(nodes, per_node, shards, outcome, layers=LAYERS, allowed_seconds=1000.0).run()
    names = {f"{number:05d}" for number in range(shards)}
    assert run.quarantined_layers == {(name, BAD) for name in names}
    assert run.passed_layers == {(name, layer) for name in names for layer in LAYERS if layer != BAD}
    assert len(run.replaced) <= 3


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("nodes", "per_node"), WORKERS)
def test_a_shard_that_breaks_its_worker_for_all_that_follow_costs_no_other_shard(
    nodes: int, per_node: int, seed: int
) -> None:
    broken: set[WorkerId] = set()

    def outcome(shard: PendingShard, worker: WorkerId) -> Outcome:
        if shard.name == "00003" and GOOD in shard.layers:
            broken.add(worker)
        return LayerFailure(GOOD, "device-side assert") if worker in broken else None

    random.seed(seed)
    run = SimulatedRun(nodes, per_node, 30, outcome, layers=LAYERS, allowed_seconds=3000.0).run()
    assert run.quarantined_layers == {("00003", GOOD)}
    assert len(run.passed) == 30


@st.composite
def histories(draw: st.DrawFn) -> Callable[[PendingShard, WorkerId], Outcome]:
    """What leases do: shares of errors, by cause, and causes that are always there."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    raises, charged, model, dies = (draw(st.sampled_from([0.0, 0.05, 0.3, 0.9, 1.0])) for _ in range(4))
    always = draw(st.sets(st.sampled_from([*LAYERS][1:]), max_size=2))  # layers whose models always raise
    bad_shards = {f"{n:05d}" for n in draw(st.sets(st.integers(0, 11), max_size=6))}
    bad_nodes = {f"node {n}" for n in draw(st.sets(st.integers(0, 3), max_size=2))}
    bad_workers = draw(st.sets(st.integers(0, 40), max_size=6))

    def outcome(shard: PendingShard, worker: WorkerId) -> Outcome:
        if rng.random() < dies / 2:
            return "killed"
        failing = [layer for layer in shard.layers if layer in always or (layer != "samples" and rng.random() < model)]
        if failing:
            return LayerFailure(failing[0], "odd")
        if shard.name in bad_shards or worker.node in bad_nodes or worker.pid in bad_workers or rng.random() < raises:
            return ShardFailure("odd", rng.random() < charged)
        return None

    return outcome


@settings(max_examples=60, derandomize=True)
@given(histories(), st.sampled_from(WORKERS), st.integers(1, 12))
def test_every_run_ends_with_each_layer_of_each_shard_computed_or_quarantined_after_few_leases(
    outcome: Callable[[PendingShard, WorkerId], Outcome], workers: tuple[int, int], shards: int
) -> None:
    random.seed(0)
    run = SimulatedRun(*workers, shards, outcome, layers=LAYERS, allowed_seconds=20_000.0).run()
    for name in run.leases:
        lost = {layer for shard, layer in run.quarantined_layers if shard == name}
        lost |= {layer for layer, entry in LAYERS.items() if lost & {*entry.needs}}
        assert {layer for layer in LAYERS if (name, layer) in run.passed_layers} == LAYERS.keys() - lost
    assert max(run.failures.values(), default=0) <= 12 * len(LAYERS)
