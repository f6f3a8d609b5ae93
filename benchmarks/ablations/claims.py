"""What a paper leads one to expect of a question's arms, judged by the numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from benchmarks.ablations.measures import ALL, REACH, Numbers

#: Standard errors of a difference beyond which two arms differ; the second where the best or worst of several is taken.
ERRORS, ERRORS_OF_PICKED = 2.0, 3.0
Relation = Literal["above", "below", "level with", "not above", "not below"]


@dataclass(frozen=True)
class Verdict:
    """Whether a claim holds of the numbers, and what they are."""

    holds: bool
    text: str


class Claim(Protocol):
    """``judge`` wants every arm that is named, with two seeds or more."""

    def judge(self, numbers: Numbers) -> Verdict: ...


@dataclass(frozen=True)
class Pick:
    """The arm of several with the highest, or the lowest, mean, and what it is called."""

    of: Sequence[str]
    told: str = "the best"
    lowest: bool = False


@dataclass(frozen=True)
class Compare:
    """``first`` stands so to ``second``, in the mean over the seeds; see ``error``."""

    measure: str
    first: str | Pick
    relation: Relation
    second: str | Pick

    def judge(self, numbers: Numbers) -> Verdict:
        first, second = (self._label(side, numbers) for side in (self.first, self.second))
        measure = ALL[self.measure]
        here, there = (statistics.fmean(numbers[label][self.measure]) for label in (first, second))
        picked = any(isinstance(side, Pick) and len(side.of) > 1 for side in (self.first, self.second))
        noise = (ERRORS_OF_PICKED if picked else ERRORS) * error(numbers, self.measure)
        found = "level with" if abs(here - there) <= noise else "above" if here > there else "below"
        holds = found != self.relation.removeprefix("not ") if "not " in self.relation else found == self.relation
        claim = f"{measure.title}, {self._told(self.first, first)} {self.relation} {self._told(self.second, second)}"
        answer = "yes" if holds else f"no, it is {found} it"
        values = f"{measure.text(here)} and {measure.text(there)}, {measure.distance(here, there)} apart"
        return Verdict(holds, f"{claim}: {answer} ({values}, noise {measure.noise(noise)})")

    def _label(self, side: str | Pick, numbers: Numbers) -> str:
        if isinstance(side, str):
            return side
        choose = min if side.lowest else max
        return choose(side.of, key=lambda label: statistics.fmean(numbers[label][self.measure]))

    @staticmethod
    def _told(side: str | Pick, label: str) -> str:
        return label if isinstance(side, str) else f"{side.told} ({label})"


@dataclass(frozen=True)
class Sooner:
    """``first`` reaches the final accuracy of ``second`` in fewer steps than that one does, with every seed."""

    measure: str
    first: str
    second: str

    def judge(self, numbers: Numbers) -> Verdict:
        measure = ALL[self.measure + REACH]
        pairs = [*zip(*(numbers[label][self.measure + REACH] for label in (self.first, self.second)), strict=True)]
        sooner = sum(first < second for first, second in pairs)
        reached = [pair for pair in pairs if math.isfinite(pair[0])]
        claim = f"{ALL[self.measure].title}, {self.first} sooner at the final accuracy of {self.second}"
        parts = [f"with {sooner} of {len(pairs)} seeds"]
        if reached:
            first, second = (statistics.fmean(steps) for steps in zip(*reached, strict=True))
            times = f" ({second / first:.1f} times as many)" if first else ""
            parts.append(f"at step {measure.text(first)} where {self.second} has it at {measure.text(second)}{times}")
        if never := len(pairs) - len(reached):
            parts.append(f"never with {never}")
        holds = sooner == len(pairs)
        return Verdict(holds, f"{claim}: {'yes' if holds else 'no'}, {', '.join(parts)}")


def error(numbers: Numbers, measure: str) -> float:
    """The standard error of the difference of two arms' means.

    From the variances over seeds of all arms of the question together, since three seeds of one arm tell little.
    """
    seeds = [values[measure] for values in numbers.values() if measure in values]
    variance = statistics.fmean(statistics.variance(values) for values in seeds)
    return math.sqrt(2 * variance / min(map(len, seeds)))


def agreement(verdicts: Sequence[Verdict]) -> str:
    """Whether the numbers agree, as what follows `the numbers here`."""
    hold = sum(verdict.holds for verdict in verdicts)
    if not verdicts:
        return "are of one seed, which has no spread, so nothing is concluded"
    if 0 < hold < len(verdicts):
        return f"agree in {hold} of {len(verdicts)} points"
    return "agree" if hold else "do not agree"
