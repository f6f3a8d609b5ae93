"""Covering arrays: few cases in which each two values of each two dimensions meet."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

#: A value of each dimension by its name.
Case = Mapping[str, Any]
#: Two dimensions with a value of each.
Pair = frozenset[tuple[str, Any]]
#: Values by dimension. A case that has one of them in each of these dimensions does not exist.
Exclusion = Mapping[str, Sequence[Any]]

_DRAWN = 12  # cases of which the one with most new pairs is taken


class Array(NamedTuple):
    """Cases, and the pairs that they have to meet: all but those that no allowed case has, ``impossible``."""

    cases: list[dict[str, Any]]
    pairs: set[Pair]
    impossible: set[Pair]


def pairs_of(case: Case) -> set[Pair]:
    return {frozenset(two) for two in itertools.combinations(case.items(), 2)}


def covering_array(dimensions: Mapping[str, Sequence[Any]], excluded: Sequence[Exclusion], seed: int) -> Array:
    """Draw cases until all pairs of values that an allowed case can have are met; the same ones for a ``seed``."""
    rng, cases, impossible = random.Random(seed), list[dict[str, Any]](), set[Pair]()
    every = [frozenset(two) for names in itertools.combinations(dimensions, 2) for two in _values(dimensions, names)]
    left = dict.fromkeys(every)
    while left:
        first = dict(rng.choice([*left]))
        drawn = [_complete(first, dimensions, excluded, left, rng) for _ in range(_DRAWN)]
        if drawn[0] is None:
            impossible.add(frozenset(first.items()))
            del left[frozenset(first.items())]
            continue
        best = max((case for case in drawn if case is not None), key=lambda case: len(pairs_of(case) & left.keys()))
        cases.append({name: best[name] for name in dimensions})
        met = pairs_of(best)
        left = {pair: None for pair in left if pair not in met}
    return Array(cases, {*every} - impossible, impossible)


def cheapened(
    array: Array, excluded: Sequence[Exclusion], costs: Mapping[str, Mapping[Any, float]]
) -> list[dict[str, Any]]:
    """Cases that meet the same pairs, with fewer of the values that cost time, and without cases that nothing needs.

    ``costs`` are what each value of a dimension adds to a case; dimensions that are not named stay as they are.
    """
    cases = [dict(case) for case in array.cases]
    counts = Counter(pair for case in cases for pair in pairs_of(case))

    def cost(case: Case) -> float:
        return sum(of.get(case[name], 0.0) for name, of in costs.items())

    def lost(case: Case, changed: Case | None) -> bool:
        return any(counts[pair] == 1 for pair in pairs_of(case) - (pairs_of(changed) if changed else set()))

    for case in sorted(cases, key=cost, reverse=True):
        if not lost(case, None):
            counts.subtract(pairs_of(case))
            cases.remove(case)
    for case in sorted(cases, key=cost, reverse=True):
        for name, of in costs.items():
            for value in sorted(of, key=lambda value: of[value]):
                changed = {**case, name: value}
                if of[value] < of[case[name]] and is_allowed(changed, excluded) and not lost(case, changed):
                    counts.subtract(pairs_of(case))
                    counts.update(pairs_of(changed))
                    case[name] = value
                    break
    return cases


def is_allowed(case: Case, excluded: Sequence[Exclusion]) -> bool:
    """Whether no exclusion holds for a case, which may lack dimensions."""
    for one in excluded:
        for name, values in one.items():
            if name not in case or case[name] not in values:
                break
        else:
            return False
    return True


def _values(dimensions: Mapping[str, Sequence[Any]], names: Sequence[str]) -> Iterator[Sequence[tuple[str, Any]]]:
    return itertools.product(*([(name, value) for value in dimensions[name]] for name in names))


def _complete(
    case: Case,
    dimensions: Mapping[str, Sequence[Any]],
    excluded: Sequence[Exclusion],
    left: Mapping[Pair, None],
    rng: random.Random,
) -> dict[str, Any] | None:
    """The case with values of its other dimensions that meet many of the pairs ``left``; None if there are none."""
    if not is_allowed(case, excluded):
        return None
    others = [name for name in dimensions if name not in case]
    if not others:
        return dict(case)
    of_name = {name: [one for one in excluded if name in one] for name in others}
    if not all(any(is_allowed({**case, name: one}, of_name[name]) for one in dimensions[name]) for name in others):
        return None  # at once, since no values of the dimensions between would help
    name = rng.choice(others)
    new = {value: sum(frozenset([(name, value), one]) in left for one in case.items()) for value in dimensions[name]}
    for value in sorted(new, key=lambda value: (-new[value], rng.random())):
        if (found := _complete({**case, name: value}, dimensions, excluded, left, rng)) is not None:
            return found
    return None
