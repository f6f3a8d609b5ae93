"""One more operation belongs to a new backend: records, fingerprints and datasets of the others stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import ImageChops

from reinforce.config import Augmentations, parse_config
from reinforce.dataset.augment.backends import BACKENDS, Backend, known_operations, load_backend, sample_augmentation
from reinforce.dataset.augment.operations import OPS, RAND_AUGMENT, OperationTable
from reinforce.dataset.augment.records import AUGMENTATION_BACKEND, Augmentation
from reinforce.dataset.layers import SAMPLES
from reinforce.engine.plan.plan import make_plan
from reinforce.engine.plan.recipe import build_layers
from tests.helpers.data import config_of
from tests.helpers.images import noise
from tests.helpers.reinforced import reinforce_here

NEW = "with-invert-1"


def with_invert() -> Backend:
    """The default backend with one more operation."""
    default, table = BACKENDS[AUGMENTATION_BACKEND], RAND_AUGMENT
    operations = {**default.operations, "Invert": lambda image, _: ImageChops.invert(image)}
    more = OperationTable(
        (*table.names, "Invert"), table.signed, lambda level, size: {**table.magnitudes(level, size), "Invert": 0.0}
    )
    return Backend(default.load_resize, operations, more)


def records(policy: Augmentations) -> list[Augmentation]:
    return [sample_augmentation(policy, 0, str(n), 0, 64, 48) for n in range(200)]


def test_an_operation_of_a_new_backend_changes_no_records_fingerprints_or_datasets_of_others(
    shards: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(shards(3, 2), tmp_path / "out", captioners={}, teachers={})
    reinforce_here(config)
    policies = [Augmentations(backend=name) for name in BACKENDS]
    drawn = [records(policy) for policy in policies]
    fingerprint = build_layers(parse_config(config), {})[SAMPLES].fingerprint

    monkeypatch.setitem(BACKENDS, NEW, with_invert())
    assert [records(policy) for policy in policies] == drawn
    layers = build_layers(parse_config(config), {})
    assert layers[SAMPLES].fingerprint == fingerprint
    assert make_plan(parse_config(config)).pending == []

    parsed = parse_config(config)
    changed = parsed.model_copy(update={"augmentations": parsed.augmentations.model_copy(update={"backend": NEW})})
    assert build_layers(changed, {})[SAMPLES].fingerprint != fingerprint


def test_a_new_backend_draws_and_replays_its_operation_and_others_refuse_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, NEW, with_invert())
    assert known_operations() == (*OPS, "Invert")
    drawn = records(Augmentations().model_copy(update={"backend": NEW}))
    inverting = [record for record in drawn if any(op.name == "Invert" for op in record.ops or ())]
    assert 10 < len(inverting) < 45  # 2 of 15 operations a record: 27 of 200 expected
    record = Augmentation(inverting[0].crop, 16, tuple(op for op in inverting[0].ops or () if op.name == "Invert")[:1])
    image = noise(64, 48)
    plain = load_backend(NEW)(image, Augmentation(record.crop, 16, None))
    assert np.array_equal(load_backend(NEW)(image, record), 255 - plain)
    for backend in (AUGMENTATION_BACKEND, "fixed-point-1"):
        with pytest.raises(ValueError, match="unknown operation 'Invert'"):
            load_backend(backend)(image, record)
