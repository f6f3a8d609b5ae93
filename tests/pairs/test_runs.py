"""Small whole runs of a covering array, each checked by what must always be true."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from reinforce.dataset.kinds.registry import KINDS
from reinforce.source.config import MODULES
from tests.helpers.arrays import cheapened, covering_array, is_allowed, pairs_of
from tests.pairs.invariants import INVARIANTS
from tests.pairs.runs import COSTS, DIMENSIONS, EXCLUDED, SECTIONS, perform, small_samples
from tests.pairs.sources import WRITERS

ARRAY = covering_array(DIMENSIONS, EXCLUDED, seed=7)
CASES = cheapened(ARRAY, EXCLUDED, COSTS)


def test_all_pairs_are_met() -> None:
    met = set().union(*map(pairs_of, CASES))
    assert met == ARRAY.pairs
    assert all(is_allowed(case, EXCLUDED) and case.keys() == DIMENSIONS.keys() for case in CASES)
    assert WRITERS.keys() == MODULES.keys()
    assert SECTIONS.keys() == KINDS.keys()
    print(f"runs: {len(met):,} pairs are met by {len(CASES)} cases; {len(ARRAY.impossible)} cannot be")


@pytest.fixture(autouse=True, scope="module")
def codebooks() -> Iterator[None]:
    with small_samples():
        yield


@pytest.mark.parametrize("number", range(len(CASES)), ids=["-".join(case.values()) for case in CASES])
def test_a_run_is_as_it_must_be(number: int, tmp_path: Path, s3: Any) -> None:
    case = CASES[number]
    roots = {"local": str(tmp_path), "memory": f"memory://pairs-{number}", "s3": f"s3://bucket/pairs-{number}"}
    run = perform(case, roots[case["storage"]], tmp_path, number)
    for invariant in INVARIANTS:
        invariant(run)
    shutil.rmtree(tmp_path)
