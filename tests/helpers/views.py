"""Views of datasets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

import reinforce
from reinforce.dataset.view import View
from reinforce.explore.config import SelectConfig
from reinforce.explore.select import select
from reinforce.settings import parse


def make_view(url: str | Path, *rules: str | dict[str, Any], name: str = "some", seed: int = 0, **options: Any) -> View:
    """Make a view of a dataset; a rule that is a text is a ``where``. ``options`` are those of ``select``."""
    written = [{"where": rule} if isinstance(rule, str) else rule for rule in rules]
    return select(parse(SelectConfig, {"dataset": str(url), "name": name, "rules": written, "seed": seed}), **options)


def keys_of(url: str | Path, view: str | None = "some") -> list[str]:
    """The keys of the samples of a view, or of a dataset."""
    return [sample.key for sample in reinforce.open(str(url), view=view)]


def rows_of(url: str | Path, view: str = "some") -> list[dict[str, Any]]:
    """What the view has of each row of the dataset."""
    [folder] = [folder for folder in Path(url, "views", view).glob("rows-*") if any(folder.iterdir())]
    return [row for path in sorted(folder.iterdir()) for row in pq.read_table(path).to_pylist()]


def reasons_of(url: str | Path, view: str = "some") -> list[str | None]:
    """Why the view leaves out each row of the dataset, None where it keeps it."""
    return [row["left_out"] for row in rows_of(url, view)]
