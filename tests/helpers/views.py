"""Views of datasets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

import reinforce
from reinforce.dataset.store import Store
from reinforce.dataset.view import View, read_view, view_fingerprint
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


def reasons_of(url: str | Path, view: str = "some") -> list[str | None]:
    """Why the view leaves out each row of the dataset, None where it keeps it."""
    [folder] = [folder for folder in Path(url, "views", view).glob("rows-*") if any(folder.iterdir())]
    return [row for path in sorted(folder.iterdir()) for row in pq.read_table(path)["left_out"].to_pylist()]


def as_version_1(url: str | Path, name: str = "some") -> Path:
    """Turn a view into one that a version without digests and content has written; returns its ``shards.parquet``."""
    store = Store(str(url))
    view = read_view(store, name)
    folder = Path(url, "views", name)
    old = view_fingerprint(view.rules, view.seed, view.inputs, view.counts)
    shards = next(folder.glob("shards-*"))
    pq.write_table(pq.read_table(shards).select(["shard", "rows", "kept"]), folder / "shards.parquet")
    shards.unlink()
    (folder / f"rows-{view.fingerprint}").rename(folder / f"rows-{old}")
    description = json.loads((folder / "view.json").read_text())
    kept = {key: value for key, value in description.items() if key not in ("columns", "shards")}
    (folder / "view.json").write_text(json.dumps({**kept, "version": 1, "fingerprint": old}))
    return folder / "shards.parquet"
