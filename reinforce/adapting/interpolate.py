"""Weights between models: ``reinforce interpolate`` (WiSE-FT, arXiv 2109.01903), evaluated over a grid of shares, and
``reinforce soup``, the mean of several training runs that are added greedily (arXiv 2203.05482).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from reinforce import plots
from reinforce.adapting.choosing import Point, Rule, mean
from reinforce.adapting.mixtures import SOUP, SWEEP, Mixtures, check_free, load_mixer, percent
from reinforce.errors import UserError
from reinforce.evaluation.report import score_table
from reinforce.storage import Storage
from teachers.spec import ModelSpec

#: Shares of the second model's weights that a sweep evaluates, as published.
GRID = tuple(round(0.1 * tenth, 1) for tenth in range(11))
PICTURE = "sweep.png"
_NAME_COLUMNS = 50


@dataclass(frozen=True)
class Sweep:
    """The metrics by share, and the share that a rule has chosen."""

    models: tuple[str, str]
    points: Sequence[Point]
    rule: Rule
    chosen: Point

    def shares(self, alpha: float) -> dict[str, float]:
        """The weights of both models in the mixture of a share ``alpha``."""
        return dict(zip(self.models, (1 - alpha, alpha), strict=True))

    @property
    def shown(self) -> list[Point]:
        """The points of tables: the first model, the chosen share and the largest one."""
        return [self.points[0], self.chosen, self.points[-1]]

    def table(self) -> Table:
        """Metrics in percent, one column a share, in 80 columns; a star marks the chosen one."""
        shown = [point for point in self.points if point in self.shown]
        names = dict.fromkeys(name for point in self.points for name in point.metrics)
        heads = [f"{point.alpha:g}{'*' if point is self.chosen else ''}" for point in shown]
        rows = [[name, *(percent(point.metrics.get(name)) for point in shown)] for name in names]
        table = score_table(["%, by alpha", *heads], rows, [])
        table.columns[0].no_wrap, table.columns[0].max_width = False, _NAME_COLUMNS
        return table

    def lines(self) -> list[str]:
        return [f"* chosen: alpha {self.chosen.alpha:g}, the {self.rule.describe()}"]

    def as_json(self) -> dict[str, Any]:
        return {"models": [*self.models], "points": [*map(asdict, self.points)], "rule": asdict(self.rule)} | {
            "alpha": self.chosen.alpha
        }

    def draw(self, url: str) -> None:
        """Draw the mean of the domain over that of the general metrics, or over the share without general metrics."""
        made, [axes] = plots.figure(width=6.4, height=4.8)
        general = self.rule.general
        across = [100 * mean(point.metrics, general) if general else point.alpha for point in self.points]
        up = [100 * mean(point.metrics, self.rule.domain) for point in self.points]
        x_label = f"{', '.join(general)} (%)" if general else "alpha"
        plots.label(axes, "Weights between two models", x_label, f"{', '.join(self.rule.domain)} (%)")
        axes.plot(across, up, color=plots.colour(0), marker="o")
        for point, x, y in zip(self.points, across, up, strict=True):
            axes.annotate(f"{point.alpha:g}", (x, y), xytext=(5, 5), textcoords="offset points", fontsize=8)
        place = self.points.index(self.chosen)
        axes.plot(
            across[place], up[place], color=plots.colour(1), marker="o", markersize=11, fillstyle="none",
            linestyle="none", label=f"chosen: {self.chosen.alpha:g}",
        )  # fmt: skip
        axes.legend(frameon=False, fontsize=9)
        plots.save(made, url)


def interpolate(specs: Mapping[str, ModelSpec], out: str, alpha: float) -> None:
    """Write the model with the weights (1 - alpha) x first + alpha x second to ``out``.

    Raises UserError if the architectures differ, or if ``out`` has a model.
    """
    storage = Storage(out)
    check_free(storage)
    storage.check_writable()
    mixer = load_mixer(specs)
    mixer.use(_shares(specs, alpha))
    mixer.write(storage)


def sweep(
    mixtures: Mixtures,
    specs: Mapping[str, ModelSpec],
    out: str,
    rule: Rule,
    alphas: Sequence[float] = GRID,
    log: Callable[[str], None] = lambda line: None,
) -> Sweep:
    """Evaluate the shares, 0 included, and write the model of the chosen one, sweep.json and sweep.png to ``out``.

    Raises UserError where a metric of ``rule`` has no value for alpha 0, or if the folder has the model of a soup.
    """
    mixtures.check_report(SWEEP)
    points = []
    for alpha in sorted({0.0, *alphas}):
        points.append(Point(alpha, mixtures.metrics(_shares(specs, alpha))))
        log(f"alpha {alpha:g}: {rule.means(points[-1].metrics)}")
    first, second = specs
    result = Sweep((first, second), points, rule, rule.choose(points))
    mixtures.write(_shares(specs, result.chosen.alpha), result.as_json(), SWEEP)
    picture = f"{out.rstrip('/')}/{PICTURE}"
    if plots.drawable(f"{picture} is"):
        result.draw(picture)
    return result


def _shares(specs: Mapping[str, ModelSpec], alpha: float) -> dict[str, float]:
    first, second = specs
    return {first: 1 - alpha, second: alpha}


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
