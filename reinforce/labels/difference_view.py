"""The table of ``reinforce diff``."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from reinforce.dataset.comparison import Comparison
from reinforce.labels.difference import DatasetDiff
from reinforce.terminal import escape


def diff_table(found: DatasetDiff) -> Table:
    """One line for each layer, and for each part of the samples."""
    table = Table(box=None, pad_edge=False)
    table.add_column("layer", overflow="fold", min_width=min(36, max(map(len, found.layers))))
    table.add_column("equal rows", justify="right", no_wrap=True)
    table.add_column("differences")
    for name, one in found.layers.items():
        first, second = found.fingerprints[name.partition(": ")[0]]
        words = [*_differences(one), *(["other fingerprint"] if first != second else [])]
        table.add_row(escape(name), f"{one.equal:,} of {one.rows:,}", ", ".join(words))
    return table


def _differences(one: Comparison) -> Iterator[str]:
    if one.nulls:
        yield f"{one.nulls:,} null in one"
    if one.equal < one.rows and one.cosine is not None:
        yield f"cosine {one.mean_cosine:.6f}, least {one.cosine:.6f}"
    elif one.difference and one.cosine is None:
        yield f"by at most {one.difference:.6g}"
