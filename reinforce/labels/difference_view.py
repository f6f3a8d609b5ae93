"""The table of ``reinforce diff``."""

from __future__ import annotations

from rich.table import Table

from reinforce.labels.difference import DatasetDiff
from reinforce.terminal import escape


def diff_table(found: DatasetDiff) -> Table:
    """One line for each layer, and for each part of the samples."""
    table = Table(box=None, pad_edge=False)
    table.add_column("layer")
    for heading in ("rows", "equal", "null in one", "mean cosine", "least cosine", "largest difference"):
        table.add_column(heading, justify="right")
    table.add_column("fingerprint")
    for name, one in found.layers.items():
        first, second = found.fingerprints[name.partition(": ")[0]]
        numbers = (one.cosine, one.least, one.most)
        table.add_row(
            escape(name), f"{one.rows:,}", f"{one.equal:,}", f"{one.nulls:,}",
            *("" if value is None else f"{value:.6f}" for value in numbers),
            escape(first if first == second else f"{first} / {second}"),
        )  # fmt: skip
    return table
