"""Views of datasets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reinforce.dataset.view import View
from reinforce.selection.config import SelectConfig
from reinforce.selection.select import select
from reinforce.settings import parse


def make_view(url: str | Path, *rules: str | dict[str, Any], name: str = "some", seed: int = 0, **options: Any) -> View:
    """Make a view of a dataset; a rule that is a text is a ``where``. ``options`` are those of ``select``."""
    written = [{"where": rule} if isinstance(rule, str) else rule for rule in rules]
    return select(parse(SelectConfig, {"dataset": str(url), "name": name, "rules": written, "seed": seed}), **options)
