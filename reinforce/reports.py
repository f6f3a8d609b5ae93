"""HTML and Markdown by jinja2 templates, and the common style of all plots.

Figures are built without pyplot: that needs no display, has no global state and no figures to close. So threads can
draw at the same time.

In HTML everything that comes from data is text: values are escaped, and only what templates and ``render`` have made is
HTML. In both, control characters of values are written as ``\\x00`` or ``\\u202e``.
"""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from reinforce.processes.imports import installed, require
from reinforce.storage import write_file
from reinforce.terminal import escape, format_bytes, format_duration, plural

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TEMPLATES = Path(__file__).parent / "templates"


def picture_address(data: bytes, kind: str = "webp") -> str:
    """The address of a picture that holds its data, for a page that is one file."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def render(template: str, **values: Any) -> Markup:
    """Fill in an HTML template of the folder ``templates``."""
    return Markup(_environment().get_template(template).render(values))  # noqa: S704 - escaped by the environment


def notebook_table(
    title: str,
    facts: Sequence[tuple[str, str]],
    heads: Sequence[str] = (),
    lines: Sequence[Sequence[str]] = (),
    more: int = 0,
) -> Markup:
    """A result as a notebook shows it: facts by name, and a table, of which ``more`` lines are left out."""
    return render("notebook/table.html", title=title, facts=facts, heads=heads, lines=lines, more=more)


def render_markdown(template: str, **values: Any) -> str:
    """Fill in a template of Markdown or YAML, whose values are not escaped; ends with a line end."""
    return _environment().get_template(template).render(values) + "\n"


@lru_cache(maxsize=1)
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=select_autoescape(disabled_extensions=("md", "yaml"), default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: escape(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
    )
    environment.filters.update(
        count=lambda value: f"{value:,}",
        plural=plural,
        size=format_bytes,
        duration=format_duration,
        share=lambda value: "-" if value is None else f"{value:.1%}".replace("%", " %"),
        fixed=lambda value, digits=3: "-" if value is None else f"{value:.{digits}f}".replace("-", "\u2212"),
    )
    return environment


_LOG = logging.getLogger(__name__)
_PACKAGE = "matplotlib"
#: Distinguishable on white with any colour vision, and in grey by their lightness.
COLOURS = ("#0b7285", "#e8590c", "#5f3dc4", "#f2b705", "#c2255c", "#66a80f", "#4dabf7", "#495057")
INK, GREY, EDGE = "#1f2328", "#6b7280", "#e1e4e8"
_DPI = 160


def drawable(picture: str) -> bool:
    """Whether matplotlib is installed; logs that ``picture`` (``PATH is``) is left out if it is not."""
    if not installed(_PACKAGE):
        _LOG.warning("%s not drawn: run pip install -e '.[report]' in the checkout", picture)
        return False
    return True


def figure(
    panels: int = 1, width: float = 8.0, height: float = 4.5, columns: int | None = None
) -> tuple[Figure, list[Axes]]:
    """Create a figure with ``panels`` axes, in one row or in rows of ``columns``; its size is in inches.

    Raises UserError if matplotlib is not installed.
    """
    require("report", "a picture", _PACKAGE)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(fig)
    columns = columns or panels
    axes = [fig.add_subplot(-(-panels // columns), columns, i + 1) for i in range(panels)]
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.spines[["left", "bottom"]].set_color(EDGE)
        panel.grid(axis="y", color=EDGE, linewidth=0.8)
        panel.set_axisbelow(True)
        panel.tick_params(colors=GREY, length=0, labelsize=9)
    return fig, axes


def colour(index: int) -> str:
    """Return the colour of a series by its index; colours repeat after the last."""
    return COLOURS[index % len(COLOURS)]


def label(axes: Axes, title: str, x: str, y: str) -> None:
    """Set the title and the labels of both axes (with their units); a dollar sign is one, as names of sets may have."""
    axes.set_title(title, loc="left", color=INK, fontsize=11, fontweight="bold", pad=10, parse_math=False)
    axes.set_xlabel(x, color=GREY, fontsize=9, parse_math=False)
    axes.set_ylabel(y, color=GREY, fontsize=9, parse_math=False)


def legend(axes: Axes) -> None:
    """Add a legend if more than one series has a label."""
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)


def save(fig: Figure, url: str) -> None:
    """Write the figure as PNG to a path or fsspec URI, atomically; create missing folders."""
    buffer = io.BytesIO()
    # Without the software version, so that equal figures are equal bytes.
    fig.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    write_file(buffer.getvalue(), url)
