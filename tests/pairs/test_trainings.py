"""Small trainings of a covering array, each checked by what must always be true."""

from __future__ import annotations

import json
import re
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from reinforce.errors import UserError
from reinforce.student.terms.registry import MODULES
from reinforce.student.train import build
from reinforce.training.ranks import join_ranks
from teachers.runtime.accelerator import Accelerator
from tests.helpers import sync_batch_norm  # noqa: F401  SyncBatchNorm's operations on CPUs
from tests.helpers.arrays import cheapened, covering_array, is_allowed, pairs_of
from tests.helpers.ranks import served_store, start_ranks, under_torchrun
from tests.pairs.training_invariants import FUNCTIONS, INVARIANTS, Trained
from tests.pairs.trainings import COSTS, DIMENSIONS, EXCLUDED, REFUSED, TERMS, Place, config, train

pytest.importorskip("faiss")

ARRAY = covering_array(DIMENSIONS, EXCLUDED, seed=7)
CASES = cheapened(ARRAY, EXCLUDED, COSTS)
#: Cases of more than one rank.
ON_RANKS = [number for number, case in enumerate(CASES) if case["ranks"] == "2"]
RANKS = 2


def test_all_pairs_are_met() -> None:
    met = set().union(*map(pairs_of, CASES))
    assert met == ARRAY.pairs
    assert all(is_allowed(case, EXCLUDED) and case.keys() == DIMENSIONS.keys() for case in CASES)
    assert TERMS.keys() == FUNCTIONS.keys() == MODULES.keys()
    for term, (name, values) in TERMS.items():
        assert any(case[name] in values for case in CASES), term
    print(f"trainings: {len(met):,} pairs are met by {len(CASES)} cases; {len(ARRAY.impossible)} cannot be")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("trainings"))


def outputs(folder: Path, number: int) -> tuple[Path, Path, Path]:
    """Where a case is trained on one rank in one part, divided, and resumed."""
    case, one = CASES[number], folder / f"{number}-one"
    divided = one if (case["ranks"], case["accumulate"]) == ("1", "1") else folder / f"{number}-divided"
    return one, divided, divided if case["resume"] == "no" else folder / f"{number}-resumed"


def train_divided(place: Place, number: int, ranks: Any = None) -> None:
    one, divided, resumed = outputs(place.folder, number)
    case = CASES[number]
    if divided != one:
        train(config(case, place, divided, divided=True), ranks)
    if resumed != divided:
        train(config(case, place, resumed, divided=True), ranks, killed=True)


def on_rank(rank: int, folder: str, port: int) -> None:
    """All cases of more than one rank, one after the other, because processes take seconds to start."""
    under_torchrun(rank, RANKS, port)
    torch.set_num_threads(1)
    place, failures = Place(Path(folder)), {}
    first = config(CASES[ON_RANKS[0]], place, "unused", divided=True)
    with join_ranks(first.train.compute) as ranks:
        for number in ON_RANKS:
            try:
                train_divided(place, number, ranks)
            except Exception:
                failures[number] = traceback.format_exc()
    Path(folder, f"failures-{rank}.json").write_text(json.dumps(failures))


@pytest.fixture(scope="module")
def failures(place: Place) -> dict[str, str]:
    """What went wrong with cases of more than one rank."""
    for case in CASES:
        config(case, place, "unused")  # makes what they share
    store = served_store()
    start_ranks(on_rank, RANKS, str(place.folder), store.port)
    found = [json.loads((place.folder / f"failures-{rank}.json").read_text()) for rank in range(RANKS)]
    return found[0] | found[1]


@pytest.mark.parametrize("number", range(len(CASES)), ids=["-".join(case.values()) for case in CASES])
def test_a_training_is_as_it_must_be(number: int, place: Place, request: pytest.FixtureRequest) -> None:
    run = Trained(CASES[number], place, *outputs(place.folder, number))
    run.train()
    if number in ON_RANKS:
        failed = request.getfixturevalue("failures")
        assert str(number) not in failed, failed[str(number)]
    else:
        train_divided(place, number)
    for invariant in INVARIANTS:
        invariant(run)


@pytest.mark.parametrize("number", range(len(REFUSED)), ids=["-".join(exclusion) for exclusion, _ in REFUSED])
def test_what_does_not_fit_is_refused_in_one_line(number: int, place: Place) -> None:
    exclusion, message = REFUSED[number]
    others = [one for n, (one, _) in enumerate(REFUSED) if n != number]
    [case, *_] = (case for case in _cases_of(exclusion) if is_allowed(case, others))
    with pytest.raises(UserError) as raised:
        build(config(case, place, "unused"), Accelerator("cpu"))
    *header, line = str(raised.value).split("\n")
    assert header in ([], ["config has 1 error:"])
    assert re.search(message, line)


def _cases_of(exclusion: Any) -> Iterator[dict[str, str]]:
    """Cases with the first of each value that an exclusion has, and otherwise with those of a case of the array."""
    for case in CASES:
        yield {**case, **{name: values[0] for name, values in exclusion.items()}}
