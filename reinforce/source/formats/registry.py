"""Formats by their names, as ``reinforce.source_formats`` lists them."""

from __future__ import annotations

from importlib import import_module

from reinforce.source.formats.base import SourceFormat
from reinforce.source_formats import MODULES


def find_format(name: str) -> SourceFormat:
    """The format with a name."""
    found: SourceFormat = import_module(MODULES[name]).FORMAT
    return found


def all_formats() -> list[SourceFormat]:
    """Every format, in the order of the registry."""
    return [find_format(name) for name in MODULES]
