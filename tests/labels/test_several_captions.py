"""Labels with vectors of several true captions a sample: a copy gets those of the captions that it has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import reinforce
from reinforce.config import parse_config
from reinforce.engine.plan.plan import make_plan
from reinforce.engine.preflight.check_source import check_source
from reinforce.publishing.labels import export_labels
from tests.helpers.data import config_of, picture, write_tar
from tests.helpers.reinforced import reinforce_here
from tests.labels.test_taking import LAYERS, taking

COUNT, MOST = 12, 3
READ = {"captions": ["json:captions"], "captions_per_sample": MOST}
STRANGE = 7  # the number of the sample whose captions another copy has changed


def captions_of(number: int) -> list[str]:
    return [f"{word} {number}" for word in ("one", "two", "three")[: 1 + number % MOST]]


def write(path: Path, reverse: bool = False) -> None:
    """Images with one to three captions each, or a copy of them in another order with these in another order."""
    members = []
    for number in reversed(range(COUNT)) if reverse else range(COUNT):
        texts = captions_of(number)[:: -1 if reverse else 1] + ["other"] * (reverse and number == STRANGE)
        fields = {"uid": f"uid{number}", "captions": texts, "first": texts[0]}
        members += [
            (f"{'own' if reverse else ''}{number}.png", picture(number)),
            (f"{'own' if reverse else ''}{number}.json", json.dumps(fields).encode()),
        ]
    write_tar(path, members)


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("several")
    write(folder / "images" / "0.tar")
    dataset = reinforce_here(config_of(f"{folder}/images/*.tar", folder / "dataset", input=READ))
    exported = export_labels(dataset, f"{folder}/labels", use_ray=False)
    assert any("sets input.captions_per_sample: 3" in line for line in exported.lines())
    return exported.output


@pytest.mark.parametrize(
    "read", [READ, {**READ, "captions_per_sample": 2}, {**READ, "captions_per_sample": 5}, {"captions": ["json:first"]}]
)
@pytest.mark.parametrize("own", [False, True])  # whether the config has the model too
def test_vectors_are_those_that_the_model_computes_of_the_captions(
    tmp_path: Path, labels: str, read: dict[str, Any], own: bool
) -> None:
    write(tmp_path / "copy" / "0.tar", reverse=True)
    source = f"{tmp_path}/copy/*.tar"
    expected = reinforce_here(config_of(source, tmp_path / "computed", input=read))
    models = {"teachers": config_of("", "")["teachers"]} if own else {}
    config = taking(tmp_path, labels, input=read, **models)
    for one, other in zip(reinforce.open(expected), reinforce.open(reinforce_here(config)), strict=True):
        assert one.true_captions == other.true_captions
        if own or "other" not in one.true_captions:
            np.testing.assert_array_equal(one.texts["red"]["caption"], other.texts["red"]["caption"])
        else:
            assert np.isnan(other.texts["red"]["caption"]).all()  # one of its captions is not in the labels
        assert len(other.texts["red"]["namer"]) == 2


def test_a_plan_states_what_is_read_of_them(tmp_path: Path, labels: str) -> None:
    write(tmp_path / "copy" / "0.tar", reverse=True)
    _, notes = check_source(make_plan(parse_config(taking(tmp_path, labels, input={"captions": ["json:first"]}))))
    assert any("input.captions_per_sample: 3 takes all" in note for note in notes)
    _, notes = check_source(make_plan(parse_config(taking(tmp_path, labels, input=READ))))
    assert not any("takes all" in note for note in notes)


def test_layers_of_captions_that_are_taken_later_fit_the_stored_ones(tmp_path: Path, labels: str) -> None:
    write(tmp_path / "copy" / "0.tar", reverse=True)

    def of(*layers: str) -> dict[str, Any]:
        return taking(tmp_path, labels, input=READ, labels={"lab": {"url": labels, "layers": [*layers]}})

    reinforce_here(of("embeddings/blue"))
    later = reinforce.open(reinforce_here(of("embeddings/blue", "embeddings/red/caption")))
    at_once = reinforce.open(reinforce_here({**of(*LAYERS), "output": f"{tmp_path}/at-once"}))
    for one, other in zip(at_once, later, strict=True):
        np.testing.assert_array_equal(one.texts["red"]["caption"], other.texts["red"]["caption"])
