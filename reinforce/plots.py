"""The one look of all plots, and the one way they are stored.

Figures are built without pyplot: no display, no global state, no figure that has to be closed, so threads and the
processes of a training run may draw at the same time.
"""

from __future__ import annotations

import io
import os
import posixpath
import tempfile
from typing import TYPE_CHECKING

from fsspec.implementations.local import LocalFileSystem

from reinforce.source.urls import filesystem

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Told apart by people with any colour vision, on white, and in grey by their lightness.
COLOURS = ("#0b7285", "#e8590c", "#5f3dc4", "#f2b705", "#c2255c", "#66a80f", "#4dabf7", "#495057")
_INK, _GREY, _EDGE = "#1f2328", "#6b7280", "#e1e4e8"
_DPI = 160


def figure(
    panels: int = 1, width: float = 8.0, height: float = 4.5, columns: int | None = None
) -> tuple[Figure, list[Axes]]:
    """An empty figure with ``panels`` axes, side by side or in rows of ``columns``; sizes in inches, of the whole."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(made)
    columns = columns or panels
    axes = [made.add_subplot(-(-panels // columns), columns, i + 1) for i in range(panels)]
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.spines[["left", "bottom"]].set_color(_EDGE)
        panel.grid(axis="y", color=_EDGE, linewidth=0.8)
        panel.set_axisbelow(True)
        panel.tick_params(colors=_GREY, length=0, labelsize=9)
    return made, axes


def colour(index: int) -> str:
    """The colour of the series of that number; they repeat after the last."""
    return COLOURS[index % len(COLOURS)]


def label(axes: Axes, title: str, x: str, y: str) -> None:
    """Title above the left edge and the names of both axes (with their units)."""
    axes.set_title(title, loc="left", color=_INK, fontsize=11, fontweight="bold", pad=10)
    axes.set_xlabel(x, color=_GREY, fontsize=9)
    axes.set_ylabel(y, color=_GREY, fontsize=9)


def legend(axes: Axes) -> None:
    """A legend without a frame, where the series have labels and there is more than one."""
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(frameon=False, fontsize=9, labelcolor=_INK)


def save(made: Figure, url: str) -> None:
    """The figure as PNG at a path or fsspec URL, whole or not at all; folders are made."""
    buffer = io.BytesIO()
    # No date or version in the file: equal figures are equal bytes.
    made.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    write_file(buffer.getvalue(), url)


def write_file(data: bytes, url: str) -> None:
    """A small file at a path or fsspec URL, whole or not at all; folders are made."""
    fs, path = filesystem(url)
    if not isinstance(fs, LocalFileSystem):
        fs.pipe_file(path, data)
        return
    folder = posixpath.dirname(path) or "."
    os.makedirs(folder, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=".report-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)  # mkstemp keeps files to their owner
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
