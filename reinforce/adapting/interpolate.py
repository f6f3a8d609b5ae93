"""``reinforce interpolate``: weights between two models (WiSE-FT, arXiv 2109.01903), evaluated over a grid."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from reinforce import plots
from reinforce.adapting.choosing import Point, Rule, mean
from reinforce.adapting.mixing import load_mixer
from reinforce.adapting.mixtures import SWEEP, Mixtures, check_free, percent
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
