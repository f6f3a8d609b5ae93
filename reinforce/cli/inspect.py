"""``reinforce inspect``: a report on a dataset for people."""

from __future__ import annotations

from typing import Annotated

import typer

from reinforce.cli.common import DatasetUrl, ImagesFrom, ViewName, print_lines, split_names

Names = Annotated[str | None, typer.Option(metavar="NAMES", help="Names, separated by commas. Default: all.")]


def inspect(
    dataset: DatasetUrl,
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="Folder or fsspec URL to write the report to.")],
    teachers: Names = None,
    captioners: Names = None,
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of samples that are looked at.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Which row groups and samples are looked at.")] = 0,
    images_from: ImagesFrom = None,
    view: ViewName = None,
) -> None:
    """Write a report on a dataset: an HTML folder with a summary, a gallery of samples, and plots.

    It opens in a browser from disk, from a web server or from an object store, and sends no request elsewhere. An
    earlier report in OUTPUT is replaced. The same command gives equal files.

    With --view, it also shows samples on both sides of each rule of the view.
    """
    from reinforce import __version__
    from reinforce.inspection.report import inspect as inspect_dataset

    found = inspect_dataset(
        dataset,
        output,
        split_names(teachers),
        split_names(captioners),
        limit=limit,
        seed=seed,
        images_from=images_from or (),
        view=view,
        version=__version__,
    )
    print_lines(found.lines())
