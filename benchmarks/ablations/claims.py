"""Claims about the arms of a question, from the papers, and their check against the results."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from benchmarks.ablations.measures import ALL_MEASURES, REACHED_AT, Numbers

#: Two arms differ if their means are this many standard errors of a difference apart.
ERRORS = 2.0
#: The same where one side is the best or worst of several arms.
ERRORS_OF_PICKED = 3.0
Relation = Literal["above", "below", "level with", "not above", "not below"]


@dataclass(frozen=True)
class Verdict:
    """Whether a claim holds, and a sentence with the numbers."""

    holds: bool
    text: str


class Claim(Protocol):
    """``check`` needs the numbers of every arm that the claim names, with at least two seeds."""

    def check(self, numbers: Numbers) -> Verdict: ...


@dataclass(frozen=True)
class Pick:
    """The arm with the highest, or the lowest, mean of several, and its name in the text."""

    arms: Sequence[str]
    name: str = "the best"
    lowest: bool = False


@dataclass(frozen=True)
class Compare:
    """The mean of ``first`` over the seeds has this relation to the mean of ``second``."""

    measure: str
    first: str | Pick
    relation: Relation
    second: str | Pick

    def check(self, numbers: Numbers) -> Verdict:
        first, second = (self._label(side, numbers) for side in (self.first, self.second))
        measure = ALL_MEASURES[self.measure]
        first_mean, second_mean = (statistics.fmean(numbers[label][self.measure]) for label in (first, second))
        picked = any(isinstance(side, Pick) and len(side.arms) > 1 for side in (self.first, self.second))
        noise = (ERRORS_OF_PICKED if picked else ERRORS) * standard_error(numbers, self.measure)
        if abs(first_mean - second_mean) <= noise:
            actual = "level with"
        else:
            actual = "above" if first_mean > second_mean else "below"
        holds = actual != self.relation.removeprefix("not ") if "not " in self.relation else actual == self.relation
        claim = f"{measure.title}: {self._name(self.first, first)} {self.relation} {self._name(self.second, second)}"
        answer = "yes" if holds else f"no, {actual} it"
        values = f"{measure.format(first_mean)} and {measure.format(second_mean)}"
        difference = measure.format_difference(first_mean, second_mean)
        noise_text = measure.format_noise(noise)
        return Verdict(holds, f"{claim}: {answer} ({values}, difference {difference}, noise {noise_text})")

    def _label(self, side: str | Pick, numbers: Numbers) -> str:
        if isinstance(side, str):
            return side
        choose = min if side.lowest else max
        return choose(side.arms, key=lambda label: statistics.fmean(numbers[label][self.measure]))

    @staticmethod
    def _name(side: str | Pick, label: str) -> str:
        return label if isinstance(side, str) else f"{side.name} ({label})"


@dataclass(frozen=True)
class Within:
    """The mean of ``first`` differs from that of ``second`` by at most this share of the smaller one."""

    measure: str
    first: str
    second: str
    share: float

    def check(self, numbers: Numbers) -> Verdict:
        measure = ALL_MEASURES[self.measure]
        first, second = (statistics.fmean(numbers[label][self.measure]) for label in (self.first, self.second))
        holds = max(first, second) <= (1 + self.share) * min(first, second)
        claim = f"{measure.title}: {self.first} within {self.share:.0%} of {self.second}"
        values = f"{measure.format(first)} and {measure.format(second)}"
        difference = measure.format_difference(first, second)
        return Verdict(holds, f"{claim}: {'yes' if holds else 'no'} ({values}, difference {difference})")


@dataclass(frozen=True)
class Sooner:
    """With every seed, ``first`` reaches the final accuracy of ``second`` in fewer steps than ``second`` does."""

    measure: str
    first: str
    second: str

    def check(self, numbers: Numbers) -> Verdict:
        measure = ALL_MEASURES[self.measure + REACHED_AT]
        labels = (self.first, self.second)
        pairs = [*zip(*(numbers[label][self.measure + REACHED_AT] for label in labels), strict=True)]
        sooner = sum(first < second for first, second in pairs)
        reached = [pair for pair in pairs if math.isfinite(pair[0])]
        title = ALL_MEASURES[self.measure].title
        claim = f"{title}: {self.first} reaches the final accuracy of {self.second} in fewer steps"
        parts = [f"with {sooner} of {len(pairs)} seeds"]
        if reached:
            first, second = (statistics.fmean(steps) for steps in zip(*reached, strict=True))
            ratio = f" ({second / first:.1f} times as many)" if first else ""
            parts.append(f"at step {measure.format(first)}, {self.second} at step {measure.format(second)}{ratio}")
        if never := len(pairs) - len(reached):
            parts.append(f"never with {never}")
        holds = sooner == len(pairs)
        return Verdict(holds, f"{claim}: {'yes' if holds else 'no'}, {', '.join(parts)}")


def standard_error(numbers: Numbers, measure: str) -> float:
    """Return the standard error of the difference of two arms' means.

    The variance over seeds is pooled over all arms of the question, since few seeds of one arm give a poor estimate.
    """
    seeds = [values[measure] for values in numbers.values() if measure in values]
    variance = statistics.fmean(statistics.variance(values) for values in seeds)
    return math.sqrt(2 * variance / min(map(len, seeds)))


def agreement(verdicts: Sequence[Verdict]) -> str:
    """Return whether the results agree with the papers, as the end of a sentence."""
    hold = sum(verdict.holds for verdict in verdicts)
    if not verdicts:
        return "come from a single seed and allow no conclusion"
    if 0 < hold < len(verdicts):
        return f"agree in {hold} of {len(verdicts)} points"
    return "agree" if hold else "do not agree"
