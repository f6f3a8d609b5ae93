"""``reinforce soup``: the mean of the weights of several training runs, added greedily (arXiv 2203.05482)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from reinforce.adapting.choosing import Rule, mean
from reinforce.adapting.mixtures import SOUP, Mixtures, percent
from reinforce.errors import UserError
from reinforce.evaluation.report import score_table
from teachers.spec import ModelSpec


@dataclass(frozen=True)
class Trial:
    """The metrics of the mean of some models; ``added`` is the last of them, ``kept`` whether it stays."""

    models: Sequence[str]
    metrics: Mapping[str, float]
    added: str
    kept: bool


@dataclass(frozen=True)
class Soup:
    """The models of the mean, and the trials that led to it: each model alone, then with those before."""

    models: Sequence[str]
    alone: Mapping[str, Mapping[str, float]]
    trials: Sequence[Trial]
    rule: Rule

    def table(self) -> Table:
        """Metrics of each model alone, and of the mean, in percent."""
        columns = {**self.alone, "mean": [trial.metrics for trial in self.trials if trial.kept][-1]}
        names = dict.fromkeys(name for metrics in columns.values() for name in metrics)
        rows = [[name, *(percent(metrics.get(name)) for metrics in columns.values())] for name in names]
        return score_table(["%", *columns], rows, [*columns])

    def lines(self) -> list[str]:
        refused = [trial.added for trial in self.trials if not trial.kept]
        left_out = f"; left out: {', '.join(refused)}" if refused else ""
        return [f"mean of {', '.join(self.models)}, the {self.rule.describe()}{left_out}"]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def greedy_soup(
    mixtures: Mixtures, specs: Mapping[str, ModelSpec], rule: Rule, log: Callable[[str], None] = lambda line: None
) -> Soup:
    """Add models to a mean in the order of their metric, as long as each makes it better, and write the mean.

    Raises UserError if no model has the metrics of ``rule``, or if the folder has the model of a sweep.
    """
    mixtures.check_report(SOUP)
    alone = {}
    for name in specs:
        alone[name] = mixtures.metrics({name: 1.0})
        log(f"{name}: {rule.means(alone[name])}")
    scores = {name: mean(metrics, rule.domain) for name, metrics in alone.items()}
    ranked = sorted((name for name in specs if math.isfinite(scores[name])), key=lambda name: -scores[name])
    if not ranked:
        raise UserError(f"{', '.join(rule.domain)} has no value for any model; see the lines above.")
    chosen, best = [ranked[0]], alone[ranked[0]]
    trials = [Trial(tuple(chosen), best, ranked[0], True)]
    for name in ranked[1:]:
        tried = [*chosen, name]
        metrics = mixtures.metrics({one: 1 / len(tried) for one in tried})
        log(f"mean of {len(tried)} models, with {name}: {rule.means(metrics)}")
        better = mean(metrics, rule.domain) > mean(best, rule.domain)
        trials.append(Trial(tuple(tried), metrics, name, better))
        if better:
            chosen, best = tried, metrics
    result = Soup(tuple(chosen), alone, trials, rule)
    mixtures.write({name: 1 / len(chosen) for name in chosen}, result.as_json(), SOUP)
    return result
