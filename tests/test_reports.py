"""Plots are drawn without a display and written atomically, to a disk or an object store."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
from matplotlib.figure import Figure
from PIL import Image

from reinforce import reports as plots
from reinforce.errors import UserError


def _draw() -> Figure:
    made, (left, right) = plots.figure(panels=2, width=6, height=3)
    left.bar(range(3), [1, 2, 3], color=plots.colour(0))
    plots.label(left, "Bars", "number", "height")
    right.plot([0, 1], [0, 1], color=plots.colour(1), label="up")
    right.plot([0, 1], [1, 0], color=plots.colour(2), label="down")
    plots.legend(right)
    return made


@pytest.mark.parametrize("where", ["disk", "memory"])
def test_a_figure_is_saved_as_a_png_of_its_size(tmp_path: Path, where: str) -> None:
    url = f"{tmp_path}/new/folder/plot.png" if where == "disk" else "memory://plots/folder/plot.png"
    plots.save(_draw(), url)
    with fsspec.open(url, "rb") as file:
        written = file.read()
    image = Image.open(io.BytesIO(written))
    assert (image.format, image.size) == ("PNG", (960, 480))
    if where == "disk":
        assert [p.name for p in (tmp_path / "new" / "folder").iterdir()] == ["plot.png"], "no temporary file is left"
    plots.save(_draw(), f"{tmp_path}/again.png")
    assert (tmp_path / "again.png").read_bytes() == written, "equal figures are equal files"


def test_drawing_does_not_import_pyplot() -> None:
    code = (
        "import sys; from reinforce import reports as plots; assert 'matplotlib' not in sys.modules; plots.figure(); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_single_series_gets_no_legend_and_a_dollar_sign_in_the_name_of_a_set_is_drawn_as_it_is(
    tmp_path: Path,
) -> None:
    made, [axes] = plots.figure()
    axes.plot([0, 1], [0, 1], label="alone")
    plots.legend(axes)
    assert axes.get_legend() is None
    plots.label(axes, "$\\a$", "$\\b$", "$\\c$")
    plots.save(made, str(tmp_path / "a.png"))


def test_a_url_without_a_driver_is_a_user_error() -> None:
    with pytest.raises(UserError, match="nosuch://"):
        plots.save(plots.figure()[0], "nosuch://bucket/plot.png")
