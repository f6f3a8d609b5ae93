"""Charts of a report: what a chart shows, drawn by matplotlib as inline SVG with the colours of the page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from reinforce import plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRUE_COLOUR = "#868e96"  # of true captions
#: Variables of report.css, so that a chart follows light and dark.
_VARIABLES = {
    plots.INK: "ink",
    plots.GREY: "soft",
    plots.EDGE: "line",
    TRUE_COLOUR: "grey",
    **{colour: f"c{number}" for number, colour in enumerate(plots.COLOURS)},
}
_WIDTH = 4.4  # inches
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "text.parse_math": False,
}


@dataclass(frozen=True)
class Chart:
    """A chart that ``draw`` draws on axes. ``table`` has the same numbers for readers who cannot see it, under its
    ``heads``. ``height`` is in inches."""

    title: str
    text: str
    x_label: str
    y_label: str
    heads: Sequence[str]
    table: Sequence[Sequence[str]]
    draw: Callable[[Axes], None]
    height: float = 2.8

    def svg(self) -> Markup:
        """The drawing as an element of a page: equal charts are equal text."""
        from matplotlib import rc_context

        with rc_context({**_STYLE, "svg.hashsalt": self.title}):
            figure, (axes,) = plots.figure(width=_WIDTH, height=self.height)
            self.draw(axes)
            plots.label(axes, "", self.x_label, self.y_label)
            if len(labels := axes.get_legend_handles_labels()[1]) > 1:
                columns = 1 if max(map(len, labels)) > 20 else 3
                figure.legend(loc="outside upper left", ncols=columns, frameon=False, fontsize=9, labelcolor=plots.INK)
            file = io.StringIO()
            figure.savefig(
                file, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
            )
        svg = file.getvalue()
        svg = re.sub(r' id="[a-z0-9_.]+_\d+"', "", svg[svg.index("<svg") :])  # which other charts of the page have too
        return Markup(re.sub("|".join(_VARIABLES), lambda found: f"var(--{_VARIABLES[found[0]]})", svg))  # noqa: S704
