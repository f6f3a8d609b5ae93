"""The sets of each suite, and published main metrics of released models; both are tables beside this file.

``sets.csv`` has a line for each set; DataComp's are those of mlfoundations/datacomp, tasklist.yml. ``published.csv``
has the main metrics in results/ of apple/ml-mobileclip, commit 4144bb1, as fractions.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from reinforce.errors import UserError
from teachers.open_clip.released import name_key

Layout = Literal["tars", "tables", "sugarcrepe", "sharegpt4v", "pairs", "xm3600", "masks"]

#: The suites in sets.csv.
Suite = Literal["datacomp", "sugarcrepe", "long-captions", "xm3600", "dense"]
#: Those that measure image towers without texts, and so any teacher.
TEXTLESS = ("dense",)

HUB = "hf://"


@dataclass(frozen=True)
class SuiteSet:
    """A set of a suite. ``size`` and ``classes`` are published numbers, ``published`` a dataset of the Hub
    or a page, behind whose ``#`` is the folder of the set if its name is another.

    ``fields`` are the columns of a sample's ``npy`` metadata. ``groups`` maps the metric of the worst group to the
    field that has the groups.
    """

    key: str
    name: str
    kind: str  # a name in kinds.registry.KINDS
    layout: Layout
    size: int
    classes: int | None
    main_metric: str
    chance: float | None
    published: str
    fields: tuple[str, ...]
    groups: dict[str, str]

    @property
    def folder(self) -> str:
        """The folder of the set below ROOT."""
        page, _, folder = self.published.partition("@")[0].partition("#")
        return folder or page.rpartition("/")[2]

    @property
    def page(self) -> str:
        """The page where the set is published."""
        hub = f"https://huggingface.co/datasets/{self.published.partition('@')[0]}"
        return hub if self.on_hub else self.published.partition("#")[0]

    @property
    def on_hub(self) -> bool:
        """Whether the Hub has the files in their layout, so that they can be read from there."""
        return not self.published.startswith("https://")

    def place(self, root: str) -> str:
        """The set's folder or URL; ``hf://`` stands for the places where the sets are published."""
        return f"{HUB}datasets/{self.published}" if root == HUB else f"{root.rstrip('/')}/{self.folder}"


def select_sets(suite: str, names: Sequence[str] = ()) -> list[SuiteSet]:
    """Return the sets of a suite, or those with the given keys or names. Raises UserError."""
    known = _load_sets(suite)
    chosen = {}
    for name in names:
        found = [
            one for one in known if name.lower() in (one.key.lower(), one.name.lower(), one.key.rpartition("/")[2])
        ]
        if not found:
            raise UserError(f"--sets: {suite} has no set {name!r}; it has {', '.join(one.key for one in known)}.")
        chosen.update({one.key: one for one in found})
    return [one for one in known if not names or one.key in chosen]


def published_metrics(model: str) -> dict[str, float]:
    """Return the published main metrics of a model by the keys of sets. Raises UserError for an unknown model."""
    rows = _read("published.csv")
    models = {name_key(name): name for name in rows[0] if name != "key"}
    name = models.get(name_key(model))
    if name is None:
        raise UserError(f"--compare: nothing is published of {model!r}; choose one of {', '.join(models.values())}.")
    return {row["key"]: float(row[name]) for row in rows if row[name]}


@cache
def _load_sets(suite: str) -> tuple[SuiteSet, ...]:
    rows: list[dict[str, Any]] = [{**row} for row in _read("sets.csv") if row.pop("suite") == suite]
    for row in rows:
        row["size"], row["fields"] = int(row["size"]), tuple(row["fields"].split())
        row["classes"] = int(row["classes"]) if row["classes"] else None
        row["chance"] = float(row["chance"]) if row["chance"] else None
        row["groups"] = dict(pair.split("=") for pair in row["groups"].split())
    return tuple(SuiteSet(**row) for row in rows)


def _read(name: str) -> list[dict[str, str]]:
    return list(csv.DictReader(files(__package__).joinpath(name).read_text(encoding="utf-8").splitlines()))
