"""Where a view of a dataset states which rows of a shard it keeps, and how a config names a view."""

from __future__ import annotations

FOLDER = "views"
_AT = "@"  # between the name and the fingerprint of a view


def with_fingerprint(name: str, fingerprint: str) -> str:
    """A view with its fingerprint, as ``input.view`` may name it and dataset.json records it."""
    return f"{name}{_AT}{fingerprint}"


def split_view(view: str) -> tuple[str, str]:
    """The name and the fingerprint of a view; the latter is empty if it has none."""
    name, _, fingerprint = view.partition(_AT)
    return name, fingerprint


def rows_path(name: str, fingerprint: str, shard: str) -> tuple[str, ...]:
    """The parts of the path, in the dataset, of the file that has why each row of a shard is left out."""
    return FOLDER, name, f"rows-{fingerprint}", f"{shard}.parquet"
