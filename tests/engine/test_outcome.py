"""Errors that travel from a worker to the driver."""

from __future__ import annotations

import pickle
import re

import pytest

from reinforce.engine.messages.results import LayerFailure, LoadFailure, ShardFailure, WorkerId, raising_layer_failure


def test_failures_survive_pickling() -> None:
    layer = pickle.loads(pickle.dumps(LayerFailure("captions/c", "odd")))
    assert (layer.layer, str(layer)) == ("captions/c", "captions/c: odd")
    for worker_at_fault in (True, False):
        shard = pickle.loads(pickle.dumps(ShardFailure("odd", worker_at_fault)))
        assert (str(shard), shard.worker_at_fault) == ("odd", worker_at_fault)


def test_a_failed_start_survives_pickling() -> None:
    failure = pickle.loads(pickle.dumps(LoadFailure(("node", 1, "host"), "no weights", True)))
    assert (failure.worker, str(failure.error)) == (WorkerId("node", 1, "host"), "no weights")


def test_an_error_of_a_model_names_its_layer() -> None:
    with pytest.raises(LayerFailure) as raised, raising_layer_failure("captions/c"):
        raise ValueError("odd")
    message = re.escape("captions/c: ValueError: odd (tests/engine/test_outcome.py:")
    assert re.fullmatch(message + r'\d+ in test_\w+: `raise ValueError\("odd"\)`\)', str(raised.value))
    assert isinstance(raised.value.__cause__, ValueError)
